"""The three functions of temporal_resample under test."""

import torch
from op_case import OpCase, Sample

from vtok_ext.ops.temporal_resample import (
    temporal_downsample_blend,
    temporal_downsample_blend_reference,
    temporal_upsample,
    temporal_upsample_blend,
    temporal_upsample_blend_reference,
    temporal_upsample_reference,
)


def _make(name, shape, dtype, generator, kwargs):
    values = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    if name == "mix_factor":
        return values
    return values.contiguous(memory_format=torch.channels_last_3d)


def _frames(shape, count):
    return (*shape[:2], count, *shape[3:])


def _sample(x, *, y=None, carried=None, front=None, **kwargs):
    """Tensors of one call; y, carried and a front that is a tensor are given as numbers of
    frames."""
    tensors = {"x": x}
    if y is not None:
        tensors |= {"y": _frames(x, y), "mix_factor": (1,)}
    if carried is not None:
        tensors["carried"] = _frames(x, carried)
    if isinstance(front, int):
        tensors["front"] = _frames(x, front)
    elif front is not None:
        kwargs["front"] = front
    return Sample(tensors, kwargs)


_VIDEO = (1, 128, 5, 8, 8)
_ODD = (2, 7, 6, 5, 3)
_LONG = (1, 4, 21, 3, 4)  # more than one segment of output frames per CUDA thread
_LINEAR = {"interpolation": "linear"}

_TIMING = {"down": [0, 1, 0, 0, 0, 5, 0, 0, 2], "up": [2, 2, 0, 1, 1, 6, 0, 1, 12]}


def _raw_blend():
    x, y = torch.randn(2, 3, 5, 2, 2), torch.randn(2, 3, 2, 2, 2)
    return x, None, None, y, torch.randn(()), _TIMING["down"]


def _raw_up():
    video = [torch.randn(2, 3, frames, 2, 2) for frames in (5, 1, 2)]
    return *video, None, None, _TIMING["up"]


def _raw_blend_backward():
    x, _, _, y, factor, timing = _raw_blend()
    return torch.randn_like(y), x, None, y, factor, timing, [True, False, False, True, True]


def _raw_up_backward():
    needed = [True, True, True, False, False]
    return torch.randn(2, 3, 12, 2, 2), None, None, None, None, _TIMING["up"], needed


TEMPORAL_DOWNSAMPLE = OpCase(
    name="temporal_downsample_blend",
    function=temporal_downsample_blend,
    reference=temporal_downsample_blend_reference,
    samples=[
        _sample(_VIDEO, y=2, padding="zeros"),
        _sample(_ODD, y=3, padding="replicate"),
        _sample(_ODD, y=2, padding="none"),
        _sample((2, 7, 5, 5, 3), y=2, padding="none"),
        _sample(_ODD, y=3, padding="zeros_behind"),
        _sample((2, 7, 5, 5, 3), y=2, padding="zeros_behind"),
        _sample(_ODD, y=3, carried=1),
        _sample((2, 7, 5, 5, 3), y=3, carried=2),
        _sample(_LONG, y=10, padding="zeros"),
        _sample((3, 1, 2, 1, 1), y=1, padding="replicate"),
        _sample((2, 3, 1, 4, 4), y=0),
        _sample((0, 4, 6, 2, 2), y=3),
    ],
    make=_make,
    differentiable=("x", "y", "mix_factor"),
    # The factor's gradient sums terms of either sign in another order than torch does.
    gradient_factor=4.0,
    raw=(
        ("temporal_resample_forward", _raw_blend),
        ("temporal_resample_backward", _raw_blend_backward),
    ),
)

TEMPORAL_UPSAMPLE = OpCase(
    name="temporal_upsample",
    function=temporal_upsample,
    reference=temporal_upsample_reference,
    samples=[
        _sample(_VIDEO, num_front=2),
        _sample(_ODD, num_front=2, front="replicate"),
        _sample(_ODD, front=2),
        _sample(_ODD),
        _sample(_ODD, segment=2, num_front=2, front="replicate", **_LINEAR),
        _sample(_ODD, carried=1, front=2, **_LINEAR),
        _sample((2, 7, 2, 5, 3), carried=3, segment=4, **_LINEAR),
        _sample(_LONG, segment=4, num_front=2, final=False, **_LINEAR),
        _sample((1, 3, 2, 1, 1), segment=4, final=False, **_LINEAR),
        _sample((2, 3, 0, 2, 2), carried=1, front=2, **_LINEAR),
        _sample((2, 3, 0, 2, 2)),
        _sample((0, 4, 3, 2, 2), num_front=2),
    ],
    make=_make,
    differentiable=("x",),
    raw=(
        ("temporal_resample_forward", _raw_up),
        ("temporal_resample_backward", _raw_up_backward),
    ),
)

TEMPORAL_UPSAMPLE_BLEND = OpCase(
    name="temporal_upsample_blend",
    function=temporal_upsample_blend,
    reference=temporal_upsample_blend_reference,
    samples=[
        _sample(_VIDEO, y=10),
        _sample(_ODD, y=12),
        _sample(_ODD, y=12, segment=1, **_LINEAR),
        _sample(_ODD, y=12, segment=4, **_LINEAR),
        _sample(_ODD, y=12, carried=1, final=False, **_LINEAR),
        _sample((2, 7, 3, 5, 3), y=6, carried=2, segment=3, final=False, **_LINEAR),
        _sample(_LONG, y=41, segment=2, final=False, **_LINEAR),
        _sample((1, 1, 1, 1, 1), y=2),
        _sample((2, 3, 0, 2, 2), y=0),
    ],
    make=_make,
    differentiable=("x", "y", "mix_factor"),
    gradient_factor=4.0,  # as above
    raw=(("temporal_resample_forward", _raw_blend),),
)
