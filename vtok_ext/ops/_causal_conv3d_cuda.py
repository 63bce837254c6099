"""Causal convolution on CUDA by this package's kernels: which product of matrices each pass is.

An axis of a product is (taps, step, tap_step, offset, divisor, exact): output coordinate q and tap
k read the source at floor((q * step + k * tap_step + offset) / divisor); see
csrc/causal_conv3d/causal_conv3d.h.

A vector of 16 bytes must lie in one pixel: a source with another number of channels (3 of pictures,
6 of a latent) is copied with zeros up to the next multiple, and its weights with it.

A weight is reordered once per call (taps before channels), and folded for upsampling. The input's
gradient behind upsampling is computed for the repeated values, 4 times as many in space and twice
in time, and then summed. Other workspaces are partial sums alone. A product that is split (small
grids, never in a stream) takes splits * positions * O * 4 bytes, splits <= 16; the weight's
gradient takes splits * O * (taps * C + 1) * 4 bytes, at most 256 MiB unless one split is larger.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from vtok_ext import _native
from vtok_ext.ops import _causal_conv3d_folding as folding
from vtok_ext.ops._causal_conv3d_geometry import Geometry

_LAYOUT = torch.channels_last_3d
Axis = tuple[int, int, int, int, int, int]

# Tests and the tuning script set these; None leaves the choice to the kernel's table.
forced_tile: int | None = None
forced_splits: int | None = None


def forward(
    x: Tensor,  # [B, C, T, H, W]
    weight: Tensor,  # [O, C / groups, kt, kh, kw]
    bias: Tensor | None,  # [O]
    state: Tensor | None,  # [B, C, n, H, W]
    residual: Tensor | None,  # as y
    other: Tensor | None,  # as y
    mix_factor: Tensor | None,  # [1]
    g: Geometry,
    silu: bool,
    keep: bool,
    may_split: bool,
) -> tuple[Tensor, Tensor]:
    """Returns y [B, O, T', H', W'], and with `keep` what came before the activation."""
    state_frames = None if state is None else state.shape[2]
    shape = g.output_shape(x.shape, weight.shape, state_frames)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_LAYOUT)
    preactivation = torch.empty_like(y) if keep else None
    if y.numel() == 0:
        return y, x.new_empty(0) if preactivation is None else preactivation
    outputs: dict[str, Any] = {
        "out": y,
        "residual": residual,
        "other": other,
        "preactivation": preactivation,
    }
    outputs = {name: _dense(tensor) for name, tensor in outputs.items()}
    options: dict[str, Any] = {
        "bias": None if bias is None else bias.contiguous(),
        "mix_factor": None if mix_factor is None else mix_factor.float().reshape(1),
        "silu": silu,
        "replicate": bool(g.replicate) and state is None,
        "may_split": may_split,
    }
    x = _with_whole_vectors(x, g)
    state = None if state is None else _with_whole_vectors(state, g)
    weight = _pad_channels(weight, 1, x.shape[1] // g.groups)
    if not folding.folds(weight, state_frames, g):
        taps = weight.permute(0, 2, 3, 4, 1).contiguous()
        _product(x, state, taps, _forward_axes(weight, state, g), g, **outputs, **options)
    else:
        # Frames repeated in time come in pairs.
        state = state if state is None or g.repeat_time == 1 else state[:, :, ::2]
        front = g.front if state is None else state.shape[2]
        for taps, axes, phase in _phases(weight, front, g):
            views: dict[str, Any] = {
                name: None if t is None else t[phase] for name, t in outputs.items()
            }
            _product(x, state, taps, axes, g, **views, **options)
    return y, x.new_empty(0) if preactivation is None else preactivation


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous(memory_format=_LAYOUT)


def _phases(weight: Tensor, front: int, g: Geometry) -> Iterator[tuple[Tensor, list[Axis], Any]]:
    """Yields weights, axes and outputs of each phase of an upsampling, see the folding."""
    taps = folding.folded_weight(weight, g).permute(1, 0, 2, 4, 5, 6, 3).contiguous()
    kernel = weight.shape[2:]
    every = slice(None)
    if g.repeat_time == 2:
        space = [
            (kernel[i], g.stride[i], g.dilation[i], -low, 1, 0)
            for i, low in ((1, g.top), (2, g.left))
        ]
        for r in (0, 1):
            yield taps[r], [(2, 1, 1, -1, 1, 0), *space], (every, every, slice(r, None, 2))
        return
    time = (kernel[0], g.stride_t, g.dilation_t, -front, 1, 0)
    for r in (0, 1):
        for s in (0, 1):
            axes = [time, (2, 1, 1, r - 1, 1, 0), (2, 1, 1, s - 1, 1, 0)]
            phase = (every, every, every, slice(r, None, 2), slice(s, None, 2))
            yield taps[2 * r + s], axes, phase


def input_gradient(
    grad: Tensor,  # [B, O, T', H', W']
    weight: Tensor,  # [O, C / groups, kt, kh, kw]
    x_shape: Sequence[int],
    state_frames: int | None,
    g: Geometry,
) -> tuple[Tensor, Tensor | None]:
    """Returns the gradients of x and of the state, by the product with flipped weights.

    With upsampling it is computed for the repeated values and summed over the repetitions.
    """
    batch, channels, num_frames, height, width = x_shape
    front = g.front if state_frames is None else state_frames
    replicate = state_frames is None and g.replicate and front > 0 and num_frames > 0
    grad = _with_whole_vectors(grad, g)
    flipped = weight.unflatten(0, (g.groups, -1)).permute(0, 2, 3, 4, 5, 1)
    flipped = _pad_channels(flipped, 5, grad.shape[1] // g.groups).contiguous()

    def of_frames(first: int, count: int) -> Tensor:
        """Gradient of `count` padded frames from `first` on, summed over repeated pixels."""
        shape = [batch, channels, count, height * g.repeat_space, width * g.repeat_space]
        found = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=_LAYOUT)
        if found.numel() > 0:
            axes = _input_gradient_axes(weight, first, g)
            _product(grad, None, flipped, axes, g, out=found)
        if g.repeat_space > 1:
            found = found.unflatten(4, (width, 2)).unflatten(3, (height, 2)).sum((4, 6))
        return found

    inner = of_frames(front, num_frames * g.repeat_time)
    if g.repeat_time > 1:
        inner = inner.unflatten(2, (num_frames, 2)).sum(3)
    if replicate:
        inner[:, :, 0] += of_frames(0, front).sum(2)
    grad_state = None
    if state_frames is not None:
        grad_state = of_frames(0, front).contiguous(memory_format=_LAYOUT)
    return inner.contiguous(memory_format=_LAYOUT), grad_state


def weight_gradient(
    grad: Tensor,  # [B, O, T', H', W']
    x: Tensor,  # [B, C, T, H, W]
    grad_weight: Tensor,  # [O, C / groups, kt, kh, kw]
    state: Tensor | None,  # [B, C, n, H, W]
    grad_bias: Tensor | None,  # [O]
    g: Geometry,
) -> None:
    """Writes the gradients of weight and bias into `grad_weight` and `grad_bias`."""
    grad = _with_whole_vectors(grad, g).contiguous(memory_format=_LAYOUT)
    x = _with_whole_vectors(x, g)
    state = None if state is None else _with_whole_vectors(state, g)
    shape = (grad.shape[1], x.shape[1] // g.groups, *grad_weight.shape[2:])
    if shape != grad_weight.shape:  # zeros were added: their gradients are dropped
        padded = grad_weight.new_empty(shape)
        padded_bias = None if grad_bias is None else grad_bias.new_empty(shape[0])
        weight_gradient(grad, x, padded, state, padded_bias, g)
        grad_weight.copy_(padded[: grad_weight.shape[0], : grad_weight.shape[1]])
        if grad_bias is not None and padded_bias is not None:
            grad_bias.copy_(padded_bias[: grad_bias.shape[0]])
        return
    columns, channels = grad_weight.shape[0] // g.groups, grad_weight.shape[1]
    taps = grad_weight.shape[2:].numel()
    tf32 = _uses_tf32(x)
    positions = grad.numel() // grad.shape[1]
    tile, splits = _weight_gradient_plan(
        *(positions, columns, g.groups, taps * channels, x.element_size() == 2, tf32),
        *(_device_index(x), _native.module()),
    )
    partial = grad.new_empty(
        splits * grad_weight.shape[0] * (taps * channels + 1), dtype=torch.float32
    )
    _native.module().causal_conv3d_weight_gradient(
        *(x, state, grad, grad_weight.flatten(2).transpose(1, 2), grad_bias, partial),
        _forward_axes(grad_weight, state, g),
        (g.groups, bool(g.replicate) and state is None, tf32, tile, splits),
        _native.call_context(grad),
    )


def _product(
    source: Tensor,  # [B, groups * channels, T, H, W]
    state: Tensor | None,  # [B, groups * channels, n, H, W]
    weight: Tensor,  # [groups, columns, taps, channels] in this order in memory
    axes: list[Axis],
    g: Geometry,
    *,
    out: Tensor,  # [B, groups * columns, T', H', W']
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    other: Tensor | None = None,
    mix_factor: Tensor | None = None,
    silu: bool = False,
    preactivation: Tensor | None = None,
    replicate: bool = False,
    may_split: bool = True,
) -> None:
    tf32 = _uses_tf32(source)
    positions, columns = out.numel() // out.shape[1], out.shape[1] // g.groups
    tile, splits = _gemm_plan(
        *(positions, columns, g.groups, weight.numel() // out.shape[1]),
        *(source.element_size() == 2, tf32, may_split, _device_index(source), _native.module()),
    )
    tile = tile if forced_tile is None else forced_tile
    splits = splits if forced_splits is None else forced_splits
    partial = out.new_empty(splits * out.numel(), dtype=torch.float32) if splits > 1 else None
    _launch(
        *(source, state, weight, bias, residual, other, mix_factor, out, preactivation, partial),
        axes,
        (g.groups, replicate, silu, tf32, tile, splits),
    )


def _launch(source: Tensor, *arguments: Any) -> None:
    """Runs the kernel; a rehearsal on tensors without memory puts nothing in its place."""
    context = _native.call_context(source)
    _native.module().causal_conv3d_gemm(source, *arguments, context)


@lru_cache(maxsize=4096)
def _gemm_plan(
    positions: int,
    columns: int,
    groups: int,
    depth: int,
    is_half: bool,
    tf32: bool,
    may_split: bool,
    device_index: int,
    module: Any,
) -> tuple[int, int]:
    """Returns the tile and the number of splits that the kernel's table gives."""
    return module.causal_conv3d_gemm_plan(
        positions, columns, groups, depth, is_half, tf32, may_split, device_index
    )


@lru_cache(maxsize=4096)
def _weight_gradient_plan(
    positions: int,
    columns: int,
    groups: int,
    depth: int,
    is_half: bool,
    tf32: bool,
    device_index: int,
    module: Any,
) -> tuple[int, int]:
    return module.causal_conv3d_weight_gradient_plan(
        positions, columns, groups, depth, is_half, tf32, device_index
    )


def _forward_axes(weight: Tensor, state: Tensor | None, g: Geometry) -> list[Axis]:
    front = g.front if state is None else state.shape[2]
    return [
        (weight.shape[2 + i], g.stride[i], g.dilation[i], -low, repeat, 0)
        for i, (low, repeat) in enumerate(
            ((front, g.repeat_time), (g.top, g.repeat_space), (g.left, g.repeat_space))
        )
    ]


def _input_gradient_axes(weight: Tensor, first_frame: int, g: Geometry) -> list[Axis]:
    """A padded value at q is read by the outputs (q - k * dilation) / stride that are whole."""
    return [
        (weight.shape[2 + i], 1, -g.dilation[i], low, g.stride[i], 1)
        for i, low in enumerate((first_frame, g.top, g.left))
    ]


def _channels_side_by_side(x: Tensor) -> Tensor:
    """`x` [B, C, T, H, W] with channel stride 1: itself, slices too, or a copy."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous(memory_format=_LAYOUT)


def _with_whole_vectors(x: Tensor, g: Geometry) -> Tensor:
    """`x` [B, C, T, H, W] with channel stride 1 and, but for groups, whole vectors of channels."""
    width = 16 // x.element_size()
    missing = -x.shape[1] % width if g.groups == 1 else 0
    if missing == 0:
        return _channels_side_by_side(x)
    batch, channels, *size = x.shape
    shape = (batch, channels + missing, *size)
    padded = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_LAYOUT)
    padded[:, :channels] = x
    padded[:, channels:] = 0
    return padded


def _pad_channels(weight: Tensor, dim: int, count: int) -> Tensor:
    """`weight` with zeros up to `count` along `dim`."""
    missing = count - weight.shape[dim]
    if missing == 0:
        return weight
    shape = list(weight.shape)
    shape[dim] = missing
    return torch.cat([weight, weight.new_zeros(shape)], dim)


def _uses_tf32(x: Tensor) -> bool:
    """float32 runs on tensor cores when torch would let cuDNN do so."""
    if x.dtype != torch.float32:
        return False
    convolutions = getattr(torch.backends.cudnn, "conv", None)  # from torch 2.9 on
    precision = getattr(convolutions, "fp32_precision", None)
    if precision is not None:
        return precision == "tf32"
    return torch.backends.cudnn.allow_tf32


def _device_index(x: Tensor) -> int:
    return x.get_device() if x.is_cuda else 0
