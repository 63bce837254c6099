"""Clips for training: what lies at an index, as a function of seed, epoch and index alone.

Nothing depends on the order of access, so the clips of a run are the same with any number of
workers and after a restart. An item is [3, T, H, W] uint8.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F

from vtok_ext.data.procedural import procedural_clip
from vtok_ext.data.video import VideoReader, VideoReadError

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v")
_READ_FRAMES = 16


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

    Raises:
        ValueError: num_clips < 1.
    """

    def __init__(
        self, num_clips: int, num_frames: int, height: int, width: int, first_seed: int = 0
    ) -> None:
        if num_clips < 1:
            raise ValueError(f"ProceduralClips: num_clips must be at least 1, got {num_clips}")
        self.num_clips, self.first_seed = num_clips, first_seed
        self.shape = (num_frames, height, width)

    def __len__(self) -> int:
        """Number of clips."""
        return self.num_clips

    def __getitem__(self, place: tuple[int, int]) -> torch.Tensor:
        """Returns the clip [3, T, H, W] uint8 at (epoch, index)."""
        return procedural_clip(*self.shape, seed=self.first_seed + place[1])


class FolderClips:
    """One window of consecutive frames per video file and epoch, from a random place in it.

    Frames are scaled until the shorter side fits and cropped at the centre. A window is reached by
    decoding the file from its beginning: made for clips, not for films.

    Args:
        folder: searched with its subfolders for video files.
        num_frames, height, width: T, H, W of each clip.
        seed: decides where windows begin, together with epoch and index.

    Attributes:
        paths: the files in use, sorted.
        unreadable: one line for each file left out, because it cannot be read or is too short.

    Raises:
        ValueError: there is no folder, or no usable file in it.
    """

    def __init__(
        self, folder: str | Path, num_frames: int, height: int, width: int, seed: int = 0
    ) -> None:
        root = Path(folder)
        if not root.is_dir():
            raise ValueError(f"FolderClips: folder must exist, got {root}")
        self.num_frames, self.size, self.seed = num_frames, (height, width), seed
        self.paths: list[Path] = []
        self.lengths: list[int] = []
        self.unreadable: list[str] = []
        files = sorted(p for p in root.rglob("*") if p.suffix.lower() in VIDEO_SUFFIXES)
        for path in files:
            try:
                length = _count_frames(path)
            except VideoReadError as error:
                self.unreadable.append(str(error))
                continue
            if length < num_frames:
                self.unreadable.append(f"{path} has {length} of {num_frames} frames")
                continue
            self.paths.append(path)
            self.lengths.append(length)
        if not self.paths:
            raise ValueError(
                f"FolderClips: folder must hold videos of {num_frames} frames or more, got "
                f"{len(files)} files, none of them usable, in {root}"
            )

    def __len__(self) -> int:
        """Number of files."""
        return len(self.paths)

    def __getitem__(self, place: tuple[int, int]) -> torch.Tensor:
        """Returns the clip [3, T, H, W] uint8 at (epoch, index)."""
        epoch, index = place
        last = self.lengths[index] - self.num_frames
        start = random.Random(f"{self.seed}/{epoch}/{index}").randint(0, last)
        return fit(_window(self.paths[index], start, self.num_frames), *self.size)


def fit(
    video: torch.Tensor,  # [3, T, H, W] uint8
    height: int,
    width: int,
) -> torch.Tensor:
    """Returns [3, T, height, width] uint8: scaled to cover that size, then cropped at the centre.

    Args:
        video: [3, T, H, W] uint8.
        height, width: in pixels.
    """
    scale = max(height / video.shape[2], width / video.shape[3])
    if scale != 1:
        size = [
            max(height, round(video.shape[2] * scale)),
            max(width, round(video.shape[3] * scale)),
        ]
        frames = video.transpose(0, 1).float()
        frames = F.interpolate(frames, size, mode="bilinear", antialias=True)
        video = frames.round().clamp(0, 255).to(torch.uint8).transpose(0, 1)
    top, left = (video.shape[2] - height) // 2, (video.shape[3] - width) // 2
    return video[:, :, top : top + height, left : left + width].contiguous()


def _count_frames(path: Path) -> int:
    with VideoReader(path) as reader:
        if reader.info.num_frames:
            return reader.info.num_frames
        return sum(len(chunk.timestamps) for chunk in reader.chunks(_READ_FRAMES))


def _window(path: Path, start: int, num_frames: int) -> torch.Tensor:
    """Returns frames `start` to `start + num_frames` of a file."""
    kept, first = [], 0
    with VideoReader(path) as reader:
        for chunk in reader.chunks(_READ_FRAMES):
            after = first + len(chunk.timestamps)
            if after > start:
                begin, end = max(0, start - first), start + num_frames - first
                kept.append(chunk.frames[:, begin:end])
            first = after
            if first >= start + num_frames:
                return torch.cat(kept, 1)
    raise VideoReadError(
        f"FolderClips: {path} must have {start + num_frames} frames as its header says, got {first}"
    )
