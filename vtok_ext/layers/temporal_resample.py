"""Halving and doubling the frame rate with blended branches, a = sigmoid(mix_factor):

    down: out = a * mean over 3 frames, stride 2  + (1 - a) * causal conv 3x3x3, stride (2, 1, 1)
    up:   x' = twice as many frames;  out = a * x' + (1 - a) * causal conv 3x3x3 (x')

Each is one fusion unit: it reads its own `mix_factor` and runs its child convolution on frames that
it pads once for both branches. Source: VidTok (arXiv 2412.13061), section 3.2; release 1.1 for
linear upsampling.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok_ext.layers._state import State, StateFlow, owned
from vtok_ext.layers.alpha_blend import INITIAL_MIX_FACTOR, alpha_blend
from vtok_ext.layers.causal_conv3d import CausalConv3d, VolumeConv3d, check_temporal
from vtok_ext.layers.spatial_resample import repeat_nearest

INTERPOLATIONS = ("nearest", "linear")


def mean_of_three(
    padded: Tensor,  # [B, C, T, H, W], T >= 3
) -> Tensor:
    """Returns the mean over windows of 3 frames with stride 2, [B, C, (T - 1) // 2, H, W].

    Equivalent to: `F.avg_pool3d(padded, (3, 1, 1), (2, 1, 1))`, as sums of time slices: these keep
    channels_last_3d memory and exist for half tensors on the CPU, which the pooling does not.
    """
    dtype = torch.promote_types(padded.dtype, torch.float32)
    last = (padded.shape[2] - 3) // 2 * 2
    first = padded[:, :, 0 : last + 1 : 2].to(dtype)
    total = first + padded[:, :, 1 : last + 2 : 2] + padded[:, :, 2 : last + 3 : 2]
    return (total / 3).to(padded.dtype)


def interpolate_linear(
    x: Tensor,  # [B, C, T, H, W]
) -> Tensor:
    """Returns twice as many frames, half-pixel centres, neighbours clamped at both ends.

    y[2i] = .25 x[i - 1] + .75 x[i],  y[2i + 1] = .75 x[i] + .25 x[i + 1]
    """
    if x.shape[2] == 0:
        return x
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    before = torch.cat([exact[:, :, :1], exact[:, :, :-1]], dim=2)
    after = torch.cat([exact[:, :, 1:], exact[:, :, -1:]], dim=2)
    pairs = torch.stack([before.lerp(exact, 0.75), exact.lerp(after, 0.25)], dim=3)
    y = pairs.flatten(2, 3).to(x.dtype)
    return y.contiguous(memory_format=torch.channels_last_3d)


def _refuse_streams(op: str, state: object, return_state: bool) -> None:
    if state is not None or return_state:
        raise ValueError(f"{op}: a layer with causal=False must be given whole clips, got a state")


class TemporalDownsample(nn.Module):
    """Returns half as many frames: [B, C, T, H, W] -> [B, C, floor(T / 2), H, W].

    One frame of zeros (or a copy of the first, `temporal="replicate"`) precedes the clip in both
    branches. With `return_state=True`, `(y, state)`; any chunk lengths continue exactly, an odd
    frame waits in the state.

    Args:
        channels: C.
        temporal: "zeros" or "replicate", what precedes a clip.
        causal: False appends one frame of zeros at the end instead and takes whole clips only.
    """

    conv: CausalConv3d | VolumeConv3d

    def __init__(self, channels: int, *, temporal: str = "zeros", causal: bool = True) -> None:
        super().__init__()
        check_temporal("temporal_downsample", temporal)
        self.causal = causal
        if causal:
            self.conv = CausalConv3d(channels, channels, 3, stride=2, temporal=temporal)
        else:
            stride, padding = (2, 1, 1), (0, 1, 1)
            self.conv = VolumeConv3d(channels, channels, 3, stride=stride, padding=padding)
        self.mix_factor = nn.Parameter(torch.tensor([INITIAL_MIX_FACTOR]))

    def forward(self, x: Tensor, state: Tensor | None = None, return_state: bool = False):
        """Returns [B, C, floor(T / 2), H, W], or `(y, state)` with `return_state=True`."""
        if not self.causal:
            _refuse_streams("temporal_downsample", state, return_state)
            return self._whole_clip(x)
        conv: CausalConv3d = self.conv  # type: ignore[assignment]
        padded = conv.pad(x, state)
        y = conv.convolve(padded)
        if y.shape[2] > 0:
            y = alpha_blend(mean_of_three(padded), y, self.mix_factor)
        return (y, conv.carry(padded)) if return_state else y

    def _whole_clip(self, x: Tensor) -> Tensor:
        if x.shape[2] < 2:
            raise ValueError(
                f"temporal_downsample: x must have at least 2 frames with causal=False, "
                f"got {list(x.shape)}"
            )
        padded = F.pad(x, (0, 0, 0, 0, 0, 1))
        return alpha_blend(mean_of_three(padded), self.conv(padded), self.mix_factor)


class TemporalUpsample(nn.Module):
    """Returns twice as many frames: [B, C, T, H, W] -> [B, C, 2 T, H, W].

    With `return_state=True`, `(y, state)`, state `{"conv": frames}`; chunks of any lengths continue
    exactly. Linear interpolation looks one frame ahead: with `return_state=True`, which says that
    more follows, the last frame waits in the state ("first" or "last"), and a call without it, on
    a chunk that may be empty, ends the stream and returns what waited.

    Args:
        channels: C.
        temporal: "zeros" or "replicate", what precedes a clip in the convolution.
        interpolation: "nearest" repeats every frame; "linear" interpolates at half-pixel centres,
            apart in the first `segment` frames of a clip and in the rest.
        segment: frames that the first latent frame of a clip has become here: 1, 2 or 4.
        causal: False convolves with one frame of zeros on both sides and takes whole clips only.
    """

    conv: CausalConv3d | VolumeConv3d

    def __init__(
        self,
        channels: int,
        *,
        temporal: str = "zeros",
        interpolation: str = "nearest",
        segment: int = 1,
        causal: bool = True,
    ) -> None:
        super().__init__()
        check_temporal("temporal_upsample", temporal)
        if interpolation not in INTERPOLATIONS:
            raise ValueError(
                f"temporal_upsample: interpolation must be one of {INTERPOLATIONS}, "
                f"got {interpolation!r}"
            )
        if segment < 0:
            raise ValueError(f"temporal_upsample: segment must be at least 0, got {segment}")
        self.causal = causal
        if causal:
            self.conv = CausalConv3d(channels, channels, 3, temporal=temporal)
        else:
            self.conv = VolumeConv3d(channels, channels, 3, padding=(1, 1, 1))
        self.interpolation, self.segment = interpolation, segment
        self.mix_factor = nn.Parameter(torch.tensor([INITIAL_MIX_FACTOR]))

    def forward(self, x: Tensor, state: State | None = None, return_state: bool = False):
        """Returns [B, C, 2 T, H, W], or `(y, state)` with `return_state=True`."""
        if not self.causal:
            _refuse_streams("temporal_upsample", state, return_state)
        waiting: dict[str, Tensor] = {}
        if self.interpolation == "nearest":
            upsampled = repeat_nearest(x, 2, 1)
        else:
            upsampled, waiting = self._interpolate(x, state, return_state)
        flow = StateFlow(state, return_state)
        y = alpha_blend(upsampled, flow("conv", self.conv, upsampled), self.mix_factor)
        if flow.following is not None:
            flow.following.update(waiting)
        return flow.result(y)

    def _interpolate(self, x: Tensor, state: State | None, more_follows: bool):
        """Returns the frames that are certain and new, and the frames that wait for the next call.

        They wait under "first" within the first segment and under "last" behind it; at the end of
        the first segment, which is known in advance, none wait.
        """
        segment, carried = self.segment, None
        if state is not None:
            segment = self.segment if "first" in state else 0
            carried = state.get("first", state.get("last"))
        num_carried = 0 if carried is None else carried.shape[2]
        known = x if carried is None else torch.cat([carried.to(x.dtype), x], dim=2)
        parts = (known[:, :, :segment], known[:, :, segment:])
        upsampled = torch.cat([interpolate_linear(part) for part in parts], dim=2)
        upsampled = upsampled[:, :, max(0, 2 * num_carried - 1) :]
        if not more_follows:
            return upsampled, {}
        if known.shape[2] < segment:
            waiting = {"first": owned(known)}
        elif known.shape[2] == segment:
            return upsampled, {}
        else:
            waiting = {"last": owned(known[:, :, -1:])}
        return upsampled[:, :, : max(0, upsampled.shape[2] - 1)], waiting
