"""Causal layers of VidTok's ablations: without AlphaBlender, and fully 3-D.

    PixelDownsample       y = mean over 3 frames, stride 2, of a length-3 convolution in time
    PixelUpsample         y = length-3 convolution in time of every frame twice
    VolumeDownsample      3x3x3 convolution of stride (1 or 2, 2, 2)
    VolumeUpsample        3x3x3 convolution of every value (1 or 2) x 2 x 2 times
    VolumeResidualBlock   norm - silu - conv - norm - silu - conv with 3x3x3 convolutions

Zeros precede a clip, as in release 1.0. Source: VidTok (arXiv 2412.13061), table 2; see
Note [Published ablations] in `models/vidtok_ablations.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok_ext.layers._state import State, StateFlow, owned
from vtok_ext.layers.causal_conv3d import CausalConv1d, CausalConv3d
from vtok_ext.layers.norm_act import norm_act
from vtok_ext.ops._causal_conv3d_cpu import repeat_nearest


def _continued(x: Tensor, state: Tensor | None, num_frames: int) -> Tensor:
    """Returns x [B, C, T, H, W] behind `state`, or behind `num_frames` frames of zeros."""
    if state is not None:
        return torch.cat([state.to(x.dtype), x], dim=2)
    return F.pad(x, (0, 0, 0, 0, num_frames, 0))


def _num_windows(num_frames: int, stride: int) -> int:
    """Returns how many windows of 3 frames fit."""
    return max(0, (num_frames - 3) // stride + 1)


class PixelDownsample(nn.Module):
    """Returns half as many frames: [B, C, T, H, W] -> [B, C, floor(T / 2), H, W].

    With `return_state=True`, `(y, state)`; chunks of any lengths continue exactly.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = CausalConv1d(channels, channels)

    def forward(self, x: Tensor, state: State | None = None, return_state: bool = False):
        """Returns [B, C, floor(T / 2), H, W], or `(y, state)` with `return_state=True`."""
        flow = StateFlow(state, return_state)
        y = flow("conv", self.conv, x)
        padded = _continued(y, None if state is None else state["pool"], 1)
        count = _num_windows(padded.shape[2], 2)
        if flow.following is not None:
            flow.following["pool"] = owned(padded[:, :, 2 * count :])
        first, second, third = (padded[:, :, i : i + 2 * count : 2].float() for i in range(3))
        return flow.result(((first + second + third) / 3).to(y.dtype))


class PixelUpsample(nn.Module):
    """Returns twice as many frames: [B, C, T, H, W] -> [B, C, 2 T, H, W]; streams as its `conv`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = CausalConv1d(channels, channels)

    def forward(self, x: Tensor, state: Tensor | None = None, return_state: bool = False):
        """Returns [B, C, 2 T, H, W], or `(y, state)` with `return_state=True`."""
        return self.conv(repeat_nearest(x, 2, 1), state, return_state)


class VolumeDownsample(nn.Module):
    """Returns [B, C, floor(T / st), floor(H / 2), floor(W / 2)] from [B, C, T, H, W].

    Zeros are appended at the right and the bottom only, and precede the clip. With
    `return_state=True`, `(y, state)`; chunks of any lengths continue exactly.

    Args:
        channels: C.
        time_stride: st, 1 or 2.
    """

    def __init__(self, channels: int, time_stride: int) -> None:
        super().__init__()
        self.time_stride = time_stride
        self.conv = nn.Conv3d(channels, channels, 3, stride=(time_stride, 2, 2))

    def forward(self, x: Tensor, state: Tensor | None = None, return_state: bool = False):
        """Returns the halved x, or `(y, state)` with `return_state=True`."""
        padded = _continued(x, state, 3 - self.time_stride)
        batch, channels, _, height, width = x.shape
        count = _num_windows(padded.shape[2], self.time_stride)
        if count:
            y = self.conv(F.pad(padded, (0, 1 - width % 2, 0, 1 - height % 2)))
        else:
            y = x.new_empty((batch, channels, 0, height // 2, width // 2))
        return (y, owned(padded[:, :, self.time_stride * count :])) if return_state else y


class VolumeUpsample(nn.Module):
    """Returns [B, C, st T, 2 H, 2 W] from [B, C, T, H, W]; streams as its `conv`.

    Args:
        channels: C.
        time_factor: st, 1 or 2.
    """

    def __init__(self, channels: int, time_factor: int) -> None:
        super().__init__()
        self.time_factor = time_factor
        self.conv = CausalConv3d(channels, channels, 3)

    def forward(self, x: Tensor, state: Tensor | None = None, return_state: bool = False):
        """Returns the doubled x, or `(y, state)` with `return_state=True`."""
        return self.conv(repeat_nearest(x, self.time_factor, 2), state, return_state)


class VolumeResidualBlock(nn.Module):
    """Returns [B, C_out, T, H, W] from [B, C_in, T, H, W], mixed over space and time.

    State `{"conv1": frames, "conv2": frames}`; a 1x1x1 shortcut where the width changes.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, norm_type: str = "layernorm"
    ) -> None:
        super().__init__()
        self.norm1 = norm_act(in_channels, norm_type)
        self.conv1 = CausalConv3d(in_channels, out_channels, 3)
        self.norm2 = norm_act(out_channels, norm_type)
        self.conv2 = CausalConv3d(out_channels, out_channels, 3)
        self.nin_shortcut = (
            CausalConv3d(in_channels, out_channels, 1) if in_channels != out_channels else None
        )

    def forward(self, x: Tensor, state: State | None = None, return_state: bool = False):
        """Returns y [B, C_out, T, H, W], or `(y, state)` with `return_state=True`."""
        flow = StateFlow(state, return_state)
        h = flow("conv1", self.conv1, self.norm1(x))
        h = flow("conv2", self.conv2, self.norm2(h))
        skip = x if self.nin_shortcut is None else self.nin_shortcut(x)
        return flow.result(skip + h)
