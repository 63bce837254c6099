"""Halving and doubling the frame rate with blended branches, alpha = sigmoid(mix_factor):

    down: out = alpha * mean over 3 frames, stride 2  + (1 - alpha) * conv 3x3x3, stride (2, 1, 1)
    up:   x' = twice as many frames;  out = alpha * x' + (1 - alpha) * conv 3x3x3 (x')

Each is one fusion unit: it reads its own `mix_factor` and runs its child convolution on frames that
are padded once for both branches; the branch without parameters is computed within the blend.
Source: VidTok (arXiv 2412.13061), section 3.2; release 1.1 for linear upsampling.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vtok_ext.layers._hooks import has_hooks
from vtok_ext.layers._state import State, StateFlow, owned
from vtok_ext.layers.alpha_blend import INITIAL_MIX_FACTOR
from vtok_ext.layers.causal_conv3d import (
    CausalConv3d,
    VolumeConv3d,
    check_temporal,
    is_plain,
    pad_front,
)
from vtok_ext.ops.alpha_blend import alpha_blend
from vtok_ext.ops.temporal_resample import (
    temporal_downsample_blend,
    temporal_upsample,
    temporal_upsample_blend,
)
from vtok_ext.ops.temporal_timing import INTERPOLATIONS, carried_frames


def _refuse_streams(op: str, state: object, return_state: bool) -> None:
    if state is not None or return_state:
        raise ValueError(f"{op}: a layer with causal=False must be given whole clips, got a state")


def _front_frames(conv: CausalConv3d, x: Tensor, frames: Tensor) -> Tensor:
    """Returns the state `frames` of `conv`, which precede the upsampled `x` in its input."""
    expected = (*x.shape[:2], conv.kernel_frames - 1, *x.shape[3:])
    if frames.shape != expected:
        raise ValueError(
            f"temporal_upsample: state must be {list(expected)}, got {list(frames.shape)}"
        )
    return frames


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

    def forward(
        self,
        x: Tensor,
        state: Tensor | None = None,
        return_state: bool = False,
        *,
        first_alone: bool = False,
    ):
        """Returns [B, C, floor(T / 2), H, W], or `(y, state)` with `return_state=True`.

        With `first_alone`, the first of T frames stands for itself and an odd number of copies in
        front of it, of which one result is returned; floor((T + 1) / 2) frames. Exact where copies
        precede a clip.
        """
        if not self.causal:
            _refuse_streams("temporal_downsample", state, return_state)
            return self._whole_clip(x)
        conv: CausalConv3d = self.conv  # type: ignore[assignment]
        if first_alone and state is None:
            padded = pad_front(x, conv.kernel_frames - 1, None, conv.temporal)
        else:
            padded = conv.pad(x, state)
        y = conv.convolve(padded)
        y = temporal_downsample_blend(padded, y, self.mix_factor, padding="none")
        return (y, conv.carry(padded)) if return_state else y

    def _whole_clip(self, x: Tensor) -> Tensor:
        if x.shape[2] < 2:
            raise ValueError(
                f"temporal_downsample: x must have at least 2 frames with causal=False, "
                f"got {list(x.shape)}"
            )
        y = self.conv(torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 1)))
        return temporal_downsample_blend(x, y, self.mix_factor, padding="zeros_behind")


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

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        return_state: bool = False,
        *,
        first_alone: bool = False,
    ):
        """Returns [B, C, 2 T, H, W], or `(y, state)` with `return_state=True`.

        With `first_alone` ("linear" only), the first frame of a clip stands for the whole first
        segment, whose frames are equal where copies precede a clip: it becomes one frame and T
        frames 2 T - 1.
        """
        if not self.causal:
            _refuse_streams("temporal_upsample", state, return_state)
        if first_alone and state is None:
            return self._behind_first(x, return_state)
        if self.interpolation == "nearest":
            return self._blended(x, state, return_state, {})
        segment, carried = self._interrupted(state)
        options = {"interpolation": "linear", "segment": segment, "carried": carried}
        result = self._blended(x, state, return_state, {**options, "final": not return_state})
        if return_state:
            result[1].update(self._waiting(x, segment, carried))
        return result

    def _blended(self, x: Tensor, state: State | None, return_state: bool, options: dict):
        """Both branches and their blend, with the state of the convolution."""
        conv = self.conv
        if type(conv) is CausalConv3d and not has_hooks(conv):
            if not options and is_plain(conv.conv):
                # Kernels on the frames before repetition, with a third fewer products.
                carried = None if state is None else state["conv"]
                result = conv.conv(
                    x,
                    temporal=conv.temporal,
                    upsample="time",
                    state=carried,
                    return_state=return_state,
                )
                y, carry = result if return_state else (result, None)
                y = temporal_upsample_blend(x, y, self.mix_factor)
                return (y, {"conv": carry}) if return_state else y
            # The convolution's input is written once, behind its front frames.
            front = conv.temporal if state is None else _front_frames(conv, x, state["conv"])
            num_front = conv.kernel_frames - 1
            padded = temporal_upsample(x, num_front=num_front, front=front, **options)
            y = temporal_upsample_blend(x, conv.convolve(padded), self.mix_factor, **options)
            return (y, {"conv": conv.carry(padded)}) if return_state else y
        flow = StateFlow(state, return_state)
        upsampled = temporal_upsample(x, **options)
        y = flow("conv", conv, upsampled) if self.causal else conv(upsampled)
        return flow.result(temporal_upsample_blend(x, y, self.mix_factor, **options))

    def _behind_first(self, x: Tensor, return_state: bool):
        """Returns a clip whose first frame is copied, not interpolated; see `forward`."""
        conv, rest = self.conv, x[:, :, 1:]
        front = x[:, :, :1].expand(-1, -1, 3, -1, -1)  # two frames of context and the first itself
        padded = temporal_upsample(
            rest, interpolation="linear", final=not return_state, front=front
        )
        if type(conv) is CausalConv3d and not has_hooks(conv):
            y, carry = conv.convolve(padded), conv.carry(padded) if return_state else None
        else:
            y = conv(padded[:, :, 2:], None, return_state)
            y, carry = y if return_state else (y, None)
        y = alpha_blend(padded[:, :, 2:], y, self.mix_factor)
        if not return_state:
            return y
        last = {} if rest.shape[2] == 0 else {"last": owned(rest[:, :, -1:])}
        return y, {"conv": carry, **last}

    def _interrupted(self, state: State | None) -> tuple[int, Tensor | None]:
        """Returns the frames of the first segment, 0 behind it, and the carried frames."""
        if state is None:
            return self.segment, None
        if "first" in state:
            first = state["first"]
            return self.segment, first if first.shape[2] > 0 else None
        return 0, state.get("last")

    def _waiting(self, x: Tensor, segment: int, carried: Tensor | None) -> dict[str, Tensor]:
        """Returns the frames that the next chunk needs, under "first" within the first segment and
        "last" behind it; nothing between the two."""
        frames = carried_frames(x, segment, carried)
        if x.shape[2] + (0 if carried is None else carried.shape[2]) < segment:
            return {"first": owned(x if frames is None else frames)}
        return {} if frames is None else {"last": owned(frames)}
