"""Entropy of FSQ code assignments: confident per token, diverse over the codebook.

    p_j = softmax_j(2 * inverse_temperature * <z, c_j>) over every code c_j of the product codebook
    loss = mean over tokens of H(p) - diversity_gamma * H(mean over tokens of p)

Source: VidTok's FSQ regulariser; the idea is MAGVIT-v2's entropy penalty (Yu et al. 2023).

Note [Factorised entropy]
p is a product over channels. With `low` [tokens, K1] and `high` [tokens, K2], the products over the
two halves of the channels, the average distribution is high^T low / tokens, [K2, K1] in the order
of the codebook: one GEMM, and two in the backward pass. Tokens are worked on in chunks of constant
memory. Nothing of size tokens x codebook is ever made.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from vtok_ext import _native
from vtok_ext.ops._library import OpFunction, register
from vtok_ext.ops.fsq import _check_fsq, fsq_indices_to_codes_reference, fsq_reference

# The published log argument is clamped here, which caps the entropy of a code at -ln(1e-5) = 11.5
# nats.
LOG_CLAMP = 1e-5
# The average distribution takes 4 bytes per code; reciprocals in the kernels are exact below this.
MAX_CODEBOOK = 2**30
# Factors of one chunk of tokens: within a second-level CPU cache, and within a GPU's.
_CHUNK_BYTES = {"cpu": 2 << 20, "cuda": 32 << 20}
_PARTIAL = 1024  # codes per partial sum of the average's entropy, as in fsq_entropy.h


class FsqEntropy(NamedTuple):
    """Scalars; loss = per_sample - diversity_gamma * codebook + commitment_weight * commitment.

    Attributes:
        loss: the weighted sum.
        per_sample: mean entropy of a token's assignment, nats.
        codebook: entropy of the average assignment (the mean over codebooks), nats.
        commitment: mean of (z - code)^2.
        counts: [num_codebooks, codebook size] int32, tokens whose nearest code it is, of this
            process; not differentiable. See `fsq_codebook_statistics`.
    """

    loss: Tensor
    per_sample: Tensor
    codebook: Tensor
    commitment: Tensor
    counts: Tensor


class FsqCodebookStatistics(NamedTuple):
    """What a batch uses of a codebook: float32 scalars, means over codebooks.

    Attributes:
        use: fraction of the codes that occur; at most tokens / codebook size.
        perplexity: exp of the entropy of the code frequencies, 1 to the number of codes in use.
        dead_levels: number of levels, over all channels, that no token has.
    """

    use: Tensor
    perplexity: Tensor
    dead_levels: Tensor


def _entropy(probabilities: Tensor) -> Tensor:
    """-sum p log(max(p, 1e-5)) over the last dimension."""
    return -(probabilities * probabilities.clamp(min=LOG_CLAMP).log()).sum(-1)


def fsq_entropy_loss_reference(
    z: Tensor,  # [..., num_codebooks * D, ...]
    levels: Sequence[int],
    *,
    channel_dim: int = -1,
    num_codebooks: int = 1,
    inverse_temperature: float = 100.0,
    diversity_gamma: float = 1.0,
    commitment_weight: float = 0.0,
    clamp_per_sample: bool = False,
    process_group: distributed.ProcessGroup | None = None,
) -> FsqEntropy:
    """The entropy loss by its definition: a dense softmax over the whole codebook for every token.

    Takes about 16 bytes x tokens x codebook of memory with gradients: 21 GB for 5,120 tokens and
    2^18 codes. Arguments, results and errors: as `fsq_entropy_loss`.
    """
    channel_dim = _check_entropy(z, levels, channel_dim, num_codebooks)
    real = z.dtype if z.dtype == torch.float64 else torch.float32
    with torch.autocast(z.device.type, enabled=False):
        tokens = _tokens(z.to(real), channel_dim, num_codebooks)  # [codebooks, N, D]
        every_index = torch.arange(math.prod(levels), device=z.device)
        codebook = fsq_indices_to_codes_reference(every_index, levels, dtype=real)
        log_p = (2 * inverse_temperature * (tokens @ codebook.T)).log_softmax(-1)
        p = log_p.exp()
        per_sample = (_entropy(p) if clamp_per_sample else -(p * log_p).sum(-1)).mean()
        average = p.mean(1)
        if process_group is not None:
            average = MeanOverRanks.apply(average, process_group)
        codes, indices = fsq_reference(tokens, levels)
        commitment = (tokens - codes.detach()).square().mean()
        counts = _count(indices, math.prod(levels))
    diversity = _entropy(average).mean()
    loss = per_sample - diversity_gamma * diversity + commitment_weight * commitment
    return FsqEntropy(loss, per_sample, diversity, commitment, counts)


def _check_entropy(z: Tensor, levels: Sequence[int], channel_dim: int, num_codebooks: int) -> int:
    """Raises for bad arguments; returns `channel_dim` counted from the front."""
    channel_dim = _check_fsq("fsq_entropy_loss", z, levels, channel_dim, num_codebooks)
    if math.prod(levels) > MAX_CODEBOOK:
        raise ValueError(
            "fsq_entropy_loss: levels must have a product of at most 2^30 (the average "
            f"distribution is stored), got {math.prod(levels):.3g}"
        )
    return channel_dim


def _tokens(z: Tensor, channel_dim: int, num_codebooks: int) -> Tensor:
    """z as [codebooks, tokens, D], a view where strides allow."""
    rows = z.movedim(channel_dim, -1).unflatten(-1, (num_codebooks, -1))
    return rows.flatten(0, -3).movedim(-2, 0) if z.dim() > 1 else rows.unsqueeze(1)


def _count(
    indices: Tensor,  # [codebooks, tokens], -1 is not counted
    codebook_size: int,
) -> Tensor:  # [codebooks, codebook size] int32
    books = indices.shape[0]
    start = torch.arange(0, books * codebook_size, codebook_size, device=indices.device)
    flat = (indices.clamp(min=0) + start[:, None]).flatten()
    counts = torch.zeros(books * codebook_size, dtype=torch.int32, device=indices.device)
    return counts.index_add_(0, flat, (indices >= 0).int().flatten()).view(books, codebook_size)


class _Geometry:
    """Sizes of the two halves of a codebook, and of the chunks of tokens."""

    def __init__(self, tokens: Tensor, levels: Sequence[int]):
        splits = range(1, len(levels) + 1)
        halves = [(math.prod(levels[:split]), math.prod(levels[split:])) for split in splits]
        self.low, self.high = min(halves, key=sum)
        self.num_low = halves.index((self.low, self.high)) + 1
        self.books, self.num_tokens, _ = tokens.shape
        self.real = tokens.dtype if tokens.dtype == torch.float64 else torch.float32
        row_bytes = self.books * (self.low + self.high) * self.real.itemsize
        chunk = max(1, _CHUNK_BYTES[tokens.device.type] // row_bytes)
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


def _without_autocast(tensor: Tensor) -> AbstractContextManager:
    """The GEMMs stay in float32 under autocast."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _assign(
    tokens: Tensor,  # [codebooks, N, D]
    levels: list[int],
    inverse_temperature: float,
    clamp_per_sample: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = _Geometry(tokens, levels)
    native, context = _native.module(), _native.call_context(tokens)
    entropy, commitment = (
        tokens.new_empty((g.books, g.num_tokens), dtype=g.real) for _ in range(2)
    )
    indices = tokens.new_empty((g.books, g.num_tokens), dtype=torch.int32)
    average = tokens.new_full((g.books, g.high, g.low), math.nan, dtype=g.real)
    low_buffer, high_buffer = g.halves(tokens)
    with _without_autocast(tokens):
        for part in g.chunks():
            count = part.stop - part.start
            low, high = low_buffer[:, :count], high_buffer[:, :count]
            native.fsq_entropy_factors(
                tokens[:, part],
                low,
                high,
                None if clamp_per_sample else entropy[:, part],
                commitment[:, part],
                indices[:, part],
                levels,
                g.num_low,
                inverse_temperature,
                context,
            )
            if clamp_per_sample:
                native.fsq_entropy_clamped_forward(low, high, entropy[:, part], context)
            beta = 0 if part.start == 0 else 1
            average.baddbmm_(high.mT, low, beta=beta, alpha=1 / g.num_tokens)
    return (
        entropy.mean(),
        average.flatten(1),
        commitment.mean() / len(levels),
        _count(indices, math.prod(levels)),
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
    g = _Geometry(tokens, levels)
    native, context = _native.module(), _native.call_context(tokens)
    grad_tokens = torch.empty_like(tokens)
    rows = max(g.books * g.num_tokens, 1)
    grad_entropy = None if grad_per_sample is None else grad_per_sample / rows
    grad_error = None if grad_commitment is None else grad_commitment / (rows * len(levels))
    clamped = clamp_per_sample and grad_entropy is not None
    needs_halves = clamped or grad_average is not None
    low_buffer, high_buffer, grad_low_buffer, grad_high_buffer = (
        g.halves(tokens) + g.halves(tokens) if needs_halves else (None,) * 4
    )
    geometry = (levels, g.num_low, inverse_temperature, context)
    with _without_autocast(tokens):
        for part in g.chunks():
            grad_low = grad_high = None
            if needs_halves:
                low, high, grad_low, grad_high = (
                    buffer[:, : part.stop - part.start]
                    for buffer in (low_buffer, high_buffer, grad_low_buffer, grad_high_buffer)
                )
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
    num_partials = -(-average.numel() // _PARTIAL)
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


_fsq_entropy_assign = register(
    "fsq_entropy_assign(Tensor tokens, int[] levels, float inverse_temperature, "
    "bool clamp_per_sample) -> (Tensor, Tensor, Tensor, Tensor)",
    _assign,
    _assign_fake,
)
_fsq_entropy_assign_backward = register(
    "fsq_entropy_assign_backward(Tensor tokens, Tensor? grad_per_sample, Tensor? grad_average, "
    "Tensor? grad_commitment, int[] levels, float inverse_temperature, bool clamp_per_sample) "
    "-> Tensor",
    _assign_backward,
    lambda tokens, *rest: torch.empty_like(tokens),
)
_fsq_entropy_average = register(
    "fsq_entropy_average(Tensor average) -> Tensor",
    _average_entropy,
    lambda average: average.new_empty(()),
)
_fsq_entropy_average_backward = register(
    "fsq_entropy_average_backward(Tensor average, Tensor grad) -> Tensor",
    _average_entropy_backward,
    lambda average, grad: torch.empty_like(average),
)


class FsqAssignmentFunction(OpFunction):
    """Per-token entropy, average distribution, commitment and counts of [codebooks, N, D]."""

    @staticmethod
    def forward(
        tokens: Tensor, levels: list[int], inverse_temperature: float, clamp_per_sample: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See `_assign`."""
        return _fsq_entropy_assign(tokens, levels, inverse_temperature, clamp_per_sample)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keeps the tokens; their factors are computed again."""
        tokens, ctx.levels, ctx.inverse_temperature, ctx.clamp_per_sample = inputs
        ctx.save_for_backward(tokens)
        ctx.mark_non_differentiable(output[3])
        ctx.set_materialize_grads(False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any,
        grad_per_sample: Tensor | None,
        grad_average: Tensor | None,
        grad_commitment: Tensor | None,
        grad_counts: None,
    ) -> tuple[Any, ...]:
        """One pass over the tokens for all gradients that are there."""
        grads = (grad_per_sample, grad_average, grad_commitment)
        if not ctx.needs_input_grad[0] or all(grad is None for grad in grads):
            return None, None, None, None
        (tokens,) = ctx.saved_tensors
        grad_average = None if grad_average is None else grad_average.contiguous()
        grad_tokens = _fsq_entropy_assign_backward(
            tokens,
            grad_per_sample,
            grad_average,
            grad_commitment,
            ctx.levels,
            ctx.inverse_temperature,
            ctx.clamp_per_sample,
        )
        return grad_tokens, None, None, None


class FsqAverageEntropyFunction(OpFunction):
    """Clamped entropy of average distributions [codebooks, K], the mean over codebooks."""

    @staticmethod
    def forward(average: Tensor) -> Tensor:
        """-sum p ln max(p, 1e-5)."""
        return _fsq_entropy_average(average)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        """Keeps the distribution."""
        ctx.save_for_backward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor | None:
        """-(ln max(p, 1e-5) + [p >= 1e-5])."""
        (average,) = ctx.saved_tensors
        return _fsq_entropy_average_backward(average, grad) if ctx.needs_input_grad[0] else None


class MeanOverRanks(torch.autograd.Function):
    """The mean of a tensor over the processes of a group, forward and backward.

    Every rank's loss depends on every rank's distribution, so gradients are averaged as well: the
    mean over ranks of parameter gradients, which DDP takes, is then the gradient of the mean loss.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: distributed.ProcessGroup) -> Tensor:
        """Mean over ranks."""
        ctx.group = group
        return _mean_over_ranks(x, group)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Mean over ranks."""
        return _mean_over_ranks(grad, ctx.group), None


def _mean_over_ranks(x: Tensor, group: distributed.ProcessGroup) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(total, group=group)
    return total / distributed.get_world_size(group)


def fsq_entropy_loss(
    z: Tensor,  # [..., num_codebooks * D, ...]
    levels: Sequence[int],
    *,
    channel_dim: int = -1,
    num_codebooks: int = 1,
    inverse_temperature: float = 100.0,
    diversity_gamma: float = 1.0,
    commitment_weight: float = 0.0,
    clamp_per_sample: bool = False,
    process_group: distributed.ProcessGroup | None = None,
) -> FsqEntropy:
    """Entropy loss of FSQ assignments, its terms, and how often each code is the nearest.

    loss = mean H(p) - diversity_gamma * H(mean p) + commitment_weight * mean (z - code)^2
    Equivalent to: fsq_entropy_loss_reference(z, levels, ...), which takes memory for tokens x
    codebook; this takes memory for the codebook (see Note [Factorised entropy]).

    Args:
        z: the latent before rounding and bounding, as in `fsq`.
        levels, channel_dim, num_codebooks: as in `fsq`; the product of the levels is at most 2^30.
        inverse_temperature: sharpness of the assignment; the logit of code c is
            2 * inverse_temperature * <z, c>.
        diversity_gamma: weight of the codebook entropy.
        commitment_weight: weight of the squared distance to the nearest code, in the loss only.
        clamp_per_sample: whether ln p of single tokens is ln max(p, 1e-5), as published. It makes
            the entropy of an undecided token smaller (at most 11.5 nats) and takes time for tokens
            x codes above 1e-5, but no memory. The entropy of the average is clamped always.
        process_group: its average distributions are averaged, with gradients
            (`torch.distributed.group.WORLD` for all processes); every process must call. None:
            this process alone.

    Returns:
        FsqEntropy: float32 scalars (float64 for float64 z), and int32 counts of this process.
        Without tokens the scalars are NaN.

    Raises:
        ValueError: as `fsq`, and for a codebook above 2^30.
        TypeError: as `fsq`.

    float32, float16 and bfloat16 on cpu and cuda, float64 on cpu; half types are computed in
    float32, under autocast too. GEMMs follow torch's settings (TF32 is off by default).
    Deterministic; differentiable once.

    Source: VidTok's FSQ regulariser; Yu et al. 2023, "Language Model Beats Diffusion", section 3.2.
    """
    if not _native.is_enabled():
        return fsq_entropy_loss_reference(
            z,
            levels,
            channel_dim=channel_dim,
            num_codebooks=num_codebooks,
            inverse_temperature=inverse_temperature,
            diversity_gamma=diversity_gamma,
            commitment_weight=commitment_weight,
            clamp_per_sample=clamp_per_sample,
            process_group=process_group,
        )
    channel_dim = _check_entropy(z, levels, channel_dim, num_codebooks)
    per_sample, average, commitment, counts = FsqAssignmentFunction.apply(
        _tokens(z, channel_dim, num_codebooks),
        list(levels),
        float(inverse_temperature),
        bool(clamp_per_sample),
    )
    if process_group is not None:
        average = MeanOverRanks.apply(average, process_group)
    codebook = FsqAverageEntropyFunction.apply(average)
    loss = per_sample - diversity_gamma * codebook + commitment_weight * commitment
    return FsqEntropy(loss, per_sample, codebook, commitment, counts)


def fsq_codebook_statistics(
    counts: Tensor,  # [num_codebooks, product of levels]
    levels: Sequence[int],
) -> FsqCodebookStatistics:
    """Use, perplexity and dead levels of a codebook from how often each code occurred.

    perplexity = exp(-sum_j f_j ln f_j), f_j = counts_j / sum of counts

    Args:
        counts: integers >= 0, such as `FsqEntropy.counts`, or their sum over batches or ranks.
        levels: as in `fsq`.

    Returns:
        float32 scalars on the device of `counts`; NaN perplexity without a token.

    Raises:
        ValueError: counts of another shape.
    """
    size = math.prod(levels)
    if counts.dim() != 2 or counts.shape[1] != size:
        raise ValueError(
            f"fsq_codebook_statistics: counts must be [num_codebooks, {size}], "
            f"got {list(counts.shape)}"
        )
    frequency = counts / counts.sum(1, keepdim=True)
    perplexity = torch.special.entr(frequency).sum(1).exp().mean()
    dead = torch.zeros(counts.shape[0], device=counts.device)
    rest = counts  # [codebooks, combinations of the channels that are left]
    for count in reversed(levels):  # the last channel is the most significant
        by_level = rest.unflatten(1, (count, -1))
        dead += (by_level.sum(2) == 0).sum(1)
        rest = by_level.sum(1)
    return FsqCodebookStatistics((counts > 0).float().mean(), perplexity, dead.mean())
