"""Replacements for layers of AutoencoderVidTok; see `_patching`.

    networks        stay [B, C, T, H, W]; diffusers copies between frames, pixels and videos
    residual block  norm + SiLU write the padded buffer of a convolution, the second adds the sum
    frame rate      both branches of a blend share one padded buffer
    caches          the frames that the next chunk reads; diffusers keeps a copy of every input

The cache protocol is diffusers': `is_first_chunk`, `causal_cache` and `cache_offset` of each layer.
Outside tiling nothing reads a cache, so none is kept.
Source: diffusers 0.42.1, models/autoencoders/autoencoder_vidtok.py; VidTok (arXiv 2412.13061).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders import autoencoder_vidtok as vidtok
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
from vtok_ext.ops.alpha_blend import alpha_blend
from vtok_ext.ops.causal_conv3d import causal_conv3d
from vtok_ext.ops.norm_act import norm_act
from vtok_ext.ops.temporal_resample import (
    temporal_downsample_blend,
    temporal_upsample,
    temporal_upsample_blend,
)

KEEPS = "keeps_cache"  # on layers during `encode` and `decode`: whether a later chunk follows


def _keep(
    layer: Any,
    padded: Tensor,  # [B, C, P, ...]
    num_frames: int,
) -> None:
    """Keeps the `num_frames` frames of the input of `layer` that its next chunk reads."""
    if not getattr(layer, KEEPS, True):
        layer.causal_cache = None
        return
    end = padded.shape[2] - layer.cache_offset
    kept = padded[:, :, max(0, end - num_frames) : max(0, end)]
    layer.causal_cache = owned(kept) if kept.dim() == 5 else kept.clone()


def _front(
    layer: Any,
    x: Tensor,  # [B, C, T, ...]
    num_frames: int,
) -> Tensor | None:
    """Returns the frames before `x` in a later chunk, None at the start of a clip."""
    if layer.is_first_chunk:
        return None
    cache = layer.causal_cache
    return cache[:, :, max(0, cache.shape[2] - num_frames) :]


class VidTokLayerNorm(vidtok.VidTokLayerNorm):
    """LayerNorm over channels of videos [B, C, T, H, W] in one pass."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns the normalised `x`."""
        if not _is_plain_norm(self) or not takes(x, self.norm.weight):
            return super().forward(x)
        return _normalised(x, self, act=False)


def _is_plain_norm(layer: Any) -> bool:
    return is_plain(layer.norm, nn.LayerNorm) and layer.norm.elementwise_affine


def _normalised(x: Tensor, layer: VidTokLayerNorm, act: bool, **options: Any) -> Tensor:
    """Returns silu(norm(x)), or norm(x); options of `norm_act`."""
    norm = layer.norm
    return norm_act(x, norm.weight, norm.bias, act=act, eps=norm.eps, **options)


class VidTokCausalConv1d(vidtok.VidTokCausalConv1d):
    """Causal convolution over time; pixels [N, C, T] as diffusers computes them."""

    cache_offset: int

    def forward(self, x: Tensor) -> Tensor:
        """Returns the convolution of `x`; of the input only what the next chunk reads is kept."""
        y = super().forward(x)
        offset, self.cache_offset = self.cache_offset, 0  # already applied to the cache
        _keep(self, self.causal_cache, self.time_pad)
        self.cache_offset = offset
        return y


class VidTokCausalConv3d(vidtok.VidTokCausalConv3d):
    """Causal convolution behind copies of the first frame or the frames of the chunk before."""

    cache_offset: int

    def forward(self, x: Tensor) -> Tensor:
        """Returns the convolution of `x`; of the input only what the next chunk reads is kept."""
        if not _is_plain_causal(self, VidTokCausalConv3d) or not takes(x, self.conv.weight):
            y = super().forward(x)
            offset, self.cache_offset = self.cache_offset, 0
            _keep(self, self.causal_cache, self.time_pad)
            self.cache_offset = offset
            return y
        front = _front(self, x, self.time_pad)
        self._keep_frames(x, front)
        left, right, top, bottom, _, _ = self.spatial_padding
        return causal_conv3d(
            x,
            self.conv.weight,
            self.conv.bias,
            stride=self.conv.stride,
            dilation=self.conv.dilation,
            groups=self.conv.groups,
            temporal="replicate",
            front=self.time_pad,
            spatial_padding=((top, bottom), (left, right)),
            state=None if self.time_pad == 0 else front,
        )

    def _keep_frames(self, x: Tensor, front: Tensor | None) -> None:
        """Keeps what `_keep` would of `x` behind its front frames, without joining them whole."""
        needed = self.time_pad + self.cache_offset
        if x.shape[2] < needed:
            first = x[:, :, :1].expand(-1, -1, self.time_pad, -1, -1) if front is None else front
            x = torch.cat([first, x], dim=2)
        _keep(self, x, self.time_pad)


def _is_plain_causal(layer: Any, kind: type[nn.Module]) -> bool:
    """Returns whether the parameters of a causal convolution stand for all that it would do."""
    if not is_plain(layer, kind):
        return False
    inner = nn.Conv3d if kind is VidTokCausalConv3d else nn.Conv1d
    if kind is VidTokCausalConv3d and layer.pad_mode != "constant":
        return False
    conv = layer.conv
    return is_plain(conv, inner) and conv.padding_mode == "zeros" and not any(conv.padding)


def _weight(conv: Any) -> Tensor:
    """Returns the weight as [O, I, kt, kh, kw]."""
    weight = conv.weight
    if weight.dim() == 3:
        return weight[..., None, None]
    return weight.unsqueeze(2) if weight.dim() == 4 else weight


class _Unit:
    """A convolution of a residual block with the norm before it, as a part of a fusion unit."""

    def __init__(self, norm: Any, layer: Any) -> None:
        self.norm, self.layer = norm, layer
        self.is_causal = type(layer) in (VidTokCausalConv1d, VidTokCausalConv3d)
        self.conv = layer.conv if self.is_causal else layer

    def is_fusible(self, x: Tensor) -> bool:
        """Returns whether norm and convolution do nothing else than `__call__` does."""
        if not is_plain(self.norm, VidTokLayerNorm) or not _is_plain_norm(self.norm):
            return False
        if self.is_causal:
            is_known = _is_plain_causal(self.layer, type(self.layer))
        else:
            known = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
            is_known = type(self.conv) in known and is_plain(self.conv, type(self.conv))
        # First of all: an adapter in a convolution's place need not have its attributes.
        if not is_known or not takes(x, self.conv.weight):
            return False
        sizes = {*self.conv.kernel_size, *self.conv.stride, *self.conv.dilation}
        if not sizes <= {1, 3} or {*self.conv.stride, *self.conv.dilation} != {1}:
            return False
        return self.is_causal or (
            self.conv.padding_mode == "zeros"
            and tuple(self.conv.padding) == tuple(k // 2 for k in self.conv.kernel_size)
        )

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Returns conv(silu(norm(x))) + residual of [B, C, T, H, W]."""
        options: dict[str, Any] = {"temporal": "same", "groups": self.conv.groups}
        if self.is_causal:
            frames = self.layer.time_pad
            state = _front(self.layer, x, frames)
            padded = _normalised(
                x, self.norm, act=True, front=frames, temporal="replicate", state=state
            )
            _keep(self.layer, padded, frames)
            options["temporal"] = "valid"
        else:
            padded = _normalised(x, self.norm, act=True)
        if residual is not None:
            options["residual"] = residual.to(padded.dtype)
        return causal_conv3d(padded, _weight(self.conv), self.conv.bias, **options)


class VidTokResnetBlock(vidtok.VidTokResnetBlock):
    """norm - SiLU - conv - norm - SiLU - conv + shortcut; also of a whole video [B, C, T, H, W]."""

    def forward(self, x: Tensor, temb: Tensor | None) -> Tensor:
        """Returns the block of `x`: frames, pixels or videos as in diffusers, or a video."""
        if temb is not None or not self.is_fusible(x):
            return super().forward(x, temb)
        shortcut = x
        if self.in_channels != self.out_channels:
            shortcut = self._shortcut(x)
        y = _Unit(self.norm1, self.conv1)(x)
        return _Unit(self.norm2, self.conv2)(y, residual=shortcut)

    def is_fusible(self, x: Tensor) -> bool:
        """Returns whether `x` is a video that all parts of the block take as one unit."""
        if x.dim() != 5 or not is_plain(self.nonlinearity, nn.SiLU):
            return False
        if self.in_channels != self.out_channels and not self._has_plain_shortcut():
            return False
        units = _Unit(self.norm1, self.conv1), _Unit(self.norm2, self.conv2)
        return is_idle_dropout(self.dropout) and all(unit.is_fusible(x) for unit in units)

    def _has_plain_shortcut(self) -> bool:
        if self.use_conv_shortcut:
            return False
        return isinstance(self.conv1, VidTokCausalConv3d | nn.Conv3d) or is_plain_conv2d(
            self.nin_shortcut
        )

    def _shortcut(self, x: Tensor) -> Tensor:
        if isinstance(self.nin_shortcut, nn.Conv2d):
            return frame_conv(x, self.nin_shortcut)
        return self.nin_shortcut(x)


class VidTokDownsample2D(vidtok.VidTokDownsample2D):
    """Half the height and width of images, or of all frames of a video."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns the halved `x`, [N, C, H, W] or [B, C, T, H, W]."""
        if x.dim() == 4:
            return super().forward(x)
        return halving_conv(x, self.conv)


class VidTokUpsample2D(vidtok.VidTokUpsample2D):
    """Twice the height and width of images, or of all frames of a video."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns the doubled `x`, [N, C, H, W] or [B, C, T, H, W]."""
        if x.dim() == 4:
            return super().forward(x)
        return frame_conv(x, self.conv, upsample="space")


class VidTokDownsample3D(vidtok.VidTokDownsample3D):
    """Half the frame rate: mean of three frames blended with a convolution of stride 2."""

    causal_cache: Any

    def forward(self, x: Tensor) -> Tensor:
        """Returns the halved `x`."""
        if not self._is_fusible(x):
            return super().forward(x)
        x = channels_last(x)
        if not self.is_causal:
            y = self.conv(F.pad(x, (0, 0, 0, 0, 0, 1)))
            return temporal_downsample_blend(x, y, self.mix_factor, padding="zeros_behind")
        layer = self.conv
        front = x[:, :, :1] if self.is_first_chunk else self.causal_cache
        padded = torch.cat([front, x], dim=2)
        self.causal_cache = owned(padded[:, :, -1:]) if getattr(self, KEEPS, True) else None
        _keep(layer, padded, layer.time_pad)
        left, right, top, bottom, _, _ = layer.spatial_padding
        y = causal_conv3d(
            padded,
            layer.conv.weight,
            layer.conv.bias,
            stride=layer.conv.stride,
            temporal="valid",
            spatial_padding=((top, bottom), (left, right)),
        )
        return temporal_downsample_blend(padded, y, self.mix_factor, padding="none")

    def _is_fusible(self, x: Tensor) -> bool:
        if not self.is_causal:
            return type(self.conv) is nn.Conv3d and takes(x, self.conv.weight)
        layer = self.conv
        return (
            _is_plain_causal(layer, VidTokCausalConv3d)
            and layer.time_pad == 1
            and (layer.conv.stride, layer.conv.dilation) == ((2, 1, 1), (1, 1, 1))
            and layer.conv.groups == 1
            and takes(x, layer.conv.weight)
        )


class VidTokUpsample3D(vidtok.VidTokUpsample3D):
    """Twice the frame rate: repeated or interpolated frames blended with a convolution of them."""

    causal_cache: Any

    def forward(self, x: Tensor) -> Tensor:
        """Returns the doubled `x`."""
        layer = self.conv
        conv = layer.conv if self.is_causal else layer
        if not self._is_fusible(x):
            return super().forward(x)
        x = channels_last(x)
        if not self.is_causal:
            y = self.conv(temporal_upsample(x))
            return temporal_upsample_blend(x, y, self.mix_factor)
        if not self.is_first_chunk:
            return self._later_chunk(x)
        n = self.num_temp_upsample
        self.causal_cache = owned(x[:, :, -n:]) if getattr(self, KEEPS, True) else None
        linear: dict[str, Any] = {"interpolation": "linear", "segment": n}
        padded = temporal_upsample(x, num_front=layer.time_pad, front="replicate", **linear)
        _keep(layer, padded, layer.time_pad)
        left, right, top, bottom, _, _ = layer.spatial_padding
        y = causal_conv3d(
            padded,
            conv.weight,
            conv.bias,
            temporal="valid",
            spatial_padding=((top, bottom), (left, right)),
        )
        return temporal_upsample_blend(x, y, self.mix_factor, **linear)

    def _later_chunk(self, x: Tensor) -> Tensor:
        """Returns the frames of a chunk that continues behind `causal_cache`."""
        n = self.num_temp_upsample
        known = torch.cat([self.causal_cache, x], dim=2)
        self.causal_cache = owned(known[:, :, -2 * n : -n])
        upsampled = temporal_upsample(known, interpolation="linear")[:, :, 2 * n :]
        return alpha_blend(upsampled, self.conv(upsampled), self.mix_factor)

    def _is_fusible(self, x: Tensor) -> bool:
        if not self.is_causal:
            return type(self.conv) is nn.Conv3d and takes(x, self.conv.weight)
        layer = self.conv
        return (
            self.enable_cached
            and _is_plain_causal(layer, VidTokCausalConv3d)
            and (*layer.conv.stride, *layer.conv.dilation, layer.conv.groups) == (1,) * 7
            and takes(x, layer.conv.weight)
        )


def _over_frames(layer: Any, x: Tensor, *rest: Any) -> Tensor:
    """Returns `layer` of every frame of [B, C, T, H, W], in the form that it takes."""
    if _takes_videos(layer, x):
        return layer(x, *rest)
    batch = x.shape[0]
    y = layer(x.transpose(1, 2).flatten(0, 1), *rest)
    return y.unflatten(0, (batch, -1)).transpose(1, 2)


def _over_pixels(layer: Any, x: Tensor, *rest: Any) -> Tensor:
    """Returns `layer` over time of every pixel of [B, C, T, H, W], in the form that it takes."""
    if _takes_videos(layer, x):
        return layer(x, *rest)
    batch, _, _, height, width = x.shape
    y = layer(x.permute(0, 3, 4, 1, 2).flatten(0, 2), *rest)
    return y.unflatten(0, (batch, height, width)).permute(0, 3, 4, 1, 2)


def _takes_videos(layer: Any, x: Tensor) -> bool:
    """Returns whether `layer` is untouched and takes [B, C, T, H, W] as a whole."""
    if is_plain(layer, VidTokResnetBlock):
        return layer.is_fusible(x)
    kinds = (VidTokDownsample2D, VidTokUpsample2D)
    return (
        type(layer) in kinds
        and is_plain(layer, type(layer))
        and is_plain_conv2d(layer.conv)
        and takes(x, layer.conv.weight)
    )


class _Runner:
    """Calls layers, through gradient checkpointing where the network asks for it."""

    def __init__(self, network: Any) -> None:
        checkpointing = torch.is_grad_enabled() and network.gradient_checkpointing
        self.checkpoint = network._gradient_checkpointing_func if checkpointing else None

    def __call__(self, function: Any, *arguments: Any) -> Tensor:
        """Returns function(*arguments)."""
        if self.checkpoint is None:
            return function(*arguments)
        return self.checkpoint(function, *arguments)


def _head(network: Any, x: Tensor) -> Tensor:
    """Returns norm, SiLU and convolution that end both networks."""
    unit = _Unit(network.norm_out, network.conv_out)
    if is_plain(network.nonlinearity, nn.SiLU) and unit.is_fusible(x):
        return unit(x)
    return network.conv_out(network.nonlinearity(network.norm_out(x)))


def _middle(network: Any, run: _Runner, x: Tensor) -> Tensor:
    """Returns the blocks at the lowest resolution of `x`."""
    x = run(network.mid.block_1, x, None)
    x = run(network.mid.attn_1, x)
    return run(network.mid.block_2, x, None)


class VidTokEncoder3D(vidtok.VidTokEncoder3D):
    """The encoder on videos throughout; no intermediate result outlives its use."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns the raw latent of the next frames."""
        run = _Runner(self)
        x = channels_last(self.conv_in(x))
        for level in range(self.num_resolutions):
            space, time = self.down[level], self.down_temporal[level]
            for i in range(self.num_res_blocks):
                x = run(_over_frames, space.block[i], x, None)
                x = run(_over_pixels, time.block[i], x, None)
            if level in self.spatial_ds:
                x = run(_over_frames, space.downsample, x)
                if level in self.tempo_ds:
                    x = run(time.downsample, x)
        return _head(self, _middle(self, run, x))


class VidTokDecoder3D(vidtok.VidTokDecoder3D):
    """The decoder on videos throughout."""

    def forward(self, z: Tensor) -> Tensor:
        """Returns the frames of the next latents."""
        run = _Runner(self)
        x = _middle(self, run, channels_last(self.conv_in(z)))
        for level in reversed(range(self.num_resolutions)):
            space, time = self.up[level], self.up_temporal[level]
            for i in range(self.num_res_blocks + 1):
                x = run(_over_frames, space.block[i], x, None)
                x = run(_over_pixels, time.block[i], x, None)
            if level in self.spatial_us:
                x = run(_over_frames, space.upsample, x)
                if level in self.tempo_us:
                    x = run(time.upsample, x)
        return _head(self, x)


class AutoencoderVidTok(vidtok.AutoencoderVidTok):
    """The model itself: caches are kept where a later chunk reads them, and no longer."""

    def _encode(self, x: Tensor) -> Tensor:
        return self._with_caches(self.encoder, super()._encode, x)

    def _decode(self, z: Tensor, decode_from_indices: bool = False) -> Tensor:
        return self._with_caches(self.decoder, super()._decode, z, decode_from_indices)

    def _with_caches(self, network: nn.Module, function: Any, *arguments: Any) -> Tensor:
        layers: list[Any] = [m for m in network.modules() if hasattr(m, "causal_cache")]
        for layer in layers:
            setattr(layer, KEEPS, self.use_tiling)
        try:
            return function(*arguments)
        finally:
            for layer in layers:  # whoever calls a network by itself gets caches as from diffusers
                delattr(layer, KEEPS)
                layer.causal_cache = None


REPLACEMENTS: dict[type, type] = {
    vidtok.AutoencoderVidTok: AutoencoderVidTok,
    vidtok.VidTokEncoder3D: VidTokEncoder3D,
    vidtok.VidTokDecoder3D: VidTokDecoder3D,
    vidtok.VidTokResnetBlock: VidTokResnetBlock,
    vidtok.VidTokLayerNorm: VidTokLayerNorm,
    vidtok.VidTokCausalConv1d: VidTokCausalConv1d,
    vidtok.VidTokCausalConv3d: VidTokCausalConv3d,
    vidtok.VidTokDownsample2D: VidTokDownsample2D,
    vidtok.VidTokUpsample2D: VidTokUpsample2D,
    vidtok.VidTokDownsample3D: VidTokDownsample3D,
    vidtok.VidTokUpsample3D: VidTokUpsample3D,
}
FORWARDS: dict[type[nn.Module], str] = {
    vidtok.AutoencoderVidTok: "7927c32abe3c",
    vidtok.VidTokEncoder3D: "777a177f152e",
    vidtok.VidTokDecoder3D: "63da50de82da",
    vidtok.VidTokResnetBlock: "1ce4cc0be22b",
    vidtok.VidTokLayerNorm: "b46a7397748e",
    vidtok.VidTokCausalConv1d: "39faafab3e22",
    vidtok.VidTokCausalConv3d: "74594fa780dd",
    vidtok.VidTokDownsample2D: "da9c04bc70db",
    vidtok.VidTokUpsample2D: "759a4c4149a1",
    vidtok.VidTokDownsample3D: "9abb4c33c2f8",
    vidtok.VidTokUpsample3D: "e3a15198b299",
    vidtok.VidTokAttnBlock: "e0349366c311",
}
