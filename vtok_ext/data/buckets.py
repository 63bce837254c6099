"""Buckets: videos of like aspect ratio and length share a batch, so that little is cropped away.

A bucket is (T, H, W). A video goes to the longest T that it fills, or to the shortest one if it
fills none and is taken nevertheless, and there to the bucket whose H / W is nearest, on a
logarithmic scale, to its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

Bucket = tuple[int, int, int]


def check_buckets(buckets: Sequence[Bucket]) -> None:
    """Returns None if these are buckets.

    Raises:
        ValueError: there is none, one is given twice, or one is no (T, H, W) of positive integers.
    """
    ok = all(len(b) == 3 and all(isinstance(n, int) and n > 0 for n in b) for b in buckets)
    if not buckets or not ok or len(set(buckets)) != len(buckets):
        raise ValueError(f"buckets: must be different (T, H, W), at least one, got {buckets}")


def choose_bucket(
    buckets: Sequence[Bucket], height: int, width: int, fits: Callable[[int], bool]
) -> int | None:
    """Returns the index of the bucket of a video, None if it is too short for all of them.

    Args:
        buckets: (T, H, W) each.
        height, width: of the video, in pixels.
        fits: says whether the video gives T frames.
    """
    lengths = [t for t in sorted({bucket[0] for bucket in buckets}, reverse=True) if fits(t)]
    if not lengths:
        return None
    aspect = math.log(height / width)
    candidates = [i for i, bucket in enumerate(buckets) if bucket[0] == lengths[0]]
    return min(candidates, key=lambda i: abs(math.log(buckets[i][1] / buckets[i][2]) - aspect))
