"""What a fusion unit must know of a child before it does the child's work itself."""

from __future__ import annotations

from torch import nn


def has_hooks(module: nn.Module) -> bool:
    """Returns whether calling `module` would also call hooks, which a fused path would not."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
