"""Which frames of a clip become tokens: strides, key frames, shot cuts, and the order of tokens.

    segment   [S key tokens | one residual token per sampled frame, in order of time]
    position  (frame, slot) of each token: slot 0 .. S - 1 of a key frame, S of a residual

A rule decides frame by frame and looks at nothing that comes later, so that streams sample the
same frames. Source: VTok (arXiv 2602.04202); cuts and chosen key frames are our own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor

from vtok_ext.models._video_input import to_float

# Position of a token that is only there to give all clips of a batch one length.
PADDING = -1
# Frames whose feature maps exist at a time: memory does not grow with the length of a clip.
FRAMES_PER_CALL = 16
# Cuts are found on pictures of this size: fine enough to tell shots apart, and noise averages out;
# and on so many frames at a time.
_CUT_SIZE, _CUT_FRAMES = 16, 16


@dataclass(frozen=True)
class FrameRule:
    """Which frames after the first give a residual token.

    With a stride: frames stride, 2 stride, ... With a rate: the last frame of every interval of
    1 / rate seconds that is complete, so that 5 s at 24 frames per second and 6 tokens per second
    give 30 (frames 3, 7, .., 119). Frame 0 never does.

    Attributes:
        stride: frames per token; 0 for the rate.
        rate: tokens per frame.
    """

    stride: int
    rate: Fraction

    @classmethod
    def of(cls, stride: int, tokens_per_second: float, fps: float) -> FrameRule:
        """Returns the rule of a stride, or if that is 0 of a number of tokens per second."""
        return cls(stride, Fraction(tokens_per_second) / Fraction(fps))

    def samples(self, frame: int) -> bool:
        """Returns whether frame number `frame` gives a residual token."""
        if frame == 0:
            return False
        if self.stride:
            return frame % self.stride == 0
        return (frame + 1) * self.rate // 1 > frame * self.rate // 1

    def frames(self, begin: int, end: int) -> list[int]:
        """Returns the sampled frames in begin .. end - 1."""
        return [self.frame_of(number) for number in self._numbers(begin, end)]

    def count(self, begin: int, end: int) -> int:
        """Returns how many frames in begin .. end - 1 are sampled, without looking at each."""
        return len(self._numbers(begin, end))

    def frame_of(self, number: int) -> int:
        """Returns the sampled frame number 1, 2, ...; `samples` is true of these alone."""
        if self.stride:
            return number * self.stride
        # Of a rate r < 1 the frame f with f r < number <= (f + 1) r.
        return number if self.rate >= 1 else math.ceil(number / self.rate) - 1

    def _numbers(self, begin: int, end: int) -> range:
        """Returns the numbers of the sampled frames in begin .. end - 1."""
        begin, end = max(begin, 1), max(end, 1)
        if self.stride:
            return range((begin - 1) // self.stride + 1, (end - 1) // self.stride + 1)
        if self.rate >= 1:
            return range(begin, end)
        return range(math.floor(begin * self.rate) + 1, math.floor(end * self.rate) + 1)


@dataclass(frozen=True)
class Segment:
    """A key frame and the frames whose difference to it is told."""

    key: int
    frames: tuple[int, ...]


def changes(
    pictures: Tensor,  # [n, 3, H, W] in [-1, 1]
) -> Tensor:
    """Returns [n - 1]: mean absolute change from each picture to the next, in [0, 2]."""
    small = F.adaptive_avg_pool2d(pictures.float(), (_CUT_SIZE, _CUT_SIZE))
    return (small[1:] - small[:-1]).abs().flatten(1).mean(1)


def segment_starts(
    clip: Tensor,  # [3, T, H, W], float in [-1, 1] or uint8
    threshold: float,
    dtype: torch.dtype,
) -> list[int]:
    """Returns the first frame of every shot; [0] with a threshold of 0.

    Args:
        clip: any number of frames.
        threshold: change from which on a shot begins.
        dtype: to which frames are converted first, as a model does.
    """
    starts = [0]
    if threshold == 0:
        return starts
    for first in range(0, clip.shape[1] - 1, _CUT_FRAMES):
        frames = to_float(clip[:, first : first + _CUT_FRAMES + 1], dtype)
        is_cut = changes(frames.transpose(0, 1)) > threshold
        starts += (is_cut.nonzero().flatten() + first + 1).tolist()
    return starts


def segments_from(starts: Sequence[int], num_frames: int, rule: FrameRule) -> list[Segment]:
    """Returns the segments of a clip whose key frames are the first of each shot.

    Args:
        starts: first frames of the shots, ascending, the first is 0.
        num_frames: T.
        rule: which frames are sampled.
    """
    ends = [*starts[1:], num_frames]
    return [
        Segment(start, tuple(f for f in rule.frames(start, end) if f != start))
        for start, end in zip(starts, ends, strict=True)
    ]


def nearest_to_mean(
    features: Tensor,  # [..., n, C, S]
) -> Tensor:
    """Returns which of n frames has the pooled features nearest to the mean of all, int64 [...]."""
    points = features.flatten(-2).float()
    return (points - points.mean(-2, keepdim=True)).square().sum(-1).argmin(-1)


def with_key(segment: Segment, key: int) -> Segment:
    """Returns the segment with another of its frames as key; it keeps its length."""
    frames = {segment.key, *segment.frames} - {key}
    return Segment(key, tuple(sorted(frames)))


def positions_of(segments: Sequence[Segment], key_tokens: int) -> Tensor:
    """Returns int32 [L, 2]: frame and slot of every token of a clip."""
    rows = []
    for segment in segments:
        rows += [(segment.key, slot) for slot in range(key_tokens)]
        rows += [(frame, key_tokens) for frame in segment.frames]
    return torch.tensor(rows, dtype=torch.int32)


def pad_sequences(rows: Sequence[Tensor], value: float) -> Tensor:
    """Returns [B, L, ...] of B tensors [l, ...], filled up with `value`."""
    longest = max(row.shape[0] for row in rows)
    padded = [
        torch.cat([row, row.new_full((longest - row.shape[0], *row.shape[1:]), value)])
        for row in rows
    ]
    return torch.stack(padded)
