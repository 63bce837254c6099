"""VidTok 1.1 in chunks as published: reproduces numbers that were computed that way.

The clip is cut into its first frame and then chunks of equal length. Three differences from the
whole clip, all of them absent from `VidTok.encode`, `decode` and their exact streams:

    encoding   copies of the first frame of the last chunk stand in the middle of the clip when the
               chunk is no multiple of f, and losses are means over chunks
    overlap    of each frame rate step whose first segment has n frames, the second segment x[n],
               x[n + 1], ... begins with .25 x' + .75 x[n] instead of x[n], where x' is x[2n - 1] of
               a clip of two latents
    otherwise  every chunk is clamped at its end and continues behind a wrong frame

With overlap the chunk length does not matter. Source: microsoft/VidTok, release 1.1.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok_ext.layers import TemporalUpsample
from vtok_ext.layers._state import State, StateFlow, owned
from vtok_ext.layers.alpha_blend import alpha_blend
from vtok_ext.models import _video_input as video_input
from vtok_ext.models.encoding import Encoding
from vtok_ext.models.streaming import StreamEncoder, _role

if TYPE_CHECKING:
    from vtok_ext.models.vidtok import Decoder, VidTok

CHUNK_FRAMES = 16


def _linear(x: Tensor) -> Tensor:
    """Returns twice as many frames, half-pixel centres, clamped at both ends."""
    if x.shape[2] == 0:
        return x
    return F.interpolate(x, scale_factor=(2.0, 1.0, 1.0), mode="trilinear")


class _PublishedUpsample(nn.Module):
    """A chunked TemporalUpsample with the parameters of `layer`."""

    def __init__(self, layer: TemporalUpsample) -> None:
        super().__init__()
        self.conv, self.mix_factor, self.segment = layer.conv, layer.mix_factor, layer.segment

    def forward(self, x: Tensor, state: State | None = None, return_state: bool = False):
        """Returns the upsampled frames of `x`, or `(y, state)` with `return_state=True`."""
        upsampled, waiting = self.interpolate(x, state, return_state)
        upsampled = upsampled.contiguous(memory_format=torch.channels_last_3d)
        flow = StateFlow(state, return_state)
        y = alpha_blend(upsampled, flow("conv", self.conv, upsampled), self.mix_factor)
        if flow.following is not None:
            flow.following.update({name: owned(frames) for name, frames in waiting.items()})
        return flow.result(y)

    @abstractmethod
    def interpolate(
        self, x: Tensor, state: State | None, more_follows: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns frames at twice the rate, and by name the frames that the next chunk needs."""


class UpsampleApart(_PublishedUpsample):
    """Each call is one chunk: clamped at its end, begun behind the frames in "cache"."""

    def interpolate(self, x: Tensor, state: State | None, more_follows: bool):
        """Returns all frames of the chunk, and the cache of n frames."""
        n = self.segment
        if state is None:
            y = torch.cat([_linear(x[:, :, :n]), _linear(x[:, :, n:])], dim=2)
            return y, {"cache": x[:, :, -n:]}
        known = torch.cat([state["cache"], x], dim=2)
        return _linear(known)[:, :, 2 * n :], {"cache": known[:, :, -2 * n : -n]}


class UpsampleBehind(_PublishedUpsample):
    """Streams as TemporalUpsample, except that the second segment begins behind a neighbour.

    The first call has the n frames of the first segment, the second finds "neighbour" in its state.
    """

    def interpolate(self, x: Tensor, state: State | None, more_follows: bool):
        """Returns the frames that are certain and new, and the last one known."""
        if state is None or x.shape[2] == 0 and "last" not in state:
            return _linear(x), {}
        name, num_returned = ("last", 1) if "last" in state else ("neighbour", 2)
        known = torch.cat([state[name], x], dim=2)
        y = _linear(known)[:, :, num_returned:]
        return (y[:, :, :-1], {"last": known[:, :, -1:]}) if more_follows else (y, {})


def _replace_upsampling(decoder: Decoder, kind: type[_PublishedUpsample]) -> Decoder:
    """Returns a decoder on the same parameters with other linear interpolation in time."""
    other = copy.deepcopy(decoder, {id(p): p for p in decoder.parameters()})
    for stage in other.up_temporal:
        layer = stage.upsample
        if isinstance(layer, TemporalUpsample) and layer.interpolation == "linear":
            stage.upsample = kind(layer)
    return other


class OverlapDecoder(nn.Module):
    """`Decoder` on the same parameters that equals the published one in overlapping chunks.

    Streams as `Decoder`; chunks of any lengths give the same frames.
    """

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.stream = _replace_upsampling(decoder, UpsampleBehind)
        self.apart = _replace_upsampling(decoder, UpsampleApart)

    def forward(self, x: Tensor, state: State | None = None, return_state: bool = False):
        """Returns the frames of the next latents, or `(frames, state)`."""
        if state is None:
            first, state = self.stream(x[:, :, :1], None, True)
            if x.shape[2] == 1:
                return (first, state) if return_state else first
            rest = self(x[:, :, 1:], state, return_state)
            if not return_state:
                return torch.cat([first, rest], dim=2)
            return torch.cat([first, rest[0]], dim=2), rest[1]
        if x.shape[2] > 0 and not any(name.endswith(".last") for name in state):
            state = {**state, **self._neighbours(state, x[:, :, :1])}
        return self.stream(x, state, return_state)

    def _neighbours(self, state: State, second: Tensor) -> dict[str, Tensor]:
        """Returns the last input frame of every upsampling of a clip of two latents.

        `state` is that after the first latent, which it therefore contains.
        """
        two = torch.cat([state["conv_in"][:, :, -1:], second], dim=2)
        _, found = self.apart(two, None, True)
        return {
            f"{name.removesuffix('cache')}neighbour": value[:, :, -1:]
            for name, value in found.items()
            if name.endswith(".cache")
        }


def published_chunks(model: VidTok) -> VidTok:
    """Returns a model on the same parameters that decodes as published in overlapping chunks;
    `model` itself where its interpolation does not look ahead."""
    if model.config.interpolation == "nearest":
        return model
    _check_untiled("published_chunks", model)
    shared = {id(part): part for part in (model.encoder, model.decoder)}
    other = copy.deepcopy(model, shared)
    other.name = f"{model.name} in published chunks"
    other.decoder = OverlapDecoder(model.decoder)  # type: ignore[assignment]
    return other


def _check(op: str, model: VidTok, chunk_frames: int) -> None:
    f = model.temporal_factor
    if model.reference_version != "1.1":
        raise ValueError(f"{op}: model must be of version 1.1, got {model.name}")
    if model.backend != "native":
        raise ValueError(f"{op}: backend must be 'native', got {model.backend!r}")
    if chunk_frames < f or chunk_frames % f:
        raise ValueError(f"{op}: chunk_frames must be a multiple of {f}, got {chunk_frames}")


def _check_untiled(op: str, model: VidTok) -> None:
    from vtok_ext.models.vidtok import Decoder  # it builds on this file

    if not isinstance(model.decoder, Decoder) or not model.is_exact:
        raise ValueError(f"{op}: model must be a VidTok 1.1 without tiles, got {model.name}")


def _first_and_chunks(x: Tensor, length: int) -> list[Tensor]:
    """Returns x[:, :, :1] and the rest [B, C, T, H, W] in chunks, the last one maybe shorter."""
    rest = x[:, :, 1:]
    return [x[:, :, :1], *(rest.split(length, dim=2) if rest.shape[2] else ())]


def encode_published(
    model: VidTok,
    video: Tensor,  # [B, 3, T, H, W]
    *,
    chunk_frames: int = CHUNK_FRAMES,
    fps: float | None = None,
    sample: bool = False,
    generator: torch.Generator | None = None,
    compute_loss: bool = False,
) -> Encoding:
    """Returns the Encoding of a video, encoded and regularised chunk by chunk.

    Args:
        model: a VidTok 1.1.
        video, fps, sample, generator, compute_loss: as for `VidTok.encode`.
        chunk_frames: frames per chunk after the first one, a multiple of f.

    Raises:
        TypeError, ValueError: another version, a bad video or chunk length.
    """
    _check("encode_published", model, chunk_frames)
    video_input.check_video("encode_published", video, model.video_channels)
    f, s = model.temporal_factor, model.spatial_factor
    if min(video.shape[3:]) < s:
        raise ValueError(
            f"encode_published: height and width must be >= {s}, got {list(video.shape[3:])}"
        )
    state, raws, parts = None, [], []
    for chunk in _first_and_chunks(video_input.to_float(video, model.dtype), chunk_frames):
        padded = video_input.pad_front(chunk, -chunk.shape[2] % f)
        raw, state = model.encoder(padded, state, True)
        raws.append(raw)
        parts.append(
            model.regularize(raw, sample=sample, generator=generator, compute_loss=compute_loss)
        )
    latents, ids, losses = zip(*parts, strict=True)
    latent = torch.cat(latents, dim=2)
    return Encoding(
        latent=latent,
        num_frames=video.shape[2],
        size=(s * latent.shape[3], s * latent.shape[4]),
        indices=torch.cat(ids, dim=1) if model.is_discrete else None,
        moments=None if model.is_discrete else torch.cat(raws, dim=2),
        losses={name: torch.stack([part[name] for part in losses]).mean() for name in losses[0]},
        fps=fps,
        frame_rule="reference",
        chunk_frames=chunk_frames,
    )


class PublishedStreamEncoder(StreamEncoder):
    """`encode_published` of one video pushed in portions; state and calls as `StreamEncoder`.

    Keeps up to `chunk_frames` frames: where the last chunk begins, and with it the copies that the
    published encoding puts in the middle of a clip, is known at the end only.

    Args:
        model: a VidTok 1.1.
        output: "latent" or "tokens".
        chunk_frames: frames per chunk after the first one, a multiple of f.
    """

    def __init__(
        self, model: VidTok, output: str = "latent", chunk_frames: int = CHUNK_FRAMES
    ) -> None:
        _check("stream_encoder", model, chunk_frames)
        super().__init__(model, output)
        self.chunk_frames = chunk_frames
        self._role = _role(f"encoder in published chunks of {chunk_frames} to {output}", model)

    @property
    def size(self) -> tuple[int, int] | None:
        """(H, W) that the latents stand for, None before the first push."""
        if self.height is None or self.width is None:
            return None
        s = self.model.spatial_factor
        return self.height // s * s, self.width // s * s

    @property
    def _unit(self) -> int:
        return self.chunk_frames

    def _fit(self, frames: Tensor) -> Tensor:
        if min(frames.shape[3:]) < self.model.spatial_factor:
            raise ValueError(
                f"stream_encoder.push: height and width must be >= {self.model.spatial_factor}, "
                f"got {list(frames.shape[3:])}"
            )
        return frames

    def _complete(self, frames: Tensor) -> Tensor:
        return video_input.pad_front(frames, -frames.shape[2] % self.model.temporal_factor)


def decode_published(
    model: VidTok,
    encoding: Encoding | Tensor,
    *,
    chunk_frames: int = CHUNK_FRAMES,
    overlap: bool = True,
    output: str = "float",
) -> Tensor:
    """Returns the video [B, 3, T, H, W] of an encoding, decoded chunk by chunk.

    Args:
        model: a VidTok 1.1.
        encoding: as for `VidTok.decode`; a bare latent gives all f * t frames.
        chunk_frames: frames per chunk after the first latent, a multiple of f; with `overlap` all
            lengths give the same.
        overlap: whether each chunk saw one latent of the next, as in the published evaluation.
        output: "float" or "uint8".

    Raises:
        TypeError, ValueError: another version, a bad encoding or chunk length.
    """
    _check("decode_published", model, chunk_frames)
    _check_untiled("decode_published", model)
    num_frames = size = None
    if isinstance(encoding, Encoding):
        num_frames, size = encoding.num_frames, encoding.size
    latent = encoding.latent if isinstance(encoding, Encoding) else encoding
    latent = model.to_latent("decode_published", latent)
    chunked = published_chunks(model) if overlap else model
    decoder = chunked.decoder if overlap else _replace_upsampling(model.decoder, UpsampleApart)
    state, frames = None, []
    for chunk in _first_and_chunks(latent, chunk_frames // model.temporal_factor):
        decoded, state = decoder(chunk, state, True)
        frames.append(decoded)
    rest = chunked.decode_rest(state) if overlap and state is not None else None
    if rest is not None:
        frames.append(rest)
    video = torch.cat(frames, dim=2)
    video = video if num_frames is None else video[:, :, -num_frames:]
    return model._finish("decode_published", video, num_frames, size, output)
