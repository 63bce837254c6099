"""VidTok: a causal 3-D convolutional video autoencoder with a KL or an FSQ latent.

    encoder  conv_in, per level [2-D block, 1-D temporal block] x R and halvings, middle, conv_out
    decoder  the mirror image with R + 1 block pairs per level and doublings

Space and time are factorised: 3x3 convolutions frame by frame, then length-3 causal convolutions
pixel by pixel; frame rate changes blend a parameter-free branch with a 3x3x3 convolution. Tensors
stay [B, C, T, H, W] in channels_last_3d memory throughout. Parameter names and shapes are those of
the released weights. Source: Tang et al., VidTok (arXiv 2412.13061); behaviour of release 1.0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vtok_ext.layers import (
    FSQ,
    CausalConv3d,
    FrameAttention,
    ResidualBlock1d,
    ResidualBlock2d,
    ResidualBlock3d,
    SpatialDownsample,
    SpatialUpsample,
    TemporalDownsample,
    TemporalUpsample,
    kl_posterior,
    norm_act,
)
from vtok_ext.layers._state import State, StateFlow
from vtok_ext.layers.norm_act import NORM_TYPES
from vtok_ext.models._config import ModelConfig
from vtok_ext.models.causal import CausalTokenizer
from vtok_ext.ops.fsq import MAX_LEVELS


@dataclass(frozen=True)
class VidTokConfig(ModelConfig):
    """Configuration of VidTok; ch * ch_mult[l] channels at level l, level 0 at full resolution.

    Attributes:
        regularizer: "kl" or "fsq".
        z_channels: latent channels (KL).
        levels: values per latent channel (FSQ); prod(levels) codes.
        ch, ch_mult, num_res_blocks: width, width multiplier per level, block pairs per level.
        spatial_ds, spatial_us: levels whose down or up step halves or doubles H and W; default all.
        tempo_ds, tempo_us: those that change the frame rate as well; default two in the middle.
        norm_type: "layernorm" or "groupnorm".
        entropy_weight, entropy_annealing_steps, entropy_annealing_factor, commitment_weight: FSQ's
            auxiliary loss.
    """

    regularizer: str
    z_channels: int | None = None
    levels: tuple[int, ...] = ()
    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    spatial_ds: tuple[int, ...] | None = None
    spatial_us: tuple[int, ...] | None = None
    tempo_ds: tuple[int, ...] | None = None
    tempo_us: tuple[int, ...] | None = None
    in_channels: int = 3
    out_ch: int = 3
    norm_type: str = "layernorm"
    entropy_weight: float = 0.1
    entropy_annealing_steps: int = 2000
    entropy_annealing_factor: float = 3.0
    commitment_weight: float = 0.25

    def __post_init__(self) -> None:
        """Checks every field."""
        self._require_choice("regularizer", ("kl", "fsq"))
        self._require_choice("norm_type", NORM_TYPES)
        for name in ("ch", "num_res_blocks", "in_channels", "out_ch"):
            self._require_int(name, 1)
        self._require_ints("ch_mult", 1, 1024, empty=False)
        if self.regularizer == "kl":
            self._require_int("z_channels", 1)
            if self.levels != ():
                raise self._error("levels", "empty for kl")
        else:
            self._require_ints("levels", 2, MAX_LEVELS, empty=False)
            if self.z_channels not in (None, len(self.levels)):
                raise self._error("z_channels", f"{len(self.levels)}, the number of levels")
        for name in ("entropy_weight", "entropy_annealing_factor", "commitment_weight"):
            self._require_number(name, 0.0)
        self._require_int("entropy_annealing_steps", 0)
        self._check_resampling()

    def _check_resampling(self) -> None:
        for name in ("spatial_ds", "spatial_us", "tempo_ds", "tempo_us"):
            if getattr(self, name) is not None:
                self._require_ints(name, 0, len(self.ch_mult) - 1, empty=True)
        for down, up in (("spatial_ds", "spatial_us"), ("tempo_ds", "tempo_us")):
            if len(self.steps(down)) != len(self.steps(up)):
                raise self._error(up, f"as many levels as {down} {self.steps(down)}")
        for time, space in (("tempo_ds", "spatial_ds"), ("tempo_us", "spatial_us")):
            if not set(self.steps(time)) <= set(self.steps(space)):
                raise self._error(time, f"among {space} {self.steps(space)}")

    def steps(self, name: str) -> tuple[int, ...]:
        """Returns the levels of `spatial_ds`, `tempo_us`, ..., its default when it is None."""
        if getattr(self, name) is not None:
            return tuple(sorted(set(getattr(self, name))))
        top = len(self.ch_mult) - 1
        if name.startswith("spatial"):
            return tuple(range(top)) if name == "spatial_ds" else tuple(range(1, top + 1))
        middle = (top - 2, top - 1) if name == "tempo_ds" else (1, 2)
        space = self.steps(name.replace("tempo", "spatial"))
        return tuple(level for level in middle if level in space)

    @property
    def is_discrete(self) -> bool:
        """Whether the latent is quantised."""
        return self.regularizer == "fsq"

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels per level."""
        return tuple(self.ch * mult for mult in self.ch_mult)

    @property
    def latent_channels(self) -> int:
        """Channels of the latent."""
        return self.z_channels or len(self.levels)


_DEEP = (1, 2, 4, 4, 4)  # one level more: 16x16 pixels per latent position
PRESETS = {
    "vidtok_kl_causal_488_4chn": VidTokConfig("kl", 4),
    "vidtok_kl_causal_488_8chn": VidTokConfig("kl", 8),
    "vidtok_kl_causal_488_16chn": VidTokConfig("kl", 16),
    "vidtok_kl_causal_288_8chn": VidTokConfig("kl", 8, tempo_ds=(1,), tempo_us=(2,)),
    "vidtok_kl_causal_444_4chn": VidTokConfig("kl", 4, spatial_ds=(1, 2), spatial_us=(1, 2)),
    "vidtok_kl_causal_41616_4chn": VidTokConfig("kl", 4, ch_mult=_DEEP),
    "vidtok_fsq_causal_488_262144": VidTokConfig("fsq", levels=(8,) * 6),
    "vidtok_fsq_causal_488_32768": VidTokConfig("fsq", levels=(8,) * 5),
    "vidtok_fsq_causal_488_4096": VidTokConfig("fsq", levels=(8,) * 4),
    "vidtok_fsq_causal_41616_262144": VidTokConfig("fsq", levels=(8,) * 6, ch_mult=_DEEP),
}


class Stage(nn.Module):
    """Blocks of one level and, where the level has one, the change of resolution that ends it."""

    downsample: nn.Module | None
    upsample: nn.Module | None

    def __init__(self, blocks: Iterable[nn.Module], **resample: nn.Module | None) -> None:
        super().__init__()
        self.block = nn.ModuleList(blocks)
        for name, module in resample.items():
            self.add_module(name, module)


def _paired(space: nn.ModuleList, time: nn.ModuleList) -> list[tuple[Stage, Stage]]:
    """Returns (spatial stage, temporal stage) of each level."""
    return list(zip(space, time, strict=True))  # type: ignore[arg-type]


class Middle(nn.Module):
    """Residual block, attention within each frame, residual block, at the lowest resolution."""

    def __init__(self, channels: int, norm_type: str) -> None:
        super().__init__()
        self.block_1 = ResidualBlock3d(channels, norm_type=norm_type)
        self.attn_1 = FrameAttention(channels, norm_type=norm_type)
        self.block_2 = ResidualBlock3d(channels, norm_type=norm_type)

    def forward(self, x: Tensor, state: State | None = None, return_state: bool = False):
        """Returns x [B, C, T, H, W] mixed, or `(x, state)`."""
        flow = StateFlow(state, return_state)
        x = flow("block_1", self.block_1, x)
        x = self.attn_1(x)
        return flow.result(flow("block_2", self.block_2, x))


class Encoder(nn.Module):
    """Returns the raw latent [B, zc, T / f, H / s, W / s] of frames [B, 3, T, H, W] in [-1, 1].

    zc is 2 z for KL (mean and log variance), z for FSQ. With `return_state=True`, the result is
    `(latent, state)`: chunks of multiples of f frames, each given the state of the one before,
    equal one call.
    """

    def __init__(self, config: VidTokConfig) -> None:
        super().__init__()
        widths, norm = config.widths, config.norm_type
        self.conv_in = CausalConv3d(config.in_channels, widths[0], 3)
        self.down, self.down_temporal = nn.ModuleList(), nn.ModuleList()
        for level, width in enumerate(widths):
            inputs = [widths[max(0, level - 1)]] + [width] * (config.num_res_blocks - 1)
            space = SpatialDownsample(width) if level in config.steps("spatial_ds") else None
            time = TemporalDownsample(width) if level in config.steps("tempo_ds") else None
            blocks_2d = [ResidualBlock2d(c, width, norm_type=norm) for c in inputs]
            blocks_1d = [ResidualBlock1d(width, norm_type=norm) for _ in inputs]
            self.down.append(Stage(blocks_2d, downsample=space))
            self.down_temporal.append(Stage(blocks_1d, downsample=time))
        self.mid = Middle(widths[-1], norm)
        self.norm_out = norm_act(widths[-1], norm)
        out_channels = config.latent_channels * (2 if config.regularizer == "kl" else 1)
        self.conv_out = CausalConv3d(widths[-1], out_channels, 3)

    def forward(self, x: Tensor, state: State | None = None, return_state: bool = False):
        """Returns the raw latent of `x`, or `(latent, state)`."""
        flow = StateFlow(state, return_state)
        x = x.contiguous(memory_format=torch.channels_last_3d)
        x = flow("conv_in", self.conv_in, x)
        for level, (space, time) in enumerate(_paired(self.down, self.down_temporal)):
            name = f"down_temporal.{level}"
            for i, (block_2d, block_1d) in enumerate(zip(space.block, time.block, strict=True)):
                x = block_2d(x)
                x = flow(f"{name}.block.{i}", block_1d, x)
            if space.downsample is not None:
                x = space.downsample(x)
            if time.downsample is not None:
                x = flow(f"{name}.downsample", time.downsample, x)
        x = flow("mid", self.mid, x)
        return flow.result(flow("conv_out", self.conv_out, self.norm_out(x)))


class Decoder(nn.Module):
    """Returns f * T frames [B, 3, f * T, s * H, s * W] of a latent [B, z, T, H, W].

    The first f - 1 frames belong to the padding that precedes a clip. With `return_state=True`,
    `(frames, state)`: chunks of any length, each given the state of the one before, equal one call.
    """

    def __init__(self, config: VidTokConfig) -> None:
        super().__init__()
        widths, norm = config.widths, config.norm_type
        self.conv_in = CausalConv3d(config.latent_channels, widths[-1], 3)
        self.mid = Middle(widths[-1], norm)
        self.up, self.up_temporal = nn.ModuleList(), nn.ModuleList()
        for level, width in enumerate(widths):
            inputs = [widths[min(level + 1, len(widths) - 1)]] + [width] * config.num_res_blocks
            space = SpatialUpsample(width) if level in config.steps("spatial_us") else None
            time = TemporalUpsample(width) if level in config.steps("tempo_us") else None
            blocks_2d = [ResidualBlock2d(c, width, norm_type=norm) for c in inputs]
            blocks_1d = [ResidualBlock1d(width, norm_type=norm) for _ in inputs]
            self.up.append(Stage(blocks_2d, upsample=space))
            self.up_temporal.append(Stage(blocks_1d, upsample=time))
        self.norm_out = norm_act(widths[0], norm)
        self.conv_out = CausalConv3d(widths[0], config.out_ch, 3)

    def forward(self, x: Tensor, state: State | None = None, return_state: bool = False):
        """Returns the frames of latent `x`, or `(frames, state)`."""
        flow = StateFlow(state, return_state)
        x = x.contiguous(memory_format=torch.channels_last_3d)
        x = flow("conv_in", self.conv_in, x)
        x = flow("mid", self.mid, x)
        stages = _paired(self.up, self.up_temporal)
        for level, (space, time) in reversed(list(enumerate(stages))):
            name = f"up_temporal.{level}"
            for i, (block_2d, block_1d) in enumerate(zip(space.block, time.block, strict=True)):
                x = block_2d(x)
                x = flow(f"{name}.block.{i}", block_1d, x)
            if space.upsample is not None:
                x = space.upsample(x)
            if time.upsample is not None:
                x = flow(f"{name}.upsample", time.upsample, x)
        return flow.result(flow("conv_out", self.conv_out, self.norm_out(x)))


class VidTok(CausalTokenizer):
    """Returns a VidTok; see `VideoTokenizer` and `CausalTokenizer` for what it does.

    `frames="reference"` follows the published frame rule: no extension, f - 1 copies of the first
    frame in front unless T % f == 0, and f n - (f - 1) frames out of n latents. It agrees with the
    default where (T - 1) % f == 0 and H, W are multiples of s.
    """

    config: VidTokConfig
    config_class = VidTokConfig
    presets = PRESETS

    def __init__(self, config: VidTokConfig, name: str | None = None) -> None:
        super().__init__(config, name)
        self.video_channels = config.in_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.fsq = None
        if config.is_discrete:
            self.fsq = FSQ(
                config.levels,
                entropy_weight=config.entropy_weight,
                entropy_annealing_steps=config.entropy_annealing_steps,
                entropy_annealing_factor=config.entropy_annealing_factor,
                commitment_weight=config.commitment_weight,
            )

    @property
    def codebook_size(self) -> int | None:
        """Number of codes, None for KL."""
        return math.prod(self.config.levels) if self.is_discrete else None

    @property
    def latent_channels(self) -> int:
        """Channels of the latent."""
        return self.config.latent_channels

    @property
    def temporal_factor(self) -> int:
        """f: frames per latent frame."""
        return 2 ** len(self.config.steps("tempo_ds"))

    @property
    def spatial_factor(self) -> int:
        """s: pixels per latent position along H and W."""
        return 2 ** len(self.config.steps("spatial_ds"))

    def encode_chunk(self, video: Tensor, state: State | None = None, return_state: bool = False):
        """Returns the raw latent of the next frames of a stream, or `(latent, state)`."""
        # The convolutions before the first frame see f - 1 copies of it, and zeros before these.
        if state is None:
            front = [video[:, :, :1]] * (self.temporal_factor - 1)
            video = torch.cat([*front, video], dim=2)
        return self.encoder(video, state, return_state)

    def encode_reference(self, video: Tensor) -> Tensor:
        """Returns the raw latent of a clip under the published frame rule."""
        whole = video.shape[2] % self.temporal_factor == 0
        return self.encoder(video) if whole else self.encode_chunk(video)

    def decode_chunk(self, latent: Tensor, state: State | None = None, return_state: bool = False):
        """Returns the frames of the next latents of a stream, or `(frames, state)`."""
        drop = self.temporal_factor - 1 if state is None else 0
        if not return_state:
            return self.decoder(latent, state)[:, :, drop:]
        frames, state = self.decoder(latent, state, True)
        return frames[:, :, drop:], state

    def regularize(
        self,
        raw: Tensor,
        *,
        sample: bool = False,
        generator: torch.Generator | None = None,
        step: int = 0,
        compute_loss: bool = False,
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """Returns latent, indices (None for KL) and losses of a raw latent."""
        if self.fsq is not None:
            return self.fsq(raw, step, compute_loss)
        latent, losses = kl_posterior(raw, sample, generator)
        return latent, None, losses

    def indices_to_latent(self, indices: Tensor) -> Tensor:
        """Returns codes [B, C, t, h, w] of ids [B, t, h, w]."""
        if self.fsq is None:
            raise self._continuous("indices_to_latent")
        return self.fsq.indices_to_codes(indices)
