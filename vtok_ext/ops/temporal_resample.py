"""Halving and doubling the frame rate: without parameters, or fused with the blend of a branch.

    down      value[t] = (v[2t] + v[2t + 1] + v[2t + 2]) / 3,  v = x behind one frame of padding
    nearest   value[2i] = value[2i + 1] = x[i]
    linear    value[2i] = .25 x[i-1] + .75 x[i],  value[2i+1] = .75 x[i] + .25 x[i+1], in segments
    blended   out = alpha * value + (1 - alpha) * y,  alpha = sigmoid(mix_factor)

Source: VidTok (arXiv 2412.13061), section 3.2; its release 1.1 for linear upsampling in segments.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vtok_ext import _native
from vtok_ext.ops._library import OpFunction, once_differentiable, register
from vtok_ext.ops.temporal_timing import (
    Timing,
    check_blend,
    check_video,
    downsample_timing,
    resample_reference,
    upsample_timing,
    with_front,
)

# Threads per block and output frames per thread of the CUDA kernels, which give one partial sum per
# block (csrc/temporal_resample).
_THREADS, _FRAMES = 256, 8


def _empty_frames(like: Tensor, num_frames: int) -> Tensor:
    """Uninitialised [B, C, num_frames, H, W], in the memory order of `like`."""
    shape = (*like.shape[:2], num_frames, *like.shape[3:])
    is_last = like.shape[1] > 1 and like.stride(1) == 1
    memory_format = torch.channels_last_3d if is_last else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)


def _empty_output(
    x: Tensor,
    carried: Tensor | None,
    front: Tensor | None,
    y: Tensor | None,
    factor: Tensor | None,
    timing: Sequence[int],
) -> Tensor:
    return _empty_frames(x if y is None else y, timing[-1])


def _forward(
    x: Tensor,
    carried: Tensor | None,
    front: Tensor | None,
    y: Tensor | None,
    factor: Tensor | None,
    timing: Sequence[int],
) -> Tensor:
    out = _empty_output(x, carried, front, y, factor, timing)
    _native.module().temporal_resample_forward(
        x, carried, front, y, factor, out, timing, _native.call_context(out)
    )
    return out


def _num_partials(grad_out: Tensor) -> int:
    """Size of the workspace: a partial sum per block of the CUDA kernels, more than the CPU's."""
    batch, channels, frames, height, width = grad_out.shape
    return -(-batch * channels * height * width // _THREADS) * -(-frames // _FRAMES)


def _empty_gradients(
    grad_out: Tensor,
    x: Tensor | None,
    carried: Tensor | None,
    y: Tensor | None,
    factor: Tensor | None,
    timing: Sequence[int],
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised gradients of x, carried, front, y, factor; not needed ones have no elements."""
    _, num_padding, _, _, num_carried, num_sources, _, _, num_outputs = timing
    frames = (num_sources - num_carried, num_carried, num_padding, num_outputs)
    like = grad_out if y is None else y
    videos = [
        _empty_frames(like, count) if need else grad_out.new_empty(0)
        for count, need in zip(frames, needed[:4], strict=True)
    ]
    scalar = grad_out.new_empty(0) if factor is None or not needed[4] else torch.empty_like(factor)
    return videos[0], videos[1], videos[2], videos[3], scalar


def _backward(
    grad_out: Tensor,
    x: Tensor | None,
    carried: Tensor | None,
    y: Tensor | None,
    factor: Tensor | None,
    timing: Sequence[int],
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    gradients = _empty_gradients(grad_out, x, carried, y, factor, timing, needed)
    if grad_out.numel() == 0:
        return tuple(g.zero_() for g in gradients)  # type: ignore[return-value]
    outputs = [g if need else None for g, need in zip(gradients, needed, strict=True)]
    partials = None
    if needed[4] and factor is not None:
        partials = factor.new_empty(_num_partials(grad_out))
    else:
        x = carried = y = None
    _native.module().temporal_resample_backward(
        grad_out,
        x,
        carried,
        y,
        factor,
        *outputs,
        partials,
        timing,
        _native.call_context(grad_out),
    )
    return gradients


_TENSORS = "Tensor? carried, Tensor? front, Tensor? y, Tensor? factor, int[] timing"
_temporal_resample_forward = register(
    f"temporal_resample_forward(Tensor x, {_TENSORS}) -> Tensor", _forward, _empty_output
)
_temporal_resample_backward = register(
    "temporal_resample_backward(Tensor grad_out, Tensor? x, Tensor? carried, Tensor? y, "
    "Tensor? factor, int[] timing, bool[] needed) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _empty_gradients,
)


class TemporalResampleFunction(OpFunction):
    """Saves x and y only where the factor is learned; the upsampled frames are never saved."""

    @staticmethod
    def forward(
        x: Tensor,
        carried: Tensor | None,
        front: Tensor | None,
        y: Tensor | None,
        factor: Tensor | None,
        timing: list[int],
    ) -> Tensor:
        """The resampled frames, blended with `y` when there is one."""
        return _temporal_resample_forward(x, carried, front, y, factor, timing)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keeps the factor, and the branches for its gradient."""
        x, carried, _, y, factor, ctx.timing = inputs
        ctx.learns_factor = factor is not None and ctx.needs_input_grad[4]
        saved = (x, carried, y) if ctx.learns_factor else (None, None, None)
        ctx.save_for_backward(*saved, factor)

    @staticmethod
    @once_differentiable("temporal_resample")
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
        """The transposed resampling of alpha * g, (1 - alpha) * g, and the factor's sum."""
        needed = list(ctx.needs_input_grad[:5])
        gradients = _temporal_resample_backward(grad_out, *ctx.saved_tensors, ctx.timing, needed)
        return *(g if need else None for g, need in zip(gradients, needed, strict=True)), None


# Tensors in one dtype, and the timing: what both the definition and the kernels take.
_Call = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Timing]


def _call(
    x: Tensor,
    carried: Tensor | None,
    front: Tensor | None,
    y: Tensor | None,
    factor: Tensor | None,
    timing: Timing,
) -> _Call:
    dtype = x.dtype if y is None else y.dtype
    carried, front = (t if t is None else t.to(dtype) for t in (carried, front))
    return x.to(dtype), carried, front, y, factor, timing


def _apply(
    x: Tensor,
    carried: Tensor | None,
    front: Tensor | None,
    y: Tensor | None,
    factor: Tensor | None,
    timing: Timing,
) -> Tensor:
    if not _native.is_enabled():
        return resample_reference(x, carried, front, y, factor, timing)
    return TemporalResampleFunction.apply(x, carried, front, y, factor, list(map(int, timing)))


def _check_downsample_blend(
    x: Tensor, y: Tensor, mix_factor: Tensor, padding: str = "zeros", carried: Tensor | None = None
) -> _Call:
    """Raises for bad arguments of `temporal_downsample_blend`."""
    timing = downsample_timing(x, carried, padding)
    check_video("temporal_downsample", "y", y, x)
    factor = check_blend("temporal_downsample", y, mix_factor, timing)
    return _call(x, carried, None, y, factor, timing)


def _check_upsample(
    x: Tensor,
    interpolation: str = "nearest",
    segment: int = 0,
    carried: Tensor | None = None,
    final: bool = True,
    num_front: int = 0,
    front: str | Tensor = "zeros",
) -> _Call:
    """Raises for bad arguments of `temporal_upsample`."""
    timing = upsample_timing(x, interpolation, segment, carried, final)
    timing = with_front(timing, x, num_front, front)
    frames = front if isinstance(front, Tensor) and timing.has_front else None
    return _call(x, carried, frames, None, None, timing)


def _check_upsample_blend(
    x: Tensor,
    y: Tensor,
    mix_factor: Tensor,
    interpolation: str = "nearest",
    segment: int = 0,
    carried: Tensor | None = None,
    final: bool = True,
) -> _Call:
    """Raises for bad arguments of `temporal_upsample_blend`."""
    timing = upsample_timing(x, interpolation, segment, carried, final)
    check_video("temporal_upsample", "y", y, x)
    factor = check_blend("temporal_upsample", y, mix_factor, timing)
    return _call(x, carried, None, y, factor, timing)


def temporal_downsample_blend_reference(
    x: Tensor, y: Tensor, mix_factor: Tensor, **options: Any
) -> Tensor:
    """The definition of `temporal_downsample_blend`: arguments and errors as there."""
    return resample_reference(*_check_downsample_blend(x, y, mix_factor, **options))


def temporal_upsample_reference(x: Tensor, **options: Any) -> Tensor:
    """The definition of `temporal_upsample`: arguments and errors as there."""
    return resample_reference(*_check_upsample(x, **options))


def temporal_upsample_blend_reference(
    x: Tensor, y: Tensor, mix_factor: Tensor, **options: Any
) -> Tensor:
    """The definition of `temporal_upsample_blend`: arguments and errors as there."""
    return resample_reference(*_check_upsample_blend(x, y, mix_factor, **options))


def temporal_downsample_blend(
    x: Tensor,  # [B, C, T, H, W]
    y: Tensor,  # [B, C, T', H, W]
    mix_factor: Tensor,  # [1]
    *,
    padding: str = "zeros",
    carried: Tensor | None = None,  # [B, C, s, H, W]
) -> Tensor:
    """The mean over 3 frames with stride 2, blended with `y` in one pass.

    out[t] = alpha * (v[2t] + v[2t + 1] + v[2t + 2]) / 3 + (1 - alpha) * y[t],
    alpha = sigmoid(mix_factor), v = x with its padding.
    Equivalent to: temporal_downsample_blend_reference(x, y, mix_factor, ...)

    Args:
        x: frames, any strides.
        y: the branch with parameters, as many frames as windows fit. Decides dtype and memory
            format of the result; x and carried are converted to its dtype.
        mix_factor: one element, any floating dtype.
        padding: "zeros" or "replicate": a frame of zeros or a copy of the first frame precedes x;
            "zeros_behind": a frame of zeros follows it; "none": x has all frames it needs.
        carried: frames of the preceding chunk of a stream, in the place of the padding in front:
            everything from where the next window begins.

    Returns:
        out [B, C, T', H, W], T' = floor(T / 2) with one frame of padding.

    Raises:
        ValueError: shapes, devices or padding that do not fit together.
        TypeError: an unsupported dtype.

    float32, float16 and bfloat16 on cpu and cuda, float64 on cpu; half types are computed in
    float32 and rounded once. Deterministic. Differentiable once in every tensor.

    Source: VidTok (arXiv 2412.13061), section 3.2.
    """
    return _apply(*_check_downsample_blend(x, y, mix_factor, padding, carried))


def temporal_upsample(
    x: Tensor,  # [B, C, T, H, W]
    *,
    interpolation: str = "nearest",
    segment: int = 0,
    carried: Tensor | None = None,  # [B, C, s, H, W]
    final: bool = True,
    num_front: int = 0,
    front: str | Tensor = "zeros",  # [B, C, num_front, H, W]
) -> Tensor:
    """Twice as many frames, behind the frames of context that a causal convolution needs.

    nearest: value[2i] = value[2i + 1] = x[i]
    linear: value[2i] = .25 x[i - 1] + .75 x[i], value[2i + 1] = .75 x[i] + .25 x[i + 1]
    Equivalent to: F.pad(x.repeat_interleave(2, 2), (0, 0, 0, 0, num_front, 0)), written once.

    Args:
        x: frames, any strides.
        interpolation: "nearest", or "linear" with neighbours clamped to each of two segments.
        segment: frames of the first segment that is interpolated by itself; 0 for one segment.
        carried: frames kept from the preceding chunk of a stream; see `carried_frames`.
        final: whether no chunk follows. If one does, linear upsampling keeps the last frame back.
        num_front, front: frames of context: zeros, copies of the first frame ("replicate"), or
            the frames of a tensor.

    Returns:
        [B, C, num_front + 2 T, H, W] in the dtype and memory order of x; with `carried` or without
        `final` as many frames as are determined and were not returned before.

    Raises:
        ValueError: shapes or settings that do not fit together.
        TypeError: an unsupported dtype.

    Dtypes, devices and determinism as `temporal_downsample_blend`; nearest copies values exactly.

    Source: VidTok (arXiv 2412.13061), section 3.2, and its release 1.1.
    """
    return _apply(*_check_upsample(x, interpolation, segment, carried, final, num_front, front))


def temporal_upsample_blend(
    x: Tensor,  # [B, C, T, H, W]
    y: Tensor,  # [B, C, T', H, W]
    mix_factor: Tensor,  # [1]
    *,
    interpolation: str = "nearest",
    segment: int = 0,
    carried: Tensor | None = None,  # [B, C, s, H, W]
    final: bool = True,
) -> Tensor:
    """The upsampled frames of x, blended with `y` in one pass that never stores them.

    out = alpha * temporal_upsample(x, ...) + (1 - alpha) * y, alpha = sigmoid(mix_factor)
    Equivalent to: alpha_blend(temporal_upsample(x, ...), y, mix_factor)

    Args:
        x, interpolation, segment, carried, final: as in `temporal_upsample`.
        y: the branch with parameters, with the frames that `temporal_upsample` returns. Decides
            dtype and memory format of the result.
        mix_factor: one element, any floating dtype.

    Returns:
        out [B, C, T', H, W] as y.

    Raises, dtypes, devices, determinism, gradients: as `temporal_downsample_blend`.

    Source: VidTok (arXiv 2412.13061), section 3.2, and its release 1.1.
    """
    return _apply(*_check_upsample_blend(x, y, mix_factor, interpolation, segment, carried, final))
