"""Causal convolution on the CPU, by oneDNN through torch, in channels_last_3d memory.

Padding that is equal on both sides is left to oneDNN, which makes no copy. Front frames and one
sided padding are joined to x in one copied buffer; a caller that passes a buffer with its front
frames (temporal="valid") avoids it. Kernels along time alone run as images of T rows and H * W
columns, and gradients within frames as a batch of images, which torch sends to oneDNN more often
than a video.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vtok_ext.ops import _causal_conv3d_folding as folding
from vtok_ext.ops import _causal_conv3d_views as views
from vtok_ext.ops._accumulate_cpu import transposed_weight, upsampled_conv3d
from vtok_ext.ops._causal_conv3d_geometry import Geometry
from vtok_ext.ops._dtypes import without_autocast

_LAYOUT = torch.channels_last_3d

# Note [Small batches on the CPU]
# For one float32 item with B * C * T * H <= 20480 (the width is not counted) and kernels up to 3,
# torch sends a 3-D convolution to im2col and GEMM instead of oneDNN. Measured, two cores, ms:
#     16 -> 3 channels, 19x64x64: im2col 81, oneDNN 3.0; with gradients 201, as a batch of two 29
#     3 -> 128, 22x128x128: im2col 190, oneDNN 76; with gradients 562, as a batch of two 986
# So is a kernel of 1x1 within frames on one thread. Forwards oneDNN is therefore called by name.
# Gradients would be sent back to im2col; there the item is doubled, with a gradient of zero for the
# copy, which selects oneDNN and pays from about 16 channels on, unless the weight is heavy (below):
#     256 channels, 6x8x8 (18): im2col 7, oneDNN as a batch of two 11; 512, 5x8x8 (43) 20 / 60
# bfloat16 always takes oneDNN.
SMALL_ELEMENTS = 20480
DOUBLING_PAYS_CHANNELS = 16

# Note [Heavy weights on the CPU]
# oneDNN reorders a weight at every call, and torch does so once more for channels_last_3d memory.
# Where the weight has many times as many values as the frames, that takes longer than the products.
# From HEAVY_WEIGHT times on (and three times that in bfloat16), reordering the frames to contiguous
# memory instead is quicker, and from GEMM_WEIGHT times on, im2col and GEMM in float32, which read
# the weight as it is. Measured, two cores, float32, 3x3x3, ms as they are / contiguous / im2col:
#     1024 channels, 3x4x4 (576 times) 69 / 38 / 8; 4x8x8 (108) 85 / 52 / 37
#     640 channels, 3x8x8 (90) 33 / 17 / 8
#     512 channels, 3x4x4 (288) 6.3 / 2.8 / 2.0; 3x8x8 (72) 7.6 / 4.2 / 5.4; 7x8x8 (31) 14 / 12
#         / 23; 5x18x18 (9) 29 / 21
#     256 channels, 4x8x8 (27) 1.5 / 1.3 / 2.6; 4x16x16 (7) 4.4 / 4.6 / 10
# On another processor, 512 channels, as they are / contiguous:
#     7x16x16 (8) 71 / 59, input gradient 94 / 81, weight gradient 108 / 93; 9x16x16 (6) 109 / 102,
#         123 / 108, 132 / 113; 13x16x16 (4) 161 / 141, 218 / 188, 220 / 217
HEAVY_WEIGHT = 5
GEMM_WEIGHT = 80

# Note [Kernels along time on the CPU]
# A frame [H, W] counts as one line, and kernel (kt, 1, 1) becomes (kt, 1) of an image [T, H * W]: a
# view of the same memory, for which oneDNN is never slower, and which torch does not send to im2col
# on one thread. Measured, float32, input gradient as a video / as an image, ms:
#     one thread: 8 channels, 4x20x32x32 3.4 / 0.8; 64 channels, 17x64x64 72 / 18; 128 231 / 72
#     two threads: 16 channels, 17x64x64 5.8 / 0.6; 64 and more are equal
# The weight gradient of one tap is one product of matrices, which is quicker than oneDNN's kernel
# from about LINE_PRODUCT_CHANNELS on. Video / image / products, ms:
#     one thread: 64 channels, 17x64x64 76 / 41 / 29; 128 253 / 166 / 89; 512, 5x16x16 26 / 40 / 25
#     two threads: 64 channels 21 / 22 / 19; 128 79 / 84 / 48; 512 16 / 19 / 11
LINE_PRODUCT_CHANNELS = 64

# Adding up taps at every call pays from about so many values per channel on. Measured, two cores,
# time without folding / with it: 5x16x16, 512 channels in space 0.4; 5x32x32 in space 1.05 and in
# time 0.9; 10x64x64, 256 channels 1.3 in space and in time. On another processor 1.5, 1.8, 1.6 and
# at 256 channels of 10x32x32 2.0.
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
        elif _folds(x, weight, state, g):
            inputs = x.to(real), weight.to(real), _as(bias, real), _as(state, real)
            h = _convolve_folded(*inputs, shape, g)
        else:
            frames, padding = padded_frames(x, weight, state, g)
            h = _convolve(frames.to(real), weight.to(real), _as(bias, real), padding, g)
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
        frames = torch.empty(shape, dtype=real, memory_format=_LAYOUT)  # only its shape is read
        found = _backward(channels_last(grad).to(real), frames, weight.to(real), padding, g, 0)[0]
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
        frames, padding = padded_frames(x, weight, state, g)
        _, grad_weight, grad_bias = _backward(
            channels_last(grad).to(real), frames.to(real), weight.to(real), padding, g, 1, has_bias
        )
    assert grad_weight is not None
    return grad_weight.to(grad.dtype), None if grad_bias is None else grad_bias.to(grad.dtype)


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


def _is_small(x: Tensor) -> bool:
    """Returns whether torch would not send `x` to oneDNN although it could."""
    return (
        x.dtype == torch.float32
        and x.shape[0] == 1
        and math.prod(x.shape[:4]) <= SMALL_ELEMENTS
        and torch.backends.mkldnn.is_available()
    )


def _convolve(
    frames: Tensor,  # [B, C, P, H, W]
    weight: Tensor,  # [O, C / groups, kt, kh, kw]
    bias: Tensor | None,
    padding: tuple[int, int, int],
    g: Geometry,
) -> Tensor:
    """Returns the convolution with equal padding, in any layout.

    See Note [Small batches on the CPU], Note [Heavy weights on the CPU] and Note [Kernels along
    time on the CPU].
    """
    stride: Sequence[int] = g.stride
    dilation: Sequence[int] = g.dilation
    pads: Sequence[int] = padding
    is_single = frames.dtype == torch.float32
    if _is_heavy(weight, frames):
        frames = frames.contiguous()
        is_plain = g.groups == 1 and all(n == 1 for n in dilation)
        if is_single and is_plain and weight.numel() > GEMM_WEIGHT * frames.numel():
            kernel = list(weight.shape[2:])
            return torch.ops.aten.slow_conv3d(frames, weight, kernel, bias, stride, padding)
    as_lines, height = views.runs_as_lines(frames, weight, padding, g), frames.shape[3]
    if as_lines:
        frames, weight = views.lines(frames), weight[..., 0]
        stride, dilation, pads = stride[:2], dilation[:2], pads[:2]
    if is_single and torch.backends.mkldnn.is_available():
        y = torch.mkldnn_convolution(frames, weight, bias, pads, stride, dilation, g.groups)
    else:
        y = torch.convolution(frames, weight, bias, stride, pads, dilation, False, [0], g.groups)
    return views.from_lines(y, height) if as_lines else y


def _is_heavy(weight: Tensor, frames: Tensor) -> bool:
    factor = HEAVY_WEIGHT * (1 if frames.dtype == torch.float32 else 3)
    return weight.numel() > factor * frames.numel()


def _folds(x: Tensor, weight: Tensor, state: Tensor | None, g: Geometry) -> bool:
    if math.prod(x.shape) < FOLDING_PAYS_POSITIONS * x.shape[1]:
        return False
    return folding.folds(weight, None if state is None else state.shape[2], g)


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
    folding.unfold(channels_last(_convolve(frames, small, bias, padding, smaller)), out, g)
    return out


def _backward(
    grad: Tensor,  # [B, O, T', H', W']
    frames: Tensor,  # [B, C, P, H, W]
    weight: Tensor,  # [O, C / groups, kt, kh, kw]
    padding: tuple[int, int, int],
    g: Geometry,
    wanted: int,  # 0: of the frames, 1: of weight and bias
    has_bias: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    mask = [wanted == 0, wanted == 1, wanted == 1 and has_bias]
    as_images = views.runs_as_images(weight, g)
    as_lines = views.runs_as_lines(frames, weight, padding, g)
    if as_lines and wanted == 1 and _pays_products(weight, frames, g):
        return _line_products(grad, frames, weight.shape[2], padding[0], has_bias, g)
    batch, height = frames.shape[0], frames.shape[3]
    stride: Sequence[int] = g.stride
    dilation: Sequence[int] = g.dilation
    pads: Sequence[int] = padding
    if as_images:
        grad, frames, weight = views.images(grad), views.images(frames), weight[:, :, 0]
        stride, dilation, pads = stride[1:], dilation[1:], pads[1:]
    if as_lines:
        grad, frames, weight = views.lines(grad), views.lines(frames), weight[..., 0]
        stride, dilation, pads = stride[:2], dilation[:2], pads[:2]
    items, is_heavy = frames.shape[0], _is_heavy(weight, frames)
    if is_heavy and not (as_images or as_lines):
        grad, frames = grad.contiguous(), frames.contiguous()
    if _is_small(frames) and frames.shape[1] >= DOUBLING_PAYS_CHANNELS and not is_heavy:
        frames = torch.cat([frames, frames])
        grad = torch.cat([grad, torch.zeros_like(grad)])
    grad_frames, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        *(grad, frames, weight, [weight.shape[0]], stride, pads, dilation),
        *(False, [0], g.groups, mask),
    )
    if grad_frames is not None:
        grad_frames = grad_frames[:items]
        grad_frames = views.video(grad_frames, batch) if as_images else grad_frames
        grad_frames = views.from_lines(grad_frames, height) if as_lines else grad_frames
    if grad_weight is not None and as_images:
        grad_weight = grad_weight.unsqueeze(2)
    if grad_weight is not None and as_lines:
        grad_weight = grad_weight.unsqueeze(4)
    return grad_frames, grad_weight, grad_bias


def _pays_products(weight: Tensor, frames: Tensor, g: Geometry) -> bool:
    return (
        frames.dtype == torch.float32
        and g.groups == 1
        and g.stride_t == 1
        and min(weight.shape[:2]) >= LINE_PRODUCT_CHANNELS
    )


def _line_products(
    grad: Tensor,  # [B, O, T', H, W]
    frames: Tensor,  # [B, C, P, H, W]
    taps: int,
    padding: int,  # zeros before and behind the frames
    has_bias: bool,
    g: Geometry,
) -> tuple[None, Tensor, Tensor | None]:
    """Returns the gradients of a weight [O, C, taps, 1, 1] and of the bias, a product per tap."""
    rows = grad.permute(0, 2, 3, 4, 1)  # [B, T', H, W, O]
    columns = frames.permute(0, 2, 3, 4, 1)  # [B, P, H, W, C]
    found = frames.new_zeros(taps, grad.shape[1], frames.shape[1])
    for k in range(taps):
        first = k * g.dilation[0] - padding  # the frame that output 0 sees
        seeing = slice(max(0, -first), max(0, min(rows.shape[1], columns.shape[1] - first)))
        seen = slice(seeing.start + first, seeing.stop + first)
        if seeing.start >= seeing.stop:
            continue
        for i in range(frames.shape[0]):
            left, right = rows[i, seeing].flatten(0, 2), columns[i, seen].flatten(0, 2)
            found[k].addmm_(left.t(), right)
    grad_bias = rows.sum((0, 1, 2, 3)) if has_bias else None
    return None, found.permute(1, 2, 0).contiguous()[..., None, None], grad_bias
