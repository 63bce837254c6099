"""Normalisation of video tensors [B, C, T, H, W], optionally followed by x * sigmoid(x).

    NormAct       LayerNorm or RMS norm over the C values of one position, eps 1e-6
    GroupNormAct  32 groups of channels, statistics over one frame, or over one pixel of one frame

Neither looks across time unless asked to: both are causal and need no streaming state. Both can
return their result inside the padded buffer of the convolution that follows; see `vt.norm_act`.
Source: VidTok (arXiv 2412.13061), section 3.2 (why LayerNorm) and its group-norm option; ProMAG
(arXiv 2501.05442) for groups without mean subtraction.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok_ext.layers._hooks import has_hooks
from vtok_ext.layers._ownership import may_overwrite
from vtok_ext.layers.causal_conv3d import pad_front
from vtok_ext.ops._dtypes import autocast_dtype
from vtok_ext.ops.norm_act import norm_act as fused_norm_act

EPS = 1e-6
NUM_GROUPS = 32
NORM_TYPES = ("layernorm", "groupnorm")


def _op_takes(x: Tensor) -> bool:
    """Returns whether the op has a kernel for x here; plain PyTorch takes everything."""
    return x.device.type == "cpu" or (x.is_cuda and x.dtype != torch.float64)


def _as_arguments(norm: nn.Module) -> dict[str, Any] | None:
    """Returns the arguments of the op that stand for calling `norm`, None where none do.

    A replaced or parametrized module has another class; a hook would not be called.
    """
    if has_hooks(norm):
        return None
    if type(norm) is nn.LayerNorm:
        return {"norm": "layer", "weight": norm.weight, "bias": norm.bias, "eps": norm.eps}
    if type(norm) is nn.RMSNorm and norm.eps is not None:
        return {"norm": "rms", "weight": norm.weight, "eps": norm.eps}
    return None


def _finish(
    y: Tensor,
    norm: nn.Module,
    act: bool,
    front: int,
    temporal: str,
    state: Tensor | None,
    border: tuple[int, int],
) -> Tensor:
    """Returns what the op makes of the normalised `y` that `norm` returned, in plain PyTorch."""
    if act:
        y = F.silu(y, inplace=may_overwrite(norm))
    y = y.to(autocast_dtype(y.device.type) or y.dtype)  # normalisations may have left it in float32
    y = pad_front(y, front, state, temporal)
    return F.pad(y, (0, border[1], 0, border[0])) if any(border) else y


class NormAct(nn.Module):
    """Returns silu(LayerNorm over channels) of [B, C, T, H, W]; parameters in `norm`.

    Equivalent to: `F.silu(F.layer_norm(x.movedim(1, -1), (C,), weight, bias, eps)).movedim(-1, 1)`.

    Args:
        channels: C.
        norm: "layer", or "rms", which subtracts no mean and has no bias.
        act: whether x * sigmoid(x) follows.
        eps: added to the variance or mean square.
    """

    def __init__(
        self, channels: int, *, norm: str = "layer", act: bool = True, eps: float = EPS
    ) -> None:
        if norm not in ("layer", "rms"):
            raise ValueError(f'norm_act: norm must be "layer" or "rms", got {norm!r}')
        super().__init__()
        self.norm = (nn.LayerNorm if norm == "layer" else nn.RMSNorm)(channels, eps=eps)
        self.act = act

    def forward(
        self,
        x: Tensor,  # [B, C, T, H, W]
        *,
        front: int = 0,
        temporal: str = "zeros",
        state: Tensor | None = None,  # [B, C, front, H, W]
        border: tuple[int, int] = (0, 0),
    ) -> Tensor:
        """Returns [B, C, front + T, H + bottom, W + right] in channels_last_3d memory.

        Frames and border as `vt.norm_act` describes them; without any, a tensor as x.
        """
        arguments = _as_arguments(self.norm)
        if arguments is None or not _op_takes(x):
            y = self.norm(x.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)
            return _finish(y, self.norm, self.act, front, temporal, state, border)
        return fused_norm_act(
            x,
            **arguments,
            act=self.act,
            front=front,
            temporal=temporal,
            state=state,
            border=border,
        )


class GroupNormAct(nn.GroupNorm):
    """Returns silu(GroupNorm) of [B, C, T, H, W] with statistics per frame, pixel or clip.

    Args:
        channels: C, a multiple of num_groups.
        num_groups: groups of channels.
        act: whether x * sigmoid(x) follows.
        per_pixel: statistics over the C / 32 values of one group at one pixel of one frame. This is
            what the published temporal block computes; with few channels it is ill conditioned.
        across_time: statistics over all frames, of the whole picture or of one pixel: not causal.
        subtract_mean: False divides by the root of the mean square of a group and subtracts
            nothing; ProMAG's norm, which leaves no spots in the corners.
    """

    def __init__(
        self,
        channels: int,
        *,
        num_groups: int = NUM_GROUPS,
        act: bool = True,
        per_pixel: bool = False,
        across_time: bool = False,
        subtract_mean: bool = True,
    ) -> None:
        if channels % num_groups:
            raise ValueError(
                f"norm_act: channels must be a multiple of {num_groups} for groupnorm, "
                f"got {channels}"
            )
        if (per_pixel or across_time) and not subtract_mean:
            raise ValueError(
                "norm_act: subtract_mean must be True for statistics per pixel or across time, "
                "got False"
            )
        super().__init__(num_groups, channels, eps=EPS)
        self.act, self.subtract_mean = act, subtract_mean
        self.apart = ([] if across_time else [2]) + ([3, 4] if per_pixel else [])

    def forward(
        self,
        x: Tensor,  # [B, C, T, H, W]
        *,
        front: int = 0,
        temporal: str = "zeros",
        state: Tensor | None = None,  # [B, C, front, H, W]
        border: tuple[int, int] = (0, 0),
    ) -> Tensor:
        """Returns [B, C, front + T, H + bottom, W + right].

        Frames and border as `vt.norm_act` describes them; without any, a tensor as x.
        """
        if self.subtract_mean and not (self.apart == [2] and _op_takes(x)):
            y = self._normalise_apart(x)
            return _finish(y, self, self.act, front, temporal, state, border)
        return fused_norm_act(
            x,
            self.weight,
            self.bias,
            norm="group" if self.subtract_mean else "group_rms",
            num_groups=self.num_groups,
            act=self.act,
            eps=self.eps,
            front=front,
            temporal=temporal,
            state=state,
            border=border,
        )

    def _normalise_apart(self, x: Tensor) -> Tensor:
        # Positions along `apart` have statistics of their own: they become batch items.
        leading = list(range(1, 1 + len(self.apart)))
        items = x.movedim(self.apart, leading)
        y = super().forward(items.flatten(0, len(leading))).reshape(items.shape)
        return y.movedim(leading, self.apart)


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
