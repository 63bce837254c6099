"""A device that is not the CPU, for tests without one: tensors there refuse to meet the CPU's.

    inner       an ordinary tensor has the values
    Elsewhere   says that it is on `DEVICE`; an operation on it and on a tensor of the CPU raises

Numbers (tensors of no dimensions) and indices may come from the CPU, as with CUDA.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

# One that autograd runs without threads of its own and that torch needs no library for.
DEVICE = torch.device("lazy")
_COPIES = {torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default}
_INDEXING = {
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put_.default,
    torch.ops.aten.index_put.default,
}


class Elsewhere(Tensor):
    """A tensor on `DEVICE`."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Elsewhere:
        return Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __repr__(self, **options: Any) -> str:
        return f"Elsewhere({self.inner})"

    def tolist(self) -> Any:
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class OtherDevice(TorchDispatchMode):
    """Within it, new tensors on `DEVICE` can be made."""

    def __enter__(self) -> Any:
        # torch makes tensors of lists, for one, past modes, and moves them to their device: not
        # with this, which it has for fake tensors.
        self.before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *arguments: Any) -> None:
        torch._C._set_only_lift_cpu_tensors(self.before)
        super().__exit__(*arguments)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = [t for t in tensors if isinstance(t, Elsewhere)]
    # Without numbers: what torch.tensor([], device=...) makes in this mode stays on the CPU.
    here = [t for t in tensors if not isinstance(t, Elsewhere) and t.dim() and t.numel()]
    if func in _INDEXING and isinstance(args[0], Elsewhere):
        indices = {id(leaf) for leaf in tree_leaves(args[1])}
        here = [t for t in here if id(t) not in indices]
    if there and here and func not in _COPIES:
        shapes = [(list(t.shape), str(t.device)) for t in tensors]
        raise RuntimeError(f"{func}: tensors must be on one device, got {shapes}")
    wanted = kwargs.get("device")
    is_there = bool(there) if wanted is None else torch.device(wanted) == DEVICE
    if func is torch.ops.aten.copy_.default:
        is_there = isinstance(args[0], Elsewhere)
    if wanted is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    wrappers = {id(t.inner): t for t in there}

    def unwrapped(leaf: Any) -> Any:
        return leaf.inner if isinstance(leaf, Elsewhere) else leaf

    def wrapped(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) in wrappers:  # an operation in place
            return wrappers[id(leaf)]
        return Elsewhere(leaf) if is_there else leaf

    return tree_map(wrapped, func(*tree_map(unwrapped, args), **tree_map(unwrapped, kwargs)))


@torch.no_grad()
def moved(model: nn.Module) -> nn.Module:
    """Returns the model with all parameters and buffers on `DEVICE`."""
    return model._apply(Elsewhere)
