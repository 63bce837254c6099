"""Moving averages of a model's weights.

    decay_n = min(decay, (1 + n) / (10 + n)),  average <- average + (1 - decay_n) (weight - average)

n counts updates from 1: the first averages forget the random start quickly. Source: VidTok
(specification section 8), whose warm-up of the decay is that of TensorFlow's
ExponentialMovingAverage.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class ExponentialMovingAverage:
    """Keeps the moving average of every trainable parameter of `model`, in the same dtype.

    Buffers are not averaged: within `applied` the model has its own.

    Args:
        model: its parameters that require gradients are followed.
        decay: largest decay per update, in [0, 1).

    Raises:
        ValueError: decay out of range.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ExponentialMovingAverage: decay must be in [0, 1), got {decay}")
        self.decay, self.num_updates = decay, 0
        self._parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.averages = {name: p.detach().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Returns None after one step towards the present weights."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        for name, parameter in self._parameters.items():
            self.averages[name].lerp_(parameter.detach(), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it the model has the averages for weights; afterwards its own again."""
        own = {name: p.detach().clone() for name, p in self._parameters.items()}
        self._write(self.averages)
        try:
            yield
        finally:
            self._write(own)

    @torch.no_grad()
    def _write(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(weights[name])

    def state_dict(self) -> dict[str, Any]:
        """Returns {"num_updates": int, "averages": {parameter name: tensor}}."""
        return {"num_updates": self.num_updates, "averages": dict(self.averages)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Returns None after taking over a state; raises ValueError for that of another model."""
        averages = state["averages"]
        shapes = {name: average.shape for name, average in averages.items()}
        if shapes != {name: average.shape for name, average in self.averages.items()}:
            raise ValueError(
                f"ExponentialMovingAverage: averages must be those of the same model, got "
                f"{len(shapes)} tensors for {len(self.averages)} or other names or shapes"
            )
        self.num_updates = int(state["num_updates"])
        with torch.no_grad():
            for name, average in self.averages.items():
                average.copy_(averages[name])
