"""Replacements for layers of AutoencoderKLHunyuanVideo; see `_patching`.

    residual block  group norm over the clip + SiLU in one pass, the sum with the second convolution
    doubling        the kernel runs on pixels before they are repeated: outermost values are copied
                    around the small frames, which is the same as around the large ones
    convolution     all sides are padded with copies of the outermost values, in one buffer

Group norm and attention look at all frames of a call: there is no cache and no stream.
Source: diffusers 0.42.1, models/autoencoders/autoencoder_kl_hunyuan_video.py; HunyuanVideo
(arXiv 2412.03603).
"""

from __future__ import annotations

from typing import Any

from diffusers.models.autoencoders import autoencoder_kl_hunyuan_video as hunyuan
from torch import Tensor, nn

from vtok_ext.diffusers_vae._fused import (
    GroupNorm,
    channels_last,
    group_norm_act,
    is_idle_dropout,
    is_plain,
    repeat_frames,
    surround,
    takes,
)
from vtok_ext.ops.causal_conv3d import causal_conv3d


class HunyuanVideoCausalConv3d(hunyuan.HunyuanVideoCausalConv3d):
    """Convolution whose front frames and borders are copies of the outermost values."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Returns the convolution of `hidden_states`."""
        if not _is_plain_conv(self) or not takes(hidden_states, self.conv.weight):
            return super().forward(hidden_states)
        return _convolve(self, hidden_states)


def _is_plain_conv(layer: Any) -> bool:
    """Returns whether the parameters of `layer` stand for all that its child would do."""
    conv = layer.conv
    return (
        layer.pad_mode == "replicate"
        and is_plain(conv, nn.Conv3d)
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and conv.padding[0] == 0
    )


def _convolve(
    layer: HunyuanVideoCausalConv3d,
    x: Tensor,  # [B, C, T, H, W]
    residual: Tensor | None = None,  # as the result
) -> Tensor:
    """Returns the convolution of `x` plus `residual`."""
    conv = layer.conv
    _, top, left = conv.padding
    return causal_conv3d(
        surround(x, layer.time_causal_padding),
        conv.weight,
        conv.bias,
        stride=conv.stride,
        dilation=conv.dilation,
        groups=conv.groups,
        temporal="valid",
        spatial_padding=((top, top), (left, left)),
        residual=residual,
    )


class HunyuanVideoResnetBlockCausal3D(hunyuan.HunyuanVideoResnetBlockCausal3D):
    """norm - SiLU - conv - norm - SiLU - conv + shortcut in two passes and two convolutions."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Returns the block of `hidden_states`."""
        if not self._is_fusible(hidden_states):
            return super().forward(hidden_states)
        x = channels_last(hidden_states)
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut(x)
        y = _convolve(self.conv1, group_norm_act(x, self.norm1, act=True))
        y = group_norm_act(y, self.norm2, act=True)
        return _convolve(self.conv2, y, residual=shortcut.to(y.dtype))

    def _is_fusible(self, x: Tensor) -> bool:
        pairs = (self.norm1, self.conv1), (self.norm2, self.conv2)
        return (
            all(
                is_plain(norm, GroupNorm)
                and norm.affine
                and is_plain(conv, HunyuanVideoCausalConv3d)
                and _is_plain_conv(conv)
                and takes(x, conv.conv.weight)
                for norm, conv in pairs
            )
            and is_plain(self.nonlinearity, nn.SiLU)
            and is_idle_dropout(self.dropout)
        )


class HunyuanVideoUpsampleCausal3D(hunyuan.HunyuanVideoUpsampleCausal3D):
    """Twice the height and width, and where it says so every frame but the first twice."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Returns the doubled `hidden_states`."""
        if not self._is_fusible(hidden_states):
            return super().forward(hidden_states)
        x, conv = channels_last(hidden_states), self.conv.conv
        if self.upsample_factor[0] == 2:
            x = repeat_frames(x, first_alone=True)
        # The op surrounds the repeated pixels with zeros, which the outermost two rows and columns
        # of its result see: they belong to the copies around the frames.
        y = causal_conv3d(
            surround(x, (1, 1, 1, 1, 2, 0)),
            conv.weight,
            conv.bias,
            groups=conv.groups,
            temporal="valid",
            upsample="space",
        )
        return channels_last(y[:, :, :, 2:-2, 2:-2])

    def _is_fusible(self, x: Tensor) -> bool:
        if tuple(self.upsample_factor) not in ((1, 2, 2), (2, 2, 2)):
            return False
        if not is_plain(self.conv, HunyuanVideoCausalConv3d) or not _is_plain_conv(self.conv):
            return False
        conv = self.conv.conv
        is_3x3x3 = (conv.kernel_size, conv.padding) == ((3, 3, 3), (0, 0, 0))
        return is_3x3x3 and (*conv.stride, *conv.dilation) == (1,) * 6 and takes(x, conv.weight)


REPLACEMENTS: dict[type, type] = {
    nn.GroupNorm: GroupNorm,
    hunyuan.HunyuanVideoCausalConv3d: HunyuanVideoCausalConv3d,
    hunyuan.HunyuanVideoResnetBlockCausal3D: HunyuanVideoResnetBlockCausal3D,
    hunyuan.HunyuanVideoUpsampleCausal3D: HunyuanVideoUpsampleCausal3D,
}
FORWARDS: dict[type[nn.Module], str] = {
    hunyuan.HunyuanVideoCausalConv3d: "1d0f98749c18",
    hunyuan.HunyuanVideoResnetBlockCausal3D: "d51794737180",
    hunyuan.HunyuanVideoUpsampleCausal3D: "f12d90e495cd",
}
