"""What is special about the triplane lookup: exact coordinates, clamping, NaN, equal bits of all
forms, deterministic gradients. Errors are in test_triplane_gather_errors.py."""

import json
import os
import subprocess
import sys

import pytest
import torch
from case_triplane_gather import make_coords, make_planes
from helpers import assert_close, needs_one_graph
from torch.nn.functional import grid_sample

import vtok_ext as vt
from vtok_ext import _native
from vtok_ext.ops.triplane_gather import REDUCTIONS, triplane_gather_reference


def as_points(axes, batch):
    """The [B, N, 3] that a lattice stands for."""
    points = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(1, -1, 3)
    return points.expand(batch, -1, -1)


def on(backend, tensors):
    return [tensor.to(backend.device) for tensor in tensors]


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_float32_equals_the_reference_bit_for_bit(reduce, backend):
    """Also on CUDA: nothing is fused or reordered."""
    planes, coords = make_planes(), 1.2 * make_coords(2, 997) - 0.1
    expected = triplane_gather_reference(*planes, coords, reduce=reduce)
    actual = vt.triplane_gather(*on(backend, planes), coords.to(backend.device), reduce=reduce)
    assert torch.equal(actual.cpu(), expected)


def test_equals_three_grid_samples():
    planes, coords = make_planes(), make_coords(2, 501)
    features = []
    for plane, (row, column) in zip(planes, ((1, 2), (0, 2), (0, 1)), strict=True):
        grid = 2 * coords[:, :, None, [column, row]] - 1
        sampled = grid_sample(plane.permute(0, 3, 1, 2), grid, align_corners=True)
        features.append(sampled[..., 0].transpose(1, 2))
    actual = vt.triplane_gather(*planes, coords)
    # grid_sample computes positions from [-1, 1]: 3 roundings of 6e-8, times cell differences of 4.
    assert torch.allclose(actual, torch.cat(features, -1), rtol=0, atol=5e-6)


@pytest.mark.parametrize("size", [4, 8, 16, 32, 64, 128, 256])
def test_grid_indices_hit_their_cells(size, backend):
    """Specification section 6.1: i / (G - 1) * (G - 1) is i for these sizes, while a multiplication
    by the reciprocal misses some cells."""
    planes = make_planes(1, size, size, size, 1)
    index = torch.arange(size).expand(3, -1).t()[None]
    features = vt.triplane_gather(
        *on(backend, planes), index.to(backend.device), grid=(size, size, size)
    )
    expected = torch.stack([plane[0, :, :, 0].diagonal() for plane in planes], -1)
    assert torch.equal(features[0].cpu(), expected)


def test_grid_of_one_position_is_the_first_cell(backend):
    planes = make_planes(1)
    index = torch.zeros(1, 1, 3, dtype=torch.int32, device=backend.device)
    features = vt.triplane_gather(*on(backend, planes), index, grid=(1, 1, 1))
    assert torch.equal(features[0, 0].cpu(), torch.cat([plane[0, 0, 0] for plane in planes]))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_indices_equal_divided_coordinates(dtype, backend):
    grid = (23, 24, 30)  # sizes at which even a true division misses some cells
    planes = on(backend, make_planes())
    generator = torch.Generator().manual_seed(3)
    index = torch.stack([torch.randint(g, (2, 500), generator=generator) for g in grid], -1)
    coords = index / torch.tensor([[[g - 1 for g in grid]]])
    by_index = vt.triplane_gather(*planes, index.to(backend.device, dtype), grid=grid)
    by_coords = vt.triplane_gather(*planes, coords.to(backend.device))
    assert torch.equal(by_index, by_coords)


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lattice_equals_its_points(reduce, dtype, backend):
    planes = [plane.to(dtype) for plane in on(backend, make_planes())]
    real = [torch.rand(9), torch.rand(40)[::4], torch.rand(5)]
    whole = [torch.arange(5, 14), torch.arange(6), torch.tensor([3, 1, 0, 3])]
    for axes, grid in ((real, None), (whole, (16, 6, 5))):
        axes = on(backend, axes)
        lattice = vt.triplane_gather(*planes, tuple(axes), grid=grid, reduce=reduce)
        points = vt.triplane_gather(*planes, as_points(axes, 2), grid=grid, reduce=reduce)
        assert torch.equal(lattice, points)


def test_lattice_gradients_equal_those_of_its_points(backend):
    planes = [plane.requires_grad_() for plane in on(backend, make_planes())]
    axes = on(backend, [torch.rand(9), torch.rand(10), torch.rand(5)])
    lattice = vt.triplane_gather(*planes, axes)
    points = vt.triplane_gather(*planes, as_points(axes, 2))
    upstream = torch.randn(lattice.shape, generator=torch.Generator().manual_seed(2)).to(lattice)
    for a, b in zip(
        torch.autograd.grad(lattice, planes, upstream),
        torch.autograd.grad(points, planes, upstream),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_coordinates_outside_are_clamped(backend):
    planes = [plane.requires_grad_() for plane in on(backend, make_planes(1))]
    outside = torch.tensor([[[-0.5, 1.5, 0.3], [2.0, -7.0, 0.3], [-1e30, float("inf"), 0.3]]])
    coords = outside.to(backend.device).requires_grad_()
    features = vt.triplane_gather(*planes, coords)
    assert torch.equal(features, vt.triplane_gather(*planes, coords.detach().clamp(0, 1)))
    (grad,) = torch.autograd.grad(features.sum(), coords)
    assert (grad[..., :2] == 0).all() and (grad[..., 2] != 0).all()
    assert outside[0, 0, 0] == -0.5, "the caller's coordinates must not change"


def test_nan_coordinates(backend):
    planes, coords = make_planes(1), make_coords(1, 300)
    coords[0, 257, 1] = torch.nan
    if not backend.is_cuda_kernel:
        with pytest.raises(ValueError, match="must not be NaN, got NaN at batch 0, point 257, ax"):
            vt.triplane_gather(*planes, coords)
        with pytest.raises(ValueError, match="must not be NaN, got NaN in coords"):
            triplane_gather_reference(*planes, coords)
        axes = (torch.rand(3), torch.tensor([0.5, torch.nan]), torch.rand(4))
        with pytest.raises(ValueError, match="must not be NaN, got NaN on axis x of the lattice"):
            vt.triplane_gather(*planes, axes)
        return
    features = vt.triplane_gather(*on(backend, planes), coords.to(backend.device))
    is_nan = features.isnan().view(300, 3, 8).cpu()
    assert is_nan[257].all(-1).tolist() == [True, False, True]  # x is in planes xy and xt
    is_nan[257] = False
    assert not is_nan.any()


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_gradcheck(reduce):
    planes = [p.requires_grad_() for p in make_planes(2, 3, 4, 2, 5, dtype=torch.float64)]
    coords = make_coords(2, 6, dtype=torch.float64).requires_grad_()
    cells = coords.detach() * torch.tensor([2, 3, 1])
    assert (cells - cells.round()).abs().min() > 1e-5, "a step of gradcheck crosses no cell"

    def gather(*inputs):
        return vt.triplane_gather(*inputs, reduce=reduce)

    assert torch.autograd.gradcheck(gather, (*planes, coords))


def test_gradcheck_of_indices_and_lattice():
    planes = [p.requires_grad_() for p in make_planes(2, 3, 4, 2, 5, dtype=torch.float64)]
    index = torch.randint(6, (2, 9, 3), generator=torch.Generator().manual_seed(0))
    axes = tuple(torch.rand(n, dtype=torch.float64) for n in (4, 3, 2))
    for points, grid in ((index, (6, 7, 8)), (axes, None)):
        assert torch.autograd.gradcheck(
            lambda *p, points=points, grid=grid: vt.triplane_gather(*p, points, grid=grid), planes
        )


@pytest.mark.parametrize("needed", range(1, 16))
def test_gradients_that_nobody_needs_are_skipped(needed, backend):
    """Every subset of (plane_xy, plane_yt, plane_xt, coords) gets what it gets with all others."""
    inputs = on(backend, [*make_planes(), make_coords(2, 90)])
    grads = []
    for mask in (15, needed):
        leaves = [x.detach().requires_grad_(bool(mask >> i & 1)) for i, x in enumerate(inputs)]
        vt.triplane_gather(*leaves, reduce="product").square().sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for i, (everything, some) in enumerate(zip(*grads, strict=True)):
        assert (some is None) if not needed >> i & 1 else torch.equal(some, everything)


def gradient_bits(device, dtype=torch.float32):
    """Gradients at a size where the sums are cut into several chunks."""
    planes = [p.to(device, dtype).requires_grad_() for p in make_planes(1, 32, 16, 16)]
    coords = make_coords(1, 9000).to(device).requires_grad_()
    features = vt.triplane_gather(*planes, coords)
    upstream = torch.randn(features.shape, generator=torch.Generator().manual_seed(4))
    return torch.autograd.grad(features, [*planes, coords], upstream.to(features))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_do_not_depend_on_threads(dtype):
    before, found = torch.get_num_threads(), []
    torch.use_deterministic_algorithms(True)
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            found.append(gradient_bits("cpu", dtype))
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(before)
    for grads in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], grads, strict=True))


def test_gradients_do_not_depend_on_the_order_of_cuda_threads(emulated_module):
    found = []
    with _native.use_module(emulated_module):
        for options in emulated_module.emulation_configurations():
            emulated_module.emulation_set_options(**options)
            found.append(gradient_bits("cpu"))
    assert emulated_module.emulation_take_reports() == []
    for grads in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], grads, strict=True))
    for actual, expected in zip(found[0], gradient_bits("cpu"), strict=True):
        assert_close(actual, expected, "emulated gradient")


_BITS = """
import json, sys, torch
sys.path.insert(0, sys.argv[1])
import vtok_ext as vt
from test_triplane_gather import gradient_bits
sums = [g.view(torch.int32).long().sum().item() for g in gradient_bits("cpu")]
print(json.dumps([vt.build_info()["cpu_isa"], sums]))
"""


def test_equal_bits_on_every_instruction_set():
    found = {}
    folder = os.path.dirname(__file__)
    path = os.pathsep.join([folder, os.path.dirname(folder), os.environ.get("PYTHONPATH", "")])
    for isa in ("baseline", "avx2", "avx512"):
        done = subprocess.run(
            [sys.executable, "-c", _BITS, folder],
            env={**os.environ, "VTOK_CPU_ISA": isa, "PYTHONPATH": path},
            capture_output=True,
            text=True,
        )
        if "at most" in done.stderr:  # this machine cannot run it
            continue
        name, found[isa] = json.loads(done.stdout.splitlines()[-1])
        assert name == isa
    assert len({json.dumps(bits) for bits in found.values()}) == 1 and "baseline" in found


def test_a_batch_can_share_its_points(backend):
    planes = on(backend, make_planes(3))
    shared = make_coords(1, 70).to(backend.device)
    expanded = vt.triplane_gather(*planes, shared.expand(3, -1, -1))
    assert torch.equal(expanded, vt.triplane_gather(*planes, shared.repeat(3, 1, 1)))


def test_no_points_give_zero_gradients(backend):
    planes = [plane.requires_grad_() for plane in on(backend, make_planes())]
    features = vt.triplane_gather(*planes, torch.zeros(2, 0, 3, device=backend.device))
    assert features.shape == (2, 0, 24)
    assert all((g == 0).all() for g in torch.autograd.grad(features.sum(), planes))


def test_without_autograd():
    planes, coords = make_planes(), make_coords(2, 30)
    with torch.no_grad():
        features = vt.triplane_gather(*[p.requires_grad_() for p in planes], coords)
    assert not features.requires_grad
    assert torch.equal(features, vt.triplane_gather(*planes, coords))


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_layer(reduce):
    planes, index = make_planes(), torch.tensor([[[0, 1, 2], [3, 4, 5]]]).expand(2, -1, -1)
    layer = vt.TriplaneGather(reduce, grid=(9, 9, 9))
    expected = vt.triplane_gather(*planes, index, grid=(9, 9, 9), reduce=reduce)
    assert torch.equal(layer(*planes, index), expected)
    assert not layer.state_dict() and f"reduce='{reduce}', grid=(9, 9, 9)" in repr(layer)


@needs_one_graph
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_layer_compiles_as_one_graph(reduce):
    planes, index = make_planes(), torch.tensor([[[0, 1, 2], [3, 4, 5]]]).expand(2, -1, -1)
    layer = vt.TriplaneGather(reduce, grid=(9, 9, 9))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*planes, index), layer(*planes, index))


def test_layer_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="reduce must be 'cat', 'sum' or 'product', got 'mean'"):
        vt.TriplaneGather("mean")
    with pytest.raises(ValueError, match="grid must be three positive sizes"):
        vt.TriplaneGather(grid=(3, 0, 3))
