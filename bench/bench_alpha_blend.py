"""alpha_blend: sigmoid(m) * a + (1 - sigmoid(m)) * b and its gradients for a, b and m.

Providers: eager (the published formula), compiled (torch.compile of it), native (this package).
"""

import pytest
import torch
from harness import QUICK, Case, measure
from shapes import BLEND_SHAPES

import vtok_ext as vt
from vtok_ext import _native

SHAPES = BLEND_SHAPES[:1] if QUICK else BLEND_SHAPES
DTYPES = [torch.float32, torch.bfloat16]


def eager(a, b, mix_factor):
    """The published formula; the factor is cast so that it does not promote half tensors."""
    alpha = torch.sigmoid(mix_factor).to(a.dtype)
    return alpha * a + (1 - alpha) * b


def eager_into(a, b, mix_factor, out, work):
    """The same with every intermediate in a buffer made beforehand."""
    alpha = torch.sigmoid(mix_factor).to(a.dtype)
    torch.mul(a, alpha, out=out)
    torch.mul(b, 1 - alpha, out=work)
    out.add_(work)


def eager_step_into(a, b, mix_factor, grad, out, work, grad_a, grad_b):
    """Forward and backward as autograd runs them on the formula, into buffers made beforehand."""
    alpha = torch.sigmoid(mix_factor).to(a.dtype)
    eager_into(a, b, mix_factor, out, work)
    torch.mul(grad, alpha, out=grad_a)
    torch.mul(grad, 1 - alpha, out=grad_b)
    torch.mul(grad, a, out=work)
    grad_alpha = work.sum_to_size(alpha.shape)
    torch.mul(grad, b, out=work)
    grad_alpha = grad_alpha - work.sum_to_size(alpha.shape)
    return grad_alpha.float() * (alpha * (1 - alpha))


def whole_step(a, b, mix_factor, grad):
    """The same in one function for torch.compile."""
    alpha = torch.sigmoid(mix_factor)
    grad_alpha = (grad.float() * (a.float() - b.float())).sum_to_size(mix_factor.shape)
    half = alpha.to(a.dtype)
    return eager(a, b, mix_factor), half * grad, (1 - half) * grad, grad_alpha


def inputs(shape, dtype, device):
    tensors = [torch.randn(shape.shape, device=device).to(dtype) for _ in range(3)]
    a, b, grad = (t.contiguous(memory_format=torch.channels_last_3d) for t in tensors)
    return a, b, grad, torch.randn(shape.factor, device=device)


def check(actual, expected, dtype):
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    assert (actual - expected).float().abs().max() <= tolerance * expected.float().abs().max()


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
def bench_alpha_blend_forward(shape, dtype, device, record, benchmark):
    a, b, _, mix_factor = inputs(shape, dtype, device)
    check(vt.alpha_blend(a, b, mix_factor), eager(a, b, mix_factor), dtype)
    compiled = torch.compile(eager, fullgraph=True)
    out, work = torch.empty_like(a), torch.empty_like(a)
    context = _native.call_context(a)

    @torch.compile(fullgraph=True)
    def compiled_into(a, b, mix_factor, out):
        out.copy_(eager(a, b, mix_factor))

    def native_into():
        _native.module().alpha_blend_forward(a, b, mix_factor, out, True, context)

    providers = {
        ("eager", "preallocated"): lambda: eager_into(a, b, mix_factor, out, work),
        ("compiled", "preallocated"): lambda: compiled_into(a, b, mix_factor, out),
        ("native", "preallocated"): native_into,
        ("eager", "default"): lambda: eager(a, b, mix_factor),
        ("compiled", "default"): lambda: compiled(a, b, mix_factor),
        ("native", "default"): lambda: vt.alpha_blend(a, b, mix_factor),
    }
    bytes_moved = 3 * a.numel() * a.element_size()
    name = str(dtype).removeprefix("torch.")
    case = Case("alpha_blend", shape.name, name, "forward", bytes_moved)
    with torch.no_grad():
        record(measure(case, providers, device))
        benchmark.pedantic(native_into, rounds=3)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
def bench_alpha_blend_forward_backward(shape, dtype, device, record, benchmark):
    *pair, grad, mix_factor = inputs(shape, dtype, device)
    leaves = [t.requires_grad_() for t in (*pair, mix_factor)]
    compiled = torch.compile(eager, fullgraph=True)

    def step(function):
        return torch.autograd.grad(function(*leaves), leaves, grad)

    for actual, expected in zip(step(vt.alpha_blend)[:2], step(eager)[:2], strict=True):
        check(actual, expected, dtype)
    out, work, grad_a, grad_b = (torch.empty_like(grad) for _ in range(4))
    grad_factor, partials = torch.empty_like(mix_factor), mix_factor.new_empty(256 * 1024)
    context = _native.call_context(grad)
    a, b, factor = (t.detach() for t in leaves)

    @torch.compile(fullgraph=True)
    def compiled_into(a, b, factor, out, grad_a, grad_b, grad_factor):
        results = whole_step(a, b, factor, grad)
        for buffer, result in zip((out, grad_a, grad_b, grad_factor), results, strict=True):
            buffer.copy_(result)

    def native_into():
        module = _native.module()
        module.alpha_blend_forward(a, b, factor, out, True, context)
        module.alpha_blend_backward(
            *(grad, a, b, factor, grad_a, grad_b, grad_factor, partials, True, context)
        )

    eager_buffers = (a, b, factor, grad, out, work, grad_a, grad_b)
    native_into()
    for actual, expected in zip((grad_a, grad_b), step(eager)[:2], strict=True):
        check(actual, expected, dtype)
    providers = {
        ("eager", "preallocated"): lambda: eager_step_into(*eager_buffers),
        ("compiled", "preallocated"): lambda: compiled_into(
            a, b, factor, out, grad_a, grad_b, grad_factor
        ),
        ("native", "preallocated"): native_into,
        ("eager", "default"): lambda: step(eager),
        ("compiled", "default"): lambda: step(compiled),
        ("native", "default"): lambda: step(vt.alpha_blend),
    }
    # Forward reads a, b and writes out; backward reads grad, a, b and writes both gradients.
    bytes_moved = 8 * grad.numel() * grad.element_size()
    name = str(dtype).removeprefix("torch.")
    case = Case("alpha_blend", shape.name, name, "forward+backward", bytes_moved)
    record(measure(case, providers, device))
    benchmark.pedantic(lambda: step(vt.alpha_blend), rounds=3)
