"""What a fusion unit must know of a child before it does the child's work itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn
from torch.nn.modules import module as torch_module

_SAME = "returns_the_same"
_Forward = TypeVar("_Forward", bound=Callable[..., Any])


def same_forward(module: nn.Module, forward: _Forward) -> _Forward:
    """Returns `forward`, which is to replace that of the instance `module`, marked as one that
    returns the same: a fused path need not call it. Unmarked where the instance has another."""
    if not _has_other_forward(module):
        setattr(forward, _SAME, True)
    return forward


def _has_other_forward(module: nn.Module) -> bool:
    forward = module.__dict__.get("forward")
    return forward is not None and not getattr(forward, _SAME, False)


def has_hooks(module: nn.Module) -> bool:
    """Returns whether calling `module` would also call hooks, its own or those of all modules, or a
    `forward` of the instance, which a fused path would not."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
        or _has_other_forward(module)
    )
