"""The architectures that VidTok's paper compares with its own, as `architecture` of VidTokConfig.

    "full_3d"          3x3x3 convolutions in every residual block and every change of resolution
    "without_blender"  frame rate changes by a length-3 convolution in time alone
    "without_3d"       the middle from the same pairs of 2-D and 1-D blocks as the rest

Causal, of version 1.0, and without released weights. Source: VidTok (arXiv 2412.13061), table 2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vtok_ext.layers import (
    FrameAttention,
    ResidualBlock1d,
    ResidualBlock2d,
    TemporalDownsample,
    TemporalUpsample,
    norm_act,
)
from vtok_ext.layers._state import State, StateFlow
from vtok_ext.layers.causal_conv3d import video_conv3d
from vtok_ext.layers.unblended import (
    PixelDownsample,
    PixelUpsample,
    VolumeDownsample,
    VolumeResidualBlock,
    VolumeUpsample,
)
from vtok_ext.models.vidtok import Decoder, Encoder, Middle, Stage
from vtok_ext.models.vidtok_config import VidTokConfig

# Note [Published ablations]
# No code of these networks is public; what the paper fixes is the size and the work of each, for
# one clip of 17x256x256 and KL with 4 channels: parameters (M) and multiply-adds (T).
#                        published        here
#     full_3d            245   16.98      245.98   16.98
#     without_blender    142    7.17      141.72    7.17
#     without_3d         126   10.18      126.01   10.18
#     VidTok             157   10.35      157.45   10.35
# The table cuts decimals off as often as it rounds (157.9 M is listed as 157 M). Multiply-adds
# agree to all digits and exclude close relatives: in "without_blender" a convolution of stride 2
# instead of one at the full rate and pooling gives 7.16; in "full_3d" 2-D convolutions for the
# levels that keep the frame rate give 16.88, separate convolutions for space and time 17.44; in
# "without_3d" factorised first and last convolutions give 10.17.


def ablated_networks(config: VidTokConfig) -> tuple[Any, Any]:
    """Returns encoder and decoder of a configuration whose architecture is not VidTok's own."""
    if config.architecture == "full_3d":
        return FullEncoder(config), FullDecoder(config)
    encoder: Any = Encoder(config)
    decoder: Any = Decoder(config)
    if config.architecture == "without_3d":
        for network in (encoder, decoder):
            network.mid = PairedMiddle(config.widths[-1], config.norm_type)
        return encoder, decoder
    for width, down, up in zip(
        config.widths, encoder.down_temporal, decoder.up_temporal, strict=True
    ):
        if isinstance(down.downsample, TemporalDownsample):
            down.downsample = PixelDownsample(width)
        if isinstance(up.upsample, TemporalUpsample):
            up.upsample = PixelUpsample(width)
    return encoder, decoder


class PairedMiddle(nn.Module):
    """Pair of blocks, attention within each frame, pair of blocks, at the lowest resolution."""

    def __init__(self, channels: int, norm_type: str) -> None:
        super().__init__()
        self.block_1 = ResidualBlock2d(channels, channels, norm_type=norm_type)
        self.block_1_temporal = ResidualBlock1d(channels, norm_type=norm_type)
        self.attn_1 = FrameAttention(channels, norm_type=norm_type)
        self.block_2 = ResidualBlock2d(channels, channels, norm_type=norm_type)
        self.block_2_temporal = ResidualBlock1d(channels, norm_type=norm_type)

    def forward(self, x: Tensor, state: State | None = None, return_state: bool = False):
        """Returns x [B, C, T, H, W] mixed, or `(x, state)`."""
        flow = StateFlow(state, return_state)
        x = flow("block_1_temporal", self.block_1_temporal, self.block_1(x))
        x = self.attn_1(x)
        return flow.result(flow("block_2_temporal", self.block_2_temporal, self.block_2(x)))


class FullEncoder(nn.Module):
    """Returns the raw latent of frames [B, 3, T, H, W], or `(latent, state)`; see `Encoder`."""

    def __init__(self, config: VidTokConfig) -> None:
        super().__init__()
        widths, norm = config.widths, config.norm_type
        self.conv_in = video_conv3d(config.in_channels, widths[0])
        self.down = nn.ModuleList()
        for level, width in enumerate(widths):
            inputs = [widths[max(0, level - 1)]] + [width] * (config.num_res_blocks - 1)
            stride = 2 if level in config.steps("tempo_ds") else 1
            halve = level in config.steps("spatial_ds")
            self.down.append(
                Stage(
                    [VolumeResidualBlock(c, width, norm_type=norm) for c in inputs],
                    downsample=VolumeDownsample(width, stride) if halve else None,
                )
            )
        self.mid = Middle(widths[-1], norm, config.time_options)
        self.norm_out = norm_act(widths[-1], norm)
        self.conv_out = video_conv3d(widths[-1], config.raw_channels)

    def forward(self, x: Tensor, state: State | None = None, return_state: bool = False):
        """Returns the raw latent of `x`, or `(latent, state)`."""
        flow = StateFlow(state, return_state)
        x = x.contiguous(memory_format=torch.channels_last_3d)
        x = flow("conv_in", self.conv_in, x)
        for level, stage in enumerate(self.down):
            for i, block in enumerate(stage.block):  # type: ignore[arg-type]
                x = flow(f"down.{level}.block.{i}", block, x)
            if isinstance(stage.downsample, nn.Module):
                x = flow(f"down.{level}.downsample", stage.downsample, x)
        x = flow("mid", self.mid, x)
        return flow.result(flow("conv_out", self.conv_out, self.norm_out(x)))


class FullDecoder(nn.Module):
    """Returns f * T frames of a latent [B, z, T, H, W], or `(frames, state)`; see `Decoder`."""

    def __init__(self, config: VidTokConfig) -> None:
        super().__init__()
        widths, norm = config.widths, config.norm_type
        self.conv_in = video_conv3d(config.latent_channels, widths[-1])
        self.mid = Middle(widths[-1], norm, config.time_options)
        self.up = nn.ModuleList()
        for level, width in enumerate(widths):
            inputs = [widths[min(level + 1, len(widths) - 1)]] + [width] * config.num_res_blocks
            factor = 2 if level in config.steps("tempo_us") else 1
            double = level in config.steps("spatial_us")
            self.up.append(
                Stage(
                    [VolumeResidualBlock(c, width, norm_type=norm) for c in inputs],
                    upsample=VolumeUpsample(width, factor) if double else None,
                )
            )
        self.norm_out = norm_act(widths[0], norm)
        self.conv_out = video_conv3d(widths[0], config.out_ch)

    def forward(self, x: Tensor, state: State | None = None, return_state: bool = False):
        """Returns the frames of latent `x`, or `(frames, state)`."""
        flow = StateFlow(state, return_state)
        x = x.contiguous(memory_format=torch.channels_last_3d)
        x = flow("mid", self.mid, flow("conv_in", self.conv_in, x))
        for level, stage in reversed(list(enumerate(self.up))):
            for i, block in enumerate(stage.block):  # type: ignore[arg-type]
                x = flow(f"up.{level}.block.{i}", block, x)
            if isinstance(stage.upsample, nn.Module):
                x = flow(f"up.{level}.upsample", stage.upsample, x)
        return flow.result(flow("conv_out", self.conv_out, self.norm_out(x)))
