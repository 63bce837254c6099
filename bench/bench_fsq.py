"""FSQ: codes and indices of a latent, and the straight-through backward.

Providers: eager (the published chain of PyTorch ops), compiled (torch.compile of it),
vector-quantize-pytorch where it is installed, native (this package).
"""

import math

import pytest
import torch
from harness import QUICK, Case, measure
from shapes import FSQ_SHAPES, LatentShape

import vtok_ext as vt
from vtok_ext import _native

SHAPES = FSQ_SHAPES[:1] if QUICK else FSQ_SHAPES
DTYPES = [torch.float32, torch.bfloat16]


class EagerFSQ:
    """The published formula, op by op; `into` writes every intermediate into buffers made
    beforehand."""

    def __init__(self, shape: LatentShape, device: str):
        view = [-1] + [1] * (len(shape.shape) - 1 - shape.channel_dim % len(shape.shape))
        levels = torch.tensor(shape.levels, dtype=torch.float32)
        half = (levels - 1) * 1.001 / 2
        offset = torch.where(levels % 2 == 0, 0.5, 0.0)
        basis = [math.prod(shape.levels[:d]) for d in range(len(shape.levels))]
        constants = (torch.atanh(offset / half), half, offset, levels // 2, torch.tensor(basis))
        self.shift, self.half, self.offset, self.width, self.basis = (
            c.float().view(view).to(device) for c in constants
        )
        self.dim = shape.channel_dim

    def __call__(self, z):
        bounded = torch.tanh(z.float() + self.shift) * self.half - self.offset
        rounded = bounded + (bounded.round() - bounded).detach()
        codes = rounded / self.width
        indices = ((rounded + self.width) * self.basis).sum(self.dim).to(torch.int32)
        return codes.to(z.dtype), indices

    def into(self, z, codes, indices):
        """Outputs made beforehand, intermediates from the allocator."""
        bounded = torch.tanh(z.float() + self.shift) * self.half - self.offset
        rounded = bounded.round()
        codes.copy_(rounded / self.width)
        indices.copy_(((rounded + self.width) * self.basis).sum(self.dim))

    def buffers(self, z):
        """Work memory for `in_place`: one float buffer like z, one like the indices."""
        work = torch.empty_like(z, dtype=torch.float32)
        return work, torch.empty_like(work.select(self.dim, 0))

    def in_place(self, z, codes, indices, work, sums):
        """The most that eager PyTorch can do: no allocation at all."""
        torch.add(z, self.shift, out=work)
        work.tanh_().mul_(self.half).sub_(self.offset).round_()
        if codes.dtype == torch.float32:
            torch.div(work, self.width, out=codes)
        else:
            codes.copy_(work / self.width)
        torch.sum(work.add_(self.width).mul_(self.basis), self.dim, out=sums)
        indices.copy_(sums)


def peer(shape: LatentShape, device: str):
    """vector-quantize-pytorch's FSQ on the same tokens, or None when it is not installed."""
    try:
        from vector_quantize_pytorch import FSQ
    except ImportError:
        return None
    quantize = FSQ(levels=list(shape.levels), channel_first=shape.channel_dim == 1).to(device)
    if len(shape.shape) > 2:
        return quantize
    return lambda z: quantize(z[None])  # it takes [B, N, D]


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
def bench_fsq_forward(shape, dtype, device, record, benchmark):
    z = torch.randn(shape.shape, device=device).to(dtype)
    eager = EagerFSQ(shape, device)
    compiled = torch.compile(EagerFSQ(shape, device), fullgraph=True)
    peer_fsq = peer(shape, device)
    codes, indices = vt.fsq(z, shape.levels, channel_dim=shape.channel_dim)
    expected_codes, expected_indices = eager(z)
    differing = (indices != expected_indices).float().mean().item()
    assert differing < 1e-4, f"{differing:.2%} of indices differ from the eager chain"
    out_codes, out_indices = torch.empty_like(codes), torch.empty_like(indices)
    work, sums = eager.buffers(z)
    channel_dim = shape.channel_dim % z.dim()
    context = _native.call_context(z)

    @torch.compile(fullgraph=True)
    def compiled_into(z, codes, indices):
        new_codes, new_indices = eager(z)
        codes.copy_(new_codes)
        indices.copy_(new_indices)

    def native_into():
        _native.module().fsq_forward(
            z, out_codes, out_indices, list(shape.levels), channel_dim, 1, context
        )

    providers = {
        ("eager", "preallocated"): lambda: eager.into(z, out_codes, out_indices),
        ("eager in place", "preallocated"): lambda: eager.in_place(
            z, out_codes, out_indices, work, sums
        ),
        ("compiled", "preallocated"): lambda: compiled_into(z, out_codes, out_indices),
        ("native", "preallocated"): native_into,
        ("eager", "default"): lambda: eager(z),
        ("compiled", "default"): lambda: compiled(z),
        ("native", "default"): lambda: vt.fsq(z, shape.levels, channel_dim=shape.channel_dim),
    }
    if peer_fsq is not None:
        providers["vector-quantize-pytorch", "default"] = lambda: peer_fsq(z)
    bytes_moved = 2 * z.numel() * z.element_size() + indices.numel() * indices.element_size()
    case = Case("fsq", shape.name, str(dtype).removeprefix("torch."), "forward", bytes_moved)
    with torch.no_grad():
        record(measure(case, providers, device))
        benchmark.pedantic(native_into, rounds=3)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
def bench_fsq_forward_backward(shape, dtype, device, record, benchmark):
    z = torch.randn(shape.shape, device=device).to(dtype).requires_grad_()
    grad = torch.randn(shape.shape, device=device).to(dtype)
    eager = EagerFSQ(shape, device)
    compiled = torch.compile(EagerFSQ(shape, device), fullgraph=True)
    peer_fsq = peer(shape, device)

    def step(function):
        codes = function(z)[0]
        return torch.autograd.grad(codes, z, grad.view_as(codes))[0]

    def native(z):
        return vt.fsq(z, shape.levels, channel_dim=shape.channel_dim)

    expected = step(eager)
    scale = expected.float().abs().max()
    assert (step(native) - expected).float().abs().max() <= 0.02 * scale
    providers = {
        ("eager", "default"): lambda: step(eager),
        ("compiled", "default"): lambda: step(compiled),
        ("native", "default"): lambda: step(native),
    }
    if peer_fsq is not None:
        providers["vector-quantize-pytorch", "default"] = lambda: step(peer_fsq)
    indices = z.numel() // len(shape.levels) * 4
    bytes_moved = 5 * z.numel() * z.element_size() + indices
    case = Case(
        "fsq", shape.name, str(dtype).removeprefix("torch."), "forward+backward", bytes_moved
    )
    record(measure(case, providers, device))
    benchmark.pedantic(lambda: step(native), rounds=3)
