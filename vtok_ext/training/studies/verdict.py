"""Whether a claim holds: paired differences, their 95 % interval, and a verdict.

    d[s, c] = metric of `better` - metric of `worse`, for seed s and held-out clip c
    holds      the interval of its mean lies above the margin
    reversed   it lies below -|margin|
    undecided  neither, or fewer than two seeds

One of whole runs gets Student's interval over seeds. A metric per clip gets that of its means per
seed, widened to the bootstrap interval over clips and seeds where that goes further.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vtok_ext.training.studies.row_result import FinishedRun
from vtok_ext.training.studies.specification import Comparison

_RESAMPLES = 4000
_CHUNK = 250  # resamples at a time: 250 x 2,048 clips of counts are 4 MB
# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom, and the normal one.
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
_NORMAL = 1.96

# Note [Bootstrap over seeds and clips]
# Seeds and clips are crossed: every seed meets every clip. A resample draws clips with replacement
# and, independently, seeds. Drawing all S seeds of S would make the variance over seeds too small
# by (S - 1) / S, a third of it for three seeds; drawing S - 1 makes it unbiased (Rao and Wu 1988).
# Its quantiles know nothing of how uncertain a variance of two or three seeds is: where seeds
# differ more than clips, one of six intervals of three seeds misses the truth. Student's over the
# means of seeds misses one of twenty, but knows nothing of the choice of clips. A claim has to pass
# both.


@dataclass(frozen=True)
class Verdict:
    """What a comparison has shown.

    Attributes:
        verdict: "holds", "reversed" or "undecided".
        difference: mean paired difference, positive where `better` is better; None without runs.
        low, high: its 95 % interval.
        num_seeds: seeds that both rows have.
        reason: why it is undecided in words, "" otherwise.
    """

    verdict: str
    difference: float | None
    low: float | None
    high: float | None
    num_seeds: int
    reason: str = ""


def bootstrap_interval(
    differences: np.ndarray,  # [S, C]
    seed: int = 0,
) -> tuple[float, float]:
    """Returns the 95 % interval of the mean, resampled over seeds and clips.

    Args:
        differences: [S, C], one row per seed and one column per clip.
        seed: of the resampling; the same seed gives the same interval.

    See Note [Bootstrap over seeds and clips].
    """
    num_seeds, num_clips = differences.shape
    generator = np.random.default_rng(seed)
    drawn = max(1, num_seeds - 1)
    means = []
    for _ in range(_RESAMPLES // _CHUNK):
        clips = generator.multinomial(num_clips, [1 / num_clips] * num_clips, _CHUNK) / num_clips
        seeds = generator.multinomial(drawn, [1 / num_seeds] * num_seeds, _CHUNK) / drawn
        means.append(np.einsum("rs,sc,rc->r", seeds, differences, clips, optimize=True))
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return float(low), float(high)


def interval(
    differences: np.ndarray,  # [S, C]
) -> tuple[float, float]:
    """Returns the 95 % interval of a mean over seeds and clips: the union of both, with two seeds.

    See Note [Bootstrap over seeds and clips].
    """
    low, high = bootstrap_interval(differences)
    if len(differences) > 1:
        of_seeds = student_interval(differences.mean(1))
        low, high = min(low, of_seeds[0]), max(high, of_seeds[1])
    return low, high


def student_interval(
    differences: np.ndarray,  # [S]
) -> tuple[float, float]:
    """Returns the 95 % interval of the mean of S >= 2 numbers by Student's t."""
    quantile = _student_quantile(len(differences) - 1)
    half = quantile * differences.std(ddof=1) / np.sqrt(len(differences))
    return float(differences.mean() - half), float(differences.mean() + half)


def _student_quantile(freedom: int) -> float:
    """Returns the two-sided 95 % quantile, within 0.003 of it.

    Source: Abramowitz and Stegun 26.7.5, for what is beyond the table.
    """
    if freedom <= len(_STUDENT):
        return _STUDENT[freedom - 1]
    z = _NORMAL
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def judge(comparison: Comparison, runs: dict[tuple[str, int], FinishedRun]) -> Verdict:
    """Returns the verdict on a claim.

    Args:
        comparison: the claim.
        runs: results by row and seed.

    Raises:
        ValueError: a run lacks the metric, or two runs were measured on different clips.
    """
    better = {seed: run for (row, seed), run in runs.items() if row == comparison.better}
    worse = {seed: run for (row, seed), run in runs.items() if row == comparison.worse}
    seeds = sorted(better.keys() & worse.keys())
    if not seeds:
        return Verdict("undecided", None, None, None, 0, "no seed has both rows")
    pairs = [(better[seed], worse[seed]) for seed in seeds]
    sign = 1.0 if comparison.direction == "higher" else -1.0
    differences = sign * np.stack([_difference(a, b, comparison) for a, b in pairs])
    mean = float(differences.mean())
    if differences.shape[1] > 1:
        low, high = interval(differences)
    elif len(seeds) > 1:
        low, high = student_interval(differences[:, 0])
    else:
        return Verdict("undecided", mean, None, None, 1, "one seed")
    if len(seeds) < 2:
        return Verdict("undecided", mean, low, high, 1, "one seed: the interval is over clips only")
    if low > comparison.margin:
        return Verdict("holds", mean, low, high, len(seeds))
    if high < -abs(comparison.margin):
        return Verdict("reversed", mean, low, high, len(seeds))
    return Verdict("undecided", mean, low, high, len(seeds), "the interval meets the margin")


def _difference(a: FinishedRun, b: FinishedRun, comparison: Comparison) -> np.ndarray:
    """Returns [C] differences per clip, or [1] of a summary."""
    names = (comparison.metric, comparison.worse_metric or comparison.metric)
    for run, metric in zip((a, b), names, strict=True):
        if metric not in run.metric_names():
            raise ValueError(
                f"study: metric must be one of {', '.join(run.metric_names())} of "
                f"{run.row}, got {metric!r}"
            )
    if a.held_out != b.held_out:
        raise ValueError(
            f"study: {a.row} and {b.row} must be measured on the same clips, "
            f"got {a.held_out} and {b.held_out}"
        )
    if names[0] in a.summary or names[1] in b.summary:
        return np.array([a.mean(names[0]) - b.mean(names[1])])
    left, right = np.array(a.per_clip[names[0]]), np.array(b.per_clip[names[1]])
    if left.shape != right.shape:
        raise ValueError(
            f"study: {a.row} and {b.row} must have as many values of {metric}, "
            f"got {len(left)} and {len(right)}"
        )
    return left - right
