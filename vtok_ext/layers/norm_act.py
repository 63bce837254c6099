"""Normalisation of video tensors [B, C, T, H, W], optionally followed by x * sigmoid(x).

    NormAct       LayerNorm over the C values of one position, eps 1e-6
    GroupNormAct  32 groups of channels, statistics over one frame, or over one pixel of one frame

Neither looks across time unless asked to: both are causal and need no streaming state.
Source: VidTok (arXiv 2412.13061), section 3.2 (why LayerNorm) and its group-norm option.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok_ext.layers._ownership import may_overwrite

EPS = 1e-6
NUM_GROUPS = 32
NORM_TYPES = ("layernorm", "groupnorm")


def _activate(y: Tensor, norm: nn.Module, act: bool) -> Tensor:
    """Returns silu(y) in the autocast dtype (normalisations may have left it in float32)."""
    if act:
        y = F.silu(y, inplace=may_overwrite(norm))
    if torch.is_autocast_enabled(y.device.type):
        y = y.to(torch.get_autocast_dtype(y.device.type))
    return y


class NormAct(nn.Module):
    """Returns silu(LayerNorm over channels) of [B, C, T, H, W]; parameters in `norm`.

    Equivalent to: `F.silu(F.layer_norm(x.movedim(1, -1), (C,), weight, bias, eps).movedim(-1, 1))`.

    Args:
        channels: C.
        act: whether x * sigmoid(x) follows.
        eps: added to the variance.
    """

    def __init__(self, channels: int, *, act: bool = True, eps: float = EPS) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=eps)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        """Returns a tensor as x [B, C, T, H, W]."""
        y = self.norm(x.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)
        return _activate(y, self.norm, self.act)


class GroupNormAct(nn.GroupNorm):
    """Returns silu(GroupNorm) of [B, C, T, H, W] with statistics per frame, pixel or clip.

    Args:
        channels: C, a multiple of 32.
        act: whether x * sigmoid(x) follows.
        per_pixel: statistics over the C / 32 values of one group at one pixel of one frame. This is
            what the published temporal block computes; with few channels it is ill conditioned.
        across_time: statistics over all frames, of the whole picture or of one pixel: not causal.
    """

    def __init__(
        self,
        channels: int,
        *,
        act: bool = True,
        per_pixel: bool = False,
        across_time: bool = False,
    ) -> None:
        if channels % NUM_GROUPS:
            raise ValueError(
                f"norm_act: channels must be a multiple of {NUM_GROUPS} for groupnorm, "
                f"got {channels}"
            )
        super().__init__(NUM_GROUPS, channels, eps=EPS)
        self.act = act
        self.apart = ([] if across_time else [2]) + ([3, 4] if per_pixel else [])

    def forward(self, x: Tensor) -> Tensor:
        """Returns a tensor as x [B, C, T, H, W]."""
        # Positions along `apart` have statistics of their own: they become batch items.
        leading = list(range(1, 1 + len(self.apart)))
        items = x.movedim(self.apart, leading)
        y = super().forward(items.flatten(0, len(leading))).reshape(items.shape)
        y = y.movedim(leading, self.apart)
        return F.silu(y) if self.act else y


def norm_act(
    channels: int,
    norm_type: str,
    *,
    act: bool = True,
    per_pixel: bool = False,
    across_time: bool = False,
) -> nn.Module:
    """Returns the normalisation layer called `norm_type`, "layernorm" or "groupnorm"."""
    if norm_type == "layernorm":
        return NormAct(channels, act=act)
    if norm_type == "groupnorm":
        return GroupNormAct(channels, act=act, per_pixel=per_pixel, across_time=across_time)
    raise ValueError(f"norm_act: norm_type must be one of {NORM_TYPES}, got {norm_type!r}")
