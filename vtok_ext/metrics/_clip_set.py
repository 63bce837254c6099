"""Checks videos for the metrics that compare two sets of clips, and cuts them into equal clips."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# A set of clips: one tensor, or batches of them.
Videos = Tensor | Iterable[Tensor]
CHUNKS = ("all", "first")
# Videos of either kind that an interval needs.
LEAST_VIDEOS = 3


@dataclass(frozen=True)
class SetDistance:
    """A distance of two sets of clips.

    Attributes:
        value: the estimate.
        low, high: 95 % confidence interval, equal to `value` when it was not wanted.
        num_generated, num_real: clips behind it.
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
            if not bool(video.isfinite().all()):
                raise ValueError(f"{op}: videos must be finite, got NaN or infinity")
            yield ((video.float().clamp(-1, 1) + 1) / 2 * 255).to(torch.uint8)
        else:
            raise TypeError(f"{op}: videos must be uint8 or floating, got {video.dtype}")


def clips_of(
    op: str, videos: Videos, num_frames: int | None, chunks: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields uint8 clips [B, 3, num_frames, H, W] and which videos they are of, [B], from 0 on.

    What is left of a video behind its last clip is dropped; without `num_frames` clips are whole
    videos. Raises as `uint8_batches`.
    """
    first = 0
    for video in uint8_batches(op, videos):
        numbers = torch.arange(first, first + len(video))
        first += len(video)
        length = num_frames or video.shape[2]
        count = video.shape[2] // length
        for start in range(count if chunks == "all" else min(1, count)):
            yield video[:, :, start * length : (start + 1) * length], numbers


@dataclass(frozen=True)
class Origins:
    """Which videos the clips of two sets are of: what is independent are videos, not their clips.

    Attributes:
        generated, real: [N] and [M] int64, a number per clip.
        paired: whether video i of one set was made of video i of the other, as by a tokenizer.
    """

    generated: Tensor
    real: Tensor
    paired: bool = False

    @property
    def num_videos(self) -> tuple[int, int]:
        """Videos of the generated and of the real clips."""
        return len(self.generated.unique()), len(self.real.unique())

    @classmethod
    def of_clips(cls, num_generated: int, num_real: int, paired: bool = False) -> Origins:
        """Returns origins by which every clip is a video of its own."""
        return cls(torch.arange(num_generated), torch.arange(num_real), paired)

    def or_clips(self) -> Origins:
        """Returns itself, or with too few videos for an interval every clip as one."""
        if min(self.num_videos) >= LEAST_VIDEOS:
            return self
        return self.of_clips(len(self.generated), len(self.real), self.paired)

    def check(self, op: str) -> None:
        """Raises ValueError for pairs that are none."""
        if self.paired and not torch.equal(self.generated, self.real):
            raise ValueError(
                f"{op}: paired sets must have a real clip for each generated one, in their order, "
                f"got {len(self.generated)} generated and {len(self.real)} real clips"
            )
