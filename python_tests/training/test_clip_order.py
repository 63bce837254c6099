"""Which clips a batch has: for any number of processes and workers, and after a restart."""

from fractions import Fraction

import pytest
import torch

from vtok_ext.data.clips import Augmentation, ProceduralClips, VideoClips
from vtok_ext.data.frame_sampling import FrameSampling
from vtok_ext.data.procedural import procedural_clip
from vtok_ext.data.video import VideoWriter
from vtok_ext.data.video_list import list_videos
from vtok_ext.training.clip_order import ClipOrder, buckets_of, step_batches


def test_every_epoch_is_a_shuffle_of_all_clips():
    order = ClipOrder(num_clips=7, batch_size=3)
    places = [place for step in range(7) for place in order.places(step, 0)]
    epochs = [[index for epoch, index in places if epoch == e] for e in range(3)]
    assert all(sorted(indices) == list(range(7)) for indices in epochs)
    assert epochs[0] != epochs[1]
    assert places == [p for s in range(7) for p in ClipOrder(7, 3).places(s, 0)]
    assert places != [p for s in range(7) for p in ClipOrder(7, 3, seed=1).places(s, 0)]


@pytest.mark.parametrize("seed", [20_000_000_000_000, 2**63 - 1])
def test_large_seeds(seed):
    """Their product with a constant is beyond 64 bits."""
    assert sorted(ClipOrder(7, 7, seed=seed).places(0, 0)) == [(0, i) for i in range(7)]
    bucketed = ClipOrder(4, 2, seed=seed, bucket_of=[0, 1, 0, 1]).places(0, 0)
    assert bucketed != ClipOrder(4, 2, seed=seed, bucket_of=[0, 1, 0, 1]).places(1, 0)


def test_orders_stay_what_they_were():
    generator = torch.Generator().manual_seed(3 * 1_000_003 + 2)
    expected = torch.randperm(7, generator=generator).tolist()
    assert ClipOrder(7, 7, seed=3).places(2, 0) == [(2, index) for index in expected]


@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 4), (2, 2), (4, 1)])
def test_a_step_has_the_same_clips_however_it_is_divided(world_size, accumulate):
    whole = ClipOrder(10, 8).places(5, 0)
    parts = [
        ClipOrder(10, 2, accumulate, rank, world_size).places(5, part)
        for part in range(accumulate)
        for rank in range(world_size)
    ]
    assert [place for part in parts for place in part] == whole


def test_the_row_goes_on_where_it_was_with_steps_of_another_size():
    whole = [p for step in range(6) for p in ClipOrder(10, 4).places(step, 0)]
    one = ClipOrder(10, 2, first_step=3, first_sample=12)
    assert [p for step in range(3, 9) for p in one.places(step, 0)] == whole[12:]


def test_workers_and_starts_change_nothing():
    clips = ProceduralClips(5, 2, 8, 8)
    order = ClipOrder(5, 2, accumulate=2)
    state = torch.get_rng_state()
    alone = list(step_batches(clips, order, 0, 4))
    assert [len(parts) for parts in alone] == [2] * 4
    for num_workers, first in ((2, 0), (1, 1), (0, 3)):
        found = list(step_batches(clips, order, first, 4, num_workers))
        assert len(found) == 4 - first
        for a, b in zip(alone[first:], found, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.fixture
def videos(tmp_path):
    """Returns 5 wide and 3 tall videos."""
    for i in range(8):
        height, width = (32, 48) if i < 5 else (48, 32)
        frames = procedural_clip(6 + i, height, width, seed=i)
        path = tmp_path / f"{i}.mp4"
        with VideoWriter(path, height=height, width=width, time_base=Fraction(1, 30)) as writer:
            writer.write(frames, list(range(6 + i)))
    return list_videos(tmp_path)


def test_files_in_buckets_with_1_2_and_4_workers_and_from_the_middle(videos):
    clips = VideoClips(
        videos,
        FrameSampling(5, (10.0, 30.0)),
        [(5, 16, 24), (5, 24, 16)],
        augmentation=Augmentation("random", 1.3, flip=True),
        seed=3,
    )
    order = ClipOrder(8, 2, accumulate=2, bucket_of=buckets_of(clips))
    alone = list(step_batches(clips, order, 0, 3))
    shapes = {tuple(part.shape) for parts in alone for part in parts}
    assert shapes == {(2, 3, 5, 16, 24), (2, 3, 5, 24, 16)}
    for num_workers, first in ((1, 0), (2, 2), (4, 1)):
        found = list(step_batches(clips, order, first, 3, num_workers))
        assert len(found) == 3 - first
        for a, b in zip(alone[first:], found, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_buckets_over_epochs_and_ranks():
    bucket_of = [0, 0, 1, 0, 1, 0, 1, 1, 1]
    order = ClipOrder(9, 2, bucket_of=bucket_of)
    for epoch in range(3):
        places = [order.places(4 * epoch + step, 0) for step in range(4)]  # 2 + 2 batches
        assert all(len({bucket_of[i] for _, i in batch}) == 1 for batch in places)
        seen = [place for batch in places for place in batch]
        assert len(set(seen)) == 8 and {e for e, _ in seen} == {epoch}
    halves = [ClipOrder(9, 1, 1, rank, 2, bucket_of=bucket_of).places(5, 0) for rank in (0, 1)]
    assert halves[0] + halves[1] == order.places(5, 0)
    with pytest.raises(ValueError, match="some bucket must hold 6 clips"):
        ClipOrder(9, 6, bucket_of=bucket_of)
