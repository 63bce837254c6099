"""The procedural clip: reproducible, textured, moving."""

import pytest
import torch

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
