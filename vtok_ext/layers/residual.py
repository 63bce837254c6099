"""Residual blocks: norm - silu - conv - norm - silu - conv, added to the input.

    ResidualBlock2d  3x3 in space, frame by frame; a 1x1 shortcut where the width changes
    ResidualBlock1d  3 in time, pixel by pixel; starts as the identity
    ResidualBlock3d  3x3x3

The convolutions in time are causal, or with `causal=False` centred, for whole clips only.
Source: VidTok (arXiv 2412.13061), section 3.2.
"""

from __future__ import annotations

from torch import Tensor, nn

from vtok_ext.layers._ownership import may_overwrite
from vtok_ext.layers._state import State, StateFlow
from vtok_ext.layers.causal_conv3d import FrameConv2d, pixel_conv1d, video_conv3d
from vtok_ext.layers.norm_act import norm_act


def _add(skip: Tensor, h: Tensor, producer: nn.Module) -> Tensor:
    """Returns skip + h, written into `h` where nobody else can see it."""
    if may_overwrite(producer) and h.dtype == skip.dtype:
        return h.add_(skip)
    return skip + h


class ResidualBlock2d(nn.Module):
    """Returns [B, C_out, T, H, W] from [B, C_in, T, H, W], every frame by itself."""

    def __init__(
        self, in_channels: int, out_channels: int, *, norm_type: str = "layernorm"
    ) -> None:
        super().__init__()
        self.norm1 = norm_act(in_channels, norm_type)
        self.conv1 = FrameConv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = norm_act(out_channels, norm_type)
        self.conv2 = FrameConv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = (
            FrameConv2d(in_channels, out_channels, 1) if in_channels != out_channels else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """Returns [B, C_out, T, H, W]."""
        h = self.conv1(self.norm1(x))
        h = self.conv2(self.norm2(h))
        skip = x if self.nin_shortcut is None else self.nin_shortcut(x)
        return _add(skip, h, self.conv2)


class _TemporalResidualBlock(nn.Module):
    """Both convolutions carry streaming state: `{"conv1": frames, "conv2": frames}`."""

    norm1: nn.Module
    conv1: nn.Module
    norm2: nn.Module
    conv2: nn.Module

    def forward(self, x: Tensor, state: State | None = None, return_state: bool = False):
        """Returns y as x [B, C, T, H, W], or `(y, state)` with `return_state=True`."""
        flow = StateFlow(state, return_state)
        h = flow("conv1", self.conv1, self.norm1(x))
        h = flow("conv2", self.conv2, self.norm2(h))
        return flow.result(_add(x, h, self.conv2))


class ResidualBlock1d(_TemporalResidualBlock):
    """Returns [B, C, T, H, W], mixed over time at every pixel; conv2 starts at zero."""

    def __init__(
        self,
        channels: int,
        *,
        norm_type: str = "layernorm",
        temporal: str = "zeros",
        causal: bool = True,
    ) -> None:
        super().__init__()
        self.norm1 = norm_act(channels, norm_type, per_pixel=True, across_time=not causal)
        self.conv1 = pixel_conv1d(channels, temporal=temporal, causal=causal)
        self.norm2 = norm_act(channels, norm_type, per_pixel=True, across_time=not causal)
        self.conv2 = pixel_conv1d(channels, temporal=temporal, causal=causal)
        for parameter in self.conv2.parameters():
            nn.init.zeros_(parameter)


class ResidualBlock3d(_TemporalResidualBlock):
    """Returns [B, C, T, H, W], mixed over space and time."""

    def __init__(
        self,
        channels: int,
        *,
        norm_type: str = "layernorm",
        temporal: str = "zeros",
        causal: bool = True,
    ) -> None:
        super().__init__()
        self.norm1 = norm_act(channels, norm_type, across_time=not causal)
        self.conv1 = video_conv3d(channels, channels, temporal=temporal, causal=causal)
        self.norm2 = norm_act(channels, norm_type, across_time=not causal)
        self.conv2 = video_conv3d(channels, channels, temporal=temporal, causal=causal)
