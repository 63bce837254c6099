"""One training step: gradients of all micro-batches, then every optimiser moves, or none.

Nothing is applied unless all losses and gradients are finite on every process.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vtok_ext.layers.vq import VQ
from vtok_ext.training.checkpoint import random_generators, set_random_generators
from vtok_ext.training.distributed import gathered, mean_over_ranks, rank, world_size
from vtok_ext.training.gradients import clip_gradients, divide_gradients
from vtok_ext.training.parallel import gradients_shared, is_sharded, local
from vtok_ext.training.sentinel import first_bad_layer, is_finite, last_bad_gradient
from vtok_ext.training.state import Training
from vtok_ext.training.task import MicroBatch


class NonFiniteStep(Exception):
    """A step that was not taken: `where` says what was not finite first."""

    def __init__(self, where: str) -> None:
        super().__init__(where)
        self.where = where


class Stepper:
    """Takes training steps; with several processes gradients are averaged over them.

    Args:
        training: what is trained; changed in place.

    Attributes:
        is_whole: whether the state is that after the last step. An error leaves it so, but for one
            while the optimisers were moving.
    """

    def __init__(self, training: Training) -> None:
        self.training, self.task = training, training.task
        self.is_whole = True
        wrapped = {p for n in self.task.networks.values() for p in n.parameters()}
        # Such as a log variance: what neither DDP nor FSDP2 takes care of.
        self._loose = [p for p in self._parameters() if p not in wrapped]

    def __call__(self, parts: list[Any]) -> dict[str, float]:
        """Returns the loss terms of a step, averaged over its micro-batches and all processes.

        Args:
            parts: what the data set's items collate to, one per micro-batch.

        Raises:
            NonFiniteStep: something was NaN or infinite. Weights, optimisers, buffers and random
                generators are as they were before the step, as after any other error before the
                optimisers move.
        """
        task = self.task
        task.prepare()
        task.train_mode()
        generators = random_generators(self.training.device)
        remembered = [(t, t.detach().clone()) for t in self._remembered()]
        try:
            return self._take(parts, generators, remembered)
        except Exception:
            if self.is_whole:
                _restore(remembered)
                set_random_generators(generators, self.training.device)
                self._zero_gradients()
            raise

    def _take(
        self,
        parts: list[Any],
        generators: dict[str, Any],
        remembered: list[tuple[Tensor, Tensor]],
    ) -> dict[str, float]:
        """Returns the loss terms, as `__call__`, which puts things right after an error."""
        training, task = self.training, self.task
        self._set_learning_rates()
        self._zero_gradients()
        batches = [self._batch(i, part, len(parts)) for i, part in enumerate(parts)]
        terms = []
        for i, batch in enumerate(batches):
            with gradients_shared(task.call.values(), i == len(parts) - 1):
                factor = training.loss_scale.value / len(parts)
                terms.append(task.accumulate(batch, partial(_backward, factor)))
        norms = self._clip_gradients()
        mean = {name: torch.stack([t[name].float() for t in terms]).mean() for name in terms[0]}
        mean |= norms
        # One transfer for all numbers; a NaN of one process reaches all of them.
        values = mean_over_ranks(torch.stack(list(mean.values()))).tolist()
        num_samples = sum(len(batch.numbers) for batch in batches) * world_size()
        names = [name for name, v in zip(mean, values, strict=True) if not math.isfinite(v)]
        if names and training.loss_scale.can_shrink and self._are_of_gradients(names, norms):
            _restore(remembered)
            return self._leave_out(dict(zip(mean, values, strict=True)), num_samples)
        if names:
            _restore(remembered)
            where = _most_exact(gathered(self._search(batches, generators, names)))
            raise NonFiniteStep(where)
        self.is_whole = False
        self._apply(num_samples)
        self.is_whole = True
        return dict(zip(mean, values, strict=True))

    def _batch(self, part: int, data: Any, num_parts: int) -> MicroBatch:
        """Returns a micro-batch; all parts and processes are taken to have samples in equal
        numbers.
        """
        training, count = self.training, batch_size(data)
        first = training.samples + (part * world_size() + rank()) * count
        return MicroBatch(
            to_device(data, training.device),
            training.step,
            range(first, first + count),
            training.recipe.run.seed,
            training.loss_scale.value,
        )

    def _are_of_gradients(self, names: list[str], norms: dict[str, Tensor]) -> bool:
        """Returns whether values that are not finite are all made of gradients."""
        made = set(norms)
        if not set(self.task.gradient_terms).isdisjoint(names):
            made |= {"loss", *self.task.gradient_terms}
        return made.issuperset(names)

    def _remembered(self) -> Iterator[Tensor]:
        """Yields what forward passes change: buffers, and codebooks whose dead vectors restart."""
        for module in self.task.modules.values():
            yield from module.buffers()
            for layer in module.modules():
                if isinstance(layer, VQ) and layer.restarts_parameters:
                    yield layer.codebook

    def _parameters(self) -> list[nn.Parameter]:
        optimizers = self.training.optimizers.values()
        return [p for o in optimizers for group in o.param_groups for p in group["params"]]

    def _set_learning_rates(self) -> None:
        settings, run = self.training.recipe.optimizer, self.training.recipe.run
        scale = settings.scale(self.training.step, run.steps)
        for optimizer in self.training.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = scale * group["initial_lr"]

    def _zero_gradients(self) -> None:
        for optimizer in self.training.optimizers.values():
            optimizer.zero_grad(set_to_none=True)

    def _clip_gradients(self) -> dict[str, Tensor]:
        """Returns the norms before clipping: "grad_norm" of the first optimiser, "x_grad_norm"."""
        for parameter in self._loose:
            if parameter.grad is not None:
                parameter.grad.copy_(mean_over_ranks(parameter.grad))
        divide_gradients(self._parameters(), self.training.loss_scale.value)
        largest = self.training.recipe.optimizer.clip
        norms: dict[str, Tensor] = {}
        for kind, optimizer in self.training.optimizers.items():
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            name = f"{kind}_grad_norm" if norms else "grad_norm"
            norms[name] = clip_gradients(parameters, largest)
        return norms

    def _apply(self, num_samples: int) -> None:
        for optimizer in self.training.optimizers.values():
            optimizer.step()
        if self.training.averages is not None:
            self.training.averages.update()
        self.training.loss_scale.count()
        self._count(num_samples)

    def _leave_out(self, values: dict[str, float], num_samples: int) -> dict[str, float]:
        """Returns what is finite of a step whose float16 gradients overflowed."""
        self._zero_gradients()
        self.training.loss_scale.shrink()
        self._count(num_samples)
        return {n: v for n, v in values.items() if math.isfinite(v)} | {"left_out": 1.0}

    def _count(self, num_samples: int) -> None:
        self.training.step += 1
        self.training.samples += num_samples

    def _search(
        self, batches: list[MicroBatch], generators: dict[str, Any], names: list[str]
    ) -> tuple[int, str]:
        """Returns where the first value of a step was not finite: how inexact that is, in words."""
        task = self.task
        networks = {"" if n == task.exported else n: m for n, m in task.networks.items()}
        gradient = last_bad_gradient(task.networks[task.exported])
        set_random_generators(generators, self.training.device)
        found = None
        with torch.no_grad():
            for batch in batches:
                probe = partial(task.probe, batch)
                # With FSDP2 all processes run all layers together.
                if found is None or any(map(is_sharded, task.networks.values())):
                    found = found or first_bad_layer(networks, probe)
        task.train_mode()
        if found is not None:
            return 0, f"layer {found}"
        for prefix, module in task.modules.items():
            for name, parameter in module.named_parameters():
                if not is_finite(local(parameter)):
                    return 1, f"the weight {prefix}.{name}"
        if gradient is not None:
            return 2, f"the gradient of {gradient}, while all layers were finite"
        return 3, f"{', '.join(names)}, while all layers were finite"


def _most_exact(found: list[tuple[int, str]]) -> str:
    """Returns the words of the process that knows best: the others may have got its gradients."""
    number, (_, where) = min(enumerate(found), key=lambda item: item[1][0])
    return where if len(found) == 1 else f"{where} (process {number})"


def _backward(factor: float, loss: Tensor) -> None:
    (loss * factor).backward()


def batch_size(data: Any) -> int:
    """Returns the number of samples of a collated batch: the length of its first tensor."""
    while not isinstance(data, Tensor):
        data = next(iter(data.values())) if isinstance(data, dict) else data[0]
    return data.shape[0]


def to_device(data: Any, device: torch.device) -> Any:
    """Returns a collated batch, tensors in nested dicts, lists and tuples, on `device`."""
    if isinstance(data, Tensor):
        return data.to(device, non_blocking=True)
    if isinstance(data, dict):
        return {key: to_device(value, device) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return type(data)(to_device(value, device) for value in data)
    return data


@torch.no_grad()
def _restore(remembered: list[tuple[Tensor, Tensor]]) -> None:
    for tensor, value in remembered:
        tensor.copy_(value)
