"""Which frames of a video make a clip: at its own rate, a fixed one, one of a range; or VidTok's.

timestamps   the frame nearest to t0 + i / fps, for i = 0 .. T - 1
reference    VidTok's own index rule, off by one included; see `reference_indices`
"""

from __future__ import annotations

import bisect
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

RULES = ("timestamps", "reference")
# Times that differ by less than this many seconds are one moment: timestamps are rounded.
_TOLERANCE_S = 1e-6


@dataclass(frozen=True)
class FrameSampling:
    """How frames are chosen.

    Attributes:
        num_frames: T of a clip.
        fps: frames per second of the clip; (low, high) draws one per clip, log-uniform; None takes
            consecutive frames. The published training has 3, its validation 8.
        rule: "timestamps" or "reference".
        start: "random", or "first" for the beginning of the video.
        shortest: take videos of so few frames too; the clip of one that has fewer than `num_frames`
            is all of it, at the highest rate. None for `num_frames`.

    Raises:
        ValueError: a value out of range, or "reference" without a single fps or with `shortest`,
            since it makes up what short videos lack.
    """

    num_frames: int
    fps: float | tuple[float, float] | None = None
    rule: str = "timestamps"
    start: str = "random"
    shortest: int | None = None

    def __post_init__(self) -> None:
        """Checks every field."""
        rates = self.fps if isinstance(self.fps, tuple) else (self.fps,)
        ok = self.fps is None or (all(r is not None and r > 0 for r in rates) and len(rates) < 3)
        if not ok or (len(rates) == 2 and rates[0] > rates[1]):
            raise ValueError(
                f"FrameSampling: fps must be None, a rate or (low, high), got {self.fps!r}"
            )
        if self.num_frames < 1:
            raise ValueError(f"FrameSampling: num_frames must be >= 1, got {self.num_frames}")
        if self.rule not in RULES or self.start not in ("random", "first"):
            raise ValueError(
                f"FrameSampling: rule must be one of {RULES} and start random or first, "
                f"got {self.rule!r} and {self.start!r}"
            )
        if not 1 <= self.least <= self.num_frames or (self.shortest and self.rule == "reference"):
            raise ValueError(
                f"FrameSampling: shortest must be None, or in 1..{self.num_frames} without the "
                f"rule reference, got {self.shortest}"
            )
        if self.rule == "reference" and (self.fps is None or isinstance(self.fps, tuple)):
            raise ValueError(f"FrameSampling: fps must be one rate for reference, got {self.fps!r}")

    @property
    def least(self) -> int:
        """Frames that a video must have, at the rate of the clip."""
        return self.num_frames if self.shortest is None else self.shortest

    def fits(self, seconds: Sequence[float]) -> bool:
        """Returns whether a video with frames at these times is long enough."""
        return self.fits_length(len(seconds), _duration(seconds))

    def fits_length(self, num_frames: int, duration: float) -> bool:
        """Returns whether a video is long enough.

        Args:
            num_frames: of the video.
            duration: from the first to the last of them, in seconds.
        """
        if self.rule == "reference":
            return num_frames > 0  # the published rule repeats the last frame
        if self.fps is None:
            return num_frames >= self.least
        fastest = max(self.fps) if isinstance(self.fps, tuple) else self.fps
        return self._span(fastest, self.least) <= duration + _TOLERANCE_S

    def fills_length(self, num_frames: int, duration: float, declared_fps: float) -> bool:
        """Returns whether a video has T frames for a clip; one that `fits_length` may have fewer.

        By the reference's rule it does if (T - 1) * interval + 1 <= num_frames, the interval being
        at least 1, since one of 0 repeats frames.

        Args:
            num_frames, duration: as of `fits_length`.
            declared_fps: rate that the file declares; only the reference's rule uses it.
        """
        if self.rule != "reference":
            return replace(self, shortest=None).fits_length(num_frames, duration)
        assert isinstance(self.fps, int | float)  # checked above
        interval = max(1, _reference_interval(declared_fps, self.fps))
        return (self.num_frames - 1) * interval + 1 <= num_frames

    def indices(
        self, seconds: Sequence[float], declared_fps: float, generator: random.Random
    ) -> list[int]:
        """Returns the indices of the frames of one clip, which never decrease: `num_frames`, or as
        many as the video has.

        Args:
            seconds: times of all frames of the video, strictly increasing.
            declared_fps: rate that the file declares; only the reference's rule uses it.
            generator: draws the rate and the start.

        Raises:
            ValueError: the video is too short, see `fits`.
        """
        if not self.fits(seconds):
            raise ValueError(
                f"FrameSampling: the video must be long enough for {self.least} frames at "
                f"{self.fps or 'its own'} fps, got {len(seconds)} frames in "
                f"{_duration(seconds):.3f} s"
            )
        first = 0 if self.start == "first" else None
        if self.rule == "reference":
            assert isinstance(self.fps, int | float)  # checked above
            return reference_indices(
                len(seconds), declared_fps, self.fps, self.num_frames, first, generator
            )
        if self.fps is None:
            count = min(self.num_frames, len(seconds))
            begin = 0 if first == 0 else generator.randint(0, len(seconds) - count)
            return list(range(begin, begin + count))
        fps = self._drawn(_duration(seconds), generator)
        # Twice the tolerance, so that what `fits` is not one frame short by rounding.
        fitting = 1 + int((_duration(seconds) + 2 * _TOLERANCE_S) * fps)
        count = min(self.num_frames, fitting)
        slack = max(0.0, _duration(seconds) - self._span(fps, count))
        begin_s = seconds[0] + (0.0 if first == 0 else generator.uniform(0, slack))
        return [nearest(seconds, begin_s + i / fps) for i in range(count)]

    @staticmethod
    def _span(fps: float, count: int) -> float:
        return (count - 1) / fps

    def _drawn(self, duration: float, generator: random.Random) -> float:
        """Returns a rate of the range at which the video is long enough."""
        if not isinstance(self.fps, tuple):
            assert self.fps is not None
            return self.fps
        low, high = self.fps
        if duration > 0:
            low = min(high, max(low, (self.num_frames - 1) / (duration + _TOLERANCE_S)))
        return low * (high / low) ** generator.random()


def _duration(seconds: Sequence[float]) -> float:
    return seconds[-1] - seconds[0] if seconds else 0.0


def _reference_interval(video_fps: float, sample_fps: float) -> int:
    return round(video_fps / sample_fps)


def nearest(seconds: Sequence[float], time: float) -> int:
    """Returns the index of the frame whose time is nearest; of two as near, the earlier one."""
    after = bisect.bisect_left(seconds, time)
    if after == 0:
        return 0
    if after == len(seconds):
        return after - 1
    closer = time - seconds[after - 1] <= seconds[after] - time + _TOLERANCE_S
    return after - 1 if closer else after


def reference_indices(
    num_available: int,
    video_fps: float,
    sample_fps: float,
    num_frames: int,
    start: int | None,
    generator: random.Random,
) -> list[int]:
    """Returns VidTok's indices: T points from start to start + span, truncated.

        interval = round(video_fps / sample_fps),  span = (T - 1) * interval + 1
        linspace(start, min(last, start + span), T), truncated to integers

    The end is one frame too far, so that gaps are uneven: 30 fps at interval 1 give 0, 1, ..., 15,
    17. A video of fewer than T frames gives all of them and repeats the last. An interval of 0,
    where sample_fps exceeds twice the video's rate, gives nearly the same frame T times.

    Args:
        num_available: frames of the video, >= 1.
        video_fps, sample_fps: frames per second.
        num_frames: T.
        start: fixed first frame; None draws it from 0 .. num_available - span - 1, 0 if too short.
        generator: of the start.

    Source: VidTok's data set (specification section 9).
    """
    count = min(num_frames, num_available)
    interval = _reference_interval(video_fps, sample_fps)
    span = (count - 1) * interval + 1
    if start is None:
        start = generator.randint(0, num_available - span - 1) if num_available > span else 0
    end = min(num_available - 1, start + span)
    step = (end - start) / (count - 1) if count > 1 else 0.0
    chosen = [min(end, int(start + i * step + 1e-9)) for i in range(count)]
    return chosen + [chosen[-1]] * (num_frames - count)
