"""residual_pool under test."""

import torch
from op_case import OpCase, Sample

from vtok_ext.ops.residual_pool import residual_pool, residual_pool_reference


def _make(name, shape, dtype, generator, kwargs):
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    # Scores of about one, so that the softmax is neither flat nor a single place.
    return (values / shape[-1] ** 0.5 if name == "weight" else values).to(dtype)


def _sample(batch, frames, places, channels, queries, outputs, bias=True):
    shapes = {
        "frames": (batch, frames, places, channels),
        "key": (batch, places, channels),
        "position": (places, channels),
        "query": (queries, channels),
        "weight": (outputs, queries * channels),
    }
    return Sample({**shapes, "bias": (outputs,)} if bias else shapes, {})


_SAMPLES = [
    _sample(2, 3, 64, 96, 2, 48),  # vtok_small, fewer frames
    _sample(1, 1, 130, 40, 4, 70),  # one streamed frame, three pieces of places, two of outputs
    _sample(1, 5, 7, 13, 3, 11),  # odd sizes
    _sample(2, 2, 16, 37, 1, 5, bias=False),
    _sample(1, 2, 3, 300, 16, 2),  # the most queries, more channels than threads
    _sample(1, 1, 1, 1, 1, 1),
    _sample(2, 0, 9, 8, 2, 4),
    _sample(0, 3, 9, 8, 2, 4),
]


def _raw():
    tensors = [torch.randn(*shape) for shape in _SAMPLES[2].tensors.values()]
    return tuple(tensors)


def _raw_backward():
    frames, key, position, query, weight, _ = _raw()
    grad_out, pooled = torch.randn(1, 5, 11), torch.randn(1, 5, 3, 13)
    log_sum, needed = torch.randn(1, 5, 3), [True, False, True, True, True, False]
    return grad_out, frames, key, position, query, weight, pooled, log_sum, needed


RESIDUAL_POOL = OpCase(
    name="residual_pool",
    function=residual_pool,
    reference=residual_pool_reference,
    samples=_SAMPLES,
    make=_make,
    differentiable=("frames", "key", "position", "query", "weight", "bias"),
    # Those of position and query sum products of either sign over all frames and places, through a
    # softmax whose scores carry the rounding of a sum of C products.
    gradient_factor=8.0,
    raw=(("residual_pool_forward", _raw), ("residual_pool_backward", _raw_backward)),
)
