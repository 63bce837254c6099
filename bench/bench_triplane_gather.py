"""Triplane lookup: features of points from three planes, and the gradient of the planes.

Providers: eager (three grid_samples and a concatenation), compiled (torch.compile of that), native
(this package; on a lattice also from the three axes instead of its points).
"""

import pytest
import torch
import torch._functorch.config
from harness import QUICK, Case, measure
from shapes import TRIPLANE_SHAPES, TriplaneShape
from torch.nn.functional import grid_sample

import vtok_ext as vt
from vtok_ext import _native

SHAPES = TRIPLANE_SHAPES[:1] if QUICK else TRIPLANE_SHAPES
DTYPES = [torch.float32, torch.bfloat16]
IDS = ["float32", "bfloat16"]


def as_grid(coords):
    """The three grids of grid_sample, (column, row) in [-1, 1]: views of one tensor (y, x, t)."""
    flipped = 2 * coords.flip(-1)[:, :, None] - 1  # [B, N, 1, 3]
    return flipped[..., :2], flipped[..., ::2], flipped[..., 1:]


def sample(plane, grid):
    """[B, rows, columns, C] at [B, N, 1, 2] -> [B, N, C]. In float32: coordinates need it."""
    channels_first = plane.permute(0, 3, 1, 2).float()
    features = grid_sample(channels_first, grid, padding_mode="border", align_corners=True)
    return features[..., 0].transpose(1, 2).to(plane.dtype)


def eager(planes, coords):
    grids = as_grid(coords)
    return torch.cat([sample(p, g) for p, g in zip(planes, grids, strict=True)], -1)


def eager_into(planes, coords, out):
    """The output made beforehand, intermediates from the allocator."""
    grids = as_grid(coords)
    torch.cat([sample(p, g) for p, g in zip(planes, grids, strict=True)], -1, out=out)


def eager_backward_into(grad_out, planes, coords, grads):
    """What autograd runs backwards, without its overhead, into gradients made beforehand."""
    pieces = grad_out.float().chunk(3, -1)
    for piece, plane, grid, grad in zip(pieces, planes, as_grid(coords), grads, strict=True):
        channels_first, _ = torch.ops.aten.grid_sampler_2d_backward(
            piece.transpose(1, 2)[..., None],
            plane.permute(0, 3, 1, 2).float(),
            grid,
            0,  # bilinear
            1,  # border
            True,
            [True, False],
        )
        grad.copy_(channels_first.permute(0, 2, 3, 1))


class Setup:
    """Inputs of one case and the native call's arguments."""

    def __init__(self, shape: TriplaneShape, dtype, device):
        b, c, rt, r = shape.batch, shape.channels, shape.rt, shape.rxy
        sizes = (b, r, r, c), (b, rt, r, c), (b, rt, r, c)
        self.planes = [torch.randn(size, device=device).to(dtype) for size in sizes]
        self.axes = None
        if shape.lattice is None:
            self.coords = torch.rand(b, shape.num_points, 3, device=device)
        else:
            self.grid = list(shape.lattice)
            self.axes = [torch.arange(n, device=device) for n in shape.lattice]
            steps = [axis / torch.full_like(axis, len(axis) - 1) for axis in self.axes]
            points = torch.stack(torch.meshgrid(*steps, indexing="ij"), -1)
            self.coords = points.reshape(1, -1, 3).repeat(b, 1, 1)
        self.out = torch.empty(b, shape.num_points, 3 * c, dtype=dtype, device=device)
        self.grads = [torch.empty_like(plane) for plane in self.planes]
        self.context = _native.call_context(self.coords)
        elements = _native.module().triplane_gather_workspace(
            self.planes[0], rt, shape.num_points, "cat"
        )
        self.workspace = torch.empty(elements, device=device)

    def bytes_moved(self) -> int:
        """Coordinates and planes read, output written; the same backwards."""
        tensors = [self.coords, self.out, *self.planes]
        return sum(t.numel() * t.element_size() for t in tensors)

    def points(self, on_lattice):
        """Arguments of the compiled module that name the points."""
        if on_lattice:
            return (*self.axes, self.grid, "cat")
        return self.coords, None, None, [], "cat"

    def native_into(self, on_lattice=False):
        _native.module().triplane_gather_forward(
            *self.planes, *self.points(on_lattice), self.out, self.context
        )

    def native_backward_into(self, grad_out, on_lattice=False):
        _native.module().triplane_gather_backward(
            grad_out,
            *self.planes,
            *self.points(on_lattice),
            *self.grads,
            None,
            self.workspace,
            self.context,
        )


def check(actual, expected, dtype):
    """grid_sample rounds positions in [-1, 1]; bfloat16 rounds once more."""
    scale = expected.float().abs().max()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert (actual.float() - expected.float()).abs().max() <= tolerance * scale


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
def bench_triplane_gather_forward(shape, dtype, device, record, benchmark):
    setup = Setup(shape, dtype, device)
    planes, coords, out = setup.planes, setup.coords, setup.out
    compiled = torch.compile(eager, fullgraph=True)

    @torch.compile(fullgraph=True)
    def compiled_into(planes, coords, out):
        out.copy_(eager(planes, coords))

    providers = {
        ("eager", "preallocated"): lambda: eager_into(planes, coords, out),
        ("compiled", "preallocated"): lambda: compiled_into(planes, coords, out),
        ("native", "preallocated"): setup.native_into,
        ("eager", "default"): lambda: eager(planes, coords),
        ("compiled", "default"): lambda: compiled(planes, coords),
        ("native", "default"): lambda: vt.triplane_gather(*planes, coords),
    }
    if setup.axes is not None:
        providers["native lattice", "preallocated"] = lambda: setup.native_into(on_lattice=True)
        providers["native lattice", "default"] = lambda: vt.triplane_gather(
            *planes, setup.axes, grid=setup.grid
        )
    case = Case(
        "triplane_gather",
        shape.name,
        str(dtype).removeprefix("torch."),
        "forward",
        setup.bytes_moved(),
    )
    with torch.no_grad():
        check(vt.triplane_gather(*planes, coords), eager(planes, coords), dtype)
        record(measure(case, providers, device))
        benchmark.pedantic(setup.native_into, rounds=3)


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
def bench_triplane_gather_backward(shape, dtype, device, record, benchmark):
    setup = Setup(shape, dtype, device)
    coords, grads = setup.coords, setup.grads
    planes = [plane.requires_grad_() for plane in setup.planes]
    grad_out = torch.randn_like(setup.out)
    native = vt.triplane_gather(*planes, coords)
    by_eager = eager(planes, coords)
    with torch._functorch.config.patch(donated_buffer=False):  # its graph is used many times
        by_compiled = torch.compile(eager, fullgraph=True)(planes, coords)

        def backward(out):
            return torch.autograd.grad(out, planes, grad_out, retain_graph=True)

        for actual, expected in zip(backward(native), backward(by_eager), strict=True):
            check(actual, expected, dtype)
        detached = [plane.detach() for plane in planes]
        providers = {
            ("eager", "preallocated"): lambda: eager_backward_into(
                grad_out, detached, coords, grads
            ),
            ("native", "preallocated"): lambda: setup.native_backward_into(grad_out),
            ("eager", "default"): lambda: backward(by_eager),
            ("compiled", "default"): lambda: backward(by_compiled),
            ("native", "default"): lambda: backward(native),
        }
        if setup.axes is not None:
            providers["native lattice", "preallocated"] = lambda: setup.native_backward_into(
                grad_out, on_lattice=True
            )
        case = Case(
            "triplane_gather",
            shape.name,
            str(dtype).removeprefix("torch."),
            "backward",
            setup.bytes_moved(),
        )
        record(measure(case, providers, device))
        benchmark.pedantic(lambda: setup.native_backward_into(grad_out), rounds=3)
