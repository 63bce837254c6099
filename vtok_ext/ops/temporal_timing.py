"""Which frames make an output frame of `temporal_resample`: timing, checks and definition.

Note [Streamed linear upsampling]
value[2i + 1] needs frame i + 1. In a stream (`final=False`) the last frame known so far is
therefore kept back and comes first in the next call; the source frames that the next call needs are
`carried_frames(...)`. The end of the first segment is known in advance: nothing is kept back there.
Chunks of any lengths then give exactly the frames of one call, nothing is computed twice, and the
last call (`final=True`, with a chunk that may be empty) returns what was kept back.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vtok_ext.ops._dtypes import check_floating

PADDINGS = ("zeros", "replicate", "none", "zeros_behind")
FRONTS = ("zeros", "replicate")
INTERPOLATIONS = ("nearest", "linear")
MAX_FRONT = 4  # kResampleMaxPadding: a convolution over 5 frames
MEAN, NEAREST, LINEAR = range(3)  # ResampleMode in csrc/temporal_resample


class Timing(NamedTuple):
    """Which frames of which tensor make an output frame; see csrc/temporal_resample."""

    mode: int
    num_padding: int
    replicate: bool
    has_front: bool
    num_carried: int
    num_sources: int
    segment: int
    skip: int
    num_outputs: int


def check_video(op: str, name: str, x: Tensor, like: Tensor | None = None) -> None:
    """Raises unless `x` is a floating [B, C, T, H, W], equal to `like` but for T."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(x)}")
    check_floating(op, name, x)
    if x.dim() != 5:
        raise ValueError(f"{op}: {name} must be [B, C, T, H, W], got {list(x.shape)}")
    if like is None:
        return
    if (*x.shape[:2], *x.shape[3:]) != (*like.shape[:2], *like.shape[3:]):
        expected = ", ".join(map(str, (*like.shape[:2], "T", *like.shape[3:])))
        raise ValueError(f"{op}: {name} must be [{expected}], got {list(x.shape)}")
    if x.device != like.device:
        raise ValueError(f"{op}: {name} must be on {like.device}, got {x.device}")


def check_blend(op: str, y: Tensor, mix_factor: Tensor, timing: Timing) -> Tensor:
    """Raises for bad arguments; returns the factor as a scalar in the dtype of the arithmetic."""
    if y.shape[2] != timing.num_outputs:
        raise ValueError(
            f"{op}: y must have {timing.num_outputs} frames, got {y.shape[2]} ({list(y.shape)})"
        )
    if not isinstance(mix_factor, Tensor) or not mix_factor.is_floating_point():
        raise TypeError(f"{op}: mix_factor must be a floating tensor, got {mix_factor!r}")
    if mix_factor.numel() != 1 or mix_factor.device != y.device:
        raise ValueError(
            f"{op}: mix_factor must have one element on {y.device}, "
            f"got {list(mix_factor.shape)} on {mix_factor.device}"
        )
    dtype = torch.float64 if y.dtype == torch.float64 else torch.float32
    return mix_factor.to(dtype).reshape(())


def downsample_timing(x: Tensor, carried: Tensor | None, padding: str) -> Timing:
    """Raises for bad arguments; returns the timing of `temporal_downsample_blend`."""
    op = "temporal_downsample"
    check_video(op, "x", x)
    if padding not in PADDINGS:
        raise ValueError(f"{op}: padding must be one of {PADDINGS}, got {padding!r}")
    if carried is not None:
        check_video(op, "carried", carried, x)
    num_carried = 0 if carried is None else carried.shape[2]
    num_sources = num_carried + x.shape[2]
    front = int(carried is None and padding in ("zeros", "replicate"))
    behind = int(padding == "zeros_behind")
    num_outputs = max(0, (num_sources + front + behind - 1) // 2)
    replicate = padding == "replicate" and front == 1
    return Timing(MEAN, front, replicate, False, num_carried, num_sources, 0, 0, num_outputs)


def upsample_timing(
    x: Tensor, interpolation: str, segment: int, carried: Tensor | None, final: bool
) -> Timing:
    """Raises for bad arguments; returns the timing of upsampling without padding frames."""
    op = "temporal_upsample"
    check_video(op, "x", x)
    if interpolation not in INTERPOLATIONS:
        raise ValueError(
            f"{op}: interpolation must be one of {INTERPOLATIONS}, got {interpolation!r}"
        )
    num_frames = x.shape[2]
    if interpolation == "nearest":
        if carried is not None or segment != 0:
            raise ValueError(f"{op}: segment and carried must be absent with 'nearest'")
        return Timing(NEAREST, 0, False, False, 0, num_frames, 0, 0, 2 * num_frames)
    if segment < 0:
        raise ValueError(f"{op}: segment must be at least 0, got {segment}")
    num_carried = 0
    if carried is not None:
        check_video(op, "carried", carried, x)
        num_carried = carried.shape[2]
        most = segment - 1 if segment > 0 else 1  # a complete first segment leaves nothing behind
        if not 1 <= num_carried <= most:
            raise ValueError(
                f"{op}: carried must have 1 to {most} frames (or be None) with segment {segment}, "
                f"got {num_carried}"
            )
    num_sources = num_carried + num_frames
    skip = max(0, 2 * num_carried - 1)
    kept_back = int(not final and num_sources not in (0, segment))
    num_outputs = 2 * num_sources - skip - kept_back
    return Timing(LINEAR, 0, False, False, num_carried, num_sources, segment, skip, num_outputs)


def carried_frames(x: Tensor, segment: int = 0, carried: Tensor | None = None) -> Tensor | None:
    """The frames of [carried | x] that the next chunk of linear upsampling needs, or None.

    Within the first segment all of them ([B, C, s, H, W] with s < segment), at its end none, later
    the last one; see Note [Streamed linear upsampling]. After the first segment the next call has
    `segment=0`. The result may be a view of x.
    """
    num_frames = x.shape[2] + (0 if carried is None else carried.shape[2])
    if num_frames in (0, segment):
        return None
    if num_frames < segment:
        return x if carried is None else torch.cat([carried.to(x.dtype), x], 2)
    return carried if x.shape[2] == 0 else x[:, :, -1:]


def with_front(timing: Timing, x: Tensor, num_front: int, front: str | Tensor) -> Timing:
    """Raises for bad arguments; returns the timing with `num_front` padding frames in front."""
    op = "temporal_upsample"
    if isinstance(front, Tensor):
        check_video(op, "front", front, x)
        num_front = front.shape[2]
    elif front not in FRONTS:
        raise ValueError(f"{op}: front must be one of {FRONTS} or a tensor, got {front!r}")
    if not 0 <= num_front <= MAX_FRONT:
        raise ValueError(f"{op}: num_front must be in 0..{MAX_FRONT}, got {num_front}")
    replicate = isinstance(front, str) and front == "replicate" and num_front > 0
    if replicate and (timing.num_carried > 0 or timing.num_sources == 0):
        raise ValueError(
            f"{op}: front must be 'zeros' or a tensor unless x begins a clip with a frame to "
            f"replicate, got {front!r}, {timing.num_carried} carried and {x.shape[2]} new frames"
        )
    return timing._replace(
        num_padding=num_front,
        replicate=replicate,
        has_front=isinstance(front, Tensor) and num_front > 0,
        num_outputs=timing.num_outputs + num_front,
    )


def _value_reference(
    x: Tensor, carried: Tensor | None, front: Tensor | None, timing: Timing
) -> Tensor:
    """value[0 : num_outputs] in plain PyTorch, with the padding frames of an upsampled buffer."""
    v = x if carried is None else torch.cat([carried, x], 2)
    zero = torch.zeros_like(v[:, :, :1])
    if timing.mode == MEAN:
        first = [v[:, :, :1] if timing.replicate else zero] * timing.num_padding
        v = torch.cat([*first, v, zero], 2)[:, :, : 2 * timing.num_outputs + 1]
        return (v[:, :, :-2:2] + v[:, :, 1:-1:2] + v[:, :, 2::2]) / 3
    if timing.mode == NEAREST:
        value = v.repeat_interleave(2, 2)
    else:
        parts = (v[:, :, : timing.segment], v[:, :, timing.segment :])
        value = torch.cat([_linear_reference(part) for part in parts], 2)
    value = value[:, :, timing.skip :][:, :, : timing.num_outputs - timing.num_padding]
    if front is None:
        front = v[:, :, :1] if timing.replicate else torch.zeros_like(value[:, :, :1])
        front = front.expand(-1, -1, timing.num_padding, -1, -1)
    return torch.cat([front, value], 2)


def _linear_reference(x: Tensor) -> Tensor:
    """Twice as many frames, half-pixel centres, neighbours clamped at both ends."""
    if x.shape[2] == 0:
        return x
    before = torch.cat([x[:, :, :1], x[:, :, :-1]], 2)
    after = torch.cat([x[:, :, 1:], x[:, :, -1:]], 2)
    even, odd = 0.25 * before + 0.75 * x, 0.75 * x + 0.25 * after
    return torch.stack([even, odd], 3).flatten(2, 3)


def resample_reference(
    x: Tensor,  # [B, C, T, H, W]
    carried: Tensor | None,  # [B, C, num_carried, H, W]
    front: Tensor | None,  # [B, C, num_padding, H, W]
    y: Tensor | None,  # [B, C, num_outputs, H, W]
    factor: Tensor | None,  # []
    timing: Timing,
) -> Tensor:
    """[B, C, num_outputs, H, W] in plain PyTorch: the definition of every function of
    `temporal_resample`."""
    dtype = x.dtype
    real = torch.float64 if dtype == torch.float64 else torch.float32
    x = x.to(real)
    carried, front, y = (None if t is None else t.to(real) for t in (carried, front, y))
    if timing.num_outputs == 0:  # slices of nothing would not have the right shape
        value = x[:, :, :0]
    else:
        value = _value_reference(x, carried, front, timing)
    if y is None or factor is None:
        return value.to(dtype)
    alpha = torch.sigmoid(factor)
    return (alpha * value + (1 - alpha) * y).to(dtype)
