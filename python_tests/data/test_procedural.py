"""The procedural clip: reproducible, textured, moving."""

import itertools
import math

import pytest
import torch

from vtok_ext.data.erratic_motion import erratic_camera, erratic_shape
from vtok_ext.data.procedural import procedural_clip


def test_same_seed_same_clip_other_seed_other_clip():
    first, again, other = (procedural_clip(3, 40, 56, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert (first.float() - other.float()).abs().mean() > 20


def test_longer_clip_continues_the_shorter_one():
    assert torch.equal(procedural_clip(9, 32, 32)[:, :4], procedural_clip(4, 32, 32))


@pytest.mark.parametrize("size", [(1, 1), (7, 31), (48, 64)])
def test_shape_and_range(size):
    clip = procedural_clip(2, *size)
    assert clip.shape == (3, 2, *size)
    assert clip.dtype == torch.uint8
    floating = procedural_clip(2, *size, dtype=torch.float32)
    assert floating.min() >= -1 and floating.max() <= 1
    # Rounding to 256 steps of 2 / 255 moves a value by at most half a step.
    assert (clip.float() / 127.5 - 1 - floating).abs().max() <= 1 / 255 + 1e-6


def test_background_and_shapes_are_textured_and_move():
    clip = procedural_clip(2, 64, 64, seed=0).float()
    background = procedural_clip(2, 64, 64, seed=0, num_shapes=0).float()
    assert background[:, 0].std() > 10
    covered = (clip[:, 0] - background[:, 0]).abs().sum(0) > 8
    assert 0.1 < covered.float().mean() < 0.6
    assert clip[:, 0][:, covered].std() > 20
    # Every seed's shapes move within one frame, the background drifts slowly.
    assert (clip[:, 1] - clip[:, 0]).abs()[:, covered].mean() > 2


@pytest.mark.parametrize("arguments", [(0, 8, 8), (1, 0, 8), (1, 8, 0)])
def test_sizes_below_one(arguments):
    with pytest.raises(ValueError, match="must be at least 1"):
        procedural_clip(*arguments)


def test_other_arguments():
    with pytest.raises(ValueError, match="num_shapes must be at least 0, got -1"):
        procedural_clip(1, 8, 8, num_shapes=-1)
    with pytest.raises(TypeError, match="dtype must be uint8 or floating, got torch.int32"):
        procedural_clip(1, 8, 8, dtype=torch.int32)


def test_erratic_motion_reverses_and_accelerates_and_the_camera_moves():
    shape = erratic_shape("7/0", 64, (0.4, 0.4))
    steps = [(b.x - a.x, b.y - a.y) for a, b in itertools.pairwise(shape)]
    turned = [a[0] * b[0] + a[1] * b[1] < 0 for a, b in itertools.pairwise(steps)]
    assert all(any(turned[t : t + 15]) for t in range(len(turned) - 15))
    lengths = [math.hypot(*step) for step in steps]
    assert max(lengths) > 1.5 * min(lengths) and max(lengths) <= 0.061
    assert all(abs(pose.x) <= 0.4 and abs(pose.y) <= 0.4 for pose in shape)
    camera = erratic_camera("7", 64)
    for values in ([p.x for p in camera], [p.angle for p in camera], [p.scale for p in camera]):
        assert max(values) - min(values) > 0.02


def test_erratic_clips():
    clip = procedural_clip(9, 16, 24, seed=2, motion="erratic")
    assert torch.equal(clip[:, :4], procedural_clip(4, 16, 24, seed=2, motion="erratic"))
    every_third = procedural_clip(3, 16, 24, seed=2, motion="erratic", frame_step=3)
    assert torch.equal(clip[:, ::3][:, :3], every_third)
    still = procedural_clip(9, 16, 24, seed=2, motion="erratic", num_shapes=0)
    assert not torch.equal(still[:, 0], still[:, 1])  # the camera
    with pytest.raises(ValueError, match="motion must be one of"):
        procedural_clip(motion="wild")
    with pytest.raises(ValueError, match="frame_step must be at least 1"):
        procedural_clip(frame_step=0)
