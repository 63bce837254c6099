"""Registers raw ops with torch.library, so that torch.compile sees them as single graph nodes.

Note [Raw ops]
A raw op allocates its outputs, calls the compiled module and knows nothing of autograd: it is
called inside an `autograd.Function`. Called directly with gradients enabled it would yield None
gradients in silence, so it raises instead. Ops are functional: none writes into its arguments.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class OpFunction(torch.autograd.Function):
    """Base of the ops' autograd functions: `forward` without a context, and `setup_context`."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Caches the signature that torch binds the arguments with at every call: 12 of 30 us
        measured."""
        super().__init_subclass__(**kwargs)
        cls.forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]


class _Refusal(torch.autograd.Function):
    """Passes gradients on, and refuses to be differentiated."""

    generate_vmap_rule = True

    @staticmethod
    def forward(op: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Returns the last `count` tensors; those before them decide whether gradients flow."""
        return tuple(t.view_as(t) for t in tensors[len(tensors) - count :])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keeps the op's name."""
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> None:
        """Raises."""
        raise RuntimeError(
            f"{ctx.op}: differentiable once; its gradients cannot be differentiated again"
        )


class _ReadOnce:
    """A context that reads its saved tensors once: a checkpoint gives them out only once."""

    def __init__(self, ctx: Any) -> None:
        self._ctx, self.saved_tensors = ctx, ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


# Note [Differentiable once]
# torch's own `once_differentiable` refuses a second differentiation only where the gradient that
# comes in requires one. That of a sum or a mean does not: second gradients were lost in silence.
# Here all results of a backward pass with create_graph=True require one, and depend on the gradient
# that came in and on what was saved. Transforms of torch.func always create a graph; in them, a
# tensor of our own must not require a gradient. torch.compile refuses by itself.
def once_differentiable(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates `backward` of an autograd function: differentiating its results raises.

    Args:
        op: public name, for the message.
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(backward)
        def run(ctx: Any, *grads: Any) -> Any:
            if not torch.is_grad_enabled() or torch.compiler.is_compiling():
                with torch.no_grad():
                    return backward(ctx, *grads)
            ctx = _ReadOnce(ctx)
            with torch.no_grad():
                found = backward(ctx, *grads)
            sources = [t for t in (*ctx.saved_tensors, *grads) if isinstance(t, Tensor)]
            if not torch._C._are_functorch_transforms_active():
                sources.append(torch.empty(0, requires_grad=True))
            return _refuse(op, sources, found)

        return run

    return decorate


def _refuse(op: str, sources: list[Tensor], found: Any) -> Any:
    """Returns `found`, a gradient or a tuple of gradients or None, each with a refusal."""
    gradients = list(found) if isinstance(found, tuple) else [found]
    places = [i for i, gradient in enumerate(gradients) if isinstance(gradient, Tensor)]
    refused = _Refusal.apply(op, len(places), *sources, *(gradients[i] for i in places))
    for i, gradient in zip(places, refused, strict=True):
        gradients[i] = gradient
    return tuple(gradients) if isinstance(found, tuple) else gradients[0]


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
