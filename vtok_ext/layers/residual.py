"""Residual blocks: norm - silu - conv - norm - silu - conv, added to the input.

    ResidualBlock2d  3x3 in space, frame by frame; a 1x1 shortcut where the width changes
    ResidualBlock1d  3 in time, pixel by pixel; starts as the identity
    ResidualBlock3d  3x3x3

The convolutions in time are causal, or with `causal=False` centred, for whole clips only.
Source: VidTok (arXiv 2412.13061), section 3.2.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vtok_ext.layers._hooks import has_hooks
from vtok_ext.layers._state import State, StateFlow, owned
from vtok_ext.layers.causal_conv3d import (
    CausalConv1d,
    CausalConv3d,
    FrameConv2d,
    fuses,
    pixel_conv1d,
    video_conv3d,
)
from vtok_ext.layers.norm_act import GroupNormAct, NormAct, norm_act


def _writes_front(norm: nn.Module, conv: nn.Module, x: Tensor, flow: StateFlow) -> bool:
    """Whether `norm` is to write the buffer that holds the front frames of `conv`.

    On a CPU, where a convolution could only join them to a copy, and in a stream: a GPU kernel
    reads copies of the first frame from where it is, but is slower on frames that lie elsewhere.
    """
    if type(norm) not in (NormAct, GroupNormAct) or has_hooks(norm):
        return False
    if type(conv) not in (CausalConv1d, CausalConv3d) or not fuses(conv):
        return False
    return (x.device.type == "cpu" or flow.is_stream) and x.shape[2] > 0


class _BehindFront:
    """A norm and the causal convolution of its result, as one layer with the latter's state."""

    def __init__(self, norm: nn.Module, conv: Any) -> None:
        self.norm, self.conv = norm, conv

    def __call__(
        self, x: Tensor, state: Tensor | None = None, return_state: bool = False, **residual: Tensor
    ):
        conv, front = self.conv, self.conv.geometry.front
        if state is not None and state.shape[3] == 0:
            state = None  # a stream that has not begun
        buffer = self.norm(x, front=front, temporal=conv.temporal, state=state)
        y = conv.conv(buffer, temporal="valid", spatial_padding=conv.spatial_padding, **residual)
        return (y, owned(buffer[:, :, x.shape[2] :])) if return_state else y


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
        h = self.norm2(self.conv1(self.norm1(x)))
        skip = x if self.nin_shortcut is None else self.nin_shortcut(x)
        return self.conv2(h, residual=skip) if fuses(self.conv2) else skip + self.conv2(h)


class _TemporalResidualBlock(nn.Module):
    """Both convolutions carry streaming state: `{"conv1": frames, "conv2": frames}`."""

    norm1: nn.Module
    conv1: nn.Module
    norm2: nn.Module
    conv2: nn.Module

    def forward(self, x: Tensor, state: State | None = None, return_state: bool = False):
        """Returns y as x [B, C, T, H, W], or `(y, state)` with `return_state=True`."""
        flow = StateFlow(state, return_state)
        h = self._convolved(flow, "conv1", self.norm1, x)
        if fuses(self.conv2):
            return flow.result(self._convolved(flow, "conv2", self.norm2, h, residual=x))
        return flow.result(x + self._convolved(flow, "conv2", self.norm2, h))

    def _convolved(
        self, flow: StateFlow, name: str, norm: nn.Module, x: Tensor, **residual: Tensor
    ) -> Tensor:
        """Returns the convolution `name` of `norm(x)`."""
        conv = getattr(self, name)
        if not _writes_front(norm, conv, x, flow):
            return flow(name, conv, norm(x), **residual)
        return flow(name, _BehindFront(norm, conv), x, **residual)


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
