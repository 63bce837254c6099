"""alpha_blend under test."""

import torch
from op_case import OpCase, Sample

from vtok_ext.ops.alpha_blend import alpha_blend, alpha_blend_reference


def _make(name, shape, dtype, generator, kwargs):
    if name == "image_only":
        return torch.rand(shape, generator=generator) < 0.4
    values = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    if name == "mix_factor":
        return values
    is_video = len(shape) == 5
    return values.contiguous(memory_format=torch.channels_last_3d) if is_video else values


def _sample(shape, factor, **tensors):
    kwargs = {"strategy": "learned_with_images"} if tensors else {}
    return Sample({"a": shape, "b": shape, "mix_factor": factor, **tensors}, kwargs)


_SAMPLES = [
    _sample((1, 128, 4, 16, 16), (1,)),  # VidTok: one factor, channels_last
    _sample((2, 64, 5, 8, 8), (64, 1, 1, 1)),  # per channel
    _sample((2, 13, 5, 7, 3), (5, 1, 1)),  # per frame, odd sizes
    _sample((2, 5, 3, 7, 3), (2, 1, 3, 1, 1)),  # per item and frame
    _sample((3, 24, 3, 4, 8), (24, 3, 1, 1)),  # per channel and frame
    _sample((2, 3, 7), (2, 3, 7)),  # per element
    _sample((2, 2, 2100), (2100,)),  # factors along a run longer than a block is wide
    _sample((1, 8, 3, 80, 80), (8, 1, 1, 1)),  # several partial sums per factor
    _sample((2, 16, 4, 5, 5), (1,), image_only=(2, 4)),
    Sample({"a": (41,), "b": (41,), "mix_factor": (1,)}, {"strategy": "fixed"}),
    _sample((1,), (1,)),
    _sample((), ()),
    _sample((2, 0, 3), (1,)),
    _sample((0, 4, 2, 2, 2), (4, 1, 1, 1)),
]

ALPHA_BLEND = OpCase(
    name="alpha_blend",
    function=alpha_blend,
    reference=alpha_blend_reference,
    samples=_SAMPLES,
    make=_make,
    differentiable=("a", "b", "mix_factor"),
    # The factor's gradient sums up to 10^5 terms of either sign in another order than torch does.
    gradient_factor=4.0,
    supports_vmap=True,
    raw=(
        (
            "alpha_blend_forward",
            lambda: (torch.randn(7, 6), torch.randn(7, 6), torch.randn(6), True),
        ),
        (
            "alpha_blend_backward",
            lambda: (
                *(torch.randn(7, 6), torch.randn(7, 6), torch.randn(7, 6), torch.randn(6)),
                *(True, [True, True, True]),
            ),
        ),
        (
            "alpha_blend_backward",
            lambda: (torch.randn(7, 6), None, None, torch.randn(6), False, [False, True, False]),
        ),
    ),
)
