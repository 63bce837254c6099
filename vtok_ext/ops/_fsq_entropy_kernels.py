"""Raw ops of the FSQ entropy: kernels and the GEMMs between them, chunk by chunk of tokens.

See Note [Factorised entropy] in fsq_entropy.py.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vtok_ext import _native
from vtok_ext.ops._dtypes import without_autocast
from vtok_ext.ops._library import register
from vtok_ext.ops.fsq_codebook_statistics import count_codes

# Factors of one chunk of tokens: within a second-level CPU cache, and within a GPU's.
CHUNK_BYTES = {"cpu": 2 << 20, "cuda": 32 << 20}
PARTIAL = 1024  # codes per partial sum of the average's entropy, as in fsq_entropy.h


class Geometry:
    """Sizes of the two halves of a codebook, and of the chunks of tokens."""

    def __init__(self, tokens: Tensor, levels: Sequence[int]):
        splits = range(1, len(levels) + 1)
        halves = [(math.prod(levels[:split]), math.prod(levels[split:])) for split in splits]
        self.low, self.high = min(halves, key=sum)
        self.num_low = halves.index((self.low, self.high)) + 1
        self.books, self.num_tokens, _ = tokens.shape
        self.real = tokens.dtype if tokens.dtype == torch.float64 else torch.float32
        row_bytes = self.books * (self.low + self.high) * self.real.itemsize
        chunk = max(1, CHUNK_BYTES[tokens.device.type] // row_bytes)
        self.chunk = min(self.num_tokens, chunk)

    def chunks(self) -> Iterator[slice]:
        """Slices of the tokens."""
        for first in range(0, self.num_tokens, self.chunk or 1):
            yield slice(first, min(first + self.chunk, self.num_tokens))

    def halves(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Uninitialised [codebooks, chunk, K1] and [codebooks, chunk, K2]."""
        return tuple(
            tokens.new_empty((self.books, self.chunk, size), dtype=self.real)
            for size in (self.low, self.high)
        )  # type: ignore[return-value]


class Work(NamedTuple):
    """What `assign_into` writes: per token, on average, and the factors of one chunk."""

    entropy: Tensor  # [codebooks, N]
    commitment: Tensor  # [codebooks, N], summed over channels
    indices: Tensor  # [codebooks, N] int32
    average: Tensor  # [codebooks, K2, K1]
    low: Tensor  # [codebooks, chunk, K1]
    high: Tensor  # [codebooks, chunk, K2]


def empty_work(tokens: Tensor, g: Geometry) -> Work:
    shape = (g.books, g.num_tokens)
    return Work(
        tokens.new_empty(shape, dtype=g.real),
        tokens.new_empty(shape, dtype=g.real),
        tokens.new_empty(shape, dtype=torch.int32),
        tokens.new_full((g.books, g.high, g.low), math.nan, dtype=g.real),
        *g.halves(tokens),
    )


def assign_into(
    tokens: Tensor,  # [codebooks, N, D]
    work: Work,
    g: Geometry,
    levels: list[int],
    inverse_temperature: float,
    clamp_per_sample: bool,
) -> None:
    native, context = _native.module(), _native.call_context(tokens)
    with without_autocast(tokens.device.type):  # GEMMs stay in float32
        for part in g.chunks():
            count = part.stop - part.start
            low, high = work.low[:, :count], work.high[:, :count]
            native.fsq_entropy_factors(
                tokens[:, part],
                low,
                high,
                None if clamp_per_sample else work.entropy[:, part],
                work.commitment[:, part],
                work.indices[:, part],
                levels,
                g.num_low,
                inverse_temperature,
                context,
            )
            if clamp_per_sample:
                native.fsq_entropy_clamped_forward(low, high, work.entropy[:, part], context)
            beta = 0 if part.start == 0 else 1
            work.average.baddbmm_(high.mT, low, beta=beta, alpha=1 / g.num_tokens)


def _assign(
    tokens: Tensor,  # [codebooks, N, D]
    levels: list[int],
    inverse_temperature: float,
    clamp_per_sample: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = Geometry(tokens, levels)
    work = empty_work(tokens, g)
    assign_into(tokens, work, g, levels, inverse_temperature, clamp_per_sample)
    return (
        work.entropy.mean(),
        work.average.flatten(1),
        work.commitment.mean() / len(levels),
        count_codes(work.indices, math.prod(levels)),
    )


def _assign_fake(
    tokens: Tensor, levels: list[int], inverse_temperature: float, clamp_per_sample: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    real = tokens.dtype if tokens.dtype == torch.float64 else torch.float32
    shape = (tokens.shape[0], math.prod(levels))
    return (
        tokens.new_empty((), dtype=real),
        tokens.new_empty(shape, dtype=real),
        tokens.new_empty((), dtype=real),
        tokens.new_empty(shape, dtype=torch.int32),
    )


def _assign_backward(
    tokens: Tensor,  # [codebooks, N, D]
    grad_per_sample: Tensor | None,  # []
    grad_average: Tensor | None,  # [codebooks, K]
    grad_commitment: Tensor | None,  # []
    levels: list[int],
    inverse_temperature: float,
    clamp_per_sample: bool,
) -> Tensor:
    g = Geometry(tokens, levels)
    native, context = _native.module(), _native.call_context(tokens)
    grad_tokens = torch.empty_like(tokens)
    rows = max(g.books * g.num_tokens, 1)
    grad_entropy = None if grad_per_sample is None else grad_per_sample / rows
    grad_error = None if grad_commitment is None else grad_commitment / (rows * len(levels))
    clamped = clamp_per_sample and grad_entropy is not None
    needs_halves = clamped or grad_average is not None
    buffers = [*g.halves(tokens), *g.halves(tokens)] if needs_halves else []
    geometry = (levels, g.num_low, inverse_temperature, context)
    with without_autocast(tokens.device.type):  # GEMMs stay in float32
        for part in g.chunks():
            grad_low: Tensor | None = None
            grad_high: Tensor | None = None
            if buffers:
                count = part.stop - part.start
                low, high, grad_low, grad_high = (buffer[:, :count] for buffer in buffers)
                native.fsq_entropy_factors(tokens[:, part], low, high, None, None, None, *geometry)
                if clamped:
                    native.fsq_entropy_clamped_backward(
                        low, high, grad_entropy, grad_low, grad_high, context
                    )
                if grad_average is not None:
                    matrix = grad_average.view(g.books, g.high, g.low)
                    scale = {"beta": int(clamped), "alpha": 1 / g.num_tokens}
                    grad_low.baddbmm_(high, matrix, **scale)
                    grad_high.baddbmm_(low, matrix.mT, **scale)
            native.fsq_entropy_backward(
                tokens[:, part],
                grad_low,
                grad_high,
                None if clamped else grad_entropy,
                grad_error,
                grad_tokens[:, part],
                *geometry,
            )
    return grad_tokens


def _average_entropy(average: Tensor) -> Tensor:  # [codebooks, K] -> []
    num_partials = -(-average.numel() // PARTIAL)
    partial = average.new_empty(num_partials)
    context = _native.call_context(average)
    _native.module().fsq_entropy_average_forward(average.view(-1), partial, context)
    return partial.sum() / average.shape[0]


def _average_entropy_backward(average: Tensor, grad: Tensor) -> Tensor:
    grad_average = torch.empty_like(average)
    _native.module().fsq_entropy_average_backward(
        average.view(-1),
        grad / average.shape[0],
        grad_average.view(-1),
        _native.call_context(average),
    )
    return grad_average


fsq_entropy_assign = register(
    "fsq_entropy_assign(Tensor tokens, int[] levels, float inverse_temperature, "
    "bool clamp_per_sample) -> (Tensor, Tensor, Tensor, Tensor)",
    _assign,
    _assign_fake,
)
fsq_entropy_assign_backward = register(
    "fsq_entropy_assign_backward(Tensor tokens, Tensor? grad_per_sample, Tensor? grad_average, "
    "Tensor? grad_commitment, int[] levels, float inverse_temperature, bool clamp_per_sample) "
    "-> Tensor",
    _assign_backward,
    lambda tokens, *rest: torch.empty_like(tokens),
)
fsq_entropy_average = register(
    "fsq_entropy_average(Tensor average) -> Tensor",
    _average_entropy,
    lambda average: average.new_empty(()),
)
fsq_entropy_average_backward = register(
    "fsq_entropy_average_backward(Tensor average, Tensor grad) -> Tensor",
    _average_entropy_backward,
    lambda average, grad: torch.empty_like(average),
)
