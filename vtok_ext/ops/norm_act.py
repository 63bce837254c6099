"""Normalisation of video tensors, optional SiLU and cast, in the buffer of the next convolution.

    n = (x - mean) / sqrt(variance + eps),  u = n * weight + bias,  y = u * sigmoid(u)

    "layer", "rms"          over the C values of one position (t, h, w)
    "group", "group_rms"    over C / num_groups channels and the H * W positions of one frame
    the rms kinds           subtract no mean and divide by the root of the mean square

Source: Ba et al. 2016 (layer); Zhang & Sennrich 2019 (rms); Wu & He 2018 (group); ProMAG
(arXiv 2501.05442) for groups without mean subtraction, whose removal of corner artefacts it shows.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vtok_ext import _native
from vtok_ext.ops._dtypes import FLOATING, autocast_dtype, check_floating
from vtok_ext.ops._library import OpFunction, once_differentiable
from vtok_ext.ops._norm_act_kernels import LAYOUT, NORMS, norm_act_backward, norm_act_forward

TEMPORAL_PADDINGS = ("zeros", "replicate")


def norm_act_reference(
    x: Tensor,  # [B, C, T, H, W]
    weight: Tensor | None = None,  # [C]
    bias: Tensor | None = None,  # [C]
    *,
    norm: str = "layer",
    num_groups: int = 32,
    act: bool = True,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
    front: int = 0,
    temporal: str = "zeros",
    state: Tensor | None = None,  # [B, C, front, H, W]
    border: tuple[int, int] = (0, 0),
) -> Tensor:
    """The definition of `norm_act` in plain PyTorch: arguments, result and errors as there."""
    _check_norm_act(x, weight, bias, norm, num_groups, eps, dtype, front, temporal, state, border)
    dtype = _result_dtype(x, dtype)
    h = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    groups = num_groups if norm.startswith("group") else 1
    over = (2, 4, 5) if norm.startswith("group") else (2,)
    h = h.unflatten(1, (groups, x.shape[1] // groups))  # [B, G, C / G, T, H, W]
    if not norm.endswith("rms"):
        h = h - h.mean(over, keepdim=True)
    h = h / (h.square().mean(over, keepdim=True) + eps).sqrt()
    h = h.flatten(1, 2)
    if weight is not None:
        h = h * weight.to(h.dtype).view(-1, 1, 1, 1)
    if bias is not None:
        h = h + bias.to(h.dtype).view(-1, 1, 1, 1)
    y = (h * torch.sigmoid(h) if act else h).to(dtype)
    y = _surround(y, front, temporal, state, border)
    return y.contiguous(memory_format=LAYOUT)


def _surround(
    y: Tensor, front: int, temporal: str, state: Tensor | None, border: tuple[int, int]
) -> Tensor:
    """`y` with frames in front, and zeros at the bottom and the right."""
    if state is not None:
        y = torch.cat([state.to(y.dtype), y], dim=2)
    elif temporal == "replicate":
        y = torch.cat([y[:, :, :1]] * front + [y], dim=2)
    else:
        y = _zero_pad(y, (0, 0, 0, 0, front, 0))
    return _zero_pad(y, (0, border[1], 0, border[0]))


def _zero_pad(y: Tensor, padding: tuple[int, ...]) -> Tensor:
    """`F.pad(y, padding)`, which torch 2.4 refuses where a side of no length gets none."""
    if y.numel() > 0:
        return F.pad(y, padding)
    shape = list(y.shape)
    for i, (before, after) in enumerate(zip(padding[::2], padding[1::2], strict=True)):
        shape[-1 - i] += before + after
    return y.new_zeros(shape) + y.sum()  # a sum of nothing, which keeps y in the graph


def _result_dtype(x: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """`dtype`, else that of autocast where it is on, else that of x."""
    if dtype is not None or x.dtype == torch.float64:
        return dtype or x.dtype
    return autocast_dtype(x.device.type) or x.dtype


def _check_x(x: Tensor, norm: str, num_groups: int) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"norm_act: x must be a torch.Tensor, got {type(x).__name__}")
    check_floating("norm_act", "x", x)
    if x.dim() != 5 or x.shape[1] == 0:
        raise ValueError(f"norm_act: x must be [B, C, T, H, W], C >= 1, got {list(x.shape)}")
    if norm not in NORMS:
        raise ValueError(f"norm_act: norm must be one of {NORMS}, got {norm!r}")
    if norm.startswith("group") and (num_groups < 1 or x.shape[1] % num_groups):
        raise ValueError(
            f"norm_act: num_groups must divide the {x.shape[1]} channels, got {num_groups}"
        )


def _check_vector(name: str, vector: Tensor | None, x: Tensor) -> None:
    if vector is None:
        return
    if not isinstance(vector, Tensor):
        raise TypeError(f"norm_act: {name} must be a torch.Tensor, got {type(vector).__name__}")
    if list(vector.shape) != [x.shape[1]]:
        raise ValueError(f"norm_act: {name} must be [{x.shape[1]}], got {list(vector.shape)}")
    if vector.dtype not in FLOATING or (x.is_cuda and vector.dtype == torch.float64):
        raise TypeError(f"norm_act: {name} must be a floating type, got {vector.dtype}")
    if vector.device != x.device:
        raise ValueError(f"norm_act: {name} must be on {x.device}, got {vector.device}")


def _check_buffer(
    x: Tensor, front: int, temporal: str, state: Tensor | None, border: tuple[int, int]
) -> None:
    if front < 0:
        raise ValueError(f"norm_act: front must be at least 0, got {front}")
    if temporal not in TEMPORAL_PADDINGS:
        raise ValueError(f"norm_act: temporal must be one of {TEMPORAL_PADDINGS}, got {temporal!r}")
    if len(border) != 2 or min(border) < 0:
        raise ValueError(f"norm_act: border must be (bottom, right) >= 0, got {tuple(border)}")
    batch, channels, frames, height, width = x.shape
    if state is None:
        if temporal == "replicate" and front > 0 and frames == 0:
            raise ValueError("norm_act: x must have a frame to replicate, got none")
        return
    if not isinstance(state, Tensor):
        raise TypeError(f"norm_act: state must be a torch.Tensor, got {type(state).__name__}")
    if list(state.shape) != [batch, channels, front, height, width]:
        raise ValueError(
            f"norm_act: state must be {[batch, channels, front, height, width]}, "
            f"got {list(state.shape)}"
        )
    if state.dtype not in FLOATING:
        raise TypeError(f"norm_act: state must be a floating type, got {state.dtype}")
    if state.device != x.device:
        raise ValueError(f"norm_act: state must be on {x.device}, got {state.device}")


def _check_norm_act(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    num_groups: int,
    eps: float,
    dtype: torch.dtype | None,
    front: int,
    temporal: str,
    state: Tensor | None,
    border: tuple[int, int],
) -> None:
    """Raises for bad arguments."""
    _check_x(x, norm, num_groups)
    _check_vector("weight", weight, x)
    _check_vector("bias", bias, x)
    _check_buffer(x, front, temporal, state, border)
    if eps < 0:
        raise ValueError(f"norm_act: eps must be at least 0, got {eps}")
    result = _result_dtype(x, dtype)
    if result not in FLOATING or (result == torch.float64) != (x.dtype == torch.float64):
        raise TypeError(
            "norm_act: dtype must be float32, float16 or bfloat16, or float64 for float64 x, "
            f"got {result} for {x.dtype}"
        )


def _needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


class NormActFunction(OpFunction):
    """Saves x, weight, bias and statistics; u and its sigmoid are recomputed.

    Statistics of a position are found again on a GPU, where the row is in registers anyway. On a
    CPU that would be a sixth of the backward pass.
    """

    @staticmethod
    def forward(  # named one by one: torch.compile takes no *options here
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        state: Tensor | None,
        norm: str,
        num_groups: int,
        act: bool,
        eps: float,
        dtype: torch.dtype,
        front: int,
        temporal: str,
        bottom: int,
        right: int,
        save_stats: bool,
    ) -> tuple[Tensor, Tensor]:
        """The buffer and the statistics."""
        return norm_act_forward(
            *(x, weight, bias, state, norm, num_groups, act, eps),
            *(dtype, front, temporal, bottom, right, save_stats),
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Keeps what the backward pass reads."""
        x, weight, bias, state, norm, num_groups, act, eps, _, front, temporal, *_ = inputs
        ctx.save_for_backward(x, weight, bias, output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.state_dtype = None if state is None else state.dtype
        replicate = temporal == "replicate" and state is None
        ctx.options = (norm, num_groups, act, eps, front, replicate)

    @staticmethod
    @once_differentiable("norm_act")
    def backward(ctx: Any, grad_y: Tensor | None, grad_stats: None) -> tuple[Any, ...]:
        """Gradients of x, weight, bias and state; those that nobody needs are not computed."""
        if grad_y is None:
            return (None,) * 14
        x, weight, bias, stats = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:3])
        grads: list[Tensor | None] = [None, None, None]
        if any(needs):
            found = norm_act_backward(grad_y, x, weight, bias, stats, *ctx.options, needs)
            grads = [g if needed else None for g, needed in zip(found, needs, strict=True)]
        grad_state = None
        if ctx.state_dtype is not None and ctx.needs_input_grad[3]:
            front, height, width = ctx.options[4], x.shape[3], x.shape[4]
            grad_state = grad_y[:, :, :front, :height, :width].to(ctx.state_dtype, copy=True)
        return (*grads, grad_state, *(None,) * 10)


def norm_act(
    x: Tensor,  # [B, C, T, H, W]
    weight: Tensor | None = None,  # [C]
    bias: Tensor | None = None,  # [C]
    *,
    norm: str = "layer",
    num_groups: int = 32,
    act: bool = True,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
    front: int = 0,
    temporal: str = "zeros",
    state: Tensor | None = None,  # [B, C, front, H, W]
    border: tuple[int, int] = (0, 0),
) -> Tensor:
    """Normalised, scaled and activated video, in one pass, inside the buffer a convolution needs.

    y = silu((x - mean) / sqrt(variance + eps) * weight + bias)
    Equivalent to (norm="layer"):
    `F.silu(F.layer_norm(x.movedim(1, -1), (C,), weight, bias, eps)).movedim(-1, 1)`, cast, padded.

    Args:
        x: floating, any values. Memory with channel stride 1 (channels_last_3d, or a slice of it)
            is read in place; any other layout is copied once.
        weight, bias: factor and summand per channel, of any floating dtype; 1 and 0 when absent.
        norm: "layer" or "rms": statistics over the C values of one position. "group" or
            "group_rms": over C / num_groups channels and all positions of one frame. The rms
            kinds subtract no mean and divide by the root of the mean square.
        num_groups: divides C; for the group kinds.
        act: whether x * sigmoid(x) follows.
        eps: >= 0, added to the variance or mean square.
        dtype: of the result; None for the dtype of autocast where it is on, else of x.
        front: number of frames put in front of the T frames.
        temporal: what these are without `state`: "zeros", or "replicate" for copies of the
            first result frame.
        state: the frames themselves: the last `front` frames of the buffer that the preceding chunk
            returned, without the border, as a copy (`buffer[:, :, -front:, :H, :W].clone()`).
        border: (bottom, right) numbers of zero rows and columns, as the stride-2 spatial
            convolution wants them.

    Returns:
        [B, C, front + T, H + bottom, W + right] in channels_last_3d memory, of `dtype`.

    Raises:
        ValueError: wrong rank, shapes, norm, num_groups, eps, front, temporal or border; nothing
            to replicate.
        TypeError: a tensor or `dtype` of an unsupported dtype.

    float32, float16 and bfloat16 on cpu and cuda, float64 on cpu; half types are computed in
    float32. Deterministic: sums run in a fixed order, on a CPU whatever the number of threads.
    Differentiable once, with respect to x, weight, bias and state.

    Source: Ba et al. 2016; Zhang & Sennrich 2019; Wu & He 2018; ProMAG (arXiv 2501.05442).
    """
    if not _native.is_enabled():
        return norm_act_reference(
            x,
            weight,
            bias,
            norm=norm,
            num_groups=num_groups,
            act=act,
            eps=eps,
            dtype=dtype,
            front=front,
            temporal=temporal,
            state=state,
            border=border,
        )
    _check_norm_act(x, weight, bias, norm, num_groups, eps, dtype, front, temporal, state, border)
    dtype = _result_dtype(x, dtype)
    save_stats = not x.is_cuda and _needs_gradient(x, weight, bias)
    return NormActFunction.apply(
        *(x, weight, bias, state, norm, num_groups, act, eps),
        *(dtype, front, temporal, *border, save_stats),
    )[0]
