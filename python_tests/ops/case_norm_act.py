"""norm_act under test: with affine, without it, and with frames carried over from another chunk."""

import torch
from op_case import OpCase, Sample

from vtok_ext.ops.norm_act import norm_act, norm_act_reference

# Reductions of the reference and of the kernels differ in order, and grad_x is a difference of
# terms of its own size; half types round the gradient of every use of a value and their sum.
GRADIENT_FACTOR = 3.0


def _make(name, shape, dtype, generator, kwargs):
    """Off-centre values: a norm that forgot the mean, or formed E[x^2] - mean^2, would show."""
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (values + {"x": 2.0, "weight": 1.0}.get(name, 0.0)).to(dtype)


def _affine(shape, **kwargs):
    return Sample({"x": shape, "weight": (shape[1],), "bias": (shape[1],)}, kwargs)


def _raw_tensors():
    return torch.randn(1, 8, 2, 3, 3), torch.randn(8), torch.randn(8)


# norm, num_groups, act, eps, dtype, front, temporal, bottom, right, save_stats
_LAYER = ("layer", 32, True, 1e-6, torch.float32, 2, "replicate", 1, 1, True)
_GROUP = ("group", 2, False, 1e-6, torch.bfloat16, 1, "zeros", 0, 1, False)
_BACKWARD = ("layer", 32, True, 1e-6, 2, True, [True, False, True])


NORM_ACT = OpCase(
    name="norm_act",
    function=norm_act,
    reference=norm_act_reference,
    samples=[
        _affine((1, 128, 3, 6, 5)),  # VidTok's first level
        _affine((2, 512, 2, 3, 4), front=2, border=(1, 1)),
        _affine((1, 256, 2, 4, 3), norm="rms", front=2, temporal="replicate"),
        _affine((2, 64, 3, 5, 7), norm="group", front=1, temporal="replicate", border=(0, 1)),
        _affine((1, 128, 2, 13, 10), norm="group_rms", num_groups=8, front=2, border=(1, 0)),
        _affine((2, 6, 2, 3, 5), act=False, front=2, temporal="replicate", border=(1, 1)),
        _affine((1, 33, 1, 1, 1), norm="rms"),
        _affine((1, 30, 5, 1, 7), norm="group", num_groups=3, act=False, border=(2, 3)),
        # One channel: with a small eps grad_x would be all cancellation.
        _affine((3, 1, 2, 2, 2), norm="rms", front=1, eps=0.5),
        _affine((1, 514, 1, 2, 2), eps=1e-3, dtype=None),
        _affine((0, 16, 2, 3, 3), front=2),
        _affine((1, 16, 2, 0, 3), norm="group", num_groups=2, front=1, border=(1, 2)),
    ],
    make=_make,
    differentiable=("x", "weight", "bias"),
    gradient_factor=GRADIENT_FACTOR,
    returns_autocast_dtype=True,
    raw=(
        ("norm_act_forward", lambda: (*_raw_tensors(), None, *_LAYER)),
        (
            "norm_act_backward",
            lambda: (
                torch.randn(1, 8, 4, 4, 4),
                *_raw_tensors(),
                torch.ones(1, 2, 9, 2),
                *_BACKWARD,
            ),
        ),
    ),
)

NORM_ACT_WITHOUT_AFFINE = OpCase(
    name="norm_act_without_affine",
    function=norm_act,
    reference=norm_act_reference,
    samples=[
        Sample({"x": (1, 32, 2, 3, 3)}, {}),
        Sample({"x": (2, 96, 2, 3, 5)}, {"norm": "group_rms", "front": 2}),
        Sample({"x": (1, 7, 1, 2, 3)}, {"norm": "rms", "act": False}),
    ],
    make=_make,
    differentiable=("x",),
    gradient_factor=GRADIENT_FACTOR,
    returns_autocast_dtype=True,
    raw=(
        ("norm_act_forward", lambda: (torch.randn(2, 8, 2, 3, 3), None, None, None, *_GROUP)),
        (
            "norm_act_backward",
            lambda: (
                *(torch.randn(1, 8, 4, 4, 4), torch.randn(1, 8, 2, 3, 3), None, None),
                *(torch.randn(1, 2, 0, 2), *_BACKWARD),
            ),
        ),
    ),
)

NORM_ACT_STATE = OpCase(
    name="norm_act_state",
    function=norm_act,
    reference=norm_act_reference,
    samples=[
        Sample(
            {"x": (2, 64, 3, 3, 4), "weight": (64,), "state": (2, 64, 2, 3, 4)},
            {"front": 2, "border": (1, 1)},
        ),
        Sample(
            {"x": (1, 5, 1, 2, 3), "weight": (5,), "state": (1, 5, 3, 2, 3)},
            {"front": 3, "temporal": "replicate", "norm": "rms"},
        ),
        Sample(
            {"x": (1, 32, 0, 2, 2), "weight": (32,), "state": (1, 32, 1, 2, 2)},
            {"front": 1, "norm": "group", "num_groups": 4},
        ),
    ],
    make=_make,
    differentiable=("x", "weight", "state"),
    gradient_factor=GRADIENT_FACTOR,
    returns_autocast_dtype=True,
    raw=(
        (
            "norm_act_forward",
            lambda: (
                *(torch.randn(2, 8, 2, 3, 3), None, None, torch.randn(2, 8, 1, 3, 3)),
                *_GROUP,
            ),
        ),
    ),
)
