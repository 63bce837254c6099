"""Muon: momentum whose matrices are orthogonalised before they are applied.

    M = momentum of the gradient = U S V^T;  O = U V^T;  W -= lr * scale * O

O comes from a Newton-Schulz iteration. All directions of a weight matrix then move at one speed,
which makes short trainings of small networks several times faster than Adam. Source: K. Jordan et
al., "Muon: an optimizer for hidden layers in neural networks", 2024, including the iteration's
coefficients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

# One step maps a singular value s to a s + b s^3 + c s^5. These coefficients (Jordan et al.) raise
# small values fastest; after five steps all of them lie in about 0.7..1.2, which is close enough to
# 1.
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_NEWTON_SCHULZ_STEPS = 5


class Muon(torch.optim.Optimizer):
    """Optimises weights with at least two dimensions; [out, in, ...] is taken as [out, in * ...].

    Biases, norms and other vectors belong to another optimiser.

    Args:
        parameters: tensors or parameter groups.
        lr: length of a step relative to an orthogonal matrix, > 0.
        momentum: decay of the running mean of gradients, in [0, 1).

    Raises:
        ValueError: a vector among the parameters, or a setting out of range.
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter] | Iterable[dict],
        lr: float = 0.02,
        momentum: float = 0.95,
    ) -> None:
        if lr <= 0 or not 0 <= momentum < 1:
            raise ValueError(
                f"Muon: lr must be positive and momentum in [0, 1), got {lr} and {momentum}"
            )
        super().__init__(parameters, {"lr": lr, "momentum": momentum})
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.dim() < 2:
                    raise ValueError(
                        f"Muon: weights must have two dimensions or more, got {list(weight.shape)}"
                    )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Returns the closure's loss, if one is given, after updating every weight."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, weight.grad, group["lr"], group["momentum"])
        return loss

    def _update(
        self, weight: torch.Tensor, gradient: torch.Tensor, lr: float, momentum: float
    ) -> None:
        state = self.state[weight]
        if not state:
            state["momentum"] = torch.zeros_like(weight)
        mean = state["momentum"].lerp_(gradient, 1 - momentum)
        # Nesterov: look one momentum step ahead of the running mean.
        ahead = gradient.lerp(mean, momentum)
        matrix = orthogonalize(ahead.reshape(weight.shape[0], -1))
        rows, columns = matrix.shape
        # Keeps the size of the output's change independent of the matrix's shape.
        scale = max(1.0, rows / columns) ** 0.5
        weight.add_(matrix.view_as(weight), alpha=-lr * scale)


def orthogonalize(
    matrix: torch.Tensor,  # [N, M]
) -> torch.Tensor:
    """Returns U V^T of matrix = U S V^T, approximately: singular values in about 0.7..1.2.

    Args:
        matrix: [N, M], floating; zeros give zeros.
    """
    a, b, c = _NEWTON_SCHULZ
    wide = matrix.shape[0] <= matrix.shape[1]
    x = matrix if wide else matrix.T
    x = x / (x.norm() + 1e-7)  # the iteration needs singular values of at most 1
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.T
