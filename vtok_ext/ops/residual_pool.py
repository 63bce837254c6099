"""Residual tokens by attention: difference to a key frame, attention pool, projection, in one pass.

    z[n] = frame[n] - key[n] + position[n],  p[q] = softmax over n of <query[q], z[n]> / sqrt(C)
    out = weight . concatenation over q of (sum over n of p[q, n] z[n]) + bias

Source: VTok (arXiv 2602.04202), v_t = g(F(x_t) - F(x_1)); there g averages over places, which loses
where something moved. Learned queries over difference and position are our own variant.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vtok_ext import _native
from vtok_ext.ops._dtypes import check_floating, without_autocast
from vtok_ext.ops._library import OpFunction, once_differentiable, register

# As in csrc/residual_pool: queries in the registers of a thread, pooled features of a frame in
# shared memory, places per block.
MAX_QUERIES, MAX_POOLED, _PLACES = 16, 16384, 64


def residual_pool_reference(
    frames: Tensor,  # [B, T, N, C]
    key: Tensor,  # [B, N, C]
    position: Tensor,  # [N, C]
    query: Tensor,  # [Q, C]
    weight: Tensor,  # [D, Q * C]
    bias: Tensor | None = None,  # [D]
) -> Tensor:
    """The pool in plain PyTorch, the definition of `residual_pool`: arguments and errors as
    there."""
    parameters = _check_residual_pool(frames, key, position, query, weight, bias)
    position, query, weight, offset = parameters
    with without_autocast(frames.device.type):
        z = frames.to(query.dtype) - key.to(query.dtype)[:, None] + position
        scores = torch.einsum("btnc,qc->btqn", z, query) / math.sqrt(frames.shape[-1])
        pooled = torch.einsum("btqn,btnc->btqc", scores.softmax(-1), z)
        return (pooled.flatten(2) @ weight.mT + offset).to(frames.dtype)


def _check_residual_pool(
    frames: Tensor,
    key: Tensor,
    position: Tensor,
    query: Tensor,
    weight: Tensor,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Raises for bad arguments; returns the parameters in the dtype of the arithmetic, a bias of 0
    where there is none."""
    named = {"frames": frames, "key": key, "position": position, "query": query, "weight": weight}
    if bias is not None:
        named["bias"] = bias
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"residual_pool: {name} must be a torch.Tensor, got {type(tensor)}")
        check_floating("residual_pool", name, tensor)
        if tensor.device != frames.device:
            raise ValueError(
                f"residual_pool: {name} must be on {frames.device}, got {tensor.device}"
            )
    if key.dtype != frames.dtype:
        raise TypeError(f"residual_pool: key must be {frames.dtype} as frames, got {key.dtype}")
    if frames.dim() != 4 or 0 in frames.shape[2:]:
        raise ValueError(
            f"residual_pool: frames must be [B, T, N, C] with N, C >= 1, got {list(frames.shape)}"
        )
    batch, _, places, channels = frames.shape
    queries = query.shape[0] if query.dim() == 2 else 0
    if not 1 <= queries <= MAX_QUERIES or queries * channels > MAX_POOLED:
        raise ValueError(
            f"residual_pool: query must be [Q, {channels}] with Q in 1..{MAX_QUERIES} and at most "
            f"{MAX_POOLED} elements, got {list(query.shape)}"
        )
    outputs = weight.shape[0] if weight.dim() == 2 else 0
    expected = {
        "key": (batch, places, channels),
        "position": (places, channels),
        "query": (queries, channels),
        "weight": (outputs, queries * channels),
        "bias": (outputs,),
    }
    for name, shape in expected.items():
        if name in named and named[name].shape != shape:
            raise ValueError(
                f"residual_pool: {name} must be {list(shape)} for frames {list(frames.shape)} and "
                f"query {list(query.shape)}, got {list(named[name].shape)}"
            )
    real = torch.float64 if frames.dtype == torch.float64 else torch.float32
    offset = weight.new_zeros(outputs) if bias is None else bias
    return position.to(real), query.to(real), weight.to(real), offset.to(real)


def _empty_outputs(
    frames: Tensor, key: Tensor, position: Tensor, query: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised out [B, T, D], pooled [B, T, Q, C] and log_sum [B, T, Q]."""
    batch, num_frames = frames.shape[:2]
    return (
        frames.new_empty(batch, num_frames, weight.shape[0]),
        query.new_empty(batch, num_frames, *query.shape),
        query.new_empty(batch, num_frames, query.shape[0]),
    )


def _runs_cuda_kernels(tensor: Tensor) -> bool:
    return tensor.is_cuda or _native.is_cuda_emulated()


def _num_pieces(frames: Tensor) -> int:
    return -(-frames.shape[2] // _PLACES)


def _forward(
    frames: Tensor, key: Tensor, position: Tensor, query: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    outputs = _empty_outputs(frames, key, position, query, weight, bias)
    partials = None
    if _runs_cuda_kernels(frames):
        rows = frames.shape[0] * frames.shape[1], _num_pieces(frames), query.shape[0]
        partials = query.new_empty(*rows, query.shape[1] + 2)
    parameters = (t.contiguous() for t in (position, query, weight, bias))
    _native.module().residual_pool_forward(
        frames, key, *parameters, *outputs, partials, _native.call_context(frames)
    )
    return outputs


def _empty_gradients(
    grad_out: Tensor,  # [B, T, D]
    frames: Tensor,
    key: Tensor,
    position: Tensor,
    query: Tensor,
    weight: Tensor,
    pooled: Tensor,
    log_sum: Tensor,
    needed: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Uninitialised gradients of frames, key, position, query, weight, bias; one that nobody needs
    has no elements."""
    targets = (frames, key, position, query, weight, weight)
    shapes = (*(t.shape for t in targets[:5]), weight.shape[:1])
    return tuple(
        target.new_empty(shape if need else (0,))
        for target, shape, need in zip(targets, shapes, needed, strict=True)
    )


def _backward(
    grad_out: Tensor,
    frames: Tensor,
    key: Tensor,
    position: Tensor,
    query: Tensor,
    weight: Tensor,
    pooled: Tensor,
    log_sum: Tensor,
    needed: Sequence[bool],
) -> tuple[Tensor, ...]:
    gradients = list(
        _empty_gradients(
            grad_out, frames, key, position, query, weight, pooled, log_sum, list(needed)
        )
    )
    if grad_out.numel() == 0:
        return tuple(gradient.zero_() for gradient in gradients)
    rows = grad_out.flatten(0, 1).to(query.dtype)  # [B * T, D]
    with without_autocast(frames.device.type):
        if needed[4]:
            gradients[4] = rows.mT @ pooled.flatten(0, 1).flatten(1)
        if needed[5]:
            gradients[5] = rows.sum(0)
        if any(needed[:4]):
            grad_pooled = (rows @ weight).view(pooled.shape)
            _pool_gradients(gradients, grad_pooled, frames, key, position, query, pooled, log_sum)
    return tuple(gradients)


def _pool_gradients(
    gradients: list[Tensor],
    grad_pooled: Tensor,  # [B, T, Q, C]
    frames: Tensor,
    key: Tensor,
    position: Tensor,
    query: Tensor,
    pooled: Tensor,
    log_sum: Tensor,
) -> None:
    """Fills the gradients of frames, key, position and query, in this order; those that nobody
    needs have no elements."""
    outputs = [g if g.numel() else None for g in gradients[:4]]
    batch, num_frames, queries, channels = pooled.shape
    attention = query.new_empty(2, batch, num_frames, queries, frames.shape[2])
    partials = None
    if outputs[3] is not None:
        partials = query.new_empty(batch * num_frames, _num_pieces(frames), queries, channels)
    _native.module().residual_pool_backward(
        frames,
        key,
        position.contiguous(),
        query.contiguous(),
        log_sum,
        grad_pooled,
        (pooled * grad_pooled).sum(-1),
        *outputs,
        attention,
        partials,
        _native.call_context(frames),
    )


_residual_pool_forward = register(
    "residual_pool_forward(Tensor frames, Tensor key, Tensor position, Tensor query, "
    "Tensor weight, Tensor bias) -> (Tensor, Tensor, Tensor)",
    _forward,
    _empty_outputs,
)
_residual_pool_backward = register(
    "residual_pool_backward(Tensor grad_out, Tensor frames, Tensor key, Tensor position, "
    "Tensor query, Tensor weight, Tensor pooled, Tensor log_sum, bool[] needed) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _empty_gradients,
)


class ResidualPoolFunction(OpFunction):
    """Saves the inputs, the pooled features and the softmax's normaliser: Q * (C + 1) numbers per
    frame; scores are computed again."""

    @staticmethod
    def forward(
        frames: Tensor, key: Tensor, position: Tensor, query: Tensor, weight: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, pooled features and normaliser."""
        return _residual_pool_forward(frames, key, position, query, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keeps what backward needs."""
        _, pooled, log_sum = output
        ctx.mark_non_differentiable(pooled, log_sum)
        ctx.save_for_backward(*inputs[:5], pooled, log_sum)

    @staticmethod
    @once_differentiable("residual_pool")
    def backward(ctx: Any, grad_out: Tensor, *unused: Any) -> tuple[Any, ...]:
        """Softmax attention's gradients, each only where needed."""
        needed = list(ctx.needs_input_grad)
        gradients = _residual_pool_backward(grad_out, *ctx.saved_tensors, needed)
        return tuple(g if need else None for g, need in zip(gradients, needed, strict=True))


def residual_pool(
    frames: Tensor,  # [B, T, N, C]
    key: Tensor,  # [B, N, C]
    position: Tensor,  # [N, C]
    query: Tensor,  # [Q, C]
    weight: Tensor,  # [D, Q * C]
    bias: Tensor | None = None,  # [D]
) -> Tensor:
    """One token [B, T, D] per frame: what differs from the key frame, pooled by learned queries.

    z = frame - key + position;  out = weight . [softmax(query z / sqrt(C)) z] + bias
    Equivalent to: residual_pool_reference(frames, key, position, query, weight, bias)

    Args:
        frames: features of N places per frame, any strides: those of an encoder [B * T, C, h, w] as
            .unflatten(0, (B, T)).flatten(3).mT. Fastest with the channels densest in memory.
        key: features of the key frame, same dtype.
        position: added to the difference, so that queries know where it is and tokens say so.
        query: Q in 1..16 rows, Q * C <= 16384.
        weight, bias: the projection of the Q pooled vectors side by side.

    Returns:
        out: in the dtype of frames.

    Raises:
        ValueError: shapes or devices that do not fit together.
        TypeError: an unsupported dtype, or a key of another dtype than the frames.

    Frames float32, float16 and bfloat16 on cpu and cuda, float64 on cpu; parameters of any of
    these are computed with in float32 (float64 for float64 frames) and results rounded once. The
    differences [B, T, N, C] are never stored. Deterministic; on a CPU gradients are for one number
    of threads.
    Differentiable once in every argument; vmap is refused. Autocast leaves the dtypes alone.

    Source: VTok (arXiv 2602.04202); the attention pool is our own.
    """
    if not _native.is_enabled():
        return residual_pool_reference(frames, key, position, query, weight, bias)
    parameters = _check_residual_pool(frames, key, position, query, weight, bias)
    return ResidualPoolFunction.apply(frames, key, *parameters)[0]
