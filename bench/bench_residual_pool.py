"""residual_pool: difference to a key frame, attention pool and projection; gradients of its
parameters, as the encoder of the features is frozen.

Providers: eager (the reference), compiled (torch.compile of it), sdpa (the difference stored, then
torch's scaled_dot_product_attention and linear), native (this package).
"""

import pytest
import torch
import torch.nn.functional as F
from harness import QUICK, Case, measure
from shapes import POOL_SHAPES

import vtok_ext as vt
from vtok_ext.ops.residual_pool import residual_pool_reference

SHAPES = POOL_SHAPES[:1] if QUICK else POOL_SHAPES
DTYPES = [torch.float32, torch.bfloat16]


def sdpa(frames, key, position, query, weight, bias):
    """What one writes with torch's fused attention; all in the dtype of the frames."""
    dtype = frames.dtype
    z = (frames - key[:, None] + position.to(dtype)).flatten(0, 1)  # [B * T, N, C]
    queries = query.to(dtype).expand(z.shape[0], -1, -1)
    pooled = F.scaled_dot_product_attention(queries, z, z).flatten(1)
    out = F.linear(pooled, weight.to(dtype), bias.to(dtype))
    return out.unflatten(0, frames.shape[:2])


def inputs(shape, dtype, device):
    generator = torch.Generator().manual_seed(0)

    def random(*size):
        return torch.randn(size, generator=generator).to(device)

    frames = random(shape.batch, shape.frames, shape.places, shape.channels).to(dtype)
    key = random(shape.batch, shape.places, shape.channels).to(dtype)
    position = random(shape.places, shape.channels)
    query = random(shape.queries, shape.channels)
    width = shape.queries * shape.channels
    weight = random(shape.outputs, width) / width**0.5
    return frames, key, position, query, weight, random(shape.outputs)


def check(actual, expected, dtype):
    tolerance = 1e-4 if dtype == torch.float32 else 0.03
    assert (actual - expected).float().abs().max() <= tolerance * expected.float().abs().max()


def bytes_read(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
def bench_residual_pool_forward(shape, dtype, device, record, benchmark):
    tensors = inputs(shape, dtype, device)
    expected = residual_pool_reference(*tensors)
    compiled = torch.compile(residual_pool_reference, fullgraph=True)
    functions = {
        "eager": residual_pool_reference,
        "compiled": compiled,
        "sdpa": sdpa,
        "native": vt.residual_pool,
    }
    for function in functions.values():
        check(function(*tensors), expected, dtype)
    # Outputs are a few kilobytes: the default allocator is the only one worth a row.
    providers = {(name, "default"): lambda f=f: f(*tensors) for name, f in functions.items()}
    moved = bytes_read(tensors) + expected.numel() * expected.element_size()
    name = str(dtype).removeprefix("torch.")
    case = Case("residual_pool", shape.name, name, "forward", moved)
    with torch.no_grad():
        record(measure(case, providers, device))
        benchmark.pedantic(lambda: vt.residual_pool(*tensors), rounds=3)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
def bench_residual_pool_forward_backward(shape, dtype, device, record, benchmark):
    tensors = inputs(shape, dtype, device)
    leaves = [t.requires_grad_() for t in tensors[2:]]
    grad = torch.randn_like(residual_pool_reference(*tensors))
    compiled = torch.compile(residual_pool_reference, fullgraph=True)

    def step(function):
        return torch.autograd.grad(function(*tensors), leaves, grad)

    functions = {
        "eager": residual_pool_reference,
        "compiled": compiled,
        "sdpa": sdpa,
        "native": vt.residual_pool,
    }
    for actual, expected in zip(step(vt.residual_pool), step(residual_pool_reference), strict=True):
        check(actual, expected, dtype)
    providers = {(name, "default"): lambda f=f: step(f) for name, f in functions.items()}
    # Backward reads the features once more and writes the parameters' gradients.
    moved = 2 * bytes_read(tensors) + bytes_read(leaves)
    name = str(dtype).removeprefix("torch.")
    case = Case("residual_pool", shape.name, name, "forward+backward", moved)
    record(measure(case, providers, device))
    benchmark.pedantic(lambda: step(vt.residual_pool), rounds=3)
