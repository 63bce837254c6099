"""Halving and doubling height and width, frame by frame, without temporal context.

    down: zeros appended at the right and the bottom only, then a 3x3 convolution of stride 2
    up:   every pixel repeated 2x2, then a 3x3 convolution with zero padding

Source: VidTok (arXiv 2412.13061), section 3.2.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from vtok_ext.layers.causal_conv3d import FrameConv2d, is_plain
from vtok_ext.ops._causal_conv3d_cpu import repeat_nearest


class SpatialDownsample(nn.Module):
    """Returns [B, C, T, floor(H / 2), floor(W / 2)] from [B, C, T, H, W]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = FrameConv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Returns [B, C, T, floor(H / 2), floor(W / 2)]."""
        if is_plain(self.conv):
            return self.conv(x, spatial_padding=((0, 1), (0, 1)))
        # With an odd size the last window ends inside the frame and needs no padding.
        return self.conv(F.pad(x, (0, 1 - x.shape[4] % 2, 0, 1 - x.shape[3] % 2)))


class SpatialUpsample(nn.Module):
    """Returns [B, C, T, 2 H, 2 W] from [B, C, T, H, W]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = FrameConv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Returns [B, C, T, 2 H, 2 W]."""
        if is_plain(self.conv):
            return self.conv(x, upsample="space")
        return self.conv(repeat_nearest(x, 1, 2))
