"""VidTok: a 3-D convolutional video autoencoder with a continuous (KL) or a discrete latent.

    encoder  conv_in, per level [2-D block, 1-D temporal block] x R and halvings, middle, conv_out
    decoder  the mirror image with R + 1 block pairs per level and doublings

Space and time are factorised: 3x3 convolutions frame by frame, then length-3 convolutions pixel by
pixel, causal or centred; frame rate changes blend a parameter-free branch with a 3x3x3 convolution.
Tensors stay [B, C, T, H, W] in channels_last_3d memory throughout. Parameter names and shapes are
those of the released weights. Source: Tang et al., VidTok (arXiv 2412.13061), releases 1.0 and 1.1.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from vtok_ext.layers import (
    FSQ,
    LFQ,
    VQ,
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
from vtok_ext.layers.causal_conv3d import video_conv3d
from vtok_ext.layers.kl import Generators
from vtok_ext.models import _vidtok_in_place as in_place
from vtok_ext.models import vidtok_reference as reference
from vtok_ext.models._video_input import pad_front
from vtok_ext.models.grid import GridTokenizer
from vtok_ext.models.streaming import StreamDecoder, StreamEncoder
from vtok_ext.models.tiling_steps import Step
from vtok_ext.models.vidtok_config import PRESETS, VidTokConfig
from vtok_ext.models.vidtok_published import (
    CHUNK_FRAMES,
    PublishedStreamEncoder,
    published_chunks,
)

BACKENDS = ("native", "reference")


class Stage(nn.Module):
    """Blocks of one level and, where the level has one, the change of resolution that ends it."""

    downsample: nn.Module | None
    upsample: nn.Module | None

    def __init__(self, blocks: Iterable[nn.Module], **resample: nn.Module | None) -> None:
        super().__init__()
        self.block = nn.ModuleList(blocks)
        for name, module in resample.items():
            self.add_module(name, module)


_CONTAINERS: set[type] = set()  # classes that do nothing but call layers; filled below


def _paired(space: nn.ModuleList, time: nn.ModuleList) -> list[tuple[Stage, Stage]]:
    """Returns (spatial stage, temporal stage) of each level."""
    return list(zip(space, time, strict=True))  # type: ignore[arg-type]


class Middle(nn.Module):
    """Residual block, attention within each frame, residual block, at the lowest resolution."""

    def __init__(self, channels: int, norm_type: str, time: dict[str, Any]) -> None:
        super().__init__()
        self.block_1 = ResidualBlock3d(channels, norm_type=norm_type, **time)
        self.attn_1 = FrameAttention(channels, norm_type=norm_type, causal=time["causal"])
        self.block_2 = ResidualBlock3d(channels, norm_type=norm_type, **time)

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

    With `first_alone` (version 1.1), the first frame of a clip stands for itself and f - 1 copies
    in front of it: all frames that a layer makes of them are equal and are computed once.
    """

    def __init__(self, config: VidTokConfig) -> None:
        super().__init__()
        self.causal = config.causal
        widths, norm, options = config.widths, config.norm_type, config.time_options
        self.conv_in = video_conv3d(config.in_channels, widths[0], **options)
        self.down, self.down_temporal = nn.ModuleList(), nn.ModuleList()
        for level, width in enumerate(widths):
            inputs = [widths[max(0, level - 1)]] + [width] * (config.num_res_blocks - 1)
            space = SpatialDownsample(width) if level in config.steps("spatial_ds") else None
            halve = level in config.steps("tempo_ds")
            time = TemporalDownsample(width, **options) if halve else None
            blocks_2d = [ResidualBlock2d(c, width, norm_type=norm) for c in inputs]
            blocks_1d = [ResidualBlock1d(width, norm_type=norm, **options) for _ in inputs]
            self.down.append(Stage(blocks_2d, downsample=space))
            self.down_temporal.append(Stage(blocks_1d, downsample=time))
        self.mid = Middle(widths[-1], norm, options)
        self.norm_out = norm_act(widths[-1], norm, across_time=not config.causal)
        self.conv_out = video_conv3d(widths[-1], config.raw_channels, **options)

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        return_state: bool = False,
        *,
        first_alone: bool = False,
    ):
        """Returns the raw latent of `x`, or `(latent, state)`."""
        alone = {"first_alone": True} if first_alone else {}
        if self.causal and in_place.applies(self, x, state, _CONTAINERS):
            run = in_place.EncoderPass(self, first_alone, return_state)
            return in_place.each_item(run, x, state, return_state)
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
                x = flow(f"{name}.downsample", time.downsample, x, **alone)
        x = flow("mid", self.mid, x)
        return flow.result(flow("conv_out", self.conv_out, self.norm_out(x)))


class Decoder(nn.Module):
    """Returns f * T frames [B, 3, f * T, s * H, s * W] of a latent [B, z, T, H, W].

    The first f - 1 frames belong to the padding that precedes a causal clip. With
    `return_state=True`, `(frames, state)`: chunks of any length, each given the state of the one
    before, equal one call. With linear interpolation frames then wait in the state, as in
    `TemporalUpsample`; a chunk without latents and without `return_state` ends the stream.

    With `first_alone` (linear interpolation of version 1.1), of the f equal frames that the first
    latent of a clip becomes one is computed and returned. `drop` leaves out so many frames at the
    beginning; of a whole clip, frames behind the next `num_frames` need not be computed.
    """

    def __init__(self, config: VidTokConfig) -> None:
        super().__init__()
        self.causal, self.linear = config.causal, config.interpolation == "linear"
        widths, norm, options = config.widths, config.norm_type, config.time_options
        self.conv_in = video_conv3d(config.latent_channels, widths[-1], **options)
        self.mid = Middle(widths[-1], norm, options)
        self.up, self.up_temporal = nn.ModuleList(), nn.ModuleList()
        for level, width in enumerate(widths):
            inputs = [widths[min(level + 1, len(widths) - 1)]] + [width] * config.num_res_blocks
            space = SpatialUpsample(width) if level in config.steps("spatial_us") else None
            time = self._doubling(config, level) if level in config.steps("tempo_us") else None
            blocks_2d = [ResidualBlock2d(c, width, norm_type=norm) for c in inputs]
            blocks_1d = [ResidualBlock1d(width, norm_type=norm, **options) for _ in inputs]
            self.up.append(Stage(blocks_2d, upsample=space))
            self.up_temporal.append(Stage(blocks_1d, upsample=time))
        self.norm_out = norm_act(widths[0], norm, across_time=not config.causal)
        self.conv_out = video_conv3d(widths[0], config.out_ch, **options)

    @staticmethod
    def _doubling(config: VidTokConfig, level: int) -> TemporalUpsample:
        """Returns the step of `level`, where the steps before it made `segment` frames of one."""
        return TemporalUpsample(
            config.widths[level],
            interpolation=config.interpolation,
            segment=2 ** sum(earlier > level for earlier in config.steps("tempo_us")),
            **config.time_options,
        )

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        return_state: bool = False,
        *,
        first_alone: bool = False,
        drop: int = 0,
        num_frames: int | None = None,
    ):
        """Returns the frames of latent `x`, or `(frames, state)`."""
        if self._runs_in_place(x, state, first_alone):
            run = in_place.DecoderPass(self, drop, not return_state, num_frames)
            return in_place.each_item(run, x, state, return_state)
        y = self._frames(x, state, return_state, {"first_alone": True} if first_alone else {})
        return (y[0][:, :, drop:], y[1]) if return_state else y[:, :, drop:]

    def _runs_in_place(self, x: Tensor, state: State | None, first_alone: bool) -> bool:
        """Whether `in_place` knows this chunk: linear interpolation starts with `first_alone`."""
        known = not self.linear or first_alone or state is not None
        return self.causal and known and in_place.applies(self, x, state, _CONTAINERS)

    def _frames(self, x: Tensor, state: State | None, return_state: bool, alone: dict[str, bool]):
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
                x = flow(f"{name}.upsample", time.upsample, x, **alone)
        return flow.result(flow("conv_out", self.conv_out, self.norm_out(x)))


_CONTAINERS.update({Stage, Middle, Encoder, Decoder})


def _quantizer(config: VidTokConfig) -> FSQ | LFQ | VQ | None:
    """Returns the layer that makes the latent discrete, None for KL."""
    if config.regularizer == "kl":
        return None
    if config.regularizer == "vq":
        return VQ(
            config.codebook_size or 0,
            config.latent_channels,
            codebook=config.codebook,
            restart_dead=config.restart_dead,
            commitment_weight=config.commitment_weight,
        )
    names = ("entropy_weight", "entropy_annealing_steps", "entropy_annealing_factor")
    options = {name: getattr(config, name) for name in (*names, "commitment_weight")}
    if config.regularizer == "lfq":
        return LFQ(config.latent_channels, **options)
    return FSQ(config.levels, **options)


def _check_streaming(op: str, streaming: str) -> None:
    if streaming not in ("exact", "reference"):
        raise ValueError(f"{op}: streaming must be 'exact' or 'reference', got {streaming!r}")


class VidTok(GridTokenizer):
    """Returns a VidTok; see `VideoTokenizer` and `GridTokenizer` for what it does.

    `frames="reference"` follows the published frame rule, without extension at the tail:

        1.0         f - 1 copies of the first frame in front unless T % f == 0; n latents give
                    f n - (f - 1) frames
        1.1         copies of the first frame in front up to a multiple of f; the last T frames
        non-causal  T >= f; what exceeds a multiple of f is lost

    It agrees with the default where (T - 1) % f == 0 (non-causal: T % f == 0) and H, W are
    multiples of s.
    """

    config: VidTokConfig
    config_class = VidTokConfig
    presets = PRESETS

    def __init__(self, config: VidTokConfig, name: str | None = None) -> None:
        super().__init__(config, name)
        self.video_channels = config.in_channels
        self.encoder, self.decoder = self._networks(config)
        self.backend = "native"
        self.quantizer = _quantizer(config)

    @staticmethod
    def _networks(config: VidTokConfig) -> tuple[Encoder, Decoder]:
        if config.architecture == "vidtok":
            return Encoder(config), Decoder(config)
        from vtok_ext.models.vidtok_ablations import ablated_networks  # it builds on this file

        return ablated_networks(config)

    @property
    def codebook_size(self) -> int | None:
        """Number of codes, None for KL."""
        return None if self.quantizer is None else self.quantizer.codebook_size

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

    @property
    def is_causal(self) -> bool:
        """Whether a latent depends on its own and earlier frames only."""
        return self.config.causal

    @property
    def reference_version(self) -> str:
        """Version of the published behaviour that the weights belong to."""
        return self.config.version

    def network_steps(self, network: Any, **options: bool) -> list[Step]:
        """Returns the steps of `encoder` or `decoder`, between which tiling may cut it."""
        from vtok_ext.models.vidtok_steps import network_steps

        return network_steps(network, **options)

    def set_backend(self, backend: str) -> VidTok:
        """Returns the model itself, which computes with `backend` from now on.

        Args:
            backend: "native"; or "reference" for the published op sequence in plain PyTorch, see
                `vidtok_reference`, on whole clips: oracle of tests and baseline of benchmarks.

        Raises:
            ValueError: another name, or "reference" for an ablated architecture.
        """
        if backend not in BACKENDS:
            raise ValueError(f"set_backend: backend must be one of {BACKENDS}, got {backend!r}")
        if backend == "reference" and self.config.architecture != "vidtok":
            raise ValueError(
                "set_backend: architecture must be 'vidtok' for the reference backend, "
                f"got {self.config.architecture!r}"
            )
        self.backend = backend
        return self

    @property
    def _num_copies(self) -> int:
        """Copies of the first frame in front of a clip, and frames that decoding drops."""
        return self.temporal_factor - 1 if self.is_causal else 0

    def _encode_published(self, video: Tensor) -> Tensor:
        """Returns the raw latent of just these frames."""
        if self.backend == "native":
            return self.encoder(video)
        return reference.encode(self.encoder, self.config, video)

    def _decode_published(self, latent: Tensor) -> Tensor:
        """Returns all f * T frames of a latent."""
        if self.backend == "native":
            return self.decoder(latent)
        return reference.decode(self.decoder, self.config, latent)

    def _check_whole(self, op: str, state: State | None, return_state: bool) -> None:
        if state is not None or return_state:
            raise ValueError(f"{op}: backend must be 'native' for a stream, got 'reference'")

    def _check_state(self, op: str, state: State | None, return_state: bool) -> None:
        if not self.is_causal and (state is not None or return_state):
            raise self._not_causal(op)

    def encode_chunk(self, video: Tensor, state: State | None = None, return_state: bool = False):
        """Returns the raw latent of the next frames of a stream, or `(latent, state)`."""
        self._check_state("encode_chunk", state, return_state)
        if self.backend == "reference":
            self._check_whole("encode_chunk", state, return_state)
            return self._encode_published(pad_front(video, self._num_copies))
        if state is not None or not self.is_causal:
            return self.encoder(video, state, return_state)
        # The convolutions before the first frame see f - 1 copies of it; before these 1.0 sees
        # zeros, 1.1 more copies.
        if self.config.version == "1.1":
            return self.encoder(video, None, return_state, first_alone=True)
        return self.encoder(pad_front(video, self._num_copies), None, return_state)

    def encode_reference(self, video: Tensor) -> tuple[Tensor, int]:
        """Returns the raw latent of a clip under the published frame rule, and its frame count."""
        f, num_frames = self.temporal_factor, video.shape[2]
        if not self.is_causal:
            if num_frames < f:
                raise ValueError(
                    f"encode: video must have at least {f} frames with frames='reference', "
                    f"got {list(video.shape)}"
                )
            return self._encode_published(video), num_frames // f * f
        copies = -num_frames % f
        if self.config.version == "1.1":
            return self._encode_published(pad_front(video, copies)), num_frames
        raw = self._encode_published(pad_front(video, f - 1 if copies else 0))
        return raw, f * (raw.shape[2] - 1) + 1

    def decode_chunk(self, latent: Tensor, state: State | None = None, return_state: bool = False):
        """Returns the frames of the next latents of a stream, or `(frames, state)`."""
        self._check_state("decode_chunk", state, return_state)
        drop = self._num_copies
        if self.backend == "reference":
            self._check_whole("decode_chunk", state, return_state)
            return self._decode_published(latent)[:, :, drop:]
        if state is not None or not self.is_causal:
            return self.decoder(latent, state, return_state)
        if isinstance(self.decoder, Decoder):
            return self.decoder(latent, None, return_state, **self._at_start)
        if not return_state:
            return self.decoder(latent)[:, :, drop:]
        frames, state = self.decoder(latent, None, True)
        return frames[:, :, drop:], state

    @property
    def _at_start(self) -> dict[str, int]:
        """Options of a causal decoder where a clip begins."""
        return {"first_alone": True} if self.decoder.linear else {"drop": self._num_copies}

    def decode_clip(self, latent: Tensor, num_frames: int | None = None) -> Tensor:
        """Returns the frames of a whole clip, of which the first `num_frames` are wanted."""
        plain = self.is_causal and self.is_exact and self.backend == "native"
        if num_frames is None or not plain or not isinstance(self.decoder, Decoder):
            return super().decode_clip(latent, num_frames)
        return self.decoder(latent, num_frames=max(1, num_frames), **self._at_start)

    def decode_rest(self, state: State) -> Tensor | None:
        """Returns the frames that wait in the state of a stream at its end, None if none can."""
        if self.config.interpolation == "nearest":
            return None
        # The state of the first convolution consists of latents.
        return self.decoder(state["conv_in"][:, :, :0], state)

    def decode_reference(self, latent: Tensor, num_frames: int | None = None) -> Tensor:
        """Returns the frames of a latent under the published frame rule, the `num_frames` of it."""
        if self.config.version != "1.1":
            return self.decode_chunk(latent)
        frames = self._decode_published(latent)
        return frames if num_frames is None else frames[:, :, -num_frames:]

    def stream_encoder(
        self, output: str = "latent", *, streaming: str = "exact", chunk_frames: int = CHUNK_FRAMES
    ) -> StreamEncoder:
        """Returns a StreamEncoder: push frames in any portions, collect latents or ids.

        Args:
            output: "latent", or "tokens" for the ids of a discrete model.
            streaming: "exact" equals the whole clip; "reference" equals the published encoding of
                1.1 in chunks, see `vidtok_published`.
            chunk_frames: frames per published chunk after the first one, a multiple of f.

        Raises:
            ValueError: another value of an option, a continuous or non-causal model where that does
                not do, or "reference" with another version than 1.1.
        """
        exact = super().stream_encoder(output)
        _check_streaming("stream_encoder", streaming)
        if streaming == "exact":
            return exact
        return PublishedStreamEncoder(self, output, chunk_frames)

    def stream_decoder(self, *, streaming: str = "exact", **options) -> StreamDecoder:
        """Returns a StreamDecoder: push latents or ids in any portions, collect frames.

        Args:
            streaming: "exact" equals the whole clip; "reference" equals the published decoding of
                1.1 in overlapping chunks, see `vidtok_published`. 1.0 does not look ahead, so that
                both are the same.
            **options: `num_frames`, `size`, `output` of `GridTokenizer.stream_decoder`.

        Raises:
            ValueError: another value of an option, or a non-causal model.
        """
        _check_streaming("stream_decoder", streaming)
        model = self if streaming == "exact" else published_chunks(self)
        return super(VidTok, model).stream_decoder(**options)

    def regularize(
        self,
        raw: Tensor,
        *,
        sample: bool = False,
        generator: Generators = None,
        step: int = 0,
        compute_loss: bool = False,
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """Returns latent, indices (None for KL) and losses of a raw latent."""
        if self.quantizer is not None:
            return self.quantizer(raw, step, compute_loss)
        latent, losses = kl_posterior(raw, sample, generator)
        return latent, None, losses

    def indices_to_latent(self, indices: Tensor) -> Tensor:
        """Returns codes [B, C, t, h, w] of ids [B, t, h, w]."""
        if self.quantizer is None:
            raise self._continuous("indices_to_latent")
        return self.quantizer.indices_to_codes(indices)
