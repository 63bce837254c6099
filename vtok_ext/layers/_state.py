"""Streaming state through a network: an argument of a pass and a result, never an attribute.

A layer with temporal context is called `y, state = layer(x, state, return_state=True)`. A single
layer's state is one tensor; a composite's is a flat dict of its children's states under dotted
names: the state of a whole network is `{"conv_in": tensor, "mid.block_1.conv2": tensor, ...}`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

State = Mapping[str, Tensor]


class StateFlow:
    """One pass through a composite: hands each child its previous state and collects the next one.

    Args:
        previous: flat state of the composite after the preceding chunk; None to start a clip.
        collect: whether the next state is wanted; without it a pass keeps nothing alive.
    """

    def __init__(self, previous: State | None, collect: bool) -> None:
        self.previous = previous
        self.following: dict[str, Tensor] | None = {} if collect else None

    @property
    def is_stream(self) -> bool:
        """Whether the pass continues another or is to be continued."""
        return self.previous is not None or self.following is not None

    def __call__(self, name: str, layer: Callable[..., Any], x: Tensor, **options: Any) -> Tensor:
        """Returns `layer(x, **options)` continued from the child's previous state."""
        if not self.is_stream:
            return layer(x, **options)  # a whole clip: the layer need not know of streams
        state = None if self.previous is None else _child_state(self.previous, name)
        if self.following is None:
            return layer(x, state, **options)
        y, new_state = layer(x, state, return_state=True, **options)
        if isinstance(new_state, Tensor):
            self.following[name] = new_state
        else:
            self.following.update({f"{name}.{key}": value for key, value in new_state.items()})
        return y

    def result(self, y: Tensor):
        """Returns `y`, or `(y, next state)` when the state was asked for."""
        return y if self.following is None else (y, self.following)


def _child_state(state: State, name: str) -> Tensor | dict[str, Tensor]:
    """Returns the entry called `name`, or the dict of entries below `name.`."""
    if name in state:
        return state[name]
    prefix = name + "."
    child = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
    if not child:
        raise ValueError(f"streaming state: must have an entry {name!r}, got {sorted(state)[:4]}")
    return child


def owned(frames: Tensor) -> Tensor:
    """Returns a copy of `frames` [B, C, T, H, W] that keeps no activation alive.

    Always channels_last_3d: a state that was saved and loaded then has the very strides of one that
    was not, hence takes the same convolution path and gives the same bits.
    """
    return frames.clone(memory_format=torch.channels_last_3d)
