"""Processes of a training run: who am I, and means over all of us.

One process is the ordinary case and needs nothing; `torchrun` sets the variables that
`torch.distributed` reads. Every function here does what its name says in both.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

_T = TypeVar("_T")
# Longer than any job: how long one process waits for others that still have work of their own.
_PATIENCE = timedelta(days=30)


def is_distributed() -> bool:
    """Returns whether this process is one of several that talk to each other."""
    return distributed.is_available() and distributed.is_initialized()


def rank() -> int:
    """Returns the number of this process, 0 when it is alone."""
    return distributed.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Returns the number of processes."""
    return distributed.get_world_size() if is_distributed() else 1


def mean_over_ranks(
    values: Tensor,  # any shape, the same on every rank
) -> Tensor:
    """Returns the mean of `values` over all processes; no gradient passes.

    Args:
        values: any shape, the same on every rank.
    """
    values = values.detach()
    if not is_distributed():
        return values
    total = values.clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(total)
    return total / world_size()


def any_rank(flag: bool, device: torch.device) -> bool:
    """Returns whether `flag` is set on at least one process; all of them must ask."""
    if not is_distributed():
        return flag
    votes = torch.tensor(float(flag), device=device)
    distributed.all_reduce(votes, op=distributed.ReduceOp.MAX)
    return bool(votes.item())


def wait_for_all() -> None:
    """Returns None once every process has come here."""
    if is_distributed():
        distributed.barrier()


def gathered(value: _T) -> list[_T]:
    """Returns what each process gave, in the order of their numbers; all of them must ask.

    Args:
        value: what pickle can hold.
    """
    if not is_distributed():
        return [value]
    found: list[Any] = [None] * world_size()
    distributed.all_gather_object(found, value)
    return found


def on_rank_0(call: Callable[[], _T]) -> _T:
    """Returns on every process what `call` returns on rank 0, the only one that calls it.

    Args:
        call: what it returns must be something that pickle can hold.

    Raises:
        ValueError, OSError, ImportError: those of rank 0, on every process, so that none waits for
            the others.
    """
    if not is_distributed():
        return call()
    found: list[Any] = [None, None]
    if rank() == 0:
        try:
            found[0] = call()
        except (ValueError, OSError, ImportError) as error:
            found[1] = error
    distributed.broadcast_object_list(found, src=0)
    if found[1] is not None:
        raise found[1]
    return found[0]


@contextmanager
def process_group(device: torch.device, patient: bool = False) -> Iterator[torch.device]:
    """Yields the device of this process, inside the group that `torchrun` asked for, if it did.

    Args:
        device: the kind of device; with several processes on CUDA each takes its own.
        patient: for processes that work apart and meet seldom: one may wait for another for days,
            where nccl gives up after 10 minutes and gloo after 30. Always gloo, whose messages pass
            through the CPU.
    """
    if "WORLD_SIZE" not in os.environ or is_distributed():
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    nccl = device.type == "cuda" and not patient
    timeout = _PATIENCE if patient else None
    distributed.init_process_group("nccl" if nccl else "gloo", timeout=timeout)
    try:
        yield device
    finally:
        distributed.destroy_process_group()
