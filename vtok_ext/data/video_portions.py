"""Videos in portions of bounded size, as workers hand them over for tokenizing.

A portion is a group of consecutive clips of a video, or, where the whole video is one clip that is
larger than that, a part of it. Files are decoded once, from their beginning, a frame at a time, so
that no video must fit into memory and what is on its way takes one file descriptor per portion.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from vtok_ext.data.clips import fit
from vtok_ext.data.frame_sampling import nearest
from vtok_ext.data.procedural import procedural_clip
from vtok_ext.data.tokenize_settings import TokenizeSettings
from vtok_ext.data.video import VideoReadError, VideoTimes, frames_in_order, read_times
from vtok_ext.data.video_list import VideoItem

# Of the frames of a portion. 20 clips of 17 frames at 256 px: little beside a model, and so much
# that handing one over costs nothing.
PORTION_BYTES = 64 << 20
# Parts are so many frames or a multiple, so that a stream meets the chunks of an undivided video.
FRAMES_PER_CHUNK = 16
# Portions that a worker has ready.
_PORTIONS_AHEAD = 2
_PROCEDURAL_FPS = 30


@dataclass(frozen=True)
class Portion:
    """Consecutive clips of a video, or consecutive frames of a long one.

    Attributes:
        clips: [N, 3, t, H, W] uint8: N clips of t frames, or t frames of the only clip.
        timestamps: t of each clip, in units of `time_base`.
        time_base, original_size: unit in seconds, and (H, W) of the file.
        fps: frames per second of the clips, None if unknown.
        num_frames: of a clip; more than t in a part of one.
        is_last: of its video.
    """

    clips: Tensor  # [N, 3, t, H, W]
    timestamps: list[list[int]]
    time_base: str
    original_size: tuple[int, int]
    fps: float | None
    num_frames: int
    is_last: bool

    @property
    def is_part(self) -> bool:
        """Whether there is more of the same clip before or after it."""
        return self.num_frames > self.clips.shape[2]


class UnreadableVideoError(Exception):
    """A video must be left out; the message says why."""


def procedural_videos(count: int) -> list[VideoItem]:
    """Returns names of procedural clips, for which nothing is read."""
    if count < 1:
        raise ValueError(f"tokenize: procedural:N must have N >= 1, got {count}")
    return [VideoItem(f"procedural-{seed:08d}", Path()) for seed in range(count)]


def portions_of_videos(
    videos: list[VideoItem],
    settings: TokenizeSettings,
    *,
    procedural: bool = False,
    num_workers: int = 0,
) -> Iterator[Iterator[Portion]]:
    """Yields for each video an iterator of its portions, which must be used up before the next.

    The iterator raises UnreadableVideoError where the video ends early; it may have given portions.

    Args:
        videos: in the order in which they are wanted.
        settings: which frames.
        procedural: the videos are those of `procedural_videos`.
        num_workers: processes that read videos, each one whole videos; 0 for this one.
    """
    count = min(num_workers, len(videos))
    parts = [_Reader(videos[n::count], settings, procedural) for n in range(count)]
    # A loader each, so that the portions of one video wait for no other video.
    loaders: list[Any] = [
        DataLoader(
            part,
            batch_size=None,
            num_workers=1,
            prefetch_factor=_PORTIONS_AHEAD,
            generator=torch.Generator().manual_seed(0),
        )
        for part in parts
    ]
    sources = [iter(loader) for loader in loaders or [_Reader(videos, settings, procedural)]]
    for position in range(len(videos)):
        yield _of_one_video(sources[position % len(sources)])


def _of_one_video(source: Iterator[Portion | str]) -> Iterator[Portion]:
    for portion in source:
        if isinstance(portion, str):
            raise UnreadableVideoError(portion)
        yield portion
        if portion.is_last:
            return


class _Reader(IterableDataset):
    """The portions of some videos, and the reason in place of the rest of an unreadable one."""

    def __init__(self, videos: list[VideoItem], settings: TokenizeSettings, procedural: bool):
        self.videos, self.settings, self.procedural = videos, settings, procedural

    def __iter__(self) -> Iterator[Portion | str]:
        for video in self.videos:
            try:
                yield from self._procedural(video) if self.procedural else self._portions(video)
            except (UnreadableVideoError, VideoReadError, OSError) as error:
                yield str(error)

    def _procedural(self, video: VideoItem) -> Iterator[Portion]:
        count, size = self.settings.num_frames, self.settings.size
        assert count is not None and size is not None  # checked by `tokenize_shard`
        seed = int(video.name.rpartition("-")[2])
        clips = procedural_clip(count, *size, seed=seed, motion="erratic")[None]
        rate = _PROCEDURAL_FPS
        stamps = [list(range(count))]
        yield Portion(clips, stamps, f"1/{rate}", size, float(rate), count, is_last=True)

    def _portions(self, video: VideoItem) -> Iterator[Portion]:
        settings, content = self.settings, video.content()
        times = read_times(video.path, content)
        chosen = _chosen(times, settings.fps)
        length = settings.num_frames or len(chosen)
        num_clips = len(chosen) // length
        if settings.max_clips is not None:
            num_clips = min(num_clips, settings.max_clips)
        if not num_clips:
            raise UnreadableVideoError(f"has {len(chosen)} of {length} frames")
        stamps = [times.timestamps[i] for i in chosen[: num_clips * length]]
        # That of the file, as `vtok encode` takes it, not of the clip's times: they are rounded.
        fps = settings.fps or float(times.fps) or None
        pictures = self._pictures(video, stamps, content)
        done = 0
        while done < len(stamps):
            frame, original = next(pictures)
            how_many, frames = self._next_shape(frame, length, len(stamps) - done)
            clips = frame.new_empty(how_many, 3, frames, *frame.shape[1:])
            for n in range(how_many * frames):
                if n:
                    frame, original = next(pictures)
                clips[n // frames, :, n % frames] = frame
            end = done + how_many * frames
            own = [stamps[first : first + frames] for first in range(done, end, frames)]
            done, base = end, str(times.time_base)
            yield Portion(clips, own, base, original, fps, length, is_last=done == len(stamps))

    def _pictures(
        self, video: VideoItem, stamps: list[int], content: bytes | None
    ) -> Iterator[tuple[Tensor, tuple[int, int]]]:
        """Yields frames [3, H, W] uint8 in the wanted size, and the size that they had."""
        for picture in frames_in_order(video.path, stamps, content):
            frame = picture[None].permute(3, 0, 1, 2)
            original = (frame.shape[2], frame.shape[3])
            if self.settings.size is not None:
                frame = fit(frame, *self.settings.size)
            yield frame[:, 0], original

    def _next_shape(self, frame: Tensor, length: int, num_left: int) -> tuple[int, int]:
        """Returns (clips, frames of each) of a portion, of which the first frame is given."""
        most = PORTION_BYTES // frame.numel()  # frames
        if self.settings.num_frames is None and length > most:
            part = max(1, most // FRAMES_PER_CHUNK) * FRAMES_PER_CHUNK
            return 1, min(part, num_left)
        return min(max(1, most // length), num_left // length), length


def _chosen(times: VideoTimes, fps: float | None) -> list[int]:
    """Returns the indices of the frames of a video that are wanted."""
    seconds = times.seconds()
    if fps is None:
        return list(range(len(seconds)))
    count = int((seconds[-1] - seconds[0]) * fps + 1e-6) + 1
    return [nearest(seconds, seconds[0] + i / fps) for i in range(count)]
