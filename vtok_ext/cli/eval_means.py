"""Means of `vtok eval` over videos, how many videos have a value, and a 95 % interval over videos.

    m = sum_v S_v / sum_v n_v
    low, high = Student's interval of  m + (S_v - n_v m) V / sum_v n_v,  v = 1..V

with S_v and n_v the sum and number of values of a video: one, or one per clip in the reference
protocol, whose clips of one video are no independent samples. With one value per video the numbers
under Student's interval are the values themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vtok_ext.training.studies.verdict import student_interval

# A value may be None: it cannot be measured on that video.
Values = Mapping[str, Any]
# What text shows of the spread: name, label and digits.
_SHOWN = (("psnr", "PSNR", 2), ("ssim", "SSIM", 4), ("lpips", "LPIPS", 4))


def means_of(results: Sequence[Values], digits: Mapping[str, int]) -> dict[str, Any]:
    """Returns the mean of each value over those results that have one, None if none has.

    Args:
        results: of videos or clips.
        digits: names of the values, and to how many digits they are rounded.
    """
    found: dict[str, Any] = {}
    for name, count in digits.items():
        values = [result[name] for result in results if result[name] is not None]
        found[name] = round(sum(values) / len(values), count) if values else None
    return found


def spread_of(videos: Sequence[Sequence[Values]], digits: Mapping[str, int]) -> dict[str, Any]:
    """Returns {"counts": videos with a value, "intervals": [low, high] of its mean} by name.

    An interval is None for fewer than two videos.

    Args:
        videos: the results of each video, one or several.
        digits: as for `means_of`.
    """
    counts: dict[str, int] = {}
    intervals: dict[str, list[float] | None] = {}
    for name, count in digits.items():
        values = [[r[name] for r in results if r[name] is not None] for results in videos]
        values = [of_video for of_video in values if of_video]
        ends = [round(end, count) for end in _interval(values)] if len(values) > 1 else None
        counts[name], intervals[name] = len(values), ends
    return {"counts": counts, "intervals": intervals}


def _interval(values: list[list[float]]) -> tuple[float, float]:
    sums, sizes = (np.array([f(of_video) for of_video in values]) for f in (sum, len))
    mean = sums.sum() / sizes.sum()
    return student_interval(mean + (sums - sizes * mean) / sizes.mean())


def line_of_spread(report: Mapping[str, Any]) -> str:
    """Returns the main intervals of `spread_of`, and the number n of videos of each, as text."""
    parts = []
    for name, label, digits in _SHOWN:
        ends, count = report["intervals"][name], report["counts"][name]
        text = "n/a" if ends is None else f"{ends[0]:.{digits}f} to {ends[1]:.{digits}f}"
        if count:
            parts.append(f"{label} {text} (n={count})")
    return f"95 % over videos: {', '.join(parts)}"
