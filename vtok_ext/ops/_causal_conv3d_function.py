"""Raw ops of `causal_conv3d` and its autograd function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vtok_ext import _native
from vtok_ext.ops import _causal_conv3d_cpu as cpu
from vtok_ext.ops import _causal_conv3d_cuda as cuda
from vtok_ext.ops._causal_conv3d_geometry import Geometry
from vtok_ext.ops._library import OpFunction, once_differentiable, register

_LAYOUT = torch.channels_last_3d


def _frames_of(state: Tensor | None) -> int | None:
    return None if state is None else state.shape[2]


def _empty_outputs(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    residual: Tensor | None,
    other: Tensor | None,
    mix_factor: Tensor | None,
    geometry: Sequence[int],
    silu: bool,
    keep: bool,
    may_split: bool,
) -> tuple[Tensor, Tensor]:
    shape = Geometry(*geometry).output_shape(x.shape, weight.shape, _frames_of(state))
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_LAYOUT)
    return y, torch.empty_like(y) if keep else x.new_empty(0)


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    residual: Tensor | None,
    other: Tensor | None,
    mix_factor: Tensor | None,
    geometry: list[int],
    silu: bool,
    keep: bool,
    may_split: bool,
) -> tuple[Tensor, Tensor]:
    g = Geometry(*geometry)
    if _runs_kernels(x):
        return cuda.forward(
            *(x, weight, bias, state, residual, other, mix_factor),
            *(g, silu, keep, may_split),
        )
    return cpu.forward(x, weight, bias, state, residual, other, mix_factor, g, silu, keep)


def _empty_input_gradient(
    grad: Tensor,
    weight: Tensor,
    x_shape: Sequence[int],
    state_frames: int,
    geometry: Sequence[int],
) -> tuple[Tensor, Tensor]:
    grad_x = torch.empty(x_shape, dtype=grad.dtype, device=grad.device, memory_format=_LAYOUT)
    if state_frames < 0:
        return grad_x, grad.new_empty(0)
    shape = [*x_shape[:2], state_frames, *x_shape[3:]]
    return grad_x, torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=_LAYOUT)


def _input_gradient(
    grad: Tensor, weight: Tensor, x_shape: list[int], state_frames: int, geometry: list[int]
) -> tuple[Tensor, Tensor]:
    if grad.numel() == 0:
        empty = _empty_input_gradient(grad, weight, x_shape, state_frames, geometry)
        return empty[0].zero_(), empty[1].zero_()
    before = None if state_frames < 0 else state_frames
    run = cuda.input_gradient if _runs_kernels(grad) else cpu.input_gradient
    grad_x, grad_state = run(grad, weight, x_shape, before, Geometry(*geometry))
    return grad_x, grad.new_empty(0) if grad_state is None else grad_state


def _empty_weight_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    state: Tensor | None,
    has_bias: bool,
    geometry: Sequence[int],
) -> tuple[Tensor, Tensor]:
    grad_bias = grad.new_empty(weight.shape[0] if has_bias else 0)
    is_plain = weight.is_contiguous()
    memory_format = torch.contiguous_format if is_plain else torch.channels_last_3d
    return torch.empty_like(weight, memory_format=memory_format), grad_bias


def _weight_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    state: Tensor | None,
    has_bias: bool,
    geometry: list[int],
) -> tuple[Tensor, Tensor]:
    grad_weight, grad_bias = _empty_weight_gradient(grad, x, weight, state, has_bias, geometry)
    if grad.numel() == 0:
        return grad_weight.zero_(), grad_bias.zero_()
    g = Geometry(*geometry)
    if _runs_kernels(grad):
        cuda.weight_gradient(grad, x, grad_weight, state, grad_bias if has_bias else None, g)
        return grad_weight, grad_bias
    found, found_bias = cpu.weight_gradient(grad, x, weight, state, has_bias, g)
    if found.stride() != grad_weight.stride():
        found = grad_weight.copy_(found)
    return found, grad_bias if found_bias is None else found_bias


def _runs_kernels(x: Tensor) -> bool:
    """Whether this package's CUDA kernels run; the CPU has oneDNN."""
    return x.is_cuda or _native.is_cuda_emulated()


_causal_conv3d_forward = register(
    "causal_conv3d_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? state, "
    "Tensor? residual, Tensor? other, Tensor? mix_factor, int[] geometry, bool silu, bool keep, "
    "bool may_split) "
    "-> (Tensor, Tensor)",
    _forward,
    _empty_outputs,
)
_causal_conv3d_input_gradient = register(
    "causal_conv3d_input_gradient(Tensor grad, Tensor weight, SymInt[] x_shape, "
    "SymInt state_frames, int[] geometry) -> (Tensor, Tensor)",
    _input_gradient,
    _empty_input_gradient,
)
_causal_conv3d_weight_gradient = register(
    "causal_conv3d_weight_gradient(Tensor grad, Tensor x, Tensor weight, Tensor? state, "
    "bool has_bias, int[] geometry) -> (Tensor, Tensor)",
    _weight_gradient,
    _empty_weight_gradient,
)


class CausalConv3dFunction(OpFunction):
    """Saves the inputs, and only with an activation or a blend what came before these."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        state: Tensor | None,
        residual: Tensor | None,
        other: Tensor | None,
        mix_factor: Tensor | None,
        geometry: list[int],
        silu: bool,
        keep: bool,
        may_split: bool,
    ) -> tuple[Tensor, Tensor]:
        """y, and what came before activation and blend when it is kept."""
        return _causal_conv3d_forward(
            *(x, weight, bias, state, residual, other, mix_factor),
            *(geometry, silu, keep, may_split),
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Keeps what the backward pass reads."""
        x, weight, _, state, _, other, mix_factor, *_ = inputs
        ctx.geometry, ctx.silu, ctx.keep, _ = inputs[7:]
        ctx.x_shape = x.shape
        ctx.state_frames = -1 if state is None else state.shape[2]
        preactivation = output[1] if ctx.keep else None
        ctx.save_for_backward(x, weight, state, other, mix_factor, preactivation)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable("causal_conv3d")
    def backward(ctx: Any, grad_y: Tensor | None, grad_keep: None) -> tuple[Any, ...]:
        """Gradients of all seven tensors; those that nobody needs are not computed."""
        if grad_y is None:
            return (None,) * 11
        x, weight, state, other, mix_factor, preactivation = ctx.saved_tensors
        needs = ctx.needs_input_grad
        grad, grad_other, grad_mix = grad_y, None, None
        if other is not None:
            grad, grad_other, grad_mix = _blend_backward(
                grad_y, preactivation, other, mix_factor, ctx.silu, needs[5], needs[6]
            )
        if ctx.silu:
            grad = torch.ops.aten.silu_backward(grad, preactivation)
        grad_x = grad_state = grad_weight = grad_bias = None
        if needs[0] or needs[3]:
            grad_x, grad_state = _causal_conv3d_input_gradient(
                grad, weight, ctx.x_shape, ctx.state_frames, ctx.geometry
            )
        if needs[1]:
            grad_weight, grad_bias = _causal_conv3d_weight_gradient(
                grad, x, weight, state, needs[2], ctx.geometry
            )
        elif needs[2]:
            real = torch.promote_types(grad.dtype, torch.float32)
            grad_bias = grad.sum((0, 2, 3, 4), dtype=real).to(grad.dtype)
        found = (grad_x, grad_weight, grad_bias, grad_state, grad, grad_other, grad_mix)
        return (*(g if n else None for g, n in zip(found, needs, strict=False)), *(None,) * 4)


def _blend_backward(
    grad_y: Tensor,
    preactivation: Tensor,
    other: Tensor,
    mix_factor: Tensor,
    silu: bool,
    needs_other: bool,
    needs_mix: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of the convolution's branch, the other branch and mix_factor."""
    real = torch.promote_types(grad_y.dtype, torch.float32)
    mix = torch.sigmoid(mix_factor.to(real)).reshape(())
    wide = grad_y.to(real)
    grad_other = (wide * mix).to(other.dtype) if needs_other else None
    grad_mix = None
    if needs_mix:
        own = preactivation.to(real)
        own = own * torch.sigmoid(own) if silu else own
        total = (wide * (other.to(real) - own)).sum() * (mix * (1 - mix))
        grad_mix = total.reshape(mix_factor.shape).to(mix_factor.dtype)
    return (wide * (1 - mix)).to(grad_y.dtype), grad_other, grad_mix
