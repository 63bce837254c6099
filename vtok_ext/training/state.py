"""Everything that changes while training, as named tensors and a few numbers.

    model.decoder.conv_in.weight             weights and buffers of the task's modules
    averages.decoder.conv_in.weight          moving averages of the exported network
    optimizer.generator.model.decoder.conv_in.weight.exp_avg     state of an optimiser

With FSDP2 each tensor is the part that this process holds, of a whole that has the same name and
shape for any number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vtok_ext.training.ema import ExponentialMovingAverage
from vtok_ext.training.gradients import LossScale
from vtok_ext.training.parallel import reshard, whole
from vtok_ext.training.task import Task


class Training:
    """A task with its optimisers and moving averages, and how far it is.

    Args:
        task: what is trained; its `call` is set.
        calls: its networks as they must be called.

    Attributes:
        optimizers: by name, the main one first.
        loss_scale: of float16.
        averages: moving averages of the exported network's weights, None if not wanted.
        step: steps done.
        samples: samples seen in them by all processes.
    """

    def __init__(self, task: Task, calls: dict[str, Callable[..., Any]]) -> None:
        self.task, self.recipe, self.device = task, task.recipe, task.device
        task.call = calls
        self.optimizers = task.optimizers()
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["initial_lr"] = group["lr"]
        decay = self.recipe.optimizer.ema_decay
        exported = task.networks[task.exported]
        self.averages = None if decay is None else ExponentialMovingAverage(exported, decay)
        self.loss_scale = LossScale(self.recipe.run.precision == "float16")
        self.step = self.samples = 0

    def numbers(self) -> dict[str, Any]:
        """Returns what is not a tensor, as JSON can hold it."""
        return {
            "step": self.step,
            "samples": self.samples,
            "averages": self.averages.num_updates if self.averages else None,
            "loss_scale": self.loss_scale.state_dict(),
            "recipe": self.recipe.to_dict(),
            "facts": self.task.facts(),
        }

    def tensors(self) -> dict[str, Tensor]:
        """Returns all tensors by name; those of modules and averages are the living ones."""
        return self._own_tensors() | {
            f"{name}.{key}": value
            for name, _, state in self._optimizer_states()
            for key, value in state.items()
        }

    def _own_tensors(self) -> dict[str, Tensor]:
        found = {
            f"{prefix}.{name}": tensor
            for prefix, module in self.task.modules.items()
            for name, tensor in module.state_dict().items()
        }
        if self.averages is not None:
            found |= {f"averages.{name}": t for name, t in self.averages.averages.items()}
        return found

    def _optimizer_states(self) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
        """Yields (name of its tensors, parameter, state) for every trained parameter."""
        names = {
            parameter: f"{prefix}.{name}"
            for prefix, module in self.task.modules.items()
            for name, parameter in module.named_parameters()
        }
        for kind, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    state = optimizer.state[parameter] if parameter in optimizer.state else {}
                    yield f"optimizer.{kind}.{names[parameter]}", parameter, state

    def destinations(self, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        """Returns tensors to read a saved state into: living ones, and new ones of optimisers.

        Args:
            shapes: whole shape of each saved tensor by name.

        Raises:
            ValueError: the saved state is that of another model or of other losses.
        """
        own = self._own_tensors()
        theirs = {name: s for name, s in shapes.items() if not name.startswith("optimizer.")}
        for name in sorted(own.keys() | theirs.keys()):
            ours = own[name].shape if name in own else None
            if ours != theirs.get(name):
                raise _mismatch(f"{name} of {_words(theirs.get(name))} for {_words(ours)}")
        states = {}
        for stem, parameter, _ in self._optimizer_states():
            for name in shapes:
                if name.startswith(f"{stem}.") and "." not in name[len(stem) + 1 :]:
                    states[name] = _like(parameter, shapes[name])
        surplus = shapes.keys() - theirs.keys() - states.keys()
        if surplus:
            raise _mismatch(f"{min(surplus)}, which nothing here has")
        return own | states

    def adopt(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Takes over a state that was read into `destinations`."""
        for stem, parameter, _ in self._optimizer_states():
            state = {
                name[len(stem) + 1 :]: tensor
                for name, tensor in tensors.items()
                if name.startswith(f"{stem}.") and "." not in name[len(stem) + 1 :]
            }
            if state:
                optimizer = self.optimizers[stem.split(".")[1]]
                optimizer.state[parameter] = state
        self.step, self.samples = numbers["step"], numbers["samples"]
        self.loss_scale.load_state_dict(numbers["loss_scale"])
        if self.averages is not None:
            self.averages.num_updates = numbers["averages"]

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within it everything is in evaluation mode, with averaged weights if there are any."""
        exported = self.task.networks[self.task.exported]
        self.task.eval_mode()
        try:
            with torch.no_grad():
                if self.averages is None:
                    yield
                else:
                    with self.averages.applied():
                        reshard(exported)
                        yield
        finally:
            reshard(exported)
            self.task.train_mode()

    def exported_weights(self) -> dict[str, Tensor]:
        """Returns the whole state of the exported network on the CPU; all processes must ask."""
        with self.evaluating():
            state = self.task.networks[self.task.exported].state_dict()
            return {name: whole(tensor).to("cpu", copy=True) for name, tensor in state.items()}


def _like(parameter: Tensor, shape: torch.Size) -> Tensor:
    """Returns a new tensor for a state of an optimiser: as the parameter, or a CPU scalar."""
    if parameter.shape == shape:
        return torch.zeros_like(parameter)
    return torch.zeros(shape)  # Adam counts steps in float32 on the CPU


def _words(shape: torch.Size | None) -> str:
    return "nothing" if shape is None else str(list(shape))


def _mismatch(reason: str) -> ValueError:
    return ValueError(f"train: the checkpoint must be of the same model and losses, got {reason}")
