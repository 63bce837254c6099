"""The mean of a tensor over processes, with gradients: y = sum_r x_r / R, both ways."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed

from vtok_ext.ops._library import once_differentiable


class MeanOverRanks(torch.autograd.Function):
    """The mean of a tensor over the processes of a group, forward and backward.

    Every rank's loss depends on every rank's distribution, so gradients are averaged as well: the
    mean over ranks of parameter gradients, which DDP takes, is then the gradient of the mean loss.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: distributed.ProcessGroup) -> Tensor:
        """Mean over ranks."""
        ctx.group = group
        return _mean_over_ranks(x, group)

    @staticmethod
    @once_differentiable("fsq_entropy_loss")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Mean over ranks."""
        return _mean_over_ranks(grad, ctx.group), None


def _mean_over_ranks(x: Tensor, group: distributed.ProcessGroup) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(total, group=group)
    return total / distributed.get_world_size(group)
