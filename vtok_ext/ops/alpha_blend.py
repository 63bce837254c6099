"""AlphaBlender: a convex combination of two tensors, its factor learned or fixed.

    out = alpha * a + (1 - alpha) * b,  alpha = sigmoid(mix_factor), or mix_factor itself

Source: Blattmann et al. 2023, "Stable Video Diffusion" (the blend and its three strategies);
VidTok (arXiv 2412.13061), section 3.2, where a is the branch without parameters.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vtok_ext import _native
from vtok_ext.ops._dtypes import check_floating
from vtok_ext.ops._library import OpFunction, once_differentiable, register

STRATEGIES = ("learned", "fixed", "learned_with_images")
MAX_DIMS = 6
# Partial sums per factor at most, and elements per partial sum: as in csrc/alpha_blend.
_MAX_BLOCKS, _BLOCK_ELEMENTS = 1024, 16384


def alpha_blend_reference(
    a: Tensor,  # [...]
    b: Tensor,  # [...], as a
    mix_factor: Tensor,  # [1], or a shape that broadcasts to a
    *,
    strategy: str = "learned",
    image_only: Tensor | None = None,  # [B, T] bool
) -> Tensor:
    """The blend in plain PyTorch, the definition of `alpha_blend`: arguments and errors as
    there."""
    a, factor = _check_alpha_blend(a, b, mix_factor, strategy, image_only)
    alpha = factor if strategy == "fixed" else torch.sigmoid(factor)
    return (alpha * a.to(factor.dtype) + (1 - alpha) * b.to(factor.dtype)).to(b.dtype)


def _check_alpha_blend(
    a: Tensor, b: Tensor, mix_factor: Tensor, strategy: str, image_only: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Raises for bad arguments; returns `a` in the dtype of `b`, and the factor in the dtype of
    the arithmetic, infinite (alpha = 1) at the frames of images."""
    for name, tensor in (("a", a), ("b", b), ("mix_factor", mix_factor)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"alpha_blend: {name} must be a torch.Tensor, got {type(tensor)}")
        if name != "mix_factor" or tensor.dtype != torch.float64:  # a factor is converted below
            check_floating("alpha_blend", name, tensor)
        if tensor.device != a.device:
            raise ValueError(f"alpha_blend: {name} must be on {a.device}, got {tensor.device}")
    if a.shape != b.shape or a.dim() > MAX_DIMS:
        raise ValueError(
            f"alpha_blend: a and b must have one shape of at most {MAX_DIMS} dimensions, "
            f"got {list(a.shape)} and {list(b.shape)}"
        )
    factor = mix_factor.to(b.dtype if b.dtype == torch.float64 else torch.float32)
    if strategy not in STRATEGIES:
        raise ValueError(f"alpha_blend: strategy must be one of {STRATEGIES}, got {strategy!r}")
    if (strategy == "learned_with_images") != (image_only is not None):
        raise ValueError(
            "alpha_blend: image_only must be given with strategy 'learned_with_images' and only "
            f"then, got strategy {strategy!r} and image_only {image_only}"
        )
    if image_only is not None:
        factor = _without_images(a, factor, image_only)
    # A factor of one element serves every rank; broadcasting must not enlarge the result.
    if factor.numel() == 1:
        factor = factor.reshape(())
    sizes = zip(factor.shape[::-1], a.shape[::-1], strict=False)
    if factor.dim() > a.dim() or any(f not in (1, size) for f, size in sizes):
        raise ValueError(
            f"alpha_blend: mix_factor must broadcast to a {list(a.shape)}, "
            f"got {list(mix_factor.shape)}"
        )
    return a.to(b.dtype), factor


def _without_images(a: Tensor, factor: Tensor, image_only: Tensor) -> Tensor:
    """Returns the factor per frame, infinite where `image_only`: alpha is exactly 1 there, and the
    factor gets no gradient."""
    if (
        a.dim() < 3
        or image_only.shape != (a.shape[0], a.shape[2])
        or image_only.is_floating_point()
    ):
        expected = f"[{a.shape[0]}, {a.shape[2]}] bool" if a.dim() >= 3 else "for a of rank >= 3"
        raise ValueError(
            f"alpha_blend: image_only must be {expected}, "
            f"got {list(image_only.shape)} {image_only.dtype}"
        )
    frames = image_only.to(device=a.device, dtype=torch.bool)
    return torch.where(
        frames.view(a.shape[0], 1, a.shape[2], *([1] * (a.dim() - 3))), torch.inf, factor
    )


def _forward(a: Tensor, b: Tensor, factor: Tensor, is_logit: bool) -> Tensor:
    out = torch.empty_like(b)
    _native.module().alpha_blend_forward(a, b, factor, out, is_logit, _native.call_context(a))
    return out


def _num_partials(factor: Tensor, numel: int) -> int:
    """Size of the workspace: at most one partial sum per element, block and factor."""
    per_factor = max(1, numel // factor.numel())
    blocks = -(-numel // _BLOCK_ELEMENTS)
    return factor.numel() * max(1, min(_MAX_BLOCKS, per_factor, blocks))


def _empty_gradients(
    grad_out: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    factor: Tensor,
    is_logit: bool,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised gradients; one that nobody needs has no elements."""
    absent = grad_out.new_empty(0)
    grad_a = torch.empty_like(grad_out if a is None else a) if needed[0] else absent
    grad_b = torch.empty_like(grad_out if b is None else b) if needed[1] else absent.clone()
    shape = factor.shape if needed[2] else (0,)
    return grad_a, grad_b, factor.new_empty(shape)


def _backward(
    grad_out: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    factor: Tensor,
    is_logit: bool,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = _empty_gradients(grad_out, a, b, factor, is_logit, needed)
    if grad_out.numel() == 0:
        return gradients[0], gradients[1], gradients[2].zero_()
    outputs = [g if need else None for g, need in zip(gradients, needed, strict=True)]
    partials = None
    if needed[2]:
        partials = factor.new_empty(_num_partials(factor, grad_out.numel()))
    else:
        a = b = None
    _native.module().alpha_blend_backward(
        grad_out,
        a,
        b,
        factor.contiguous(),
        *outputs,
        partials,
        is_logit,
        _native.call_context(grad_out),
    )
    return gradients


_alpha_blend_forward = register(
    "alpha_blend_forward(Tensor a, Tensor b, Tensor factor, bool is_logit) -> Tensor",
    _forward,
    lambda a, b, factor, is_logit: torch.empty_like(b),
)
_alpha_blend_backward = register(
    "alpha_blend_backward(Tensor grad_out, Tensor? a, Tensor? b, Tensor factor, bool is_logit, "
    "bool[] needed) -> (Tensor, Tensor, Tensor)",
    _backward,
    _empty_gradients,
)


class AlphaBlendFunction(OpFunction):
    """Saves a and b only where the factor is learned: their own gradients need the factor alone."""

    @staticmethod
    def forward(a: Tensor, b: Tensor, factor: Tensor, is_logit: bool) -> Tensor:
        """The blend of `a` and `b`."""
        return _alpha_blend_forward(a, b, factor, is_logit)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keeps the factor, and a and b for its gradient."""
        a, b, factor, ctx.is_logit = inputs
        ctx.learns_factor = ctx.needs_input_grad[2]
        if ctx.learns_factor:
            ctx.save_for_backward(factor, a, b)
        else:
            ctx.save_for_backward(factor)

    @staticmethod
    @once_differentiable("alpha_blend")
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
        """alpha * g, (1 - alpha) * g, and the sum of slope * g * (a - b) over a factor's reach."""
        factor, a, b = ctx.saved_tensors if ctx.learns_factor else (*ctx.saved_tensors, None, None)
        needed = list(ctx.needs_input_grad[:3])
        gradients = _alpha_blend_backward(grad_out, a, b, factor, ctx.is_logit, needed)
        return *(g if need else None for g, need in zip(gradients, needed, strict=True)), None

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        a: Tensor,
        b: Tensor,
        factor: Tensor,
        is_logit: bool,
    ) -> Any:
        """A batch dimension is one more outer dimension."""
        a, b = (
            t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
            for t, dim in zip((a, b), in_dims[:2], strict=True)
        )
        if in_dims[2] is not None:
            factor = factor.movedim(in_dims[2], 0)
            inner = [1] * (a.dim() - factor.dim())
            factor = factor.reshape(info.batch_size, *inner, *factor.shape[1:])
        return AlphaBlendFunction.apply(a, b, factor, is_logit), 0


def alpha_blend(
    a: Tensor,  # [...]
    b: Tensor,  # [...], as a
    mix_factor: Tensor,  # [1], or a shape that broadcasts to a
    *,
    strategy: str = "learned",
    image_only: Tensor | None = None,  # [B, T] bool
) -> Tensor:
    """The blend of two tensors in one pass, in the dtype of `b`.

    out = alpha * a + (1 - alpha) * b
    Equivalent to: alpha_blend_reference(a, b, mix_factor, strategy=strategy, image_only=image_only)

    Args:
        a, b: equal shapes of up to 6 dimensions, any strides; `a` is converted to the dtype of `b`.
        mix_factor: one element, [C, 1, 1, 1] per channel, [T, 1, 1] per frame of [B, C, T, H, W],
            or any shape that broadcasts to a. Any floating dtype: it never promotes half tensors.
        strategy: "learned": alpha = sigmoid(mix_factor). "fixed": alpha = mix_factor.
            "learned_with_images": as learned, but alpha = 1 at the frames of images.
        image_only: True at frames [B, T] of a [B, C, T, ...] that belong to images and have no
            temporal context; with "learned_with_images" only.

    Returns:
        out: shape, dtype and memory format of b.

    Raises:
        ValueError: shapes, devices, strategy or image_only that do not fit together.
        TypeError: a, b or mix_factor of an unsupported dtype.

    float32, float16 and bfloat16 on cpu and cuda, float64 on cpu; half types are computed in
    float32 and rounded once. Deterministic: the factor's gradient is summed in a fixed order,
    whatever the number of threads. Differentiable once in a, b and mix_factor; supports vmap.
    Autocast leaves the dtypes alone.

    Source: Blattmann et al. 2023, "Stable Video Diffusion"; VidTok (arXiv 2412.13061), section 3.2.
    """
    if not _native.is_enabled():
        return alpha_blend_reference(a, b, mix_factor, strategy=strategy, image_only=image_only)
    a, factor = _check_alpha_blend(a, b, mix_factor, strategy, image_only)
    return AlphaBlendFunction.apply(a, b, factor, strategy != "fixed")
