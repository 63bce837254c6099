"""Videos as batches of images on the CPU, without a copy, for kernels that need no more dimensions.

    images  [B, C, T, H, W] -> [B * T, C, H, W]   kernel (1, kh, kw)
    lines   [B, C, T, H, W] -> [B, C, T, H * W]   kernel (kt, 1, 1)

All are views of channels_last_3d memory in channels_last memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtok_ext.ops._causal_conv3d_geometry import Geometry


def runs_as_images(
    weight: Tensor,  # [O, C / groups, kt, kh, kw]
    g: Geometry,
) -> bool:
    """Returns whether gradients may be taken frame by frame."""
    return weight.shape[2] == 1 and g.stride_t == 1


def runs_as_lines(
    frames: Tensor,  # [B, C, P, H, W]
    weight: Tensor,  # [O, C / groups, kt, kh, kw]
    padding: tuple[int, int, int],
    g: Geometry,
) -> bool:
    """Returns whether frames may count as lines; see Note [Kernels along time on the CPU]."""
    return (
        weight.shape[2] > 1
        and weight.shape[3:] == (1, 1)
        and padding[1:] == (0, 0)
        and g.stride[1:] == (1, 1)
        and frames.is_contiguous(memory_format=torch.channels_last_3d)
    )


def images(x: Tensor) -> Tensor:
    """[B, C, T, H, W] -> [B * T, C, H, W], a view in channels_last memory."""
    return x.permute(0, 2, 3, 4, 1).flatten(0, 1).permute(0, 3, 1, 2)


def video(x: Tensor, batch: int) -> Tensor:
    """[B * T, C, H, W] -> [B, C, T, H, W]."""
    return x.permute(0, 2, 3, 1).unflatten(0, (batch, -1)).permute(0, 4, 1, 2, 3)


def lines(x: Tensor) -> Tensor:
    """[B, C, T, H, W] -> [B, C, T, H * W], a view in channels_last memory."""
    return x.permute(0, 2, 3, 4, 1).flatten(2, 3).permute(0, 3, 1, 2)


def from_lines(x: Tensor, height: int) -> Tensor:
    """[B, C, T, H * W] -> [B, C, T, H, W]."""
    return x.permute(0, 2, 3, 1).unflatten(2, (height, -1)).permute(0, 4, 1, 2, 3)
