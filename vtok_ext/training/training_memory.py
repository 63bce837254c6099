"""How much memory a training step takes, predicted without taking any.

    M(batch) = weights + gradients + optimizer + constant + batch * per_clip

Weights, gradients and two moments of Adam are counted from the parameters. The rest is what
autograd keeps from the forward pass for the backward pass: a step is run on fake tensors, which
have shapes and no memory, and every storage that autograd saves is counted once. With one and with
two clips this gives what is kept per clip and what is kept once. Half precision is that of CUDA's
autocast. Transient tensors of single operations are not part of it, nor is what an allocator loses.

The quantity behind figure 1a of CoordTok (arXiv 2411.14762): the largest batch that fits a budget.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

PRECISIONS = ("float32", "bfloat16", "float16")
# A gradient and the two moments of Adam have the size of a weight.
_PER_TRAINED_WEIGHT = 3


class SavedBytes:
    """Bytes that autograd saved, each storage once, without those given as `known`."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        self._seen = {t.untyped_storage()._cdata for t in known}
        self._kept: list[Tensor] = []  # so that no address is used twice
        self.total = 0

    def add(self, tensor: Tensor) -> Tensor:
        """Returns `tensor` after counting its storage."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self._kept.append(tensor)
            self.total += storage.nbytes()
        return tensor


@contextmanager
def saved_bytes(model: nn.Module) -> Iterator[SavedBytes]:
    """Yields a SavedBytes that counts, while active, what is saved for the backward pass.

    Parameters and buffers of `model` do not count.
    """
    count = SavedBytes([*model.parameters(), *model.buffers()])
    with torch.autograd.graph.saved_tensors_hooks(count.add, lambda tensor: tensor):
        yield count


class _Float32Norms(TorchFunctionMode):
    """Layer norms in float32, as CUDA's autocast computes them and a CPU's does not: they save a
    float32 copy of what they get. No other operation of that autocast's list of float32 operations
    is given half numbers by a model of this package."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is F.layer_norm:
            args = (args[0].float(), *args[1:])
        return func(*args, **(kwargs or {}))


@contextmanager
def cuda_autocast_on_cpu(precision: str) -> Iterator[None]:
    """Computes CPU tensors in the types that CUDA's autocast takes; for "float32", in their own.

    float16 is computed as bfloat16, which is as large and known to more operations.
    """
    if precision == "float32":
        yield
        return
    with torch.autocast("cpu", torch.bfloat16), _Float32Norms():
        yield


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of a training step.

    Attributes:
        state: weights, gradients and optimizer.
        constant: activations that do not depend on the batch.
        per_clip: activations of one clip.
    """

    state: int
    constant: int
    per_clip: int

    def total(self, batch: int) -> int:
        """Returns the bytes with `batch` clips."""
        return self.state + self.constant + batch * self.per_clip

    def largest_batch(self, budget: int) -> int:
        """Returns how many clips fit `budget` bytes, 0 if not one."""
        return max(0, (budget - self.state - self.constant) // self.per_clip)


def predict_training_memory(
    build: Callable[[], nn.Module],
    step: Callable[[Any, int], Tensor],
    *,
    precision: str = "float32",
) -> TrainingMemory:
    """Returns the memory of a step; takes seconds and no memory to speak of.

    Args:
        build: returns the model.
        step: of the model and a batch size, returns the loss of clips without meaningful values
            that it makes itself.
        precision: "float32", or "bfloat16" or "float16" for autocast.

    Raises:
        ValueError: an unknown precision.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    if precision not in PRECISIONS:
        raise ValueError(
            f"predict_training_memory: precision must be one of {PRECISIONS}, got {precision!r}"
        )
    with FakeTensorMode():
        model = build().train()
        saved = [_saved(model, step, batch, precision) for batch in (1, 2)]
        state = sum(
            p.numel() * p.element_size() * (1 + _PER_TRAINED_WEIGHT * p.requires_grad)
            for p in model.parameters()
        )
    per_clip = saved[1] - saved[0]
    return TrainingMemory(state, saved[0] - per_clip, per_clip)


def _saved(model: nn.Module, step: Callable, batch: int, precision: str) -> int:
    with saved_bytes(model) as count, cuda_autocast_on_cpu(precision):
        loss = step(model, batch)  # keeps the graph, and with it what was saved, until counted
        total = count.total
        del loss
    return total
