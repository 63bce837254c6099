"""Clips for training: what lies at an index, as a function of seed, epoch and index alone.

Nothing depends on the order of access, so the clips of a run are the same with any number of
workers and after a restart. An item is [3, T, H, W] uint8.
"""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from vtok_ext.data.buckets import Bucket, check_buckets, choose_bucket
from vtok_ext.data.frame_sampling import FrameSampling
from vtok_ext.data.procedural import procedural_clip
from vtok_ext.data.video import VideoReadError, read_frames_at, read_times
from vtok_ext.data.video_list import VideoItem
from vtok_ext.data.video_scan import VideoFacts, VideoIndex

CROPS = ("center", "random")
RESIZES = ("bilinear", "bicubic")


class Clips(Protocol):
    """A set of clips of one length and size."""

    def __len__(self) -> int:
        """Number of clips of an epoch."""

    def __getitem__(self, place: tuple[int, int]) -> torch.Tensor:
        """Returns the clip [3, T, H, W] uint8 at (epoch, index)."""


class ProceduralClips:
    """Clips of `procedural_clip`, the same in every epoch.

    Args:
        num_clips: how many.
        num_frames, height, width: T, H, W of each.
        first_seed: seed of clip 0; clip i has the i-th after it.
        motion: see `procedural_clip`.

    Raises:
        ValueError: num_clips < 1.
    """

    def __init__(
        self,
        num_clips: int,
        num_frames: int,
        height: int,
        width: int,
        first_seed: int = 0,
        motion: str = "orbit",
    ) -> None:
        if num_clips < 1:
            raise ValueError(f"ProceduralClips: num_clips must be at least 1, got {num_clips}")
        self.num_clips, self.first_seed = num_clips, first_seed
        self.shape, self.motion = (num_frames, height, width), motion

    def __len__(self) -> int:
        """Number of clips."""
        return self.num_clips

    def __getitem__(self, place: tuple[int, int]) -> torch.Tensor:
        """Returns the clip [3, T, H, W] uint8 at (epoch, index)."""
        return procedural_clip(*self.shape, seed=self.first_seed + place[1], motion=self.motion)


@dataclass(frozen=True)
class Augmentation:
    """What happens to the frames of a clip; the same to all of them.

    Attributes:
        crop: "center" or "random", where a picture of another shape is cut.
        zoom: pictures are scaled by up to this factor more than needed, >= 1; a random crop then
            has room. 1 for none.
        flip: mirror every other clip left to right.
        resize: "bilinear" or "bicubic", as `fit`.

    Raises:
        ValueError: another crop or resize, or a zoom below 1.
    """

    crop: str = "center"
    zoom: float = 1.0
    flip: bool = False
    resize: str = "bilinear"

    def __post_init__(self) -> None:
        """Checks every field."""
        for name, choices in (("crop", CROPS), ("resize", RESIZES)):
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"Augmentation: {name} must be one of {choices}, got {value!r}")
        if not 1 <= self.zoom < 16:
            raise ValueError(f"Augmentation: zoom must be in [1, 16), got {self.zoom}")

    def apply(
        self,
        video: torch.Tensor,  # [3, T, H, W] uint8
        height: int,
        width: int,
        generator: random.Random,
    ) -> torch.Tensor:
        """Returns [3, T, height, width] uint8.

        Args:
            video: [3, T, H, W] uint8.
            height, width: in pixels.
            generator: of zoom, place and mirroring.
        """
        place = (0.5, 0.5)
        zoom = self.zoom ** generator.random()
        if self.crop == "random":
            place = (generator.random(), generator.random())
        video = fit(video, height, width, zoom, place, self.resize)
        return video.flip(3) if self.flip and generator.random() < 0.5 else video


class VideoClips:
    """One clip per video and epoch, from a random place in it.

    What lies at (epoch, index) depends on the seed, the epoch and the index alone. Videos that
    cannot be read, or are too short, are left out and named; one that turns out to be damaged when
    its turn comes is named too, and the next readable one stands in. No clip is ever made up.

    Args:
        videos: see `list_videos`.
        sampling: which frames.
        buckets: (T, H, W) of the clips; with more than one, each video has the one that suits it
            (see `buckets`) and `sampling.num_frames` does not matter.
        augmentation: crop, zoom, mirroring.
        seed: of all random choices.
        scan: read the index of every video now, so that unusable ones are left out at once; False
            starts faster, needs a single bucket, and finds them on the way.
        facts: what a scan has found of each video (`VideoIndex.scan`), instead of one now.
        damage_log: a file that gets one line for every video found damaged later, from whichever
            worker or rank meets it; a warning has the line where that fails.

    Attributes:
        videos: those in use.
        bucket_of: index into `buckets` of each of them.
        num_listed: videos that were given.
        unreadable: one line for each video left out, or found damaged since.

    Raises:
        ValueError: no usable video, or several buckets without a scan.
    """

    def __init__(
        self,
        videos: Sequence[VideoItem],
        sampling: FrameSampling,
        buckets: Sequence[Bucket],
        *,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        scan: bool = True,
        facts: Sequence[VideoFacts | str] | None = None,
        damage_log: Path | None = None,
    ) -> None:
        check_buckets(buckets)
        if not scan and len(buckets) > 1:
            raise ValueError(f"VideoClips: scan must be True for {len(buckets)} buckets, got False")
        self.buckets = list(buckets)
        self.samplings = [replace(sampling, num_frames=bucket[0]) for bucket in buckets]
        self.augmentation = augmentation or Augmentation()
        self.seed, self.damage_log = seed, damage_log
        self.num_listed = len(videos)
        self.videos: list[VideoItem] = []
        self.bucket_of: list[int] = []
        self.unreadable: list[str] = []
        if scan and facts is None:
            facts = VideoIndex().scan(videos)
        for number, video in enumerate(videos):
            bucket = 0 if facts is None else self._bucket(video, facts[number])
            if bucket is not None:
                self.videos.append(video)
                self.bucket_of.append(bucket)
        if not self.videos:
            shortest = min(sampling.least for sampling in self.samplings)
            reason = f", the first: {self.unreadable[0]}" if self.unreadable else ""
            raise ValueError(
                f"VideoClips: source must hold videos of {shortest} frames or more, got "
                f"{len(videos)} files, none of them usable{reason}"
            )

    def _bucket(self, video: VideoItem, facts: VideoFacts | str) -> int | None:
        """Returns the bucket of a video, None (and a line in `unreadable`) if it is unusable."""
        if isinstance(facts, str):
            self.unreadable.append(f"{video.name}: {facts}")
            return None
        count, duration = facts.num_frames, facts.duration
        lengths = {s.num_frames: s for s in self.samplings}
        shortest = min(lengths)

        def fits(length: int) -> bool:
            sampling = lengths[length]
            return sampling.fills_length(count, duration, facts.fps) or (
                length == shortest and sampling.fits_length(count, duration)
            )

        found = choose_bucket(self.buckets, facts.height, facts.width, fits)
        if found is None:
            rate = self.samplings[0].fps
            at = "" if rate is None else f" for clips at {rate} fps"
            self.unreadable.append(
                f"{video.name} has {count} of {min(s.least for s in self.samplings)} "
                f"frames{at}, too few"
            )
        return found

    def __len__(self) -> int:
        """Number of videos in use."""
        return len(self.videos)

    def __getitem__(self, place: tuple[int, int]) -> torch.Tensor:
        """Returns the clip [3, T, H, W] uint8 at (epoch, index); see `with_length`."""
        return self.with_length(place)[0]

    def with_length(self, place: tuple[int, int]) -> tuple[torch.Tensor, int]:
        """Returns the clip [3, T, H, W] uint8 at (epoch, index), and how many frames are its own.

        The others, of a video shorter than T (`FrameSampling.shortest`), repeat its last frame.
        Raises as `read`.
        """
        clip, own_frames, _ = self.read(place)
        return clip, own_frames

    def read(self, place: tuple[int, int]) -> tuple[torch.Tensor, int, int]:
        """Returns what `with_length` does, and the index of the video that the clip is from.

        It is another than the one asked for where that one turned out to be damaged.

        Raises:
            VideoReadError: neither this video nor any other of its bucket can be read.
        """
        epoch, index = place
        bucket = self.bucket_of[index]
        lines = []
        for step in range(len(self.videos)):
            stand_in = (index + step) % len(self.videos)
            if self.bucket_of[stand_in] != bucket:
                continue
            try:
                return *self._clip(epoch, stand_in), stand_in
            except (VideoReadError, OSError, ValueError) as error:
                lines.append(f"{self.videos[stand_in].name}: {error}")
                self._note_damage(lines[-1])
        raise VideoReadError(f"VideoClips: some video must be readable, got {lines[0]}")

    def readable(self, count: int) -> dict[int, torch.Tensor]:
        """Returns the clips of epoch 0 of the first `count` videos that can be read, by index.

        Fewer, if there are not so many; damaged ones are in `unreadable` then, and none stands in.
        """
        found: dict[int, torch.Tensor] = {}
        for index in range(len(self.videos)):
            if len(found) == count:
                break
            with contextlib.suppress(VideoReadError):  # no video of a bucket, which is noted
                clip, _, source = self.read((0, index))
                found.setdefault(source, clip)
        return found

    def _note_damage(self, line: str) -> None:
        if line in self.unreadable:
            return
        self.unreadable.append(line)
        if self.damage_log is None:
            return
        try:
            with self.damage_log.open("a", encoding="utf-8") as file:
                file.write(line + "\n")  # one short write: lines of several processes stay whole
        except OSError as error:  # no reason to end a run that has another video
            warnings.warn(
                f"VideoClips: damage_log must be writable, got {error}; not listed there: {line}",
                stacklevel=2,
            )

    def _clip(self, epoch: int, index: int) -> tuple[torch.Tensor, int]:
        video, bucket = self.videos[index], self.bucket_of[index]
        content = video.content()
        times = read_times(video.path, content)
        generator = random.Random(f"{self.seed}/{epoch}/{index}")
        chosen = self.samplings[bucket].indices(times.seconds(), float(times.fps), generator)
        stamps = [times.timestamps[i] for i in chosen]
        frames = read_frames_at(video.path, stamps, content)
        length, height, width = self.buckets[bucket]
        clip = self.augmentation.apply(frames, height, width, generator)
        rest = clip[:, -1:].expand(-1, length - clip.shape[1], -1, -1)
        return torch.cat([clip, rest], dim=1), clip.shape[1]


def video_clips_of(clips: Any) -> VideoClips | None:
    """Returns the clips of video files that a data set is or wraps (in `clips`), None without."""
    while clips is not None and not isinstance(clips, VideoClips):
        clips = getattr(clips, "clips", None)
    return clips


def fit(
    video: torch.Tensor,  # [3, T, H, W] uint8
    height: int,
    width: int,
    zoom: float = 1.0,
    place: tuple[float, float] = (0.5, 0.5),
    resize: str = "bilinear",
) -> torch.Tensor:
    """Returns [3, T, height, width] uint8: scaled to cover that size, then cropped.

    Args:
        video: [3, T, H, W] uint8.
        height, width: in pixels.
        zoom: factor by which it is scaled more than that, >= 1.
        place: where the rest is cut, 0 for the top (left), 1 for the bottom (right).
        resize: "bilinear" or "bicubic"; both are antialiased, the latter is that of PIL up to
            rounding.
    """
    scale = max(height / video.shape[2], width / video.shape[3]) * zoom
    if scale != 1:
        size = [
            max(height, round(video.shape[2] * scale)),
            max(width, round(video.shape[3] * scale)),
        ]
        frames = video.transpose(0, 1).float()
        frames = F.interpolate(frames, size, mode=resize, antialias=True)
        video = frames.round().clamp(0, 255).to(torch.uint8).transpose(0, 1)
    top = int(place[0] * (video.shape[2] - height))
    left = int(place[1] * (video.shape[3] - width))
    return video[:, :, top : top + height, left : left + width].contiguous()
