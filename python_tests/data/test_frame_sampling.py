"""Which frames make a clip."""

import random

import pytest

from vtok_ext.data.frame_sampling import FrameSampling, nearest, reference_indices

THIRTY = [i / 30 for i in range(100)]


def first(num_frames, fps, **options):
    return FrameSampling(num_frames, fps, start="first", **options)


def test_nearest_frame():
    assert [nearest([0.0, 1.0, 2.0], t) for t in (-1, 0.4, 0.5, 0.6, 2.0, 9)] == [0, 0, 0, 1, 2, 2]


def test_rates():
    chosen = first(5, 3.0).indices(THIRTY, 30, random.Random(0))
    assert chosen == [0, 10, 20, 30, 40]
    assert first(4, None).indices(THIRTY, 30, random.Random(0)) == [0, 1, 2, 3]
    assert first(4, 60.0).indices(THIRTY, 30, random.Random(0)) == [0, 0, 1, 1]
    variable = [0.0, 0.1, 0.15, 0.5, 1.0, 1.1]
    assert first(3, 2.0).indices(variable, 30, random.Random(0)) == [0, 3, 4]


def test_range_of_rates_takes_what_the_video_allows():
    sampling = FrameSampling(17, (3.0, 30.0))
    gaps = set()
    for seed in range(40):
        chosen = sampling.indices(THIRTY, 30, random.Random(seed))
        assert len(chosen) == 17 and 0 <= chosen[0] and chosen[-1] <= 99
        gaps.add(round((chosen[-1] - chosen[0]) / 16))
    assert gaps >= {1, 2, 3, 4, 5, 6} and max(gaps) <= 6  # 99 frames hold 16 gaps of 6
    assert not sampling.fits(THIRTY[:16]) and sampling.fits(THIRTY[:17])


def test_short_videos_are_taken_whole():
    sampling = first(8, None, shortest=3)
    assert not sampling.fits(THIRTY[:2]) and sampling.fits(THIRTY[:3])
    assert sampling.indices(THIRTY[:3], 30, random.Random(0)) == [0, 1, 2]
    assert sampling.indices(THIRTY[:9], 30, random.Random(0)) == list(range(8))
    slow = first(8, 10.0, shortest=2)
    assert not slow.fits(THIRTY[:3]) and slow.fits(THIRTY[:4])
    assert slow.indices(THIRTY[:12], 30, random.Random(0)) == [0, 3, 6, 9]
    drawn = FrameSampling(8, (3.0, 30.0), shortest=2)
    assert drawn.indices(THIRTY[:5], 30, random.Random(0)) == [0, 1, 2, 3, 4]
    for length in range(8, 60):
        assert len(drawn.indices(THIRTY[:length], 30, random.Random(length))) == 8


def test_random_starts_cover_the_video():
    starts = {FrameSampling(5).indices(THIRTY, 30, random.Random(s))[0] for s in range(400)}
    assert min(starts) < 5 and max(starts) > 90


def test_published_rule_has_its_off_by_one():
    def indices(available, video_fps, sample_fps, count, start=0):
        return reference_indices(available, video_fps, sample_fps, count, start, random.Random(0))

    assert indices(100, 30, 30, 17) == [*range(16), 17]
    assert indices(300, 30, 3, 17)[:3] == [0, 10, 20] and indices(300, 30, 3, 17)[-1] == 161
    assert indices(5, 30, 30, 8) == [0, 1, 2, 3, 4, 4, 4, 4]
    assert len(set(indices(100, 10, 30, 17))) <= 2  # interval 0
    rule = FrameSampling(17, 3.0, "reference")
    starts = {
        rule.indices([i / 30 for i in range(200)], 30, random.Random(s))[0] for s in range(99)
    }
    assert max(starts) <= 200 - 161 - 1 and len(starts) > 20
    assert rule.fits([0.0])


def test_videos_that_fill_a_clip():
    """By the published rule a short video gives a clip, but does not fill it."""
    rule = FrameSampling(17, 3.0, "reference")
    assert rule.fits_length(1, 0.0) and rule.fits_length(160, 159 / 30)
    assert [rule.fills_length(n, (n - 1) / 30, 30.0) for n in (1, 17, 160, 161)] == [0, 0, 0, 1]
    fast = FrameSampling(17, 30.0, "reference")  # interval 0 at 10 frames per second
    assert [fast.fills_length(n, (n - 1) / 10, 10.0) for n in (1, 16, 17)] == [0, 0, 1]
    short = first(8, None, shortest=3)
    assert [short.fills_length(n, (n - 1) / 30, 30.0) for n in (3, 7, 8)] == [0, 0, 1]
    slow = first(5, 3.0)
    assert [slow.fills_length(n, (n - 1) / 30, 30.0) for n in (40, 41)] == [0, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "num_frames must be >= 1"),
        ((5, -1.0), "fps must be None, a rate"),
        ((5, (8.0, 3.0)), "fps must be None, a rate"),
        ((5, None, "reference"), "fps must be one rate for reference"),
        ((5, 3.0, "other"), "rule must be one of"),
        ((5, None, "timestamps", "random", 6), "shortest must be None, or in 1..5"),
        ((5, 3.0, "reference", "random", 2), "shortest must be None"),
    ],
)
def test_wrong_values(arguments, message):
    with pytest.raises(ValueError, match=message):
        FrameSampling(*arguments)


def test_too_short():
    with pytest.raises(ValueError, match="long enough for 17 frames at 3.0 fps, got 100 frames"):
        first(17, 3.0).indices(THIRTY, 30, random.Random(0))
