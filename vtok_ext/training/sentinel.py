"""Finds where a loss stopped being a number."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vtok_ext.training.parallel import local


class NonFiniteLossError(ValueError):
    """A loss or gradient became NaN or infinite; the message says where first."""


def first_bad_layer(networks: Mapping[str, nn.Module], run: Callable[[], Any]) -> str | None:
    """Returns the name of the first layer that makes a NaN or infinity of finite input, or None.

    Args:
        networks: name -> network; a layer's name begins with that of its network, "" for none.
        run: calls the networks; an exception from it ends the search.
    """
    found: list[str] = []

    def hook(name: str) -> Callable[..., None]:
        def check(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and is_finite(inputs) and not is_finite(output):
                found.append(name)

        return check

    # Hooks of inner layers are called before those of what contains them: the innermost is found.
    layers = [
        (".".join(filter(None, (prefix, name))), module)
        for prefix, network in networks.items()
        for name, module in network.named_modules()
    ]
    handles = [module.register_forward_hook(hook(name)) for name, module in layers]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def last_bad_gradient(network: nn.Module) -> str | None:
    """Returns the last parameter, by order of definition, whose gradient is not finite, or None.

    The backward pass meets it first.
    """
    bad = [
        name
        for name, p in network.named_parameters()
        if not is_finite(None if p.grad is None else local(p.grad))
    ]
    return bad[-1] if bad else None


def is_finite(values: Any) -> bool:
    """Returns whether every floating tensor in nested lists, tuples and dicts is finite."""
    if isinstance(values, Tensor):
        return not values.is_floating_point() or bool(torch.isfinite(values).all())
    if isinstance(values, dict):
        return all(map(is_finite, values.values()))
    if isinstance(values, list | tuple):
        return all(map(is_finite, values))
    return True
