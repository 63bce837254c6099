"""FSQ and its inverse under test."""

from collections.abc import Sequence

import torch
from op_case import OpCase, Sample
from torch import Tensor

from vtok_ext.ops.fsq import (
    fsq,
    fsq_indices_to_codes,
    fsq_indices_to_codes_reference,
    fsq_reference,
)


def _away_from_rounding(z: Tensor, levels: Sequence[int], channel_dim: int, books: int) -> Tensor:
    """Replaces values whose bounded form lies within 0.01 of a rounding boundary by that of the
    next digit's centre."""
    moved = z.double().movedim(channel_dim, -1).unflatten(-1, (books, len(levels)))
    count = torch.tensor(levels, dtype=torch.float64)
    half, offset = (count - 1) * 1.001 / 2, torch.where(count % 2 == 0, 0.5, 0.0).double()
    shift = torch.atanh(offset / half)
    bounded = torch.tanh(moved + shift) * half - offset
    near = (bounded - bounded.floor() - 0.5).abs() < 0.02
    centre = torch.atanh(((bounded.round() + offset) / half).clamp(-0.999, 0.999)) - shift
    return torch.where(near, centre, moved).flatten(-2).movedim(-1, channel_dim)


def _make_fsq(name, shape, dtype, generator, kwargs):
    z = 1.5 * torch.randn(shape, generator=generator, dtype=torch.float64)
    dim, books = kwargs.get("channel_dim", -1), kwargs.get("num_codebooks", 1)
    z = z.to(dtype)  # round to the dtype first: the rounded value must be off the boundaries
    return _away_from_rounding(z, kwargs["levels"], dim, books).to(dtype).contiguous()


def _make_indices(name, shape, dtype, generator, kwargs):
    size = torch.tensor(kwargs["levels"]).prod().item()
    return torch.randint(size, shape, generator=generator)


_EIGHT6 = [8] * 6
_FSQ_SAMPLES = [
    Sample({"z": (2, 6, 5, 8, 8)}, {"levels": _EIGHT6, "channel_dim": 1}),  # VidTok 488
    Sample({"z": (1, 5, 3, 7, 5)}, {"levels": [8, 8, 8, 6, 5], "channel_dim": 1}),
    Sample({"z": (1031, 6)}, {"levels": _EIGHT6}),
    Sample({"z": (2, 300, 5)}, {"levels": [7, 5, 4, 3, 2]}),
    Sample({"z": (3, 12, 7)}, {"levels": [26, 27, 2, 16], "channel_dim": 1, "num_codebooks": 3}),
    Sample({"z": (37, 8)}, {"levels": [3, 9], "num_codebooks": 4}),
    Sample({"z": (1, 16)}, {"levels": [8] * 16}),  # 2^48 codes: int64 indices
    Sample({"z": (257, 11)}, {"levels": [8] * 10 + [2]}),  # 2^31 codes: the last int32 codebook
    Sample({"z": (4,)}, {"levels": [8, 5, 5, 5]}),
    Sample({"z": (0, 4)}, {"levels": [8] * 4}),
    Sample({"z": (2, 4, 0, 3)}, {"levels": [8] * 4, "channel_dim": 1}),
]

FSQ = OpCase(
    name="fsq",
    function=fsq,
    reference=fsq_reference,
    samples=_FSQ_SAMPLES,
    make=_make_fsq,
    differentiable=("z",),
    # 1 - tanh^2 cancels: an error of 2 ulp in tanh near 1 is large relative to a slope near 0, but
    # the largest slope (levels / 2 times larger) sets the scale. Half types round twice.
    gradient_factor=4.0,
    supports_vmap=True,
    raw=(
        ("fsq_forward", lambda: (torch.randn(7, 6), _EIGHT6, 1, 1)),
        ("fsq_backward", lambda: (torch.randn(7, 6), torch.randn(7, 6), _EIGHT6, 1, 1)),
        (
            "fsq_decode",
            lambda: (torch.arange(9, dtype=torch.int32), _EIGHT6, 1, 1, torch.float32),
        ),
    ),
)

FSQ_DECODE = OpCase(
    name="fsq_indices_to_codes",
    function=fsq_indices_to_codes,
    reference=fsq_indices_to_codes_reference,
    samples=[
        Sample({"indices": (2, 5, 8, 8)}, {"levels": _EIGHT6, "channel_dim": 1}),
        Sample({"indices": (3, 3, 7)}, {"levels": [5, 2], "channel_dim": 1, "num_codebooks": 3}),
        Sample({"indices": (129,)}, {"levels": [8] * 12}),
        Sample({"indices": (0, 3)}, {"levels": [3, 3]}),
    ],
    make=_make_indices,
    dtypes=(torch.int64,),
)
