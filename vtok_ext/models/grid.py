"""GridTokenizer: models whose latent is a grid of one frame per f frames and s x s pixels.

The first latent frame of a causal model stands for the first frame of a video alone, every other
one for f further ones. The clip is extended at its tail (last frame repeated until (T - 1) % f ==
0, non-causal T % f == 0; last row and column up to multiples of s) and decoding crops to what the
Encoding records. Since nothing is added that depends on the length before the end is reached, a
stream never needs to know it, and equals the whole-clip result.
"""

import dataclasses
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from vtok_ext.layers._state import State
from vtok_ext.layers.kl import Generators
from vtok_ext.models import _video_input as video_input
from vtok_ext.models.base import VideoTokenizer
from vtok_ext.models.encoding import Encoding, Output
from vtok_ext.models.streaming import StreamDecoder, StreamEncoder
from vtok_ext.models.tiling_steps import Step


class GridTokenizer(VideoTokenizer):
    """Base of models with a latent [B, C, t, ceil(H / s), ceil(W / s)].

    t is 1 + ceil((T - 1) / f) for models whose first latent stands for one frame, as that of causal
    ones does, ceil(T / f) otherwise. A model adds
    `encode_chunk`, `decode_chunk`, `encode_reference`, `decode_reference`, `regularize` and the
    facts `is_causal`, `temporal_factor`, `spatial_factor`, `latent_channels`. One that takes k
    latents at a time also gives `latents_per_unit`, and t is rounded up to 1 + a multiple of k.
    """

    video_channels: int = 3
    view: str = ""  # how a view of a model computes, that states of its streams are told by
    is_exact: bool = True  # False for a view in blended tiles, see `tiled`

    @property
    def starts_alone(self) -> bool:
        """Whether the first latent frame stands for the first frame alone."""
        return self.is_causal

    @property
    @abstractmethod
    def temporal_factor(self) -> int:
        """f: frames per latent frame."""

    @property
    @abstractmethod
    def spatial_factor(self) -> int:
        """s: pixels per latent position along H and W."""

    @property
    @abstractmethod
    def latent_channels(self) -> int:
        """C of the latent."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters, to which videos and latents are converted."""
        return next(self.parameters()).dtype

    @property
    def latents_per_unit(self) -> int:
        """k: latents that the networks take at a time; a first unit has k + 1."""
        return 1

    def token_grid(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Returns (t, h, w) of the latent of a clip of that many frames and that size."""
        k, s, alone = self.latents_per_unit, self.spatial_factor, int(self.starts_alone)
        units = -(-(num_frames - alone) // (self.temporal_factor * k))
        return alone + k * units, -(-height // s), -(-width // s)

    @abstractmethod
    def encode_chunk(self, video: Tensor, state: State | None = None, return_state: bool = False):
        """Returns the raw latent of the next frames of a stream, or `(latent, state)`.

        At the start (state None) 1 + k f frames, afterwards k f; sizes are multiples of s. A model
        that is not causal takes whole clips of k f frames and no state.
        """

    @abstractmethod
    def decode_chunk(self, latent: Tensor, state: State | None = None, return_state: bool = False):
        """Returns the frames of the next latents of a stream, or `(frames, state)`.

        At the start (state None) 1 + (k - 1) f frames for k latents, afterwards k f; k f without
        causality. With `return_state=True`, frames that depend on the next latent wait in the state
        until that latent or `decode_rest`.
        """

    def decode_clip(self, latent: Tensor, num_frames: int | None = None) -> Tensor:
        """Returns the frames of a whole clip; the first `num_frames` of them are wanted."""
        return self.decode_chunk(latent)

    def decode_rest(self, state: State) -> Tensor | None:
        """Returns the frames that wait in the state of a stream at its end, None if none can."""
        return None

    @abstractmethod
    def encode_reference(self, video: Tensor) -> tuple[Tensor, int]:
        """Returns the raw latent of a clip under the published frame rule, and its frame count."""

    @abstractmethod
    def decode_reference(self, latent: Tensor, num_frames: int | None = None) -> Tensor:
        """Returns the frames of a latent under the published frame rule, the `num_frames` of it."""

    @abstractmethod
    def regularize(
        self,
        raw: Tensor,
        *,
        sample: bool = False,
        generator: Generators = None,
        step: int = 0,
        compute_loss: bool = False,
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """Returns latent, indices (None when continuous) and losses of a raw latent."""

    def forward(self, video: Tensor, *, sample: bool | None = None, **options) -> Output:
        """Returns Output(reconstruction, encoding); the entry for training.

        Args:
            video: [B, 3, T, H, W], float in [-1, 1] or uint8.
            sample: draw continuous latents from the posterior; default in training mode only.
            **options: others of `encode`; a `tile` holds for both directions.
        """
        sample = self.training if sample is None else sample
        encoding = self.encode(video, sample=sample, **options)
        return Output(self.decode(encoding, tile=options.get("tile")), encoding)

    def encode(
        self,
        video: Tensor,
        *,
        fps: float | None = None,
        sample: bool = False,
        generator: Generators = None,
        frames: str = "preserve",
        step: int = 0,
        compute_loss: bool | None = None,
        tile: tuple[int, int] | str | None = None,
        normalize: bool = False,
    ) -> Encoding:
        """Returns the Encoding of a video.

        Args:
            video: [B, 3, T, H, W], float in [-1, 1] or uint8.
            fps: frames per second, only recorded.
            sample: draw a continuous latent from the posterior instead of taking its mean.
            generator: source of that noise, or a sequence of one per sample; default the global CPU
                one.
            frames: "preserve" every frame and pixel; or "reference" for the published frame rule.
            step: training step, which anneals the weight of FSQ's entropy loss.
            compute_loss: whether FSQ's auxiliary loss is computed; default in training mode with
                gradients. The KL loss is always there.
            tile: compute tile by tile, exactly; (height, width) or "auto" as in `tiled`.
            normalize: give the latent mean 0 and std 1 by `latent_statistics`; `decode` knows.

        Raises:
            TypeError, ValueError: the video or an option is not as described; NaN or infinity; no
                statistics for `normalize`.
        """
        if tile is not None:
            options = {"sample": sample, "generator": generator, "frames": frames, "step": step}
            encoding = self.tiled(tile).encode(video, fps=fps, compute_loss=compute_loss, **options)
            return self._normalized(encoding, normalize)
        video_input.check_video("encode", video, self.video_channels)
        video_input.check_frame_rule("encode", frames)
        video_input.check_fps("encode", fps)
        s, unit = self.spatial_factor, self.temporal_factor * self.latents_per_unit
        num_frames, height, width = video.shape[2:]
        x = video_input.to_float(video, self.dtype)
        if frames == "preserve":
            x = video_input.pad_tail(video_input.pad_size(x, s), unit, alone=int(self.starts_alone))
            raw = self.encode_chunk(x)
        elif min(height, width) < s:
            raise ValueError(f"encode: height and width must be >= {s}, got {[height, width]}")
        else:
            raw, num_frames = self.encode_reference(x)
            height, width = s * raw.shape[3], s * raw.shape[4]
        if compute_loss is None:
            compute_loss = self.training and torch.is_grad_enabled()
        latent, indices, losses = self.regularize(
            raw, sample=sample, generator=generator, step=step, compute_loss=compute_loss
        )
        moments = None if self.is_discrete else raw
        size = (height, width)
        encoding = Encoding(latent, num_frames, size, indices, moments, losses, fps, frames)
        return self._normalized(encoding, normalize)

    def decode(
        self,
        encoding: Encoding | Tensor,
        *,
        num_frames: int | None = None,
        size: tuple[int, int] | None = None,
        output: str = "float",
        frames: str | None = None,
        tile: tuple[int, int] | str | None = None,
        normalize: bool = False,
    ) -> Tensor:
        """Returns the video [B, 3, T, H, W] of an encoding.

        Args:
            encoding: an Encoding; or a bare latent [B, C, t, h, w]; or, of a discrete model,
                integer ids [B, t, h, w].
            num_frames, size: crop to T and (H, W); default what the Encoding records, and for a
                bare tensor all frames: f * t, without the first f - 1 of a causal model. Of a bare
                latent under VidTok 1.1's published rule the last T, which is where a clip lies.
            output: "float", nominally in [-1, 1] and not clamped; or "uint8", clamped and rounded.
            frames: the frame rule of `encode`, on the whole clip; default what the Encoding
                records, published chunks included, and "preserve".
            tile: compute tile by tile, exactly; (height, width) or "auto" as in `tiled`.
            normalize: a bare latent is normalised; an Encoding says so itself.

        Raises:
            TypeError, ValueError: an argument is not as described, or asks for more than there is,
                or an Encoding records another model, or published chunks that this model has not.
        """
        encoding = self._denormalized(encoding, normalize)  # type: ignore[assignment]
        if tile is not None:
            options = {"num_frames": num_frames, "size": size, "output": output, "frames": frames}
            return self.tiled(tile).decode(encoding, **options)
        latent, known = encoding, num_frames
        if isinstance(encoding, Encoding):
            self.check_origin("decode", encoding.model_id)
            latent = encoding.latent  # type: ignore[assignment]
            num_frames = encoding.num_frames if num_frames is None else num_frames
            # The published rule finds the clip's frames at the end of what is decoded.
            known = max(encoding.num_frames, num_frames)
            size = encoding.size if size is None else size
            if encoding.chunk_frames is not None and frames is None:
                from vtok_ext.models.vidtok_published import decode_published  # builds on this file

                chunked: Any = decode_published  # refuses models that are no VidTok 1.1
                whole = dataclasses.replace(encoding, num_frames=known, size=size)
                video = chunked(self, whole, chunk_frames=encoding.chunk_frames)
                return self._finish("decode", video, num_frames, None, output)
            frames = encoding.frame_rule if frames is None else frames
        frames = "preserve" if frames is None else frames
        video_input.check_frame_rule("decode", frames)
        latent = self.to_latent("decode", latent)
        if frames == "preserve":
            video = self.decode_clip(latent, num_frames)
        else:
            video = self.decode_reference(latent, known)
        return self._finish("decode", video, num_frames, size, output)

    def run_networks(self, batch: int, num_frames: int, height: int, width: int) -> None:
        """Runs encoder and decoder on clips without meaningful values, padded as by `encode`."""
        grid = self.token_grid(num_frames, height, width)
        f, s, alone = self.temporal_factor, self.spatial_factor, int(self.starts_alone)
        frames = alone + f * (grid[0] - alone)
        weight = next(self.parameters())
        size = s * grid[1], s * grid[2]
        self.encode_chunk(weight.new_empty(batch, self.video_channels, frames, *size))
        self.decode_chunk(weight.new_empty(batch, self.latent_channels, *grid))

    def network_steps(self, network: Any, **options: bool) -> list[Step]:
        """Returns the steps of `encoder` or `decoder`, between which tiling may cut it.

        Args:
            network: one of the two.
            **options: further ones of its `forward`.

        Raises:
            ValueError: the model declares none.
        """
        raise ValueError(
            f"tiled: model must declare the steps of its networks, got {self.name}; "
            "mode='blended' is possible, not exact"
        )

    def tiled(
        self,
        tile: tuple[int, int] | int | str = "auto",
        *,
        mode: str = "exact",
        overlap: float = 0.25,
        memory: int | None = None,
    ) -> Any:
        """Returns a view of this model that computes its networks tile by tile.

        The view has the same weights, id and methods, streams included; see `models.tiling`. It
        shares its layers with the model: put that into training or evaluation mode, not the view.

        Args:
            tile: (height, width) in positions of a feature map that are computed at once, at every
                resolution, with a few more around them; or "auto": the largest for which encoding
                or decoding fits into `memory`, as the planner predicts at the first call for a
                shape; a stream keeps one that does for chunks of 16 frames.
            mode: "exact": equal to the whole picture; "blended": overlapping tiles of (height,
                width) pixels, each by itself, faded into each other.
            overlap: of blended tiles, as a share of a tile.
            memory: bytes for everything but the weights; default 80 % of what is free.

        Raises:
            ValueError: an option is not as described, or an exact view of a model that declares no
                steps or needs whole frames at full resolution (group norms).
        """
        from vtok_ext.models.tiling import tiled_view  # it builds on this file

        return tiled_view(self, tile, mode=mode, overlap=overlap, memory=memory)

    def stream_encoder(self, output: str = "latent") -> StreamEncoder:
        """Returns a StreamEncoder: push frames in any portions, collect latents or ids.

        Args:
            output: "latent", or "tokens" for the ids of a discrete model.

        Raises:
            ValueError: another output, "tokens" of a continuous model, or a non-causal model.
        """
        if not self.is_causal:
            raise self._not_causal("stream_encoder")
        if output == "tokens" and not self.is_discrete:
            raise self._continuous("stream_encoder")
        return StreamEncoder(self, output)

    def stream_decoder(  # type: ignore[override]
        self,
        *,
        num_frames: int | None = None,
        size: tuple[int, int] | None = None,
        output: str = "float",
    ) -> StreamDecoder:
        """Returns a StreamDecoder: push latents or ids in any portions, collect frames.

        Args:
            num_frames: frames of the whole clip if known already; else pass it to `flush`.
            size: (H, W) to crop to; default the decoder's own size.
            output: "float" or "uint8".

        Raises:
            ValueError: another output, or a non-causal model.
        """
        if not self.is_causal:
            raise self._not_causal("stream_decoder")
        return StreamDecoder(self, num_frames=num_frames, size=size, output=output)

    def to_latent(self, op: str, latent) -> Tensor:
        """Returns `latent`, or that of integer ids, checked, in the model's dtype."""
        if not isinstance(latent, Tensor):
            raise TypeError(f"{op}: latent must be a torch.Tensor, got {type(latent).__name__}")
        if not latent.is_floating_point():
            latent = self.indices_to_latent(latent)
        if latent.dim() != 5 or latent.shape[1] != self.latent_channels or 0 in latent.shape:
            raise ValueError(
                f"{op}: latent must be a non-empty [B, {self.latent_channels}, T, H, W], "
                f"got {list(latent.shape)}"
            )
        return latent.to(self.dtype)
