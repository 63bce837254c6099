"""Which of torch's convolutions runs a product on the CPU, and in which memory: oneDNN as a rule.

Kernels along time alone run as images of T rows and H * W columns, and gradients within frames as a
batch of images, which torch sends to oneDNN more often than a video.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vtok_ext.ops import _causal_conv3d_views as views
from vtok_ext.ops._causal_conv3d_geometry import Geometry

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

# Note [Steps within frames on the CPU]
# Behind a stride s in space, output i sees padded rows i s + k = (i + k // s) s + k % s: row i + k
# // s of phase k % s. With each phase copied to a plane of its own, and gradient and phases on one
# grid that has zeros where the gradient ends, every tap of the weight gradient is one product of
# matrices, of the gradient and a phase that lies a constant number of values further. Measured,
# two cores, oneDNN / products, ms: 128 channels, 20x128x128 410 / 298; 256, 20x64x64 209 / 213;
# 512, 10x32x32 79 / 83. So from the first to the last of:
PHASE_PRODUCT_CHANNELS = 64, 128

# Note [Padding of few frames on the CPU]
# Told of padding on an axis that is short for its kernel, oneDNN's gradient of a weight is made of
# memory that nothing was written to, or damages the heap. Found with torch 2.13 and AVX-512, with
# all memory filled by the C library, extents 1..12, kernels 1..9, strides 1..4, any equal padding:
#     bfloat16, videos: in time at any stride, (3, 3, 3) at 2 frames, (5, 3, 3) at 2..4; in space at
#         height or width 1, (3, 3, 3) with stride (1, 2, 2), (5, 5, 5) also without
#     bfloat16, images: (3, 3) with stride 2 at width 1
#     float32, videos: in time behind a stride, kernel 7 with stride 2 at 5..7 frames; images never
# All of them have extents < reach + stride - 1. With that padding written to memory none is wrong.

# Note [Odd channels on the CPU]
# Where C / groups is no multiple of 16, its bfloat16 gradient of a weight is wrong in channels_last
# memory, or damages the heap, behind dilated rows (20, 24 and 40 channels, kernel (3, 3), dilation
# (2, 1), widths from 31 on) and behind a step that differs in height and width (12 channels, kernel
# (1, 1), stride (2, 1), 6x31). In float32 these are right, and no model is known to have them.


def is_small(x: Tensor) -> bool:
    """Returns whether torch would not send `x` to oneDNN although it could."""
    return (
        x.dtype == torch.float32
        and x.shape[0] == 1
        and math.prod(x.shape[:4]) <= SMALL_ELEMENTS
        and _has_onednn()
    )


def _has_onednn() -> bool:
    """Whether torch may call it: `torch.backends.mkldnn.flags(enabled=False)` forbids that."""
    return torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)


def convolve(
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
    if is_single and _has_onednn():
        y = torch.mkldnn_convolution(frames, weight, bias, pads, stride, dilation, g.groups)
    else:
        y = torch.convolution(frames, weight, bias, stride, pads, dilation, False, [0], g.groups)
    return views.from_lines(y, height) if as_lines else y


def _is_heavy(weight: Tensor, frames: Tensor) -> bool:
    factor = HEAVY_WEIGHT * (1 if frames.dtype == torch.float32 else 3)
    return weight.numel() > factor * frames.numel()


def backward(
    grad: Tensor,  # [B, O, T', H', W']
    frames: Tensor,  # [B, C, P, H, W]
    weight: Tensor,  # [O, C / groups, kt, kh, kw]
    padding: tuple[int, int, int],
    g: Geometry,
    wanted: int,  # 0: of the frames, 1: of weight and bias
    has_bias: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Returns the gradients of frames, weight and bias that are wanted, in any layout."""
    mask = [wanted == 0, wanted == 1, wanted == 1 and has_bias]
    as_images = views.runs_as_images(weight, g)
    as_lines = views.runs_as_lines(frames, weight, padding, g)
    if as_lines and wanted == 1 and _pays_products(weight, frames, g):
        return _line_products(grad, frames, weight.shape[2], padding[0], has_bias, g)
    if as_images and wanted == 1 and _pays_phases(weight, frames, g):
        return _phase_products(grad, frames, weight.shape[3:], padding[1:], has_bias, g)
    if wanted == 1:
        frames, padding = _write_short_padding(frames, weight, padding, g)
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
    if wanted == 1 and _needs_single(weight, stride, dilation):
        grad, frames, weight = grad.float(), frames.float(), weight.float()
    items, is_heavy = frames.shape[0], _is_heavy(weight, frames)
    if is_heavy and not (as_images or as_lines):
        grad, frames = grad.contiguous(), frames.contiguous()
    if is_small(frames) and frames.shape[1] >= DOUBLING_PAYS_CHANNELS and not is_heavy:
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


def _write_short_padding(
    frames: Tensor,  # [B, C, P, H, W]
    weight: Tensor,  # [O, C / groups, kt, kh, kw]
    padding: tuple[int, int, int],
    g: Geometry,
) -> tuple[Tensor, tuple[int, int, int]]:
    """Returns the frames with the padding that oneDNN would go wrong with, and what is left of it.

    See Note [Padding of few frames on the CPU].
    """
    sizes = frames.shape[2:]
    written = [
        pad if size < reach + stride - 1 else 0
        for pad, size, reach, stride in zip(
            padding, sizes, g.reach(weight.shape[2:]), g.stride, strict=True
        )
    ]
    if frames.dtype != torch.bfloat16:
        in_time = g.stride_t > 1 and frames.dtype == torch.float32
        written = [written[0] if in_time else 0, 0, 0]
    if not any(written):
        return frames, padding
    padded = [size + 2 * pad for size, pad in zip(sizes, written, strict=True)]
    buffer = torch.empty(
        *frames.shape[:2], *padded, dtype=frames.dtype, memory_format=torch.channels_last_3d
    ).zero_()
    inner = [slice(pad, pad + size) for pad, size in zip(written, sizes, strict=True)]
    buffer[:, :, inner[0], inner[1], inner[2]] = frames
    left = [pad - own for pad, own in zip(padding, written, strict=True)]
    return buffer, (left[0], left[1], left[2])


def _needs_single(weight: Tensor, stride: Sequence[int], dilation: Sequence[int]) -> bool:
    """Whether a gradient of `weight` is right in float32 only: Note [Odd channels on the CPU]."""
    is_odd = weight.dtype == torch.bfloat16 and weight.shape[1] % 16 != 0
    return is_odd and (dilation[-2] > 1 or stride[-2] != stride[-1])


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


def _pays_phases(weight: Tensor, frames: Tensor, g: Geometry) -> bool:
    return (
        frames.dtype == torch.float32
        and g.groups == 1
        and g.dilation[1:] == (1, 1)
        and g.stride_h * g.stride_w > 1
        and PHASE_PRODUCT_CHANNELS[0] <= min(weight.shape[:2]) <= PHASE_PRODUCT_CHANNELS[1]
    )


def _phase_products(
    grad: Tensor,  # [B, O, T, H', W']
    frames: Tensor,  # [B, C, T, H, W]
    kernel: Sequence[int],
    padding: Sequence[int],  # zeros around the rows and columns
    has_bias: bool,
    g: Geometry,
) -> tuple[None, Tensor, Tensor | None]:
    """Returns the gradients of a weight [O, C, 1, kh, kw] and of the bias.

    See Note [Steps within frames on the CPU].
    """
    rows = grad.permute(0, 2, 3, 4, 1).flatten(0, 1)  # [N, H', W', O]
    pixels = frames.permute(0, 2, 3, 4, 1).flatten(0, 1)  # [N, H, W, C]
    steps, (high, wide) = (g.stride_h, g.stride_w), rows.shape[1:3]
    grid = [n + (k - 1) // s for n, k, s in zip((high, wide), kernel, steps, strict=True)]
    left = rows.new_zeros(len(rows), *grid, rows.shape[3])
    left[:, :high, :wide] = rows
    left = left.flatten(0, 2)
    found = rows.new_zeros(*kernel, rows.shape[3], pixels.shape[3])
    for a, b in itertools.product(*(range(min(n)) for n in zip(steps, kernel, strict=True))):
        plane = pixels.new_zeros(len(pixels), *grid, pixels.shape[3])
        (into, of), (into_w, of_w) = (
            _phase(first, step, pad, size, number)
            for first, step, pad, size, number in zip(
                (a, b), steps, padding, pixels.shape[1:3], grid, strict=True
            )
        )
        plane[:, into, into_w] = pixels[:, of, of_w]
        right = plane.flatten(0, 2)
        for i, j in itertools.product(range(a, kernel[0], steps[0]), range(b, kernel[1], steps[1])):
            further = i // steps[0] * grid[1] + j // steps[1]
            torch.mm(left[: len(left) - further].t(), right[further:], out=found[i, j])
    grad_bias = rows.sum((0, 1, 2)) if has_bias else None
    return None, found.permute(2, 3, 0, 1).unsqueeze(2).contiguous(), grad_bias


def _phase(first: int, step: int, pad: int, size: int, number: int) -> tuple[slice, slice]:
    """Returns which of a phase's `number` rows there are, and which of `size` rows they are.

    Args:
        first: padded row at which the phase begins.
        step: rows from one to the next.
        pad: zeros before the rows.
        size: rows without padding.
        number: rows of the grid.
    """
    end = max(0, min(number, -((first - pad - size) // step)))
    begin = min(end, max(0, -((first - pad) // step)))  # the first that is no padding
    source = begin * step + first - pad
    return slice(begin, end), slice(source, source + (end - begin - 1) * step + 1, step)
