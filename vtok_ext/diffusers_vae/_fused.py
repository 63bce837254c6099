"""What the replaced layers of all four autoencoders share: when fusing is right, and how.

A residual block or a change of resolution is a fusion unit: it reads the parameters of its children
and does their work in fewer passes, in channels_last_3d memory. It does so only while calling the
children would do nothing else, see `is_plain`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok_ext.layers._hooks import has_hooks
from vtok_ext.ops._dtypes import autocast_dtype
from vtok_ext.ops.causal_conv3d import causal_conv3d
from vtok_ext.ops.norm_act import norm_act

LAYOUT = torch.channels_last_3d


def is_plain(module: Any, kind: type[nn.Module]) -> bool:
    """Returns whether calling `module` runs `kind.forward` on its own parameters and nothing else.

    Adapters and parametrizations have another class; accelerate and diffusers offload and cast by
    a forward of the instance.
    """
    return type(module) is kind and not has_hooks(module)


def is_idle_dropout(module: Any) -> bool:
    """Returns whether `module` is a dropout that changes nothing now."""
    return is_plain(module, nn.Dropout) and (not module.training or module.p == 0)


def takes(
    x: Tensor,  # [B, C, T, H, W]
    weight: Tensor,
) -> bool:
    """Returns whether the ops compute `x` with `weight` in the dtype that PyTorch would."""
    if x.dim() != 5 or x.device != weight.device or x.device.type not in ("cpu", "cuda"):
        return False
    if x.is_cuda and x.dtype == torch.float64:
        return False
    return x.dtype == weight.dtype or autocast_dtype(x.device.type) is not None


def channels_last(x: Tensor) -> Tensor:
    """Returns `x` [B, C, T, H, W] in channels_last_3d memory: itself, or a copy."""
    return x.contiguous(memory_format=LAYOUT)


def owned(frames: Tensor) -> Tensor:
    """Returns a copy of `frames` [B, C, T, H, W] that keeps no activation alive."""
    return frames.clone(memory_format=LAYOUT)


def may_write() -> bool:
    """Returns whether a fresh tensor may be overwritten: no gradients, and not while compiling."""
    return not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def frame_conv(
    x: Tensor,  # [B, C, T, H, W]
    conv: Any,
    **options: Any,
) -> Tensor:
    """Returns `conv` of every frame; options of `causal_conv3d` that are no sizes."""
    (top, left) = conv.padding
    options.setdefault("spatial_padding", ((top, top), (left, left)))
    return causal_conv3d(
        x,
        conv.weight.unsqueeze(2),
        conv.bias,
        stride=(1, *conv.stride),
        dilation=(1, *conv.dilation),
        groups=conv.groups,
        temporal="valid",
        **options,
    )


def halving_conv(
    x: Tensor,  # [B, C, T, H, W]
    conv: Any,
) -> Tensor:
    """Returns `conv` of every frame behind a row and a column of zeros at the bottom and right."""
    (top, left) = conv.padding
    return frame_conv(x, conv, spatial_padding=((top, top + 1), (left, left + 1)))


def is_plain_conv2d(conv: Any) -> bool:
    """Returns whether `conv` is a plain zero padded Conv2d whose sizes `frame_conv` takes."""
    return (
        is_plain(conv, nn.Conv2d)
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
    )


def flat_frames(
    x: Tensor,  # [B, C, T, H, W]
) -> Tensor:
    """Returns [B, C, 1, T H, W] in channels_last_3d memory: all frames as one, mostly a view."""
    batch, channels, frames, height, width = x.shape
    x = channels_last(x).permute(0, 2, 3, 4, 1)
    return x.reshape(batch, 1, frames * height, width, channels).permute(0, 4, 1, 2, 3)


def group_norm_act(
    x: Tensor,  # [B, C, T, H, W]
    norm: nn.GroupNorm,
    act: bool,
) -> Tensor:
    """Returns silu(norm(x)), or norm(x), with statistics over all frames: not causal."""
    y = norm_act(
        flat_frames(x),
        norm.weight,
        norm.bias,
        norm="group",
        num_groups=norm.num_groups,
        act=act,
        eps=norm.eps,
    )
    return y.permute(0, 2, 3, 4, 1).reshape(x.movedim(1, -1).shape).permute(0, 4, 1, 2, 3)


class GroupNorm(nn.GroupNorm):
    """GroupNorm of videos over all frames of a call, in channels_last_3d memory."""

    def forward(self, input: Tensor) -> Tensor:
        """Returns the normalised `input`."""
        if not self.affine or not takes(input, self.weight):
            return super().forward(input)
        return group_norm_act(input, self, act=False)


def repeat_frames(
    x: Tensor,  # [B, C, T, H, W]
    first_alone: bool,
) -> Tensor:
    """Returns every frame twice, the first one once if `first_alone`; channels_last_3d memory."""
    x = channels_last(x).permute(0, 2, 3, 4, 1)
    x = x.repeat_interleave(2, 1)[:, int(first_alone) :]
    return x.permute(0, 4, 1, 2, 3)


def surround(
    x: Tensor,  # [B, C, T, H, W]
    padding: tuple[int, int, int, int, int, int],
) -> Tensor:
    """Returns `x` with copies of its outermost values, sides as F.pad orders them."""
    return F.pad(channels_last(x), padding, mode="replicate") if any(padding) else x
