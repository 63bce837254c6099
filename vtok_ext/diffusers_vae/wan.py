"""Replacements for layers of AutoencoderKLWan (Wan 2.1 and 2.2); see `_patching`.

    residual block   norm + SiLU write the padded buffer of a convolution, the second adds the sum
    halving          zeros at the right and bottom are written with the copy that they need anyway
    doubling         the 3x3 kernel runs on pixels before they are repeated

The cache protocol is diffusers': a list `feat_cache` with one entry per cached layer in the order
of the calls, `feat_idx[0]` the next one. An entry holds the last two frames before a convolution.
Source: diffusers 0.42.1, models/autoencoders/autoencoder_kl_wan.py; Wan (arXiv 2503.20314).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders import autoencoder_kl_wan as wan
from torch import Tensor, nn

from vtok_ext.diffusers_vae._fused import (
    channels_last,
    frame_conv,
    halving_conv,
    is_idle_dropout,
    is_plain,
    is_plain_conv2d,
    owned,
    takes,
)
from vtok_ext.ops.causal_conv3d import causal_conv3d
from vtok_ext.ops.norm_act import norm_act

# F.normalize divides by max(norm, 1e-12). With this eps a zero vector gives zero as well, and no
# vector longer than 1e-12 is changed.
_EPS = 1e-30
_CACHED_FRAMES = 2
_REPEATED = "Rep"  # diffusers' mark of a doubling layer that has seen the first latent only


def _normalised(x: Tensor, norm: WanRMS_norm, act: bool, **options: Any) -> Tensor:
    """Returns silu(norm(x)), or norm(x), of [B, C, T, H, W]; options of `norm_act`."""
    bias = norm.bias.flatten() if isinstance(norm.bias, Tensor) else None
    return norm_act(x, norm.gamma.flatten(), bias, norm="rms", act=act, eps=_EPS, **options)


class WanRMS_norm(wan.WanRMS_norm):
    """RMS norm over channels of videos [B, C, T, H, W] or images [N, C, H, W] in one pass."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns the normalised `x`."""
        video = x.unsqueeze(2) if x.dim() == 4 else x
        if not self.channel_first or not takes(video, self.gamma):
            return super().forward(x)
        y = _normalised(video, self, act=False)
        return y.squeeze(2) if x.dim() == 4 else y


def _front_frames(
    cache: Tensor | None,  # [B, C, n, H, W]
    count: int,
    x: Tensor,  # [B, C, T, H, W]
) -> Tensor | None:
    """Returns the `count` frames before `x` that `cache` stands for, None for zeros."""
    if cache is None or count == 0:
        return None
    cache = cache.to(x.device)
    if cache.shape[2] < count:
        return F.pad(cache, (0, 0, 0, 0, count - cache.shape[2], 0))
    return cache[:, :, cache.shape[2] - count :]


def _last_frames(
    cache: Tensor | None,  # [B, C, n, H, W]
    x: Tensor,  # [B, C, T, H, W]
) -> Tensor:
    """Returns the owned last two frames of a stream: of `x`, or with the one before it."""
    last = x[:, :, -_CACHED_FRAMES:]
    if last.shape[2] < _CACHED_FRAMES and cache is not None:
        before = cache[:, :, -1:].to(device=x.device, dtype=x.dtype)
        return channels_last(torch.cat([before, last], dim=2))
    return owned(last)


class WanCausalConv3d(wan.WanCausalConv3d):
    """Causal convolution whose front frames are zeros or the cached ones."""

    def forward(self, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        """Returns the convolution of `x` behind `cache_x`."""
        if self.padding_mode != "zeros" or not takes(x, self.weight):
            return super().forward(x, cache_x)
        left, right, top, bottom, front, _ = self._padding
        return causal_conv3d(
            x,
            self.weight,
            self.bias,
            stride=self.stride,
            dilation=self.dilation,
            groups=self.groups,
            front=front,
            spatial_padding=((top, bottom), (left, right)),
            state=_front_frames(cache_x, front, x),
        )


def _is_plain_conv(conv: Any) -> bool:
    """Returns whether `conv` is an untouched 3x3x3 convolution of stride 1."""
    return (
        is_plain(conv, WanCausalConv3d)
        and conv.kernel_size == (3, 3, 3)
        and (*conv.stride, *conv.dilation) == (1,) * 6
        and conv._padding == (1, 1, 1, 1, 2, 0)
    )


def _norm_conv(
    x: Tensor,  # [B, C, T, H, W]
    norm: WanRMS_norm,
    conv: WanCausalConv3d,
    feat_cache: list | None,
    feat_idx: list,
    residual: Tensor | None = None,  # as the result
) -> Tensor:
    """Returns conv(silu(norm(x))) + residual; reads and replaces the next entry of `feat_cache`."""
    state = None
    if feat_cache is not None:
        state = _front_frames(feat_cache[feat_idx[0]], _CACHED_FRAMES, x)
    padded = _normalised(x, norm, act=True, front=_CACHED_FRAMES, state=state)
    if feat_cache is not None:
        feat_cache[feat_idx[0]] = owned(padded[:, :, -_CACHED_FRAMES:])
        feat_idx[0] += 1
    if residual is not None:
        residual = residual.to(padded.dtype)
    return causal_conv3d(
        padded, conv.weight, conv.bias, groups=conv.groups, temporal="valid", residual=residual
    )


def _is_fusible(x: Tensor, *pairs: tuple[Any, Any]) -> bool:
    """Returns whether each (norm, convolution) can run as one unit on `x`."""
    return all(
        is_plain(norm, WanRMS_norm) and _is_plain_conv(conv) and takes(x, conv.weight)
        for norm, conv in pairs
    )


class WanResidualBlock(wan.WanResidualBlock):
    """norm - SiLU - conv - norm - SiLU - conv + shortcut in two passes and two convolutions."""

    def forward(self, x: Tensor, feat_cache: list | None = None, feat_idx: Any = (0,)) -> Tensor:
        """Returns the block of `x`; `feat_cache` and `feat_idx` as in diffusers."""
        pairs = (self.norm1, self.conv1), (self.norm2, self.conv2)
        if not (
            _is_fusible(x, *pairs)
            and is_plain(self.nonlinearity, nn.SiLU)
            and is_idle_dropout(self.dropout)
        ):
            return super().forward(x, feat_cache, feat_idx)
        shortcut = self.conv_shortcut(x)
        y = _norm_conv(x, self.norm1, self.conv1, feat_cache, feat_idx)
        return _norm_conv(y, self.norm2, self.conv2, feat_cache, feat_idx, residual=shortcut)


class WanResample(wan.WanResample):
    """Halving or doubling of height and width, and of the frame rate where the mode says "3d"."""

    def forward(self, x: Tensor, feat_cache: list | None = None, feat_idx: Any = (0,)) -> Tensor:
        """Returns the resampled `x`; `feat_cache` and `feat_idx` as in diffusers."""
        if not self._is_fusible(x):
            return super().forward(x, feat_cache, feat_idx)
        if self.mode == "upsample3d" and feat_cache is not None:
            x = self._double_frames(x, feat_cache, feat_idx)
        if self.mode.startswith("upsample"):
            return frame_conv(x, self.resample[1], upsample="space")
        x = halving_conv(x, self.resample[1])
        if self.mode == "downsample3d" and feat_cache is not None:
            x = self._halve_frames(x, feat_cache, feat_idx)
        return x

    def _is_fusible(self, x: Tensor) -> bool:
        first = {"upsample": wan.WanUpsample, "downsample": nn.ZeroPad2d}.get(self.mode[:-2])
        return (
            first is not None
            and is_plain(self.resample, nn.Sequential)
            and is_plain(self.resample[0], first)
            and is_plain_conv2d(self.resample[1])
            and takes(x, self.resample[1].weight)
        )

    def _double_frames(self, x: Tensor, feat_cache: list, feat_idx: list) -> Tensor:
        index = feat_idx[0]
        feat_idx[0] += 1
        cache = feat_cache[index]
        if cache is None:
            feat_cache[index] = _REPEATED
            return x
        if isinstance(cache, str):  # what precedes the second latent is zeros, not the first one
            y = self.time_conv(x)
            cache = torch.zeros_like(x[:, :, :1])
        else:
            y = self.time_conv(x, cache)
        feat_cache[index] = _last_frames(cache, x)
        # Channels are [2, C]; both halves become neighbouring frames.
        y = channels_last(y).permute(0, 2, 3, 4, 1).unflatten(4, (2, -1))
        return y.permute(0, 1, 4, 2, 3, 5).flatten(1, 2).permute(0, 4, 1, 2, 3)

    def _halve_frames(self, x: Tensor, feat_cache: list, feat_idx: list) -> Tensor:
        index = feat_idx[0]
        feat_idx[0] += 1
        cache, feat_cache[index] = feat_cache[index], owned(x[:, :, -1:])
        if cache is None:
            return x
        return self.time_conv(torch.cat([cache[:, :, -1:], x], dim=2))


def _head(
    network: WanEncoder3d | WanDecoder3d, x: Tensor, feat_cache: list | None, feat_idx: list
) -> Tensor:
    """Returns norm, SiLU and convolution that end both networks."""
    if _is_fusible(x, (network.norm_out, network.conv_out)) and is_plain(
        network.nonlinearity, nn.SiLU
    ):
        return _norm_conv(x, network.norm_out, network.conv_out, feat_cache, feat_idx)
    x = network.nonlinearity(network.norm_out(x))
    return _cached_conv(network.conv_out, x, feat_cache, feat_idx)


def _cached_conv(
    conv: nn.Module,
    x: Tensor,  # [B, C, T, H, W]
    feat_cache: list | None,
    feat_idx: list,
) -> Tensor:
    """Returns conv(x) behind the next entry of `feat_cache`, which is replaced."""
    if feat_cache is None:
        return conv(x)
    index = feat_idx[0]
    feat_idx[0] += 1
    cache, feat_cache[index] = feat_cache[index], _last_frames(feat_cache[index], x)
    return conv(x, cache)


class WanEncoder3d(wan.WanEncoder3d):
    """The encoder, with the head as one unit."""

    def forward(self, x: Tensor, feat_cache: list | None = None, feat_idx: Any = (0,)) -> Tensor:
        """Returns raw moments of the next frames."""
        x = _cached_conv(self.conv_in, x, feat_cache, feat_idx)
        for layer in self.down_blocks:
            if feat_cache is None:
                x = layer(x)
            elif isinstance(layer, wan.WanAttentionBlock):
                x = layer(x)  # takes no cache
            else:
                x = layer(x, feat_cache=feat_cache, feat_idx=feat_idx)
        x = self.mid_block(x, feat_cache=feat_cache, feat_idx=feat_idx)
        return _head(self, x, feat_cache, feat_idx)


class WanDecoder3d(wan.WanDecoder3d):
    """The decoder, with the head as one unit."""

    def forward(
        self,
        x: Tensor,
        feat_cache: list | None = None,
        feat_idx: Any = (0,),
        first_chunk: bool = False,
    ) -> Tensor:
        """Returns the frames of the next latents."""
        x = _cached_conv(self.conv_in, x, feat_cache, feat_idx)
        x = self.mid_block(x, feat_cache=feat_cache, feat_idx=feat_idx)
        for block in self.up_blocks:
            x = block(x, feat_cache=feat_cache, feat_idx=feat_idx, first_chunk=first_chunk)
        return _head(self, x, feat_cache, feat_idx)


REPLACEMENTS: dict[type, type] = {
    wan.WanRMS_norm: WanRMS_norm,
    wan.WanCausalConv3d: WanCausalConv3d,
    wan.WanResidualBlock: WanResidualBlock,
    wan.WanResample: WanResample,
    wan.WanEncoder3d: WanEncoder3d,
    wan.WanDecoder3d: WanDecoder3d,
}
FORWARDS: dict[type[nn.Module], str] = {
    wan.WanRMS_norm: "6cf83b813f9f",
    wan.WanCausalConv3d: "4e1b05249494",
    wan.WanResidualBlock: "c80e6b353b79",
    wan.WanResample: "b4144ddc2583",
    wan.WanEncoder3d: "8e30020c0ae2",
    wan.WanDecoder3d: "0aa170ab4410",
    wan.WanUpsample: "a6c3f8385cfa",
}
