"""Tokenizing a list of videos, shard by shard.

A shard is `videos_per_shard` consecutive videos of the list, so that nothing needs to be known of
the others. Workers read and scale videos, in portions (see `video_portions`); the model encodes
them in the order of the list, in batches that are the same whenever a shard is made, which is what
gives it the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from vtok_ext.data.latent_shards import Shard
from vtok_ext.data.tokenize_settings import DTYPES, TokenizeSettings
from vtok_ext.data.video_list import VideoItem
from vtok_ext.data.video_portions import (
    FRAMES_PER_CHUNK,
    Portion,
    UnreadableVideoError,
    portions_of_videos,
)
from vtok_ext.models.grid import GridTokenizer

# Longest decoder memory that is looked for, in latent frames. VidTok 488's convolutions reach back
# some 45: 34 at the rate of the latents, 12 frames each at twice and four times that rate.
_LONGEST_WARMUP = 64
# Outputs that differ by less than this fraction of their spread are equal: rounding is 1e-6.
_EQUAL = 1e-4


def tokenize_shard(
    model: Any,
    videos: list[VideoItem],
    settings: TokenizeSettings,
    shard: Shard,
    settings_hash: str,
    *,
    procedural: bool = False,
    num_workers: int = 0,
    on_video: Callable[[], None] = lambda: None,
) -> None:
    """Returns None when the shard is written.

    Frames of a batch of clips, or of a part of a long video, exist at a time, and the latents of
    the whole shard.

    Args:
        model: a VideoTokenizer in eval mode; its device is used.
        videos: all of them, of which the shard takes its part.
        settings: how.
        shard: which one.
        settings_hash: of `TokenizeSettings.origin`.
        procedural: the videos are those of `procedural_videos`.
        num_workers: processes that read videos; 0 for this one.
        on_video: called after each video.

    Raises:
        ValueError: the settings do not suit the model or the videos.
    """
    if procedural:
        settings.check_procedural()
    per_shard = settings.videos_per_shard
    first = shard.number * per_shard
    part = videos[first : first + per_shard]
    work = _ShardWork(model, settings)
    unreadable: list[dict[str, str]] = []
    sources = portions_of_videos(part, settings, procedural=procedural, num_workers=num_workers)
    for position, portions in enumerate(sources):
        video = part[position]
        try:
            work.add(video, f"{first + position:08d}", portions)
        except UnreadableVideoError as error:
            unreadable.append({"video": video.name, "reason": str(error)})
        on_video()
    work.encode()
    shard.write(work.tensors, work.entries, unreadable, settings_hash)


class _ShardWork:
    """The latents of a shard in the making, and the clips that wait for a full batch.

    Attributes:
        tensors, entries: see `Shard.write`.
    """

    def __init__(self, model: Any, settings: TokenizeSettings) -> None:
        self.model, self.settings = model, settings
        self.device = next(model.parameters()).device
        self.tensors: dict[str, Tensor] = {}
        self.entries: list[dict[str, Any]] = []
        self._waiting: list[tuple[dict[str, Any], Tensor]] = []  # with [3, T, H, W] uint8

    def add(self, video: VideoItem, key: str, portions: Iterator[Portion]) -> None:
        """Returns None after taking all clips of a video, or nothing of it.

        Args:
            video: which one.
            key: the beginning of the keys of its clips.
            portions: of it.

        Raises:
            UnreadableVideoError: it ends early; all is as if there were no such video.
            ValueError: its clips are too long or too large for the model.
        """
        num_entries, waiting, number = len(self.entries), list(self._waiting), 0
        try:
            for portion in portions:
                self._check_clip(video, portion)
                if portion.is_part:
                    self._add_long(video, f"{key}-{number:05d}", portion, portions)
                    return
                for clip, stamps in zip(portion.clips, portion.timestamps, strict=True):
                    self._add_clip(video, f"{key}-{number:05d}", portion, clip, stamps)
                    number += 1
        except UnreadableVideoError:
            for entry in self.entries[num_entries:]:
                for name in [
                    entry["key"],
                    *(f"{entry['key']}.{p}" for p in entry.get("planes", ())),
                ]:
                    self.tensors.pop(name, None)
            del self.entries[num_entries:]
            # Those before may have been encoded in a batch with clips of this video: once more.
            self._waiting = waiting
            raise

    def _check_clip(self, video: VideoItem, portion: Portion) -> None:
        shape = (portion.num_frames, *portion.clips.shape[3:])
        self.model.check_clip(f"tokenize: {video.name} (see --frames and --size)", shape)

    def _add_clip(
        self, video: VideoItem, key: str, portion: Portion, clip: Tensor, stamps: list[int]
    ) -> None:
        entry = {"key": key, **_facts(video, portion, stamps, self.model)}
        self.entries.append(entry)
        if self._waiting and not _share_a_batch(self.model, self._waiting[0], (entry, clip)):
            self.encode()
        self._waiting.append((entry, clip))
        if len(self._waiting) == self.settings.batch_size:
            self.encode()

    def _add_long(
        self, video: VideoItem, key: str, first: Portion, rest: Iterator[Portion]
    ) -> None:
        """Encodes a clip that comes in parts, alone: it shares its shape with none that waits."""
        stamps: list[int] = []

        def parts() -> Iterator[Tensor]:
            for portion in chain([first], rest):
                stamps.extend(portion.timestamps[0])
                yield portion.clips

        latent = _latent_of_parts(self.model, parts(), first, self.settings)
        self.encode()
        self.entries.append({"key": key, **_facts(video, first, stamps, self.model)})
        self._keep(self.entries[-1], latent)

    @torch.no_grad()
    def encode(self) -> None:
        """Moves the latents of the waiting clips into `tensors` and completes their entries."""
        if not self._waiting:
            return
        video = torch.stack([frames for _, frames in self._waiting]).to(self.device)
        latents = _latents(self.model, video, self.settings, self._waiting[0][0]["fps"])
        for (entry, _), latent in zip(self._waiting, latents, strict=True):
            self._keep(entry, latent)
        self._waiting = []

    def _keep(self, entry: dict[str, Any], latent: Any) -> None:
        planes = latent if isinstance(latent, dict) else {}
        entry["planes"] = sorted(planes)
        entry["latent_frames"] = None
        for name in entry["planes"]:
            self.tensors[f"{entry['key']}.{name}"] = _stored(planes[name], self.settings)
        if isinstance(latent, Tensor):
            self.tensors[entry["key"]] = _stored(latent, self.settings)
            time_axis = 0 if self.settings.kind == "tokens" else 1
            entry["latent_frames"] = latent.shape[time_axis]


def _share_a_batch(
    model: Any, one: tuple[dict[str, Any], Tensor], other: tuple[dict[str, Any], Tensor]
) -> bool:
    """Returns whether two clips, each with its entry, can be encoded at once."""
    if one[1].shape != other[1].shape:
        return False
    # A grid only records the rate; other models choose frames by it.
    return isinstance(model, GridTokenizer) or one[0]["fps"] == other[0]["fps"]


def _facts(video: VideoItem, portion: Portion, stamps: list[int], model: Any) -> dict[str, Any]:
    num_frames, (height, width) = portion.num_frames, portion.clips.shape[3:]
    s = model.spatial_factor
    padded = None if s is None else [-(-height // s) * s, -(-width // s) * s]
    return {
        "video": video.name,
        "timestamps": stamps,
        "time_base": portion.time_base,
        "fps": portion.fps,
        "num_frames": num_frames,
        "padded_frames": _padded_frames(model, num_frames),
        "original_size": list(portion.original_size),
        "size": [height, width],
        "padded_size": padded,
        "fields": video.fields,
    }


def _padded_frames(model: Any, num_frames: int) -> int | None:
    """Returns how many frames the latents of a clip stand for, None where that is meaningless."""
    if not isinstance(model, GridTokenizer):
        return None
    s, alone = model.spatial_factor, int(model.starts_alone)
    num_latents = model.token_grid(num_frames, s, s)[0]
    return alone + (num_latents - alone) * model.temporal_factor


def _stored(x: Tensor, settings: TokenizeSettings) -> Tensor:
    return (x.to(DTYPES[settings.dtype]) if x.is_floating_point() else x).cpu().contiguous()


def _latents(
    model: Any, video: Tensor, settings: TokenizeSettings, fps: float | None
) -> Iterator[Any]:
    """Yields the latent or ids of each clip [B, 3, T, H, W] uint8 of `fps` frames per second."""
    if settings.num_frames is None and _has_stream(model):
        yield from _streamed(model, iter([video]), settings)
        return
    encoding = model.encode(video, fps=fps)
    if settings.kind == "tokens":
        yield from encoding.indices
    elif isinstance(encoding.latent, Tensor):
        yield from encoding.latent
    else:
        for i in range(video.shape[0]):
            yield {name: plane[i] for name, plane in encoding.latent.items()}


@torch.no_grad()
def _latent_of_parts(
    model: Any, parts: Iterator[Tensor], first: Portion, settings: TokenizeSettings
) -> Any:
    """Returns the latent or ids of one clip that comes in parts [1, 3, t, H, W] uint8.

    No more than a part is kept where the model can go on after it: with a stream encoder, or as a
    VTok whose key frame is the first. Others need the whole clip.
    """
    from vtok_ext.models.vtok import VTok
    from vtok_ext.models.vtok_streaming import encode_portions

    device = next(model.parameters()).device
    if _has_stream(model):
        return _streamed(model, (part.to(device) for part in parts), settings)[0]
    if isinstance(model, VTok) and model.config.key_frame == "first":
        encoding = encode_portions(model, (part.to(device) for part in parts), fps=first.fps)
        found: Any = encoding.indices if settings.kind == "tokens" else encoding.latent
        return found[0]
    whole = first.clips.new_empty(1, 3, first.num_frames, *first.clips.shape[3:])
    done = 0
    for part in parts:
        whole[:, :, done : done + part.shape[2]] = part
        done += part.shape[2]
    return next(_latents(model, whole.to(device), settings, first.fps))


def _has_stream(model: Any) -> bool:
    return model.is_causal and hasattr(model, "encode_chunk")


def _streamed(model: Any, parts: Iterator[Tensor], settings: TokenizeSettings) -> Tensor:
    """Returns the latents or ids, on the CPU, of clips that come in parts [B, 3, t, H, W] uint8.

    Their t are multiples of `FRAMES_PER_CHUNK` but for the last one, which makes the chunks, and
    the result, those of the clips in one part.
    """
    stream = model.stream_encoder(output="tokens" if settings.kind == "tokens" else "latent")
    found: list[Tensor] = []
    for part in parts:
        for chunk in part.split(FRAMES_PER_CHUNK, 2):
            found += [_stored(piece, settings) for piece in stream.push(chunk)]
    found += [_stored(piece, settings) for piece in stream.flush()]
    return torch.cat(found, 1 if settings.kind == "tokens" else 2)


@torch.no_grad()
def warmup_latents(model: Any) -> int | None:
    """Returns how many latent frames before a cut its decoder needs, None if all or unknown.

    Measured: the last frames of random latents are decoded with fewer and fewer of those before
    them, as long as the result is that of the whole.

    Args:
        model: a VideoTokenizer in eval mode.
    """
    if not model.is_causal or not hasattr(model, "latent_channels"):
        return None
    generator = torch.Generator().manual_seed(0)
    weight = next(model.parameters())
    shape = (1, model.latent_channels, _LONGEST_WARMUP + 2, 2, 2)
    latent = torch.randn(shape, generator=generator).to(weight)
    whole = model.decode(latent)
    frames = 2 * model.temporal_factor  # of two latents, in case the decoder looks ahead by one
    limit = _EQUAL * whole.float().std()

    def suffices(before: int) -> bool:
        cut = model.decode(latent[:, :, -2 - before :])
        return bool((cut[:, :, -frames:] - whole[:, :, -frames:]).abs().max() <= limit)

    least, most = 1, _LONGEST_WARMUP - 1
    if not suffices(most):
        return None
    while least < most:
        middle = (least + most) // 2
        least, most = (least, middle) if suffices(middle) else (middle + 1, most)
    return least
