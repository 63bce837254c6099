"""Registers raw ops with torch.library, so that torch.compile sees them as single graph nodes.

Note [Raw ops]
A raw op allocates its outputs, calls the compiled module and knows nothing of autograd: it is
called inside an `autograd.Function`. Called directly with gradients enabled it would yield None
gradients in silence, so it raises instead. Ops are functional: none writes into its arguments.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch


class OpFunction(torch.autograd.Function):
    """Base of the ops' autograd functions: `forward` without a context, and `setup_context`."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Caches the signature that torch binds the arguments with at every call: 12 of 30 us
        measured."""
        super().__init_subclass__(**kwargs)
        cls.forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]


# torch.compile traces an autograd.Function with setup_context from torch 2.6 on.
FUNCTIONS_TRACE = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 6)


_LIBRARY = torch.library.Library("vtok_ext", "DEF")


def register(
    schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """Returns the callable op for `schema` ("name(Tensor x, ...) -> Tensor").

    Args:
        schema: in the language of torch.library, without namespace.
        implementation: runs on cpu and cuda tensors.
        fake: returns empty tensors with the shapes, dtypes and strides of the outputs.
    """
    name = schema.split("(", 1)[0]

    def checked(*args: Any) -> Any:
        if torch.is_grad_enabled():
            for argument in args:
                if isinstance(argument, torch.Tensor) and argument.requires_grad:
                    raise RuntimeError(
                        f"vtok_ext::{name} has no gradient: it must be called through the public "
                        "function, or under torch.no_grad()"
                    )
        return implementation(*args)

    _LIBRARY.define(schema)
    _LIBRARY.impl(name, checked, "CPU")
    _LIBRARY.impl(name, checked, "CUDA")
    torch.library.register_fake(f"vtok_ext::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.vtok_ext, name).default
