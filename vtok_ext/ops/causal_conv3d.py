"""Convolution of video [B, C, T, H, W] that looks at the current and earlier frames only.

    p[t, h, w] = bias + sum over k, i, j of weight[k, i, j] . u[st t + dt k - front, ...]
    y = a * blend + (1 - a) * silu(p + residual),  a = sigmoid(mix_factor)

u is x, or x with frames or pixels repeated; before the first frame it continues with zeros, copies
of the first frame, or the state of a stream. Every part of the second line is optional.
Source: VidTok (arXiv 2412.13061), section 3.2; ProMAG (arXiv 2501.05442) for two front frames at
stride 2; MAGVIT-v2 (arXiv 2310.05737) for causal 3-D convolutions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vtok_ext import _native
from vtok_ext.ops._causal_conv3d_function import CausalConv3dFunction
from vtok_ext.ops._causal_conv3d_geometry import Geometry, SpatialPadding, make_geometry
from vtok_ext.ops._dtypes import FLOATING, autocast_dtype, check_floating
from vtok_ext.ops._library import FUNCTIONS_TRACE

ACTIVATIONS = (None, "silu")
Blend = tuple[Tensor, Tensor]


def causal_conv3d_reference(
    x: Tensor,  # [B, C, T, H, W]
    weight: Tensor,  # [O, C / groups, kt, kh, kw]
    bias: Tensor | None = None,  # [O]
    *,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    temporal: str = "zeros",
    front: int | None = None,
    spatial_padding: SpatialPadding = "same",
    state: Tensor | None = None,  # [B, C, n, H, W]
    return_state: bool = False,
    upsample: str | None = None,
    residual: Tensor | None = None,  # [B, O, T', H', W']
    blend: Blend | None = None,  # [B, O, T', H', W'], [1]
    activation: str | None = None,
) -> Any:
    """The definition of `causal_conv3d` in plain PyTorch: arguments, result and errors as there."""
    _check_are_tensors(blend, x=x, weight=weight, bias=bias, state=state, residual=residual)
    _check_weight(weight)
    x, weight, bias, state, residual, blend = _cast(x, weight, bias, state, residual, blend)
    g = make_geometry(
        weight.shape[2:], stride, dilation, groups, temporal, front, spatial_padding, upsample
    )
    state = _check_causal_conv3d(
        x, weight, bias, g, temporal, state, return_state, residual, blend, activation
    )
    real = torch.promote_types(x.dtype, torch.float32)
    frames = x if g.repeat_time == 1 else x.repeat_interleave(g.repeat_time, 2)
    if state is not None:
        frames = torch.cat([state, frames], 2)
    elif g.replicate and g.front > 0:
        frames = torch.cat([frames[:, :, :1]] * g.front + [frames], 2)
    elif g.front > 0:
        frames = F.pad(frames, (0, 0, 0, 0, g.front, 0))
    outputs = g.num_frames(weight.shape[2:], x.shape[2], None if state is None else state.shape[2])
    h = frames.to(real)
    if g.repeat_space > 1:
        h = h.repeat_interleave(g.repeat_space, 3).repeat_interleave(g.repeat_space, 4)
    # A clip shorter than a window is made as long, so that it too has gradients (zeros).
    missing = max(0, g.reach(weight.shape[2:])[0] - h.shape[2] - g.back)
    h = F.pad(h, (g.left, g.right, g.top, g.bottom, 0, g.back + missing))
    real_bias = None if bias is None else bias.to(real)
    h = F.conv3d(h, weight.to(real), real_bias, g.stride, 0, g.dilation, groups)[:, :, :outputs]
    if residual is not None:
        h = h + residual
    if activation == "silu":
        h = h * torch.sigmoid(h)
    if blend is not None:
        h = torch.lerp(h, blend[0].to(real), torch.sigmoid(blend[1].to(real)))
    y = h.to(x.dtype).contiguous(memory_format=torch.channels_last_3d)
    if not return_state:
        return y
    if state is None and x.shape[2] == 0:
        return y, x.new_empty([*x.shape[:2], 0, 0, 0])
    return y, frames[:, :, outputs * g.stride_t :].clone(memory_format=torch.channels_last_3d)


def _cast(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    residual: Tensor | None,
    blend: Blend | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Blend | None]:
    """The tensors in the dtype of autocast where that is on; a floating state in that of x."""
    dtype = autocast_dtype(x.device.type)
    if dtype is not None and x.is_floating_point() and x.dtype != torch.float64:
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        residual = None if residual is None else residual.to(dtype)
        blend = None if blend is None else (blend[0].to(dtype), blend[1])
    if state is not None and state.is_floating_point():
        state = state.to(x.dtype)
    return x, weight, bias, state, residual, blend


def _check_are_tensors(blend: Blend | None, **tensors: Tensor | None) -> None:
    """Raises TypeError for what is no tensor; x and weight must be there."""
    if blend is not None:
        if not isinstance(blend, tuple | list) or len(blend) != 2:
            raise TypeError(
                f"causal_conv3d: blend must be (tensor, mix_factor), got {type(blend).__name__}"
            )
        tensors |= {"blend[0]": blend[0], "mix_factor": blend[1]}
    for name, tensor in tensors.items():
        is_optional = name in ("bias", "state", "residual")
        if not isinstance(tensor, Tensor) and not (is_optional and tensor is None):
            raise TypeError(
                f"causal_conv3d: {name} must be a torch.Tensor, got {type(tensor).__name__}"
            )


def _check_weight(weight: Tensor) -> None:
    if weight.dim() != 5 or 0 in weight.shape:
        raise ValueError(
            f"causal_conv3d: weight must be [O, C / groups, kt, kh, kw], got {list(weight.shape)}"
        )


def _check_causal_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    g: Geometry,
    temporal: str,
    state: Tensor | None,
    return_state: bool,
    residual: Tensor | None,
    blend: Blend | None,
    activation: str | None,
) -> Tensor | None:
    """Raises for bad arguments; returns the state, None where the stream has not started."""
    _check_tensors(x, weight, bias, g)
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"causal_conv3d: activation must be one of {ACTIVATIONS}, got {activation!r}"
        )
    state = check_stream(x, weight.shape[2:], g, temporal, state, return_state)
    shape = g.output_shape(x.shape, weight.shape, None if state is None else state.shape[2])
    if x.shape[3] and x.shape[4] and (shape[3] == 0 or shape[4] == 0):
        raise ValueError(
            f"causal_conv3d: x must be as large as the kernel {list(weight.shape[3:])} after "
            f"padding, got {list(x.shape)}"
        )
    if residual is not None:
        _check_like_output("residual", residual, shape, x)
    if blend is not None:
        _check_like_output("blend", blend[0], shape, x)
        mix_factor = blend[1]
        if mix_factor.numel() != 1 or mix_factor.dtype not in FLOATING:
            raise ValueError(
                "causal_conv3d: mix_factor must be one floating element, "
                f"got {list(mix_factor.shape)} {mix_factor.dtype}"
            )
        _check_device("mix_factor", mix_factor, x)
    return state


def _check_tensors(x: Tensor, weight: Tensor, bias: Tensor | None, g: Geometry) -> None:
    check_floating("causal_conv3d", "x", x)
    if x.dim() != 5 or x.shape[1] == 0:
        raise ValueError(f"causal_conv3d: x must be [B, C, T, H, W], C >= 1, got {list(x.shape)}")
    if x.shape[1] % g.groups or weight.shape[0] % g.groups:
        raise ValueError(
            f"causal_conv3d: groups must divide the channels of x and weight, got {g.groups} for "
            f"{list(x.shape)} and {list(weight.shape)}"
        )
    if weight.shape[1] != x.shape[1] // g.groups:
        raise ValueError(
            f"causal_conv3d: weight must be [O, {x.shape[1] // g.groups}, kt, kh, kw] for x "
            f"{list(x.shape)} and {g.groups} groups, got {list(weight.shape)}"
        )
    if bias is not None and list(bias.shape) != [weight.shape[0]]:
        raise ValueError(f"causal_conv3d: bias must be [{weight.shape[0]}], got {list(bias.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            _check_kind(name, tensor, x)


def _check_kind(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.dtype != x.dtype:
        raise TypeError(f"causal_conv3d: {name} must be {x.dtype} as x, got {tensor.dtype}")
    _check_device(name, tensor, x)


def _check_device(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.device != x.device:
        raise ValueError(f"causal_conv3d: {name} must be on {x.device}, got {tensor.device}")


def _check_like_output(name: str, tensor: Tensor, shape: list[int], x: Tensor) -> None:
    if list(tensor.shape) != shape:
        raise ValueError(
            f"causal_conv3d: {name} must have the output's shape {shape}, got {list(tensor.shape)}"
        )
    _check_kind(name, tensor, x)


def check_stream(
    x: Tensor,
    kernel: Sequence[int],
    g: Geometry,
    temporal: str,
    state: Tensor | None,
    return_state: bool,
) -> Tensor | None:
    """Raises for a bad state; returns it, None where the stream has not started."""
    if state is None and not return_state:
        return None
    if temporal == "same" or (temporal == "valid" and state is not None):
        raise ValueError(
            f'causal_conv3d: state must be None with temporal="{temporal}": a centred convolution '
            "needs whole clips, and a buffer that holds its front frames holds the state"
        )
    if temporal == "valid" and g.repeat_time > 1:
        raise ValueError(
            'causal_conv3d: return_state must be False with temporal="valid" and upsample="time": '
            "the state holds repeated frames, which a buffer would have repeated again"
        )
    if g.stride_t > g.reach(kernel)[0]:
        raise ValueError(
            f"causal_conv3d: stride in time must be at most {g.reach(kernel)[0]} for a stream, "
            f"got {g.stride_t}"
        )
    if state is None:
        return None
    if not state.is_floating_point():
        raise TypeError(f"causal_conv3d: state must be {x.dtype} as x, got {state.dtype}")
    batch, channels, _, height, width = x.shape
    # Without an extent the state of a stream that has seen no frame, see Note [Streams].
    if list(state.shape) == [batch, channels, 0, 0, 0]:
        return None
    fewest, most = g.state_range(kernel)
    fewest = min(fewest, g.front)
    if (
        state.dim() != 5
        or [*state.shape[:2], *state.shape[3:]] != [batch, channels, height, width]
        or not fewest <= state.shape[2] <= most
    ):
        frames = most if fewest == most else f"{fewest}..{most}"
        raise ValueError(
            f"causal_conv3d: state must be [{batch}, {channels}, {frames}, {height}, {width}], "
            f"got {list(state.shape)}"
        )
    _check_device("state", state, x)
    return state


# Note [Streams]
# The state holds the frames, front padding included, that windows not yet computed will see: after
# upsampling in time, before upsampling in space. Its length varies with the phase of the stride.
# Whether a stream has started shows in its shape: only a state that has seen no frame yet is
# [B, C, 0, 0, 0]; front frames ("replicate" has none to copy before the first frame) are written
# when the first frame arrives.
def next_state(
    x: Tensor,  # [B, C, T, H, W]
    state: Tensor | None,  # [B, C, n, H, W]
    g: Geometry,
    kernel: Sequence[int],
) -> Tensor:
    """Returns the last frames of the padded clip, an owned tensor in channels_last_3d memory."""
    num_frames = x.shape[2]
    if state is None and num_frames == 0:
        return x.new_empty([*x.shape[:2], 0, 0, 0])
    length = g.state_frames(kernel, num_frames, None if state is None else state.shape[2])
    taken = min(num_frames, -(-length // g.repeat_time))
    last = x[:, :, num_frames - taken :]
    if g.repeat_time > 1:
        last = last.repeat_interleave(g.repeat_time, 2)[:, :, max(0, taken * 2 - length) :]
    missing = length - last.shape[2]
    if missing > 0:
        if state is not None:
            before = state[:, :, state.shape[2] - missing :]
        elif g.replicate:
            before = x[:, :, :1].expand(-1, -1, missing, -1, -1)
        else:
            before = x.new_zeros([*x.shape[:2], missing, *x.shape[3:]])
        last = torch.cat([before, last], 2)
        return last.contiguous(memory_format=torch.channels_last_3d)
    return last.clone(memory_format=torch.channels_last_3d)


def _runs_natively(x: Tensor) -> bool:
    """Whether this package has a path for x; the reference runs on other devices."""
    if not _native.is_enabled() or (torch.compiler.is_compiling() and not FUNCTIONS_TRACE):
        return False
    return not isinstance(x, Tensor) or x.device.type in ("cpu", "cuda", "meta")


def _keeps_preactivation(tensors: Sequence[Tensor | None], silu: bool) -> bool:
    """Whether the backward pass reads what came before activation and blend.

    Args:
        tensors: those of `CausalConv3dFunction`, mix_factor last.
    """
    if not torch.is_grad_enabled():
        return False
    needs = [t is not None and t.requires_grad for t in tensors]
    return any(needs) if silu else needs[-1]


def causal_conv3d(
    x: Tensor,  # [B, C, T, H, W]
    weight: Tensor,  # [O, C / groups, kt, kh, kw]
    bias: Tensor | None = None,  # [O]
    *,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    temporal: str = "zeros",
    front: int | None = None,
    spatial_padding: SpatialPadding = "same",
    state: Tensor | None = None,  # [B, C, n, H, W]
    return_state: bool = False,
    upsample: str | None = None,
    residual: Tensor | None = None,  # [B, O, T', H', W']
    blend: Blend | None = None,  # [B, O, T', H', W'], [1]
    activation: str | None = None,
) -> Any:
    """Convolution over time and space that sees no later frame, with what often follows it.

    y = a * blend + (1 - a) * act(conv(x) + bias + residual),  a = sigmoid(mix_factor)
    Equivalent to (3x3x3, stride 1): `F.conv3d(F.pad(x, (1, 1, 1, 1, 2, 0)), weight, bias)`.

    Args:
        x: floating. channels_last_3d memory is read in place, any other layout is copied once.
        weight: of the dtype of x; kernels of any size, odd in height and width for "same" padding.
            In channels_last_3d memory it is read in place, otherwise reordered at each call.
        bias: of the dtype of x.
        stride, dilation: (t, h, w), or an integer for time with 1 in space.
        groups: divides C and O.
        temporal: what precedes the clip: "zeros", or "replicate" for copies of its first frame.
            "same" centres the kernel instead, with zeros on both sides. "valid" adds nothing: x
            already holds its front frames.
        front: how many frames precede the clip, 0 <= front <= (kt - 1) * dilation. None means
            max(0, (kt - 1) * dilation + 1 - stride): a frame comes out of every `stride` frames.
        spatial_padding: zeros around a frame: "same", (k - 1) * dilation / 2 on each side, or
            ((top, bottom), (left, right)).
        state: continues a stream: what the call on the preceding chunk returned, of any floating
            dtype. With upsample="time" its frames are equal pairs, which is not checked.
        return_state: also return the state, for the next chunk.
        upsample: "space" repeats every pixel 2x2 before the convolution, "time" every frame twice.
        residual: added to the convolution, of the output's shape and dtype.
        blend: (tensor, mix_factor), tensor of the output's shape and dtype; mix_factor holds one
            floating element of any dtype.
        activation: None or "silu", applied after bias and residual and before the blend.

    Returns:
        y [B, O, T', H', W'] in channels_last_3d memory, possibly with T' = 0,
        T' = floor((front + T + back - reach) / stride) + 1 with reach = (kt - 1) * dilation + 1;
        2 T for T with upsample="time"; front = back = (reach - 1) / 2 with temporal="same",
        otherwise back = 0. H' and W' likewise. With return_state `(y, state)`. The state is an
        owned tensor of the input frames that later outputs still need. Chunks of any lengths give
        the results of the whole clip.

    Raises:
        ValueError: wrong shapes or options; a stream with temporal="same", a state with "valid" or
            a state from it behind upsample="time", or a stream with a stride beyond the reach.
        TypeError: unsupported or mixed dtypes.

    float32, float16 and bfloat16 on cpu and cuda, float64 on cpu; sums in float32, rounded once,
    but in bfloat16 on a CPU convolution, residual, activation and blend are rounded one by one.
    Under autocast it runs in and returns the dtype of autocast. Deterministic, on a CPU for one
    number of threads. Every combination of options is differentiable once, with respect to x,
    weight, bias, state, residual, blend and mix_factor.

    Source: VidTok (arXiv 2412.13061), section 3.2; MAGVIT-v2 (arXiv 2310.05737).
    """
    if not _runs_natively(x):
        return causal_conv3d_reference(
            *(x, weight, bias),
            stride=stride,
            dilation=dilation,
            groups=groups,
            temporal=temporal,
            front=front,
            spatial_padding=spatial_padding,
            state=state,
            return_state=return_state,
            upsample=upsample,
            residual=residual,
            blend=blend,
            activation=activation,
        )
    _check_are_tensors(blend, x=x, weight=weight, bias=bias, state=state, residual=residual)
    _check_weight(weight)
    x, weight, bias, state, residual, blend = _cast(x, weight, bias, state, residual, blend)
    kernel = weight.shape[2:]
    g = make_geometry(kernel, stride, dilation, groups, temporal, front, spatial_padding, upsample)
    state = _check_causal_conv3d(
        x, weight, bias, g, temporal, state, return_state, residual, blend, activation
    )
    other, mix_factor = (None, None) if blend is None else blend
    tensors, silu = (x, weight, bias, state, residual, other, mix_factor), activation == "silu"
    y = CausalConv3dFunction.apply(
        *(*tensors, list(g), silu, _keeps_preactivation(tensors, silu)),
        state is None and not return_state,  # see Note [Bits do not depend on the tile], csrc/
    )[0]
    return (y, next_state(x, state, g, kernel)) if return_state else y
