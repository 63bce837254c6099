"""Which clips a batch has: for any number of processes and workers, and after a restart."""

import pytest
import torch

from vtok_ext.data.clips import ProceduralClips
from vtok_ext.training.clip_order import ClipOrder, step_batches


def test_every_epoch_is_a_shuffle_of_all_clips():
    order = ClipOrder(num_clips=7, batch_size=3)
    places = [place for step in range(7) for place in order.places(step, 0)]
    epochs = [[index for epoch, index in places if epoch == e] for e in range(3)]
    assert all(sorted(indices) == list(range(7)) for indices in epochs)
    assert epochs[0] != epochs[1]
    assert places == [p for s in range(7) for p in ClipOrder(7, 3).places(s, 0)]
    assert places != [p for s in range(7) for p in ClipOrder(7, 3, seed=1).places(s, 0)]


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
