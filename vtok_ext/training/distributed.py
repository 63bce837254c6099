"""Processes of a training run: who am I, and means over all of us.

One process is the ordinary case and needs nothing; `torchrun` sets the variables that
`torch.distributed` reads. Every function here does what its name says in both.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, distributed


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


@contextmanager
def process_group(device: torch.device) -> Iterator[torch.device]:
    """Yields the device of this process, inside the group that `torchrun` asked for, if it did.

    Args:
        device: the kind of device; with several processes on CUDA each takes its own.
    """
    if "WORLD_SIZE" not in os.environ or is_distributed():
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        distributed.destroy_process_group()
