"""Replacements for layers of AutoencoderKLCogVideoX; see `_patching`.

    spatial norm    group norm * y(z) + b(z): the two 1x1x1 convolutions run on the latent before it
                    is repeated, and repetition is never stored
    residual block  SiLU with the norm, the sum with the second convolution
    doubling        the 3x3 kernel runs on pixels before they are repeated, and on each frame once

The cache protocol is diffusers': nested dicts of the frames before each convolution. Kernels of one
frame read none, so none is kept for them (diffusers keeps a copy of their whole input).
Source: diffusers 0.42.1, models/autoencoders/autoencoder_kl_cogvideox.py, models/upsampling.py and
downsampling.py; CogVideoX (arXiv 2408.06072).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models import downsampling, upsampling
from diffusers.models.autoencoders import autoencoder_kl_cogvideox as cog
from torch import Tensor, nn

from vtok_ext.diffusers_vae._fused import (
    GroupNorm,
    channels_last,
    frame_conv,
    group_norm_act,
    halving_conv,
    is_idle_dropout,
    is_plain,
    is_plain_conv2d,
    may_write,
    repeat_frames,
    takes,
)
from vtok_ext.ops.causal_conv3d import causal_conv3d

Cache = dict[str, Any]


class CogVideoXCausalConv3d(cog.CogVideoXCausalConv3d):
    """Causal convolution behind copies of the first frame or the cached frames."""

    def forward(
        self, inputs: Tensor, conv_cache: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the convolution and the frames that the next call needs."""
        if not _is_plain_conv(self) or not takes(inputs, self.conv.weight):
            return super().forward(inputs, conv_cache)
        return _convolve(self, inputs, conv_cache)


def _is_plain_conv(layer: Any) -> bool:
    """Returns whether the parameters of `layer` stand for all that its child would do."""
    conv = layer.conv
    return (
        layer.pad_mode != "replicate"
        and is_plain(conv, cog.CogVideoXSafeConv3d)
        and conv.padding_mode == "zeros"
        and (*conv.stride, *conv.dilation) == (1,) * 6
        and conv.padding == (0, layer.width_pad, layer.height_pad)
        and layer.width_pad == layer.height_pad
    )


def _convolve(
    layer: CogVideoXCausalConv3d,
    x: Tensor,  # [B, C, T, H, W]
    cache: Tensor | None,  # [B, C, kt - 1, H, W]
    residual: Tensor | None = None,  # as the result
) -> tuple[Tensor, Tensor | None]:
    """Returns the convolution of `x` plus `residual`, and the frames that the next call needs."""
    conv = layer.conv
    options: dict[str, Any] = {
        "groups": conv.groups,
        "temporal": "replicate",
        "spatial_padding": ((layer.height_pad,) * 2, (layer.width_pad,) * 2),
    }
    if residual is not None:
        options["residual"] = residual
    if layer.time_kernel_size == 1:
        return causal_conv3d(x, conv.weight, conv.bias, **options), None
    return causal_conv3d(x, conv.weight, conv.bias, state=cache, return_state=True, **options)


class CogVideoXSpatialNorm3D(cog.CogVideoXSpatialNorm3D):
    """Group norm whose scale and shift are 1x1x1 convolutions of the latent."""

    def forward(
        self, f: Tensor, zq: Tensor, conv_cache: Cache | None = None
    ) -> tuple[Tensor, Cache]:
        """Returns the normalised `f` and no frames: kernels of one frame need none."""
        if not self.is_fusible(f, zq):
            return super().forward(f, zq, conv_cache)
        return self.modulated(f, zq, act=False)

    def is_fusible(
        self,
        f: Tensor,  # [B, C, T, H, W]
        zq: Tensor,  # [B, z, t, h, w]
    ) -> bool:
        """Returns whether every value of `zq` stands for a whole block of values of `f`."""
        convs = (self.conv_y, self.conv_b)
        return (
            is_plain(self.norm_layer, GroupNorm)
            and all(
                is_plain(conv, CogVideoXCausalConv3d)
                and _is_plain_conv(conv)
                and conv.conv.kernel_size == (1, 1, 1)
                and takes(zq, conv.conv.weight)
                for conv in convs
            )
            and takes(f, self.norm_layer.weight)
            and all(s % n == 0 for s, n in zip(f.shape[3:], zq.shape[3:], strict=True))
            and all(b.shape[2] % a.shape[2] == 0 for a, b in _segments(zq, f))
        )

    def modulated(self, f: Tensor, zq: Tensor, act: bool) -> tuple[Tensor, Cache]:
        """Returns norm(f) * y + b, with `act` its SiLU, and no frames."""
        y, b = (_convolve(conv, channels_last(zq), None)[0] for conv in (self.conv_y, self.conv_b))
        normalised = group_norm_act(f, self.norm_layer, act=False)
        if may_write():
            for (scale, part), (shift, _) in zip(
                _segments(y, normalised), _segments(b, normalised), strict=True
            ):
                _blocks(part, scale).mul_(_blocked(scale)).add_(_blocked(shift))
            result = F.silu(normalised, inplace=True) if act else normalised
        else:
            parts = []
            for (scale, part), (shift, _) in zip(
                _segments(y, normalised), _segments(b, normalised), strict=True
            ):
                blocks = _blocks(part, scale) * _blocked(scale) + _blocked(shift)
                parts.append(blocks.flatten(6, 7).flatten(4, 5).flatten(2, 3))
            result = torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]
            result = F.silu(result) if act else result
        return result, {"conv_y": None, "conv_b": None}


def _segments(
    small: Tensor,  # [B, C, t, h, w]
    large: Tensor,  # [B, C', T, H, W]
) -> list[tuple[Tensor, Tensor]]:
    """Returns pairs of frames that correspond evenly: the first one alone in odd clips."""
    frames = large.shape[2]
    if frames > 1 and frames % 2 == 1 and small.shape[2] > 1:
        return [(small[:, :, :1], large[:, :, :1]), (small[:, :, 1:], large[:, :, 1:])]
    return [(small, large)]


def _blocks(
    large: Tensor,  # [B, C, T, H, W]
    small: Tensor,  # [B, C, t, h, w]
) -> Tensor:
    """Returns `large` as [B, C, t, T / t, h, H / h, w, W / w], a view."""
    _, _, frames, height, width = small.shape
    large = large.unflatten(4, (width, -1)).unflatten(3, (height, -1))
    return large.unflatten(2, (frames, -1))


def _blocked(
    small: Tensor,  # [B, C, t, h, w]
) -> Tensor:
    """Returns `small` as [B, C, t, 1, h, 1, w, 1]."""
    return small[:, :, :, None, :, None, :, None]


class CogVideoXResnetBlock3D(cog.CogVideoXResnetBlock3D):
    """norm - SiLU - conv - norm - SiLU - conv + shortcut, in the encoder and the decoder."""

    def forward(
        self,
        inputs: Tensor,
        temb: Tensor | None = None,
        zq: Tensor | None = None,
        conv_cache: Cache | None = None,
    ) -> tuple[Tensor, Cache]:
        """Returns the block of `inputs` and the caches of its layers by name."""
        if temb is not None or not self._is_fusible(inputs, zq):
            return super().forward(inputs, temb, zq, conv_cache)
        old, new = conv_cache or {}, {}
        shortcut = inputs
        if self.in_channels != self.out_channels:
            if self.use_conv_shortcut:
                shortcut, new["conv_shortcut"] = self.conv_shortcut(
                    inputs, conv_cache=old.get("conv_shortcut")
                )
            else:
                shortcut = self.conv_shortcut(channels_last(inputs))
        h = self._normalised("norm1", inputs, zq, new)
        h, new["conv1"] = _convolve(self.conv1, h, old.get("conv1"))
        h = self._normalised("norm2", h, zq, new)
        shortcut = shortcut.to(h.dtype)
        h, new["conv2"] = _convolve(self.conv2, h, old.get("conv2"), residual=shortcut)
        return h, new

    def _normalised(self, name: str, x: Tensor, zq: Tensor | None, new: Cache) -> Tensor:
        norm = getattr(self, name)
        if zq is None:
            return group_norm_act(x, norm, act=True)
        x, new[name] = norm.modulated(x, zq, act=True)
        return x

    def _is_fusible(self, x: Tensor, zq: Tensor | None) -> bool:
        for norm, conv in ((self.norm1, self.conv1), (self.norm2, self.conv2)):
            if not is_plain(conv, CogVideoXCausalConv3d) or not _is_plain_conv(conv):
                return False
            if zq is None:
                fits = is_plain(norm, GroupNorm) and norm.affine
            else:
                fits = is_plain(norm, CogVideoXSpatialNorm3D) and norm.is_fusible(x, zq)
            if not fits or not takes(x, conv.conv.weight):
                return False
        return is_plain(self.nonlinearity, nn.SiLU) and is_idle_dropout(self.dropout)


class CogVideoXDownsample3D(downsampling.CogVideoXDownsample3D):
    """Means of pairs of frames, the first alone in odd clips, then half the height and width."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns the halved `x`."""
        if not is_plain_conv2d(self.conv) or not takes(x, self.conv.weight):
            return super().forward(x)
        if self.compress_time and x.shape[2] > 1:
            x = self._mean_of_pairs(channels_last(x))
        return halving_conv(x, self.conv)

    def _mean_of_pairs(self, x: Tensor) -> Tensor:
        alone = x.shape[2] % 2
        first, second = x[:, :, alone::2], x[:, :, alone + 1 :: 2]
        means = (first + second) * 0.5
        return torch.cat([x[:, :, :1], means], dim=2) if alone else means


class CogVideoXUpsample3D(upsampling.CogVideoXUpsample3D):
    """Twice the height and width, and the frames twice, the first one alone in odd clips."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Returns the doubled `inputs`; frames are repeated behind the convolution of each."""
        if not is_plain_conv2d(self.conv) or not takes(inputs, self.conv.weight):
            return super().forward(inputs)
        y = frame_conv(inputs, self.conv, upsample="space")
        frames = inputs.shape[2]
        if not self.compress_time or frames == 1:
            return y
        return repeat_frames(y, first_alone=frames % 2 == 1)


REPLACEMENTS: dict[type, type] = {
    nn.GroupNorm: GroupNorm,
    cog.CogVideoXCausalConv3d: CogVideoXCausalConv3d,
    cog.CogVideoXSpatialNorm3D: CogVideoXSpatialNorm3D,
    cog.CogVideoXResnetBlock3D: CogVideoXResnetBlock3D,
    downsampling.CogVideoXDownsample3D: CogVideoXDownsample3D,
    upsampling.CogVideoXUpsample3D: CogVideoXUpsample3D,
}
FORWARDS: dict[type[nn.Module], str] = {
    cog.CogVideoXCausalConv3d: "32f086a62ca1",
    cog.CogVideoXSpatialNorm3D: "9d16855b8237",
    cog.CogVideoXResnetBlock3D: "aa2a29e5a840",
    downsampling.CogVideoXDownsample3D: "8f67ef0131ae",
    upsampling.CogVideoXUpsample3D: "d0b5acddbcfd",
    cog.CogVideoXSafeConv3d: "5a8faf8d696f",
}
