"""Halving and doubling the frame rate with blended branches, a = sigmoid(mix_factor):

    down: out = a * mean over 3 frames, stride 2  + (1 - a) * causal conv 3x3x3, stride (2, 1, 1)
    up:   x' = every frame twice;  out = a * x'   + (1 - a) * causal conv 3x3x3 (x')

Each is one fusion unit: it reads its own `mix_factor` and runs its child convolution on frames that
it pads once for both branches. Source: VidTok (arXiv 2412.13061), section 3.2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vtok_ext.layers._state import State, StateFlow
from vtok_ext.layers.alpha_blend import INITIAL_MIX_FACTOR, alpha_blend
from vtok_ext.layers.causal_conv3d import CausalConv3d
from vtok_ext.layers.spatial_resample import repeat_nearest


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


class TemporalDownsample(nn.Module):
    """Returns half as many frames: [B, C, T, H, W] -> [B, C, floor(T / 2), H, W].

    One frame of zeros (or a copy of the first, `temporal="replicate"`) precedes the clip in both
    branches. With `return_state=True`, `(y, state)`; any chunk lengths continue exactly, an odd
    frame waits in the state.
    """

    def __init__(self, channels: int, *, temporal: str = "zeros") -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, 3, stride=2, temporal=temporal)
        self.mix_factor = nn.Parameter(torch.tensor([INITIAL_MIX_FACTOR]))

    def forward(self, x: Tensor, state: Tensor | None = None, return_state: bool = False):
        """Returns [B, C, floor(T / 2), H, W], or `(y, state)` with `return_state=True`."""
        padded = self.conv.pad(x, state)
        y = self.conv.convolve(padded)
        if y.shape[2] > 0:
            y = alpha_blend(mean_of_three(padded), y, self.mix_factor)
        return (y, self.conv.carry(padded)) if return_state else y


class TemporalUpsample(nn.Module):
    """Returns twice as many frames: [B, C, T, H, W] -> [B, C, 2 T, H, W].

    With `return_state=True`, `(y, {"conv": frames})`.
    """

    def __init__(self, channels: int, *, temporal: str = "zeros") -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, 3, temporal=temporal)
        self.mix_factor = nn.Parameter(torch.tensor([INITIAL_MIX_FACTOR]))

    def forward(self, x: Tensor, state: State | None = None, return_state: bool = False):
        """Returns [B, C, 2 T, H, W], or `(y, state)` with `return_state=True`."""
        flow = StateFlow(state, return_state)
        repeated = repeat_nearest(x, 2, 1)
        y = alpha_blend(repeated, flow("conv", self.conv, repeated), self.mix_factor)
        return flow.result(y)
