"""Causal convolution on the CPU, by oneDNN through torch, in channels_last_3d memory.

Padding that is equal on both sides is left to oneDNN, which makes no copy. Front frames and one
sided padding are joined to x in one copied buffer; a caller that passes a buffer with its front
frames (temporal="valid") avoids it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vtok_ext.ops import _causal_conv3d_folding as folding
from vtok_ext.ops._accumulate_cpu import transposed_weight, upsampled_conv3d
from vtok_ext.ops._causal_conv3d_geometry import Geometry
from vtok_ext.ops._causal_conv3d_onednn import backward, convolve
from vtok_ext.ops._dtypes import without_autocast

_LAYOUT = torch.channels_last_3d

# Adding up taps at every call pays from about so many values per channel on. Measured, two cores,
# time without folding / with it: 5x16x16, 512 channels in space 0.4; 5x32x32 in space 1.05 and in
# time 0.9; 10x64x64, 256 channels 1.3 in space and in time. On another processor 1.5, 1.8, 1.6 and
# at 256 channels of 10x32x32 2.0. Both gradients there against those of PyTorch, which upsamples by
# itself: 10x64x64, 256 channels in space 2.0; 5x32x32, 512 in space 1.7; 5x64x64 in time 1.3.
FOLDING_PAYS_POSITIONS = 4096


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
) -> tuple[Tensor, Tensor]:
    """Returns y [B, O, T', H', W'], and with `keep` what came before the activation."""
    # float16 is converted: oneDNN has it on few CPUs, and torch's own kernel is slow.
    real = torch.float32 if x.dtype == torch.float16 else x.dtype
    shape = g.output_shape(x.shape, weight.shape, None if state is None else state.shape[2])
    with without_autocast("cpu"):
        if 0 in shape:
            h = torch.empty(shape, dtype=real, device=x.device, memory_format=_LAYOUT)
        elif _folds(x.shape, weight, None if state is None else state.shape[2], g):
            inputs = x.to(real), weight.to(real), _as(bias, real), _as(state, real)
            h = _convolve_folded(*inputs, shape, g)
        else:
            frames, padding = padded_frames(x, weight, state, g)
            h = convolve(frames.to(real), weight.to(real), _as(bias, real), padding, g)
            h = channels_last(h)
        if residual is not None:
            h.add_(residual)
        before = h
        if silu:
            h = F.silu(h, inplace=not keep)
        if other is not None and mix_factor is not None:
            mix = float(torch.sigmoid(mix_factor.double()))
            blended = other.to(real)
            h = torch.lerp(h, blended, mix) if keep else h.lerp_(blended, mix)
    return channels_last(h.to(x.dtype)), before.to(x.dtype) if keep else x.new_empty(0)


def input_gradient(
    grad: Tensor,  # [B, O, T', H', W']
    weight: Tensor,  # [O, C / groups, kt, kh, kw]
    x_shape: Sequence[int],
    state_frames: int | None,
    g: Geometry,
) -> tuple[Tensor, Tensor | None]:
    """Returns the gradients of x and of the state."""
    real = torch.float32 if grad.dtype == torch.float16 else grad.dtype
    shape, padding = padded_shape(x_shape, weight.shape, state_frames, g)
    with without_autocast("cpu"):
        if _folds_gradients(x_shape, weight, state_frames, g):
            inner = _folded_input_gradient(channels_last(grad).to(real), weight.to(real), g)
            return channels_last(inner.to(grad.dtype)), None
        frames = torch.empty(shape, dtype=real, memory_format=_LAYOUT)  # only its shape is read
        found = backward(channels_last(grad).to(real), frames, weight.to(real), padding, g, 0)[0]
        assert found is not None
        batch, channels, num_frames, height, width = x_shape
        found = found[:, :, :, _top(g) : _top(g) + height * g.repeat_space]
        found = found[..., _left(g) : _left(g) + width * g.repeat_space]
        if g.repeat_space > 1:
            found = found.unflatten(4, (width, 2)).unflatten(3, (height, 2)).sum((4, 6))
        # Equal padding, temporal="same", is oneDNN's.
        front = g.front - g.back if state_frames is None else state_frames
        before, inner = found[:, :, :front], found[:, :, front : front + g.repeat_time * num_frames]
        if g.repeat_time > 1:
            inner = inner.unflatten(2, (num_frames, 2)).sum(3)
        if state_frames is None and g.replicate and front > 0 and num_frames > 0:
            inner = inner.contiguous(memory_format=_LAYOUT)
            inner[:, :, 0] += before.sum(2)
    grad_state = None if state_frames is None else channels_last(before.to(grad.dtype).clone())
    return channels_last(inner.to(grad.dtype)), grad_state


def weight_gradient(
    grad: Tensor,  # [B, O, T', H', W']
    x: Tensor,  # [B, C, T, H, W]
    weight: Tensor,  # [O, C / groups, kt, kh, kw]
    state: Tensor | None,  # [B, C, n, H, W]
    has_bias: bool,
    g: Geometry,
) -> tuple[Tensor, Tensor | None]:
    """Returns the gradients of weight and bias."""
    real = torch.float32 if grad.dtype == torch.float16 else grad.dtype
    with without_autocast("cpu"):
        grad, wide = channels_last(grad).to(real), weight.to(real)
        grad_weight: Tensor | None
        if _folds_gradients(x.shape, weight, None if state is None else state.shape[2], g):
            grad_weight = _folded_weight_gradient(grad, x.to(real), wide, g)
            grad_bias = grad.sum((0, 2, 3, 4)) if has_bias else None
        else:
            frames, padding = padded_frames(x, weight, state, g)
            gradients = backward(grad, frames.to(real), wide, padding, g, 1, has_bias)
            grad_weight, grad_bias = gradients[1:]
    assert grad_weight is not None
    return grad_weight.to(x.dtype), None if grad_bias is None else grad_bias.to(x.dtype)


def channels_last(x: Tensor) -> Tensor:
    """`x` [B, C, T, H, W] in channels_last_3d memory: itself, or a copy."""
    if x.is_contiguous(memory_format=_LAYOUT):  # without an event of its own in a profile
        return x
    return x.contiguous(memory_format=_LAYOUT)


def _as(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype)


def _top(g: Geometry) -> int:
    """Rows that are written in front; the rest of `top` is left to oneDNN."""
    return g.top - min(g.top, g.bottom)


def _left(g: Geometry) -> int:
    return g.left - min(g.left, g.right)


def padded_shape(
    x_shape: Sequence[int], weight_shape: Sequence[int], state_frames: int | None, g: Geometry
) -> tuple[list[int], tuple[int, int, int]]:
    """Returns the shape of the frames that a convolution with equal padding runs over, and that.

    One-sided padding that no window sees is left out.
    """
    out = g.output_shape(x_shape, weight_shape, state_frames)
    reach = g.reach(weight_shape[2:])
    shape = list(x_shape[:2])
    before = g.front if state_frames is None else state_frames
    sizes = (x_shape[2] * g.repeat_time, *(size * g.repeat_space for size in x_shape[3:]))
    sides = ((before, g.back), (g.top, g.bottom), (g.left, g.right))
    padding = []
    for i, (size, (low, high)) in enumerate(zip(sizes, sides, strict=True)):
        equal = min(low, high)
        seen = (out[2 + i] - 1) * g.stride[i] + reach[i]  # the last windows end here
        high = max(0, min(high, seen - size - low))
        shape.append((low - equal) + size + max(0, high - equal))
        padding.append(equal)
    return shape, tuple(padding)  # type: ignore[return-value]


def padded_frames(
    x: Tensor,  # [B, C, T, H, W]
    weight: Tensor,
    state: Tensor | None,  # [B, C, n, H, W]
    g: Geometry,
) -> tuple[Tensor, tuple[int, int, int]]:
    """Returns x upsampled and padded as far as oneDNN does not pad, and what it does."""
    x = repeat_nearest(x, g.repeat_time, g.repeat_space)
    state_frames = None if state is None else state.shape[2]
    before_x = [size // n for size, n in zip(x.shape[2:], _repeats(g), strict=True)]
    shape, padding = padded_shape([*x.shape[:2], *before_x], weight.shape, state_frames, g)
    if shape == list(x.shape):
        return channels_last(x), padding
    front = shape[2] - x.shape[2]
    rows = slice(_top(g), _top(g) + x.shape[3])
    columns = slice(_left(g), _left(g) + x.shape[4])
    buffer = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_LAYOUT)
    buffer[:, :, :, : rows.start] = 0
    buffer[:, :, :, rows.stop :] = 0
    buffer[..., : columns.start] = 0
    buffer[..., columns.stop :] = 0
    inner = buffer[:, :, :, rows, columns]
    inner[:, :, front:] = x
    if state is not None:
        inner[:, :, :front] = repeat_nearest(state, 1, g.repeat_space)
    elif g.replicate and x.shape[2] > 0:
        inner[:, :, :front] = x[:, :, :1]
    else:
        inner[:, :, :front] = 0
    return buffer, padding


def _repeats(g: Geometry) -> tuple[int, int, int]:
    return g.repeat_time, g.repeat_space, g.repeat_space


def repeat_nearest(x: Tensor, time: int, space: int) -> Tensor:
    """Returns [B, C, time * T, space * H, space * W]: every value of x [B, C, T, H, W] repeated.

    Equivalent to: `F.interpolate(x, scale_factor=(time, space, space), mode="nearest")`, as one
    broadcast copy: it keeps channels_last_3d memory and the dtype under autocast.
    """
    if time == 1 and space == 1:
        return x
    batch, channels, frames, height, width = x.shape
    y = x.permute(0, 2, 3, 4, 1)[:, :, None, :, None, :, None]
    y = y.expand(batch, frames, time, height, space, width, space, channels)
    y = y.reshape(batch, frames * time, height * space, width * space, channels)
    # Repeating a single frame is a view with stride 0 until here.
    return y.contiguous().permute(0, 4, 1, 2, 3)


def _folds(x_shape: Sequence[int], weight: Tensor, state_frames: int | None, g: Geometry) -> bool:
    """Whether folding is possible and pays. Folded half weights are rounded: there neither the
    frames of a chunk nor the batch may decide, and four frames are taken for granted."""
    frames = x_shape[0] * x_shape[2] if weight.element_size() > 2 else 4
    if frames * x_shape[3] * x_shape[4] < FOLDING_PAYS_POSITIONS:
        return False
    return folding.folds(weight, state_frames, g)


def _folds_gradients(
    x_shape: Sequence[int], weight: Tensor, state_frames: int | None, g: Geometry
) -> bool:
    if state_frames is not None or not _folds(x_shape, weight, None, g):
        return False
    return folding.folds_gradients(weight, g)


def _folded_input_gradient(
    grad: Tensor,  # [B, O, T', H', W']
    weight: Tensor,  # [O, C, kt, kh, kw]
    g: Geometry,
) -> Tensor:
    """Returns the gradient of x [B, C, T, H, W] before upsampling, by the folding's adjoint."""
    taps, plain, padding = folding.adjoint(weight, g)
    found = convolve(grad, taps.contiguous(), None, padding, plain)
    if g.repeat_time == 1:
        return found
    found = channels_last(found)
    if g.replicate:
        found[:, :, 1] += found[:, :, 0]
    return found[:, :, 1:]


def _folded_weight_gradient(
    grad: Tensor,  # [B, O, T', H', W']
    x: Tensor,  # [B, C, T, H, W]
    weight: Tensor,  # [O, C, kt, kh, kw]
    g: Geometry,
) -> Tensor:
    """Returns the gradient of the weight."""
    taps, plain, padding = folding.adjoint(weight, g)
    if g.repeat_time == 2:  # the frame before the clip, which its first outputs see
        before = x[:, :, :1] if g.replicate else torch.zeros_like(x[:, :, :1])
        x = torch.cat([before, x], 2)
    _, found, _ = backward(channels_last(x), grad, taps.contiguous(), padding, plain, 1)
    assert found is not None
    return folding.weight_gradient_of_adjoint(found, g)


def _convolve_folded(
    x: Tensor,  # [B, C, T, H, W]
    weight: Tensor,  # [O, C / groups, kt, kh, kw]
    bias: Tensor | None,  # [O]
    state: Tensor | None,  # [B, C, n, H, W]
    shape: Sequence[int],  # of the result, [B, O, T', H', W']
    g: Geometry,
) -> Tensor:
    """Returns the convolution of upsampled x with fewer products.

    One frame doubled in space is a transposed convolution; otherwise all phases are channels of one
    convolution.
    """
    if g.repeat_space == 2 and weight.shape[2] == 1 and g.stride_t == 1 and g.groups == 1:
        return channels_last(upsampled_conv3d(channels_last(x), transposed_weight(weight), bias))
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_LAYOUT)
    phases = folding.folded_weight(weight, g)
    bias = None if bias is None else bias.view(g.groups, 1, -1).expand(phases.shape[:3]).flatten()
    small, smaller = phases.flatten(0, 2), folding.folded_geometry(g)
    # Frames repeated in time come in pairs.
    state = state if state is None or g.repeat_time == 1 else state[:, :, ::2]
    frames, padding = padded_frames(x, small, state, smaller)
    folding.unfold(channels_last(convolve(frames, small, bias, padding, smaller)), out, g)
    return out
