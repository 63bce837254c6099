"""Checks videos for the metrics that compare two sets of clips, and cuts them into equal clips."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# A set of clips: one tensor, or batches of them.
Videos = Tensor | Iterable[Tensor]
CHUNKS = ("all", "first")


@dataclass(frozen=True)
class SetDistance:
    """A distance of two sets of clips.

    Attributes:
        value: the estimate.
        low, high: 95 % confidence interval, equal to `value` when it was not wanted.
        num_generated, num_real: samples behind it.
    """

    value: float
    low: float
    high: float
    num_generated: int
    num_real: int

    def __float__(self) -> float:
        return self.value


def check_clips(op: str, chunks: str, **counts: int | None) -> None:
    """Raises ValueError unless `chunks` is one of `CHUNKS` and the given counts are positive."""
    if chunks not in CHUNKS:
        raise ValueError(f"{op}: chunks must be one of {CHUNKS}, got {chunks!r}")
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{op}: {name} must be >= 1, got {count}")


def uint8_batches(op: str, videos: Videos) -> Iterator[Tensor]:
    """Yields batches [B, 3, T, H, W] uint8 of videos; floats in [-1, 1] are clamped and truncated.

    Truncation, not rounding, is what published numbers come from.

    Raises:
        TypeError, ValueError: something else.
    """
    for video in [videos] if isinstance(videos, Tensor) else videos:
        if not isinstance(video, Tensor) or video.dim() != 5 or video.shape[1] != 3:
            shown = list(video.shape) if isinstance(video, Tensor) else type(video).__name__
            raise ValueError(f"{op}: videos must be [B, 3, T, H, W], got {shown}")
        if video.dtype == torch.uint8:
            yield video
        elif video.is_floating_point():
            yield ((video.float().clamp(-1, 1) + 1) / 2 * 255).to(torch.uint8)
        else:
            raise TypeError(f"{op}: videos must be uint8 or floating, got {video.dtype}")


def clips_of(video: Tensor, num_frames: int, chunks: str) -> Iterator[Tensor]:
    """Yields clips [B, 3, num_frames, H, W] of video [B, 3, T, H, W]; a remainder is dropped."""
    count = video.shape[2] // num_frames
    for start in range(0, count if chunks == "all" else min(1, count)):
        yield video[:, :, start * num_frames : (start + 1) * num_frames]
