"""A quantized value with the gradient of what it replaces: d value / d z = 1."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _StraightThrough(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def straight_through(z: Tensor, value: Tensor) -> Tensor:
    """Returns `value` itself, not z + (value - z), which rounds; its gradient goes to `z`."""
    return _StraightThrough.apply(z, value) if z.requires_grad else value
