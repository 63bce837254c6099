"""A linear layer whose float32 products on a CPU with AVX-512 are computed by oneDNN.

    y = x W^T + b;  dL/dx = g W,  dL/dW = g^T x,  dL/db = sum of g  for g = dL/dy

PyTorch gives float32 products to MKL, which uses no AVX-512 on processors of other makers than
Intel. One core of an AMD EPYC, 1024 x 384 by 384 x 1536: 112 GFLOP/s, and 252 by oneDNN; its
bfloat16 products already are oneDNN's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok_ext.ops._library import OpFunction

# Multiply-adds below which the 10 us that oneDNN takes to be called outweigh its speed: 12 tokens
# of width 384 gain, 12 of width 64 lose.
_LEAST_MULTIPLY_ADDS = 1 << 20
# Fake tensors and other subclasses are left to PyTorch.
_TENSORS = {Tensor, nn.Parameter}


class Linear(nn.Linear):
    """Returns x [..., K] W^T + b as nn.Linear; see the module."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns [..., N]."""
        return linear(x, self.weight, self.bias)


def linear(
    x: Tensor,  # [..., K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None = None,  # [N]
) -> Tensor:
    """Returns x weight^T + bias [..., N].

    Equivalent to: torch.nn.functional.linear(x, weight, bias), up to the order of sums
    Deterministic. Any dtype and device of that function; differentiable as often.
    """
    if not _is_for_onednn(x, weight, bias):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return LinearFunction.apply(x, weight, bias)
    return _product(x, weight, bias)


def _is_for_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    tensors = [x, weight] if bias is None else [x, weight, bias]
    return (
        not torch.compiler.is_compiling()
        and x.dim() > 1
        and all(type(t) in _TENSORS and t.dtype == torch.float32 and t.is_cpu for t in tensors)
        and x.numel() * weight.shape[0] >= _LEAST_MULTIPLY_ADDS
        and x.shape[-1] == weight.shape[-1]
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
        and not torch.is_autocast_enabled("cpu")
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._len_torch_dispatch_stack() == 0  # counters of products know PyTorch's
    )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = _dense(x.flatten(0, -2))
    result = torch.ops.mkldnn._linear_pointwise(rows, _dense(weight), bias, "none", [], "")
    return result.view(*x.shape[:-1], weight.shape[0])


def _dense(x: Tensor) -> Tensor:
    """Returns a matrix that is contiguous, or whose transpose is; oneDNN reads either in place."""
    return x if x.is_contiguous() or x.t().is_contiguous() else x.contiguous()


class LinearFunction(OpFunction):
    """Saves x and the weight, as PyTorch's; its gradient is made of the same products."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Returns [..., N]."""
        return _product(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keeps x and the weight."""
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradients that are needed."""
        x, weight = ctx.saved_tensors
        grad = grad_out.flatten(0, -2)
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            linear(grad, weight.t()).view_as(x) if needs_x else None,
            linear(grad.t(), x.flatten(0, -2).t()) if needs_weight else None,
            grad.sum(0) if needs_bias else None,
        )
