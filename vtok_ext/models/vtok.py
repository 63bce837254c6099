"""VTok: a key frame in S tokens and one token for every later sampled frame.

    key frame  V_s = pool(F(x_1)), S = 16 by an average over 4 x 4 areas
    later      v_t = g(F(x_t) - F(x_1)), one token
    F          (encoder's features - mean) / deviation, by stored statistics per channel
    sequence   S + (T - 1) tokens instead of S * T; 5 s at 6 tokens per second: 16 + 30 = 46

The encoder is frozen, g a pool and a small MLP. A flow-matching transformer decodes. Features are
standardised since most of one is the same in all pictures, and networks that are trained from
nothing behind it see little else for long. No code or weights are public: what is not in the paper,
such as the statistics, is marked as our own where it stands.
Source: VTok (arXiv 2602.04202).
"""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok_ext.layers.fsq import FSQ
from vtok_ext.models import _video_input as video_input
from vtok_ext.models.base import OUTPUTS, VideoTokenizer
from vtok_ext.models.encoding import Encoding, Output
from vtok_ext.models.vision_encoder import (
    HuggingFaceEncoder,
    SmallViT,
    load_tower,
    resized,
    tower_from_json,
)
from vtok_ext.models.vtok_config import KEY_FRAMES, PRESETS, VTokConfig
from vtok_ext.models.vtok_decoder import Generators, VTokDecoder
from vtok_ext.models.vtok_layout import (
    FRAMES_PER_CALL,
    PADDING,
    FrameRule,
    Segment,
    nearest_to_mean,
    pad_sequences,
    positions_of,
    segment_starts,
    segments_from,
    with_key,
)
from vtok_ext.models.vtok_residual import build_residual
from vtok_ext.models.vtok_streaming import VTokStreamEncoder

# For the statistics of features: frames of a video, and the least deviation, of a dead channel.
_STATISTICS_FRAMES, _LEAST_DEVIATION = 8, 1e-3


class VTok(VideoTokenizer):
    """Returns a VTok; see `VideoTokenizer`.

    The latent is a sequence [B, L, D], L = S + residual tokens (per segment), or of a discrete
    model the rounded numbers [B, L, len(levels)]. `Encoding.positions` [B, L, 2] says which frame
    and slot a token belongs to; where clips of a batch have different lengths it is -1 behind the
    shorter ones. Without positions, as for bare latents and Tokens, sequences count as those of one
    segment whose key frame is the first.

    The encoder streams (`stream_encoder`); the decoder sees all tokens of a clip at once.
    """

    config: VTokConfig
    feature_mean: Tensor
    feature_deviation: Tensor
    config_class = VTokConfig
    presets = PRESETS

    def __init__(self, config: VTokConfig, name: str | None = None) -> None:
        encoder: SmallViT | HuggingFaceEncoder
        if config.encoder == "huggingface":
            tower = (
                tower_from_json(config.encoder_config)
                if config.encoder_config
                else load_tower(config.encoder_source)
            )
            encoder = HuggingFaceEncoder(tower, config.encoder_layer)
            config = config.replace(
                # Not where it came from: a folder of this machine is no part of what the model is.
                encoder_source="",
                encoder_config=encoder.config_json(),
                encoder_dim=encoder.channels,
                image_size=encoder.image_size,
            )
        else:
            shape = (config.encoder_dim, config.encoder_depth, config.encoder_heads)
            encoder = SmallViT(config.image_size, config.encoder_patch, *shape)
        super().__init__(config, name)
        self.encoder = encoder
        side = config.image_size // encoder.patch
        channels, dim = encoder.channels, config.token_dim
        self.register_buffer("feature_mean", torch.zeros(channels))
        self.register_buffer("feature_deviation", torch.ones(channels))
        self.key_projection = nn.Linear(channels, dim) if channels != dim else nn.Identity()
        self.residual = build_residual(config, channels, (side, side))
        self.quantizer = FSQ(config.levels, channel_dim=-1) if config.levels else None
        self.to_levels = nn.Linear(dim, len(config.levels)) if config.levels else nn.Identity()
        self.decoder = VTokDecoder(config)

    @property
    def is_causal(self) -> bool:
        """False: the decoder sees all tokens of a clip; `stream_encoder` works nevertheless."""
        return False

    @property
    def temporal_factor(self) -> None:
        """None: the first frame has S tokens, later ones have one."""
        return None

    @property
    def spatial_factor(self) -> None:
        """None: tokens do not depend on the size of the video."""
        return None

    @property
    def codebook_size(self) -> int | None:
        """Number of codes, None for a continuous model."""
        return None if self.quantizer is None else self.quantizer.codebook_size

    @property
    def latent_channels(self) -> int:
        """Numbers per token."""
        return self.config.latent_dim

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters, to which videos and latents are converted."""
        return self.decoder.out.weight.dtype

    def frame_rule(self, fps: float | None = None, stride: int | None = None) -> FrameRule:
        """Returns which frames give residual tokens at `fps`; see `encode`."""
        stride = self.config.stride if stride is None else stride
        if not isinstance(stride, int) or isinstance(stride, bool) or stride < 0:
            raise ValueError(f"VTok: stride must be an integer >= 0, got {stride!r}")
        fps = self.config.default_fps if fps is None else fps
        if not isinstance(fps, Real) or not 0 < fps < float("inf"):
            raise ValueError(f"VTok: fps must be a positive number, got {fps!r}")
        # As files have it: tokens that are read again count the same frames.
        return FrameRule.of(stride, self.config.motion_tokens_per_second, float(fps))

    def token_grid(self, num_frames: int, height: int, width: int) -> tuple[int]:
        """Returns (S + residual tokens,) of one segment at the default frame rate."""
        return (self.config.key_tokens + self.frame_rule().count(1, num_frames),)

    def default_positions(
        self, num_frames: int, fps: float | None = None, stride: int | None = None
    ) -> Tensor:
        """Returns int32 [L, 2] of a clip of one segment whose key frame is the first."""
        segments = segments_from([0], num_frames, self.frame_rule(fps, stride))
        return positions_of(segments, self.config.key_tokens)

    def run_networks(self, batch: int, num_frames: int, height: int, width: int) -> None:
        """Runs the encoder and one step of the decoder on clips without meaningful values."""
        video = next(self.decoder.parameters()).new_zeros(batch, 3, num_frames, height, width)
        encoding = self.encode(video)
        assert isinstance(encoding.latent, Tensor) and encoding.positions is not None
        clip, times = self.decoder._padded(video), video.new_zeros(batch)
        self.decoder.predict(clip, times, encoding.latent, encoding.positions)

    # Encoding.

    def forward(
        self, video: Tensor, *, step: int = 0, generator: Generators = None, **options: Any
    ) -> Output:
        """Returns Output(reconstruction, encoding); the entry for training.

        In training mode `encoding.losses` has `flow_loss`, to be minimised, and the reconstruction
        is the decoder's expectation at the noise that was drawn; in eval mode it is `decode`'s.

        Args:
            video: [B, 3, T, H, W], float in [-1, 1] or uint8.
            step: optimiser steps done, for FSQ's annealed loss.
            generator: sources of the decoder's times and noise: one per clip, or one for all.
            **options: as for `encode`.

        Raises:
            TypeError, ValueError: an argument is not as described.
        """
        encoding = self.encode(video, step=step, **options)
        if not self.training:
            return Output(self.decode(encoding), encoding)
        assert isinstance(encoding.latent, Tensor) and encoding.positions is not None
        target = video_input.to_float(video, self.dtype)
        loss, reconstruction = self.decoder.loss(
            target, encoding.latent, encoding.positions, generator
        )
        encoding.losses["flow_loss"] = loss
        return Output(reconstruction, encoding)

    def encode(
        self,
        video: Tensor,
        *,
        fps: float | None = None,
        sample: bool = False,
        generator: torch.Generator | None = None,
        stride: int | None = None,
        key_frame: str | None = None,
        cut_threshold: float | None = None,
        step: int = 0,
        compute_loss: bool | None = None,
        frames: str = "preserve",
    ) -> Encoding:
        """Returns the Encoding of a video, whose latent is a sequence of tokens; see the class.

        Args:
            video: [B, 3, T, H, W], float in [-1, 1] or uint8.
            fps: frames per second; default `config.default_fps`.
            sample, generator: without effect, the latent has no distribution.
            stride, key_frame, cut_threshold: instead of those of the configuration.
            step, compute_loss: of FSQ, see there.
            frames: "preserve"; there is no released system whose rule could be followed.

        Raises:
            TypeError, ValueError: the video or an option is not as described; NaN or infinity.
        """
        video_input.check_video("encode", video)
        if frames != "preserve":
            raise ValueError(f"encode: frames must be 'preserve' for VTok, got {frames!r}")
        key_frame = self.config.key_frame if key_frame is None else key_frame
        if key_frame not in KEY_FRAMES:
            raise ValueError(f"encode: key_frame must be one of {KEY_FRAMES}, got {key_frame!r}")
        threshold = self.config.cut_threshold if cut_threshold is None else cut_threshold
        if not isinstance(threshold, Real) or not 0 <= threshold < float("inf"):
            raise ValueError(f"encode: cut_threshold must be >= 0, got {threshold!r}")
        rule = self.frame_rule(fps, stride)
        starts = [segment_starts(clip, threshold, self.dtype) for clip in video]
        plans = [segments_from(found, video.shape[2], rule) for found in starts]
        if key_frame == "auto":
            plans = [self._choose_keys(c, plan) for c, plan in zip(video, plans, strict=True)]
        tokens, positions = self._encode_plans(video, plans)
        indices, losses = None, {}
        if self.quantizer is not None:
            tokens, indices, losses = self.quantizer(self.to_levels(tokens), step, compute_loss)
        height, width = video.shape[3:]
        return Encoding(
            tokens,
            video.shape[2],
            (height, width),
            indices=indices,
            losses=losses,
            fps=None if fps is None else float(fps),
            positions=positions.to(video.device),
        )

    def tokenize(self, video: Tensor, *, fps: float | None = None, **options: Any):
        """Returns the integer Tokens of a video; see `VideoTokenizer`.

        Raises:
            ValueError: also for cuts or chosen key frames, which Tokens cannot record: save the
                Encoding instead.
        """
        if self.is_discrete:
            self.refuse_unrecorded_positions("tokenize", **options)
        return super().tokenize(video, fps=fps, **options)

    def refuse_unrecorded_positions(self, op: str, **options: Any) -> None:
        """Raises ValueError if tokens alone do not say which frames they belong to.

        Args:
            op: name in front of the message.
            **options: as for `encode`.
        """
        chosen = {
            name: getattr(self.config, name) if options.get(name) is None else options[name]
            for name in ("key_frame", "cut_threshold", "stride")
        }
        if chosen != {"key_frame": "first", "cut_threshold": 0, "stride": self.config.stride}:
            raise ValueError(
                f"{op}: key_frame, cut_threshold and stride must be 'first', 0 and that of the "
                "configuration, because Tokens record no positions; save the Encoding instead "
                "(vtok encode --output latent)"
            )

    @torch.no_grad()
    def fit_features(self, videos: Iterable[Tensor]) -> None:
        """Stores mean and deviation of the encoder's features over some videos; before training.

        Args:
            videos: [B, 3, T, H, W] each, of which frames evenly apart are taken.

        Raises:
            TypeError, ValueError: a video is not as described, or there is none.
        """
        count, sums = 0, torch.zeros_like(self.feature_mean, dtype=torch.float64)
        squares = torch.zeros_like(sums)
        for video in videos:
            video_input.check_video("fit_features", video)
            length = video.shape[2]
            number = min(length, _STATISTICS_FRAMES)
            chosen = [i * length // number for i in range(number)]
            images = video_input.to_float(video[:, :, chosen], self.dtype).transpose(1, 2)
            maps = self._maps_of(images.flatten(0, 1)).double()
            sums += maps.sum((0, 2, 3))
            squares += maps.square().sum((0, 2, 3))
            count += maps[:, 0].numel()
        if count == 0:
            raise ValueError("fit_features: videos must be at least one, got none")
        mean = sums / count
        self.feature_mean.copy_(mean)
        variance = squares / count - mean.square()
        self.feature_deviation.copy_(variance.clamp(min=_LEAST_DEVIATION**2).sqrt())

    @property
    def knows_its_features(self) -> bool:
        """Whether statistics of features were ever fitted: of random weights they are 0 and 1."""
        return bool((self.feature_mean != 0).any() or (self.feature_deviation != 1).any())

    def standardised(self, maps: Tensor) -> Tensor:
        """Returns maps [..., C, h, w] of the encoder by the stored statistics."""
        mean, deviation = self.feature_mean[:, None, None], self.feature_deviation[:, None, None]
        return (maps - mean) / deviation

    def features(self, images: Tensor) -> Tensor:
        """Returns standardised maps [n, C, h, w] of pictures [n, 3, H, W] in [-1, 1]."""
        return self.standardised(self._maps_of(images))

    def _maps_of(self, images: Tensor) -> Tensor:
        """Returns the encoder's own maps [n, C, h, w] of pictures [n, 3, H, W] in [-1, 1]."""
        return self.encoder(resized(images, self.config.image_size))

    def key_tokens(self, maps: Tensor) -> Tensor:
        """Returns tokens [B, S, D] of a key frame's feature maps [B, C, h, w]."""
        return self.key_projection(self._pooled(maps).mT)

    def _pooled(self, maps: Tensor) -> Tensor:
        """Returns means [n, C, S] over the areas of the key tokens of maps [n, C, h, w]."""
        side = self.config.key_grid
        return F.adaptive_avg_pool2d(maps, (side, side)).flatten(2)

    def _frame_maps(self, clip: Tensor, frames: tuple[int, ...]) -> Tensor:
        """Returns maps [B, n, C, h, w] of some frames of clips [B, 3, T, H, W], float or uint8.

        Only these frames are converted: a film in uint8 would take four times its memory.
        """
        images = video_input.to_float(clip[:, :, list(frames)], self.dtype).transpose(1, 2)
        return self.features(images.flatten(0, 1)).unflatten(0, images.shape[:2])

    def _encode_plans(self, clip: Tensor, plans: list[list[Segment]]) -> tuple[Tensor, Tensor]:
        """Returns tokens [B, L, D] and positions [B, L, 2]."""
        slots = self.config.key_tokens
        if all(plan == plans[0] for plan in plans):
            positions = positions_of(plans[0], slots)
            return self._encode_plan(clip, plans[0]), positions.expand(len(plans), -1, -1)
        rows = [self._encode_plan(c[None], plan)[0] for c, plan in zip(clip, plans, strict=True)]
        places = [positions_of(plan, slots) for plan in plans]
        return pad_sequences(rows, 0.0), pad_sequences(places, PADDING)

    def _encode_plan(self, clip: Tensor, plan: list[Segment]) -> Tensor:
        """Returns tokens [B, L, D] of clips that share their segments."""
        parts = []
        for segment in plan:
            key = self._frame_maps(clip, (segment.key,))[:, 0]
            parts.append(self.key_tokens(key))
            for first in range(0, len(segment.frames), FRAMES_PER_CALL):
                frames = segment.frames[first : first + FRAMES_PER_CALL]
                parts.append(self.residual(self._frame_maps(clip, frames), key))
        tokens = torch.cat(parts, dim=1)
        if torch.is_grad_enabled() and not any(segment.frames for segment in plan):
            # DDP waits for a gradient of every parameter in every step.
            tokens = tokens + nothing_of(self.residual)
        return tokens

    @torch.no_grad()
    def _choose_keys(self, clip: Tensor, plan: list[Segment]) -> list[Segment]:
        """Returns the segments of a clip [3, T, H, W], each with the frame as key whose pooled
        features are nearest to their mean over the segment: it leaves the least to tell."""
        chosen = []
        for segment in plan:
            frames = (segment.key, *segment.frames)
            points = [
                self._pooled(self._frame_maps(clip[None], frames[at : at + FRAMES_PER_CALL])[0])
                for at in range(0, len(frames), FRAMES_PER_CALL)
            ]
            chosen.append(with_key(segment, frames[int(nearest_to_mean(torch.cat(points)))]))
        return chosen

    def indices_to_latent(self, indices: Tensor) -> Tensor:
        """Returns the codes [B, L, len(levels)] of ids [B, L] (discrete models only)."""
        if self.quantizer is None:
            return super().indices_to_latent(indices)
        return self.quantizer.indices_to_codes(indices, self.dtype)

    # Decoding.

    def decode(
        self,
        encoding: Encoding | Tensor,
        *,
        num_frames: int | None = None,
        size: tuple[int, int] | None = None,
        output: str = "float",
        num_steps: int | None = None,
        seed: int = 0,
    ) -> Tensor:
        """Returns the video of an Encoding or a bare latent, sampled from the decoder's flow.

        The same arguments give the same video on one device.

        Args:
            encoding: of this model, or tokens [B, L, D].
            num_frames, size: of the video; default those of the Encoding; of a bare latent up to
                its last token's frame, in the encoder's size.
            output: "float" in about [-1, 1], or "uint8".
            num_steps: of the flow, default `config.sampling_steps`; 1 gives the mean of all videos
                that fit, more give one of them.
            seed: of the noise.

        Raises:
            TypeError, ValueError: an argument is not as described, or an Encoding records another
                model.
        """
        latent, positions, length, wanted = self._to_decode(encoding, num_frames)
        num_frames = length if num_frames is None else num_frames
        size = wanted if size is None else size
        steps = self.config.sampling_steps if num_steps is None else num_steps
        check_sampling("decode", num_frames, size, steps, output)
        generator = torch.Generator().manual_seed(checked_seed("decode", seed))
        video = self.decoder.sample(
            latent, positions, num_frames, size, num_steps=steps, generator=generator
        )
        return self._finish("decode", video, num_frames, size, output)

    def _to_decode(
        self, encoding: Encoding | Tensor, num_frames: int | None
    ) -> tuple[Tensor, Tensor, int, tuple[int, int]]:
        """Returns latent, positions, number of frames and size, checked."""
        if isinstance(encoding, Encoding):
            self.check_origin("decode", encoding.model_id)
            latent, positions, fps = encoding.latent, encoding.positions, encoding.fps
            num_frames = encoding.num_frames
        else:
            latent, positions, fps = encoding, None, None
        width = self.config.latent_dim
        if not isinstance(latent, Tensor) or latent.dim() != 3 or latent.shape[2] != width:
            found = list(latent.shape) if isinstance(latent, Tensor) else type(latent).__name__
            raise ValueError(f"decode: latent must be [B, L, {width}], got {found}")
        if 0 in latent.shape:
            raise ValueError(
                f"decode: latent must have a clip and a token at least, got {list(latent.shape)}"
            )
        if positions is None:
            positions = self._positions_for(latent.shape[1], num_frames, fps)
        positions = self._checked_positions(positions, *latent.shape[:2]).to(latent.device)
        if num_frames is None:
            num_frames = int(positions[..., 0].max()) + 1
        size = (self.config.image_size,) * 2
        if isinstance(encoding, Encoding):
            size = encoding.size
        return latent.to(self.dtype), positions, num_frames, size

    def _checked_positions(self, positions: Tensor, batch: int, length: int) -> Tensor:
        """Returns positions as [B, L, 2]; raises if they are none of this model."""
        shape = tuple(positions.shape)
        if shape not in ((batch, length, 2), (1, length, 2), (length, 2)):
            raise ValueError(f"decode: positions must be [{batch}, {length}, 2], got {list(shape)}")
        if positions.is_floating_point():
            raise TypeError(f"decode: positions must be integers, got {positions.dtype}")
        # Those of a file are on the CPU; elsewhere looking at them would wait for the device.
        has_values = type(positions) is Tensor and not torch.compiler.is_compiling()
        if positions.device.type == "cpu" and has_values:
            slots = positions[..., 1]
            if positions.min() < PADDING or slots.max() > self.config.key_tokens:
                raise ValueError(
                    f"decode: positions must be frames >= {PADDING} and slots in "
                    f"{PADDING}..{self.config.key_tokens}, got {int(positions.min())} and "
                    f"{int(slots.max())}"
                )
        return positions.expand(batch, -1, -1)

    def _positions_for(self, length: int, num_frames: int | None, fps: float | None) -> Tensor:
        """Returns [L, 2] of a sequence that comes without; raises if it has another length."""
        rule, motion = self.frame_rule(fps), length - self.config.key_tokens
        if num_frames is None:
            num_frames = 1 if motion < 1 else rule.frame_of(motion) + 1
        # Counted, not listed: a damaged file may speak of any number of frames.
        expected = self.config.key_tokens + rule.count(1, num_frames)
        if expected != length:
            raise ValueError(
                f"decode: latent must have {expected} tokens for {num_frames} frames, "
                f"got {length}; an Encoding with positions may have others"
            )
        return self.default_positions(num_frames, fps)

    def stream_encoder(self, output: str = "latent") -> VTokStreamEncoder:
        """Returns a stream: one frame in, at most one token out, at constant memory.

        Args:
            output: "latent" or "tokens".

        Raises:
            ValueError: key_frame "auto", which needs the whole clip; tokens of a continuous model.
        """
        return VTokStreamEncoder(self, output)


def nothing_of(module: nn.Module) -> Tensor:
    """Returns 0 with zero gradients for all parameters."""
    return sum((p.flatten()[0] * 0.0 for p in module.parameters()), torch.zeros(()))


def check_sampling(op: str, num_frames: Any, size: Any, num_steps: Any, output: str) -> None:
    """Raises ValueError, before time is spent, for what a decoder cannot sample."""
    counts = (num_frames, num_steps, *(size if isinstance(size, tuple | list) else ()))
    if len(counts) != 4 or not all(isinstance(n, Integral) and int(n) >= 1 for n in counts):
        raise ValueError(
            f"{op}: num_frames, size (H, W) and num_steps must be integers of at least 1, "
            f"got {num_frames}, {size} and {num_steps}"
        )
    if output not in OUTPUTS:
        raise ValueError(f"{op}: output must be one of {OUTPUTS}, got {output!r}")


def checked_seed(op: str, seed: int) -> int:
    """Returns a seed that torch takes. Raises TypeError, ValueError for another."""
    if not isinstance(seed, Integral):
        raise TypeError(f"{op}: seed must be an integer, got {seed!r}")
    number = int(seed)
    if not 0 <= number < 2**63:
        raise ValueError(f"{op}: seed must be in 0..2^63 - 1, got {number}")
    return number
