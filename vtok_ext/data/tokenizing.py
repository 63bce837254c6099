"""Tokenizing a list of videos, shard by shard.

A shard is `videos_per_shard` consecutive videos of the list, so that nothing needs to be known of
the others. Workers read and scale videos; the model encodes them in the order of the list, in
batches that are the same whenever a shard is made, which is what gives it the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from vtok_ext.data.clips import fit
from vtok_ext.data.frame_sampling import nearest
from vtok_ext.data.latent_shards import Shard
from vtok_ext.data.procedural import procedural_clip
from vtok_ext.data.video import VideoReadError, VideoTimes, read_frames_at, read_times
from vtok_ext.data.video_list import VideoItem
from vtok_ext.models.grid import GridTokenizer

KINDS = ("tokens", "latent")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_FRAMES_PER_CHUNK = 16
_PROCEDURAL_FPS = 30
# Longest decoder memory that is looked for, in latent frames. VidTok 488's convolutions reach back
# some 45: 34 at the rate of the latents, 12 frames each at twice and four times that rate.
_LONGEST_WARMUP = 64
# Outputs that differ by less than this fraction of their spread are equal: rounding is 1e-6.
_EQUAL = 1e-4


@dataclass(frozen=True)
class TokenizeSettings:
    """How videos become latents.

    Attributes:
        kind: "tokens" or "latent".
        num_frames: cut each video into clips of so many frames and leave out the rest; None encodes
            it as a whole, in constant activation memory for causal models.
        max_clips: clips of one video at most; None for all.
        fps: take the frame nearest to every 1 / fps seconds; None takes all frames.
        size: (H, W) to scale to and crop at the centre; None keeps that of the video.
        batch_size: clips of one shape that are encoded at once.
        videos_per_shard: see above.
        dtype: of stored latents.
    """

    kind: str
    num_frames: int | None = None
    max_clips: int | None = None
    fps: float | None = None
    size: tuple[int, int] | None = None
    batch_size: int = 8
    videos_per_shard: int = 64
    dtype: str = "float32"

    def __post_init__(self) -> None:
        """Checks every field."""
        if self.kind not in KINDS or self.dtype not in DTYPES:
            raise ValueError(
                f"tokenize: kind must be one of {KINDS} and dtype one of {tuple(DTYPES)}, "
                f"got {self.kind!r} and {self.dtype!r}"
            )
        for name in ("num_frames", "max_clips", "batch_size", "videos_per_shard", "fps"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"tokenize: {name} must be positive, got {value}")

    def hash(self, model_id: str, videos: list[VideoItem]) -> str:
        """Returns 16 hexadecimal digits that change with model, list of videos and settings."""
        names = hashlib.sha256("\n".join(video.name for video in videos).encode()).hexdigest()
        text = json.dumps([model_id, names, asdict(self)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class _Clip:
    """Frames [3, T, H, W] uint8 with their times, and their rate per second if it is known."""

    frames: Tensor
    timestamps: list[int]
    time_base: str
    original_size: tuple[int, int]
    fps: float | None


def procedural_videos(count: int) -> list[VideoItem]:
    """Returns names of procedural clips, for which nothing is read."""
    if count < 1:
        raise ValueError(f"tokenize: procedural:N must have N >= 1, got {count}")
    return [VideoItem(f"procedural-{seed:08d}", Path()) for seed in range(count)]


class _Videos:
    """Data set of the clips of each video, or the reason why there are none."""

    def __init__(self, videos: list[VideoItem], settings: TokenizeSettings, procedural: bool):
        self.videos, self.settings, self.procedural = videos, settings, procedural

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> list[_Clip] | str:
        video = self.videos[index]
        try:
            return self._procedural(video) if self.procedural else self._clips(video)
        except (VideoReadError, OSError) as error:
            return str(error)

    def _procedural(self, video: VideoItem) -> list[_Clip]:
        count, size = self.settings.num_frames, self.settings.size
        assert count is not None and size is not None  # checked by `tokenize_shard`
        seed = int(video.name.rpartition("-")[2])
        frames = procedural_clip(count, *size, seed=seed, motion="erratic")
        rate = _PROCEDURAL_FPS
        return [_Clip(frames, list(range(count)), f"1/{rate}", size, float(rate))]

    def _clips(self, video: VideoItem) -> list[_Clip] | str:
        settings, content = self.settings, video.content()
        times = read_times(video.path, content)
        chosen = _chosen(times, settings.fps)
        length = settings.num_frames or len(chosen)
        starts = list(range(0, len(chosen) - length + 1, length))[: settings.max_clips]
        if not starts:
            return f"has {len(chosen)} of {length} frames"
        # That of the file, as `vtok encode` takes it, not of the clip's times: they are rounded.
        fps = settings.fps or float(times.fps) or None
        found = []
        for start in starts:
            stamps = [times.timestamps[i] for i in chosen[start : start + length]]
            frames = read_frames_at(video.path, stamps, content)
            original = (frames.shape[2], frames.shape[3])
            if settings.size is not None:
                frames = fit(frames, *settings.size)
            found.append(_Clip(frames.contiguous(), stamps, str(times.time_base), original, fps))
        return found


def _chosen(times: VideoTimes, fps: float | None) -> list[int]:
    """Returns the indices of the frames of a video that are wanted."""
    seconds = times.seconds()
    if fps is None:
        return list(range(len(seconds)))
    count = int((seconds[-1] - seconds[0]) * fps + 1e-6) + 1
    return [nearest(seconds, seconds[0] + i / fps) for i in range(count)]


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

    Args:
        model: a VideoTokenizer in eval mode; its device is used.
        videos: all of them, of which the shard takes its part.
        settings: how.
        shard: which one.
        settings_hash: see `TokenizeSettings.hash`.
        procedural: the videos are those of `procedural_videos`.
        num_workers: processes that read videos; 0 for this one.
        on_video: called after each video.

    Raises:
        ValueError: the settings do not suit the model or the videos.
    """
    if procedural and (settings.num_frames is None or settings.size is None):
        raise ValueError("tokenize: num_frames and size must be given for procedural clips")
    per_shard = settings.videos_per_shard
    part = videos[shard.number * per_shard : (shard.number + 1) * per_shard]
    loader: Any = DataLoader(
        _Videos(part, settings, procedural),  # type: ignore[arg-type]
        batch_size=None,
        num_workers=num_workers,
        generator=torch.Generator().manual_seed(0),
    )
    tensors: dict[str, Tensor] = {}
    entries: list[dict[str, Any]] = []
    unreadable: list[dict[str, str]] = []
    waiting: list[tuple[dict[str, Any], Tensor]] = []
    for position, clips in enumerate(loader):
        video = part[position]
        if isinstance(clips, str):
            unreadable.append({"video": video.name, "reason": clips})
            clips = []
        for number, clip in enumerate(clips):
            key = f"{shard.number * per_shard + position:08d}-{number:05d}"
            entries.append({"key": key, **_facts(video, clip, model)})
            if waiting and not _share_a_batch(model, waiting[0], (entries[-1], clip.frames)):
                _encode(model, waiting, settings, tensors)
            waiting.append((entries[-1], clip.frames))
            if len(waiting) == settings.batch_size:
                _encode(model, waiting, settings, tensors)
        on_video()
    _encode(model, waiting, settings, tensors)
    shard.write(tensors, entries, unreadable, settings_hash)


def _share_a_batch(
    model: Any, one: tuple[dict[str, Any], Tensor], other: tuple[dict[str, Any], Tensor]
) -> bool:
    """Returns whether two clips, each with its entry, can be encoded at once."""
    if one[1].shape != other[1].shape:
        return False
    # A grid only records the rate; other models choose frames by it.
    return isinstance(model, GridTokenizer) or one[0]["fps"] == other[0]["fps"]


def _facts(video: VideoItem, clip: _Clip, model: Any) -> dict[str, Any]:
    num_frames, height, width = clip.frames.shape[1:]
    s = model.spatial_factor
    padded = None if s is None else [-(-height // s) * s, -(-width // s) * s]
    return {
        "video": video.name,
        "timestamps": clip.timestamps,
        "time_base": clip.time_base,
        "fps": clip.fps,
        "num_frames": num_frames,
        "padded_frames": _padded_frames(model, num_frames),
        "original_size": list(clip.original_size),
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


@torch.no_grad()
def _encode(
    model: Any,
    waiting: list[tuple[dict[str, Any], Tensor]],
    settings: TokenizeSettings,
    tensors: dict[str, Tensor],
) -> None:
    """Moves the latents of the waiting clips into `tensors` and completes their entries."""
    if not waiting:
        return
    device = next(model.parameters()).device
    video = torch.stack([frames for _, frames in waiting]).to(device)
    latents = _latents(model, video, settings, waiting[0][0]["fps"])
    for (entry, _), latent in zip(waiting, latents, strict=True):
        planes = latent if isinstance(latent, dict) else {}
        entry["planes"] = sorted(planes)
        entry["latent_frames"] = None
        for name in entry["planes"]:
            tensors[f"{entry['key']}.{name}"] = _stored(planes[name], settings)
        if isinstance(latent, Tensor):
            tensors[entry["key"]] = _stored(latent, settings)
            entry["latent_frames"] = latent.shape[0 if settings.kind == "tokens" else 1]
    waiting.clear()


def _stored(x: Tensor, settings: TokenizeSettings) -> Tensor:
    return (x.to(DTYPES[settings.dtype]) if x.is_floating_point() else x).cpu().contiguous()


def _latents(
    model: Any, video: Tensor, settings: TokenizeSettings, fps: float | None
) -> Iterator[Any]:
    """Yields the latent or ids of each clip [B, 3, T, H, W] uint8 of `fps` frames per second."""
    if settings.num_frames is None and model.is_causal and hasattr(model, "encode_chunk"):
        stream = model.stream_encoder(output="tokens" if settings.kind == "tokens" else "latent")
        parts = []
        for chunk in video.split(_FRAMES_PER_CHUNK, 2):
            parts += stream.push(chunk)
        parts += stream.flush()
        yield from torch.cat(parts, 1 if settings.kind == "tokens" else 2)
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
