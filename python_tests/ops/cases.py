"""The ops under test: one OpCase per op, from which test_ops.py makes every test that all ops
share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vtok_ext.ops.fsq import (
    fsq,
    fsq_indices_to_codes,
    fsq_indices_to_codes_reference,
    fsq_reference,
)


@dataclass(frozen=True)
class Sample:
    """One call: named tensors (shapes and kind) and plain keyword arguments."""

    tensors: dict[str, tuple[int, ...]]
    kwargs: dict[str, Any]

    def __str__(self) -> str:
        shapes = "_".join("x".join(map(str, shape)) for shape in self.tensors.values())
        return shapes + "".join(f"-{value}" for value in self.kwargs.values()).replace(" ", "")


@dataclass(frozen=True)
class OpCase:
    """An op, its reference and how to call both.

    Attributes:
        make: (name, shape, dtype, generator, kwargs) -> tensor; values that stay away from
            discontinuities, so that rounding of inputs to half types cannot flip a result.
        dtypes: floating dtypes that the op takes; float64 on the CPU only.
        differentiable: names of tensors that get a gradient.
        gradient_factor: multiple of the tolerance table granted to gradients, with the reason in
            the case.
        raw: name and arguments of raw ops for opcheck.
    """

    name: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    samples: Sequence[Sample]
    make: Callable[..., Tensor]
    dtypes: tuple[torch.dtype, ...] = (
        torch.float32,
        torch.float64,
        torch.float16,
        torch.bfloat16,
    )
    differentiable: tuple[str, ...] = ()
    gradient_factor: float = 1.0
    supports_vmap: bool = False
    raw: Sequence[tuple[str, Callable[[], tuple[Any, ...]]]] = field(default_factory=tuple)

    def __str__(self) -> str:
        return self.name

    def inputs(self, sample: Sample, dtype: torch.dtype, device: str, seed: int = 0):
        """The sample's tensors on `device`."""
        generator = torch.Generator().manual_seed(seed)
        return {
            name: self.make(name, shape, dtype, generator, sample.kwargs).to(device)
            for name, shape in sample.tensors.items()
        }


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

OP_CASES = [FSQ, FSQ_DECODE]
