"""FSQ entropy loss: per-token and codebook entropy of 5,120 tokens, and their gradient.

Providers: eager and compiled (the published formula, a dense softmax over the codebook; with 2^18
codes it takes over 20 GB and is left out; its time does not depend on the tokens' spread, so it
runs once), native (this package with the published clamp), native exact (without the clamp per
token), and gemm: only the matrix products that the factorised form needs, one forward and two
backward, in preallocated outputs. The op is bound by these and not by memory, so gemm is its floor.
"""

import math

import pytest
import torch
from harness import QUICK, Case, measure
from shapes import ENTROPY_SHAPES

import vtok_ext as vt
from vtok_ext import _native
from vtok_ext.ops import _fsq_entropy_kernels as kernels
from vtok_ext.ops.fsq import fsq_indices_to_codes_reference

SHAPES = ENTROPY_SHAPES[:1] if QUICK else ENTROPY_SHAPES
DENSE_LIMIT = 2**15  # codes


class EagerEntropy:
    """The published formula, op by op; `into` writes every intermediate into buffers."""

    def __init__(self, levels: tuple[int, ...], device: str):
        every = torch.arange(math.prod(levels), device=device)
        self.codebook = fsq_indices_to_codes_reference(every, levels)

    def __call__(self, z):
        p = (200 * (z @ self.codebook.T)).softmax(-1)
        per_sample = -(p * p.clamp(min=1e-5).log()).sum(-1).mean()
        average = p.mean(0)
        return per_sample + (average * average.clamp(min=1e-5).log()).sum()

    def into(self, z, logits, p):
        torch.mm(z, self.codebook.T, out=logits)
        torch.softmax(logits.mul_(200), -1, out=p)
        average = p.mean(0)
        torch.clamp(p, min=1e-5, out=logits)
        per_sample = -logits.log_().mul_(p).sum(-1).mean()
        return per_sample + (average * average.clamp(min=1e-5).log()).sum()


class NativeForward:
    """The op's kernels on buffers made beforehand."""

    def __init__(self, z, levels):
        self.tokens, self.levels = z.detach()[None], list(levels)
        self.geometry = kernels.Geometry(self.tokens, levels)
        self.work = kernels.empty_work(self.tokens, self.geometry)
        self.partial = z.new_empty(-(-math.prod(levels) // 1024))

    def __call__(self):
        kernels.assign_into(self.tokens, self.work, self.geometry, self.levels, 100.0, True)
        average = self.work.average.view(-1)
        context = _native.call_context(average)
        _native.module().fsq_entropy_average_forward(average, self.partial, context)
        return self.work.entropy.mean() - self.partial.sum()


def gemms(z, levels, backward):
    """The matrix products of the factorised form, as often and as large as the op calls them."""
    geometry = kernels.Geometry(z[None], levels)
    low, high = (half.normal_() for half in geometry.halves(z[None]))
    average = z.new_zeros(1, geometry.high, geometry.low)
    grad_low, grad_high = torch.empty_like(low), torch.empty_like(high)

    def run():
        for part in geometry.chunks():
            rows = slice(part.stop - part.start)
            average.baddbmm_(high[:, rows].mT, low[:, rows], beta=0)
            if backward:
                grad_low[:, rows].baddbmm_(high[:, rows], average, beta=0)
                grad_high[:, rows].baddbmm_(low[:, rows], average.mT, beta=0)

    return run


def native(z, levels, clamp=True):
    return vt.fsq_entropy_loss(z, levels, clamp_per_sample=clamp).loss


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
def bench_fsq_entropy_forward(shape, device, record, benchmark):
    z = shape.spread * torch.randn(shape.num_tokens, len(shape.levels), device=device)
    codes = math.prod(shape.levels)
    prepared = NativeForward(z, shape.levels)
    providers = {
        ("native", "preallocated"): prepared,
        ("gemm", "preallocated"): gemms(z, shape.levels, backward=False),
        ("native", "default"): lambda: native(z, shape.levels),
        ("native exact", "default"): lambda: native(z, shape.levels, clamp=False),
    }
    if codes <= DENSE_LIMIT and shape.spread == 1.0:
        eager = EagerEntropy(shape.levels, device)
        compiled = torch.compile(eager.__call__, fullgraph=True)
        logits, p = (torch.empty(shape.num_tokens, codes, device=device) for _ in range(2))
        for value in (native(z, shape.levels), eager.into(z, logits, p), prepared()):
            assert torch.isclose(value, eager(z), rtol=1e-3, atol=1e-3)
        providers = {
            ("eager", "preallocated"): lambda: eager.into(z, logits, p),
            ("eager", "default"): lambda: eager(z),
            ("compiled", "default"): lambda: compiled(z),
            **providers,
        }
    bytes_moved = 4 * (z.numel() + 2 * codes)
    case = Case("fsq_entropy_loss", shape.name, "float32", "forward", bytes_moved)
    with torch.no_grad():
        record(measure(case, providers, device))
        benchmark.pedantic(prepared, rounds=3)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
def bench_fsq_entropy_forward_backward(shape, device, record, benchmark):
    z = shape.spread * torch.randn(shape.num_tokens, len(shape.levels), device=device)
    z.requires_grad_()
    codes = math.prod(shape.levels)

    def step(function):
        return torch.autograd.grad(function(z), z)[0]

    providers = {
        ("gemm", "preallocated"): gemms(z.detach(), shape.levels, backward=True),
        ("native", "default"): lambda: step(lambda z: native(z, shape.levels)),
        ("native exact", "default"): lambda: step(lambda z: native(z, shape.levels, clamp=False)),
    }
    if codes <= DENSE_LIMIT and shape.spread == 1.0:
        eager = EagerEntropy(shape.levels, device)
        compiled = torch.compile(EagerEntropy(shape.levels, device).__call__, fullgraph=True)
        expected = step(eager)
        difference = (step(lambda z: native(z, shape.levels)) - expected).abs().max()
        assert difference <= 1e-3 * expected.abs().max()
        providers = {
            ("eager", "default"): lambda: step(eager),
            ("compiled", "default"): lambda: step(compiled),
            **providers,
        }
    bytes_moved = 4 * (3 * z.numel() + 5 * codes)
    case = Case("fsq_entropy_loss", shape.name, "float32", "forward+backward", bytes_moved)
    record(measure(case, providers, device))
    benchmark.pedantic(providers["native", "default"], rounds=3)
