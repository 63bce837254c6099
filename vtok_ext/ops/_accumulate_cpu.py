"""Convolution and norm_act that write into memory the caller owns, for passes without gradients.

    out += conv(x, weight) + bias        oneDNN's sum after a convolution
    buffer = norm_act(x)                 the op, without its allocation

Fresh activations are what a video network on a CPU spends most on beside arithmetic (2 us for each
4 KB page, measured: ten times the copy of as many bytes); a pass that owns all its memory touches
every page once. Neither function is an op: nothing here may be seen by autograd or torch.compile.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vtok_ext import _native
from vtok_ext.ops._causal_conv3d_folding import four_taps
from vtok_ext.ops._norm_act_kernels import NORMS

_LAYOUT = torch.channels_last_3d


def is_available(dtype: torch.dtype) -> bool:
    """Returns whether this torch has oneDNN's accumulating convolution for `dtype`."""
    if not _native.is_enabled() or _native.is_cuda_emulated():
        return False
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    if not hasattr(torch.ops.mkldnn, "_convolution_pointwise_"):
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def add_conv3d(
    out: Tensor,  # [1, O, T', H', W'], dense channels_last_3d, written
    x: Tensor,  # [1, C, T, H, W], dense channels_last_3d
    weight: Tensor,  # [O, C, kt, kh, kw]
    bias: Tensor | None,  # [O]
    stride: Sequence[int] = (1, 1, 1),
    padding: Sequence[int] = (0, 0, 0),
) -> None:
    """Adds the convolution of `x`, zero padded on both sides, to `out`."""
    written = torch.ops.mkldnn._convolution_pointwise_.binary(
        *(out, x, weight, bias, padding, stride, (1, 1, 1), 1),
        *("add", 1.0, None, [], None),
    )
    if written.data_ptr() != out.data_ptr():  # torch could not write into this layout
        out.copy_(written)


def norm_act_into(
    buffer: Tensor,  # [1, C, front + T, H, W], dense channels_last_3d, written
    x: Tensor,  # [1, C, T, H, W], dense channels_last_3d
    weight: Tensor | None,  # [C]
    bias: Tensor | None,  # [C]
    norm: str,
    act: bool,
    eps: float,
    front: int = 0,
    replicate: bool = False,
    state: Tensor | None = None,  # [1, C, front, H, W]
) -> None:
    """Writes what `norm_act` with the norms "layer" and "rms" returns."""
    if state is not None:
        state = state.to(buffer.dtype).contiguous(memory_format=_LAYOUT)
    _native.module().norm_act_forward(
        *(x, weight, bias, state, buffer, None, x.new_empty(0, dtype=torch.float32)),
        (NORMS.index(norm), 1, eps, act, front, replicate and state is None),
        _native.call_context(x),
    )


def transposed_weight(weight: Tensor) -> Tensor:
    """Returns [O, C, 1, 4, 4] of `weight` [O, C, 1, 3, 3].

    Nearest upsampling by 2 and a 3x3 convolution with padding 1 is the transposed convolution of
    stride 2 and padding 1 with the kernel [w2, w1 + w2, w0 + w1, w0] along each axis: 4 products
    per output instead of 9, and no copy to interleave the phases. Sums are rounded once.
    """
    return four_taps(weight, (3, 4)).contiguous()


def upsampled_conv3d(
    x: Tensor,  # [B, C, T, H, W] in channels_last_3d memory
    transposed: Tensor,  # [O, C, 1, 4, 4] of `transposed_weight`
    bias: Tensor | None,  # [O]
) -> Tensor:
    """Returns the 3x3 convolution [B, O, T, 2 H, 2 W] of `x` with every pixel repeated 2x2."""
    return torch.conv_transpose3d(x, transposed.transpose(0, 1), bias, (1, 2, 2), (0, 1, 1))
