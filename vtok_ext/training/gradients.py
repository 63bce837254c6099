"""Gradients between the backward pass and the optimisers: norms, clipping, float16's loss scale."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, distributed, nn

from vtok_ext.training.parallel import is_part, local

# Note [Loss scale]
# Gradients below 6e-8 vanish in float16 and those above 65504 overflow. The loss is multiplied by
# a power of two that halves after an overflow, whose step is then left out, and doubles after so
# many steps without one. It begins at 1 and may fall below: VidTok's loss is a sum over the pixels
# of an image, which is large. With other precisions it stays 1.
_STEPS_TO_DOUBLE = 500
_SCALES = (2.0**-16, 2.0**24)


class LossScale:
    """The factor of the loss with float16; see Note [Loss scale].

    Args:
        active: whether it may change.
    """

    def __init__(self, active: bool) -> None:
        self.active, self.value, self.good_steps = active, 1.0, 0

    @property
    def can_shrink(self) -> bool:
        """Whether an overflow may be its fault."""
        return self.active and self.value > _SCALES[0]

    def shrink(self) -> None:
        """Halves it, after an overflow."""
        self.value, self.good_steps = self.value / 2, 0

    def count(self) -> None:
        """Counts a step without overflow, and doubles it after enough of them."""
        self.good_steps += 1
        if self.active and self.good_steps >= _STEPS_TO_DOUBLE:
            self.value, self.good_steps = min(self.value * 2, _SCALES[1]), 0

    def state_dict(self) -> dict[str, Any]:
        """Returns what a continued run needs."""
        return {"value": self.value, "good_steps": self.good_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over a state; another precision keeps its own."""
        if self.active:
            self.value, self.good_steps = state["value"], state["good_steps"]


@torch.no_grad()
def divide_gradients(parameters: Iterable[nn.Parameter], divisor: float) -> None:
    """Returns None after dividing all gradients, unless the divisor is 1."""
    gradients = [local(p.grad) for p in parameters if p.grad is not None]
    if divisor != 1 and gradients:
        torch._foreach_div_(gradients, divisor)


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], largest: float) -> Tensor:
    """Returns the norm of all gradients, which are then scaled to a norm of at most `largest`.

    A norm that is not finite leaves them as they are, so that their origin can be found. With FSDP2
    it is the norm of the whole gradients, of which each process has parts.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = _norm(gradients)
    scale = (largest / (norm + 1e-6)).clamp(max=1.0)
    factor = torch.where(torch.isfinite(norm), scale, 1.0)
    torch._foreach_mul_([local(gradient) for gradient in gradients], factor)
    return norm


def _norm(gradients: list[Tensor]) -> Tensor:
    if not any(map(is_part, gradients)):
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    squares = torch.zeros(2, device=gradients[0].device)  # of parts, of whole ones
    for gradient in gradients:
        squares[0 if is_part(gradient) else 1] += local(gradient).square().sum()
    distributed.all_reduce(squares[:1])
    return squares.sum().sqrt()
