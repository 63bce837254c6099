"""Convolution of [B, C, T, H, W] tensors by whichever path of torch is fast for the shape.

See Note [Small batches on the CPU].
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Note [Small batches on the CPU]
# For one float32 item with B * C * T * H <= 20480 (the width is not counted) and kernels up to 3,
# torch sends a 3-D convolution to im2col and GEMM instead of oneDNN. Measured, two cores, ms:
#     16 -> 3 channels, 19x64x64: im2col 81, oneDNN 3.0; with gradients 201, as a batch of two 29
#     3 -> 128, 22x128x128: im2col 190, oneDNN 76; with gradients 562, as a batch of two 986
# Without gradients oneDNN is therefore called by name. Its gradients would be sent back to im2col;
# with gradients the item is doubled, which selects oneDNN in both directions and pays from about 16
# channels on. bfloat16 always takes oneDNN. Frames of a 2-D convolution are a batch, so that only a
# single small image meets the same rule.
SMALL_ELEMENTS = 20480
DOUBLING_PAYS_CHANNELS = 16


def conv3d(
    x: Tensor,  # [B, C, T, H, W]
    weight: Tensor,  # [O, C, kt, kh, kw]
    bias: Tensor | None,  # [O]
    stride: tuple[int, ...] = (1, 1, 1),
    padding: tuple[int, ...] = (0, 0, 0),
) -> Tensor:
    """Returns `F.conv3d(x, weight, bias, stride, padding)`, [B, O, T', H', W']."""
    if not _is_small(x):
        return F.conv3d(x, weight, bias, stride, padding)
    if not torch.is_grad_enabled():
        return torch.mkldnn_convolution(x, weight, bias, padding, stride, (1, 1, 1), 1)
    if x.shape[1] < DOUBLING_PAYS_CHANNELS:
        return F.conv3d(x, weight, bias, stride, padding)
    return F.conv3d(x.expand(2, -1, -1, -1, -1), weight, bias, stride, padding)[:1]


def conv2d_frames(
    x: Tensor,  # [B, C, T, H, W]
    weight: Tensor,  # [O, C, kh, kw]
    bias: Tensor | None,  # [O]
    stride: tuple[int, ...] = (1, 1),
    padding: tuple[int, ...] = (0, 0),
) -> Tensor:
    """Returns the 2-D convolution of every frame, [B, O, T, H', W'].

    In channels_last_3d memory the frames are a batch of channels_last images: reshaping is free.
    """
    batch, _, frames = x.shape[:3]
    # Channels last before merging: with B = T = 1 the merged stride is otherwise ambiguous, and
    # torch would take the image for a contiguous one.
    images = x.permute(0, 2, 3, 4, 1).flatten(0, 1).permute(0, 3, 1, 2)
    if _is_small(images) and not torch.is_grad_enabled():
        y = torch.mkldnn_convolution(images, weight, bias, padding, stride, (1, 1), 1)
    else:
        y = F.conv2d(images, weight, bias, stride, padding)
    return y.permute(0, 2, 3, 1).unflatten(0, (batch, frames)).permute(0, 4, 1, 2, 3)


def _is_small(x: Tensor) -> bool:
    """Returns whether torch would not send `x` to oneDNN although it could."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.shape[0] == 1
        and math.prod(x.shape[:4]) <= SMALL_ELEMENTS
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and torch.backends.mkldnn.is_available()
    )
