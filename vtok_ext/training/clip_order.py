"""Which clips make up which batch: a function of the batch's number, so there is no state to save.

The clips of all epochs, each shuffled by itself, form one endless row; step n takes the next
`global batch` of it; the micro-batches and ranks of a step take consecutive parts. The same global
batch therefore holds the same clips for any number of processes.
"""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch.utils.data import DataLoader

from vtok_ext.data.clips import Clips, video_clips_of


@dataclass
class ClipOrder:
    """Places (epoch, index) of the clips of every micro-batch of one process.

    Attributes:
        num_clips: clips of an epoch.
        batch_size: clips of one micro-batch of one process.
        accumulate: micro-batches of a step.
        rank, world_size: which process this is, of how many.
        seed: of the shuffles.
        first_step, first_sample: the row is at sample `first_sample` at the beginning of step
            `first_step`: with other numbers of processes than before, steps have other sizes.
        bucket_of: the bucket of each clip where there are several: the clips of a micro-batch, over
            all processes, are then of one bucket. Which clips share one depends on its size, so
            that another number of processes sees other batches.
    """

    num_clips: int
    batch_size: int
    accumulate: int = 1
    rank: int = 0
    world_size: int = 1
    seed: int = 0
    first_step: int = 0
    first_sample: int = 0
    bucket_of: list[int] = field(default_factory=list, repr=False)
    _shuffles: dict[int, list[int]] = field(default_factory=dict, repr=False)
    _members: list[list[int]] = field(default_factory=list, repr=False)

    def places(self, step: int, part: int) -> list[tuple[int, int]]:
        """Returns the places of micro-batch `part` of step `step`, both from 0."""
        per_part = self.batch_size * self.world_size
        part += (step - self.first_step) * self.accumulate
        if self._members:
            shared = self._bucketed(self.first_sample // per_part + part)
            return shared[self.rank * self.batch_size :][: self.batch_size]
        first = self.first_sample + part * per_part + self.rank * self.batch_size
        row = (divmod(n, self.num_clips) for n in range(first, first + self.batch_size))
        return [(epoch, self._shuffled(epoch)[position]) for epoch, position in row]

    def _shuffled(self, epoch: int) -> list[int]:
        if epoch not in self._shuffles:
            self._shuffles = {e: s for e, s in self._shuffles.items() if e == epoch - 1}
            generator = self._generator(epoch)
            order = torch.randperm(self.num_clips, generator=generator)
            self._shuffles[epoch] = order.tolist()
        return self._shuffles[epoch]

    def _generator(self, epoch: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)

    def __post_init__(self) -> None:
        """Groups the clips by bucket."""
        members: dict[int, list[int]] = {}
        for index, bucket in enumerate(self.bucket_of):
            members.setdefault(bucket, []).append(index)
        self._members = [members[bucket] for bucket in sorted(members)]
        size = self.batch_size * self.world_size
        if self._members and sum(len(m) // size for m in self._members) == 0:
            raise ValueError(
                f"ClipOrder: some bucket must hold {size} clips, a micro-batch of all processes, "
                f"got {max(map(len, self._members))}"
            )

    def _bucketed(self, number: int) -> list[tuple[int, int]]:
        """Returns the places of micro-batch `number` of all processes, of a single bucket.

        Every epoch shuffles each bucket, cuts it into micro-batches, leaves out what does not fill
        one, and shuffles these.
        """
        size = self.batch_size * self.world_size
        per_epoch = sum(len(members) // size for members in self._members)
        epoch, position = divmod(number, per_epoch)
        if epoch not in self._shuffles:
            generator = self._generator(epoch)
            batches = []
            for members in self._members:
                order = torch.randperm(len(members), generator=generator).tolist()
                for first in range(0, len(members) // size * size, size):
                    batches.append([members[i] for i in order[first : first + size]])
            mixed = torch.randperm(per_epoch, generator=generator).tolist()
            self._shuffles = {epoch: [index for b in mixed for index in batches[b]]}
        row = self._shuffles[epoch][position * size : (position + 1) * size]
        return [(epoch, index) for index in row]

    @property
    def clips_per_epoch(self) -> int:
        """Clips that an epoch takes: all but, with buckets, those that fill no micro-batch."""
        size = self.batch_size * self.world_size
        if not self._members:
            return self.num_clips
        return sum(len(members) // size * size for members in self._members)

    def all_places(self, first_step: int, last_step: int) -> Iterator[list[tuple[int, int]]]:
        """Yields the micro-batches of steps `first_step` to before `last_step`."""
        for step in range(first_step, last_step):
            for part in range(self.accumulate):
                yield self.places(step, part)


def buckets_of(clips: Clips) -> list[int]:
    """Returns the bucket of each clip for `ClipOrder`, [] if all clips have one shape."""
    files = video_clips_of(clips)
    return files.bucket_of if files is not None and len(files.buckets) > 1 else []


def small_buckets(clips: Clips, order: ClipOrder) -> list[str]:
    """Returns a line for every bucket whose clips fill no micro-batch: they are never taken."""
    files = video_clips_of(clips)
    size = order.batch_size * order.world_size
    counts = Counter(order.bucket_of)
    return [
        f"bucket {list(files.buckets[bucket])} holds {count} clips, fewer than the {size} of a "
        "micro-batch of all processes: they are never trained on"
        for bucket, count in sorted(counts.items())
        if files is not None and count < size
    ]


class _Batches:
    """What a DataLoader takes for a batch sampler."""

    def __init__(self, order: ClipOrder, first_step: int, last_step: int) -> None:
        self.order, self.first_step, self.last_step = order, first_step, last_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self.order.all_places(self.first_step, self.last_step)

    def __len__(self) -> int:
        return max(0, self.last_step - self.first_step) * self.order.accumulate


def _outlive_signals(worker: int) -> None:
    """Lets a worker ignore SIGTERM and Ctrl-C.

    A scheduler, torchrun or a terminal sends them to all processes of a group: without its worker
    the training could not end its step and save. A worker ends when its loader does, or its parent.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def step_batches(
    clips: Clips, order: ClipOrder, first_step: int, last_step: int, num_workers: int = 0
) -> Iterator[list[torch.Tensor]]:
    """Yields for each step its micro-batches, [B, 3, T, H, W] uint8 each.

    Args:
        clips: where they come from.
        order: which ones.
        first_step, last_step: steps `first_step` to before `last_step`.
        num_workers: processes that prepare them; 0 for this one.
    """
    loader: Any = DataLoader(
        cast(Any, clips),
        batch_sampler=cast(Any, _Batches(order, first_step, last_step)),
        num_workers=num_workers,
        worker_init_fn=_outlive_signals,
        pin_memory=torch.cuda.is_available(),
        # Its own, so that a loader draws nothing from the generator that the model uses.
        generator=torch.Generator().manual_seed(0),
    )
    parts: list[torch.Tensor] = []
    for part in loader:
        parts.append(part)
        if len(parts) == order.accumulate:
            yield parts
            parts = []
