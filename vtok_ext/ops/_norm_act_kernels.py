"""Raw ops of norm_act: they allocate results and workspaces and call the compiled module.

Arguments were checked in norm_act.py; here they are brought into the memory layout that the kernels
assume. See Note [Raw ops] in _library.py.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vtok_ext import _native
from vtok_ext.ops._library import register

NORMS = ("layer", "rms", "group", "group_rms")  # in the order of NormKind in csrc
LAYOUT = torch.channels_last_3d


def _channels_last(x: Tensor) -> Tensor:
    """`x` [B, C, T, H, W] with channel stride 1: itself, or a copy."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous(memory_format=LAYOUT)


def _is_dense(x: Tensor) -> bool:
    """Whether x [B, C, T, H, W] is gapless channels_last_3d, whatever strides size 1 has."""
    expected = 1
    for dim in (1, 4, 3, 2, 0):
        if x.shape[dim] > 1 and x.stride(dim) != expected:
            return False
        expected *= x.shape[dim]
    return True


def _dense(x: Tensor) -> Tensor:
    """`x` as gapless channels_last_3d: itself, or a copy."""
    return x if _is_dense(x) else torch.empty_like(x, memory_format=LAYOUT).copy_(x)


def _contiguous(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


def _buffer_shape(shape: Sequence[int], front: int, bottom: int, right: int) -> list[int]:
    batch, channels, frames, height, width = shape
    return [batch, channels, front + frames, height + bottom, width + right]


def _empty_results(
    x: Tensor,
    norm: str,
    num_groups: int,
    dtype: torch.dtype,
    front: int,
    bottom: int,
    right: int,
    save_stats: bool,
) -> tuple[Tensor, Tensor]:
    """The buffer, and mean and 1 / deviation: per group [B, T, G, 2], per position
    [B, T, H * W, 2], or without elements."""
    shape = _buffer_shape(x.shape, front, bottom, right)
    y = torch.empty(shape, dtype=dtype, device=x.device, memory_format=LAYOUT)
    real = torch.float64 if x.dtype == torch.float64 else torch.float32
    if norm.startswith("group"):
        per_frame = num_groups
    else:
        per_frame = x.shape[3] * x.shape[4] if save_stats else 0
    return y, x.new_empty((x.shape[0], x.shape[2], per_frame, 2), dtype=real)


def _workspace(x: Tensor, kind: int, num_groups: int, backward: bool) -> Tensor:
    device_index = x.get_device() if x.is_cuda else -1
    size = _native.module().norm_act_workspace(
        list(x.shape), kind, num_groups, backward, device_index
    )
    return x.new_empty(size, dtype=torch.float32)


def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    state: Tensor | None,
    norm: str,
    num_groups: int,
    act: bool,
    eps: float,
    dtype: torch.dtype,
    front: int,
    temporal: str,
    bottom: int,
    right: int,
    save_stats: bool,
) -> tuple[Tensor, Tensor]:
    y, stats = _empty_results(x, norm, num_groups, dtype, front, bottom, right, save_stats)
    has_rows = x.numel() > 0
    if not has_rows:
        stats.zero_()  # y may still have frames in front and a border
    kind = NORMS.index(norm)
    replicate = temporal == "replicate" and state is None
    _native.module().norm_act_forward(
        _channels_last(x),
        _contiguous(weight),
        _contiguous(bias),
        None if state is None else _dense(state.to(dtype)),
        y,
        stats if has_rows and stats.numel() > 0 else None,
        _workspace(x, kind, num_groups, False),
        (kind, num_groups, eps, act, front, replicate),
        _native.call_context(x),
    )
    return y, stats


def _empty_gradients(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """One gradient each, without elements where it is not needed."""
    grad_x = torch.empty_like(x, memory_format=LAYOUT) if needs[0] else x.new_empty(0)
    vectors = [
        x.new_empty(0) if vector is None or not needed else vector.new_empty(vector.shape)
        for vector, needed in ((weight, needs[1]), (bias, needs[2]))
    ]
    return grad_x, vectors[0], vectors[1]


def _backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    norm: str,
    num_groups: int,
    act: bool,
    eps: float,
    front: int,
    replicate: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = _empty_gradients(x, weight, bias, needs)
    if x.numel() == 0:
        for gradient in gradients:
            gradient.zero_()
        return gradients
    present = [weight, bias]
    wanted = [needs[0], *(n and v is not None for n, v in zip(needs[1:], present, strict=True))]
    kind = NORMS.index(norm)
    _native.module().norm_act_backward(
        _dense(grad_y),
        _channels_last(x),
        _contiguous(weight),
        _contiguous(bias),
        stats if stats.numel() > 0 else None,
        *(g if want else None for g, want in zip(gradients, wanted, strict=True)),
        _workspace(x, kind, num_groups, True),
        (kind, num_groups, eps, act, front, replicate),
        _native.call_context(x),
    )
    return gradients


def _fake_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    state: Tensor | None,
    norm: str,
    num_groups: int,
    act: bool,
    eps: float,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    dtype, front, _, bottom, right, save_stats = rest
    return _empty_results(x, norm, num_groups, dtype, front, bottom, right, save_stats)


norm_act_forward = register(
    "norm_act_forward(Tensor x, Tensor? weight, Tensor? bias, Tensor? state, str norm, "
    "int num_groups, bool act, float eps, ScalarType dtype, int front, str temporal, int bottom, "
    "int right, bool save_stats) -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
)
norm_act_backward = register(
    "norm_act_backward(Tensor grad_y, Tensor x, Tensor? weight, Tensor? bias, Tensor stats, "
    "str norm, int num_groups, bool act, float eps, int front, bool replicate, bool[] needs) "
    "-> (Tensor, Tensor, Tensor)",
    _backward,
    lambda grad_y, x, weight, bias, stats, norm, num_groups, act, eps, front, replicate, needs: (
        _empty_gradients(x, weight, bias, needs)
    ),
)
