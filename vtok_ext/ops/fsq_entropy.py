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

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from vtok_ext import _native
from vtok_ext.ops._fsq_entropy_kernels import (
    fsq_entropy_assign,
    fsq_entropy_assign_backward,
    fsq_entropy_average,
    fsq_entropy_average_backward,
)
from vtok_ext.ops._library import OpFunction, once_differentiable
from vtok_ext.ops._mean_over_ranks import MeanOverRanks
from vtok_ext.ops.fsq import _check_fsq, fsq_indices_to_codes_reference, fsq_reference
from vtok_ext.ops.fsq_codebook_statistics import count_codes

# The published log argument is clamped here, which caps the entropy of a code at -ln(1e-5) = 11.5
# nats.
LOG_CLAMP = 1e-5
# The average distribution takes 4 bytes per code; reciprocals in the kernels are exact below this.
MAX_CODEBOOK = 2**30


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

    Takes 20 to 28 bytes x tokens x codebook of memory with gradients: over 26 GB for 5,120 tokens
    and 2^18 codes. Arguments, results and errors: as `fsq_entropy_loss`.
    """
    channel_dim = _check_entropy(z, levels, channel_dim, num_codebooks, inverse_temperature)
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
        counts = count_codes(indices, math.prod(levels))
    diversity = _entropy(average).mean()
    loss = per_sample - diversity_gamma * diversity + commitment_weight * commitment
    return FsqEntropy(loss, per_sample, diversity, commitment, counts)


def _check_entropy(
    z: Tensor,
    levels: Sequence[int],
    channel_dim: int,
    num_codebooks: int,
    inverse_temperature: float,
) -> int:
    """Raises for bad arguments; returns `channel_dim` counted from the front."""
    channel_dim = _check_fsq("fsq_entropy_loss", z, levels, channel_dim, num_codebooks)
    if math.prod(levels) > MAX_CODEBOOK:
        raise ValueError(
            "fsq_entropy_loss: levels must have a product of at most 2^30 (the average "
            f"distribution is stored), got {math.prod(levels):.3g}"
        )
    if not 0 <= inverse_temperature < math.inf:
        raise ValueError(
            "fsq_entropy_loss: inverse_temperature must be finite and at least 0, "
            f"got {inverse_temperature}"
        )
    return channel_dim


def _tokens(z: Tensor, channel_dim: int, num_codebooks: int) -> Tensor:
    """z as [codebooks, tokens, D], a view where strides allow."""
    rows = z.movedim(channel_dim, -1).unflatten(-1, (num_codebooks, -1))
    return rows.flatten(0, -3).movedim(-2, 0) if z.dim() > 1 else rows.unsqueeze(1)


class FsqAssignmentFunction(OpFunction):
    """Per-token entropy, average distribution, commitment and counts of [codebooks, N, D]."""

    @staticmethod
    def forward(
        tokens: Tensor, levels: list[int], inverse_temperature: float, clamp_per_sample: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The raw op."""
        return fsq_entropy_assign(tokens, levels, inverse_temperature, clamp_per_sample)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keeps the tokens; their factors are computed again."""
        tokens, ctx.levels, ctx.inverse_temperature, ctx.clamp_per_sample = inputs
        ctx.save_for_backward(tokens)
        ctx.mark_non_differentiable(output[3])
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable("fsq_entropy_loss")
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
        grad_tokens = fsq_entropy_assign_backward(
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
        return fsq_entropy_average(average)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        """Keeps the distribution."""
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable("fsq_entropy_loss")
    def backward(ctx: Any, grad: Tensor) -> Tensor | None:
        """-(ln max(p, 1e-5) + [p >= 1e-5])."""
        (average,) = ctx.saved_tensors
        return fsq_entropy_average_backward(average, grad) if ctx.needs_input_grad[0] else None


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
    channel_dim = _check_entropy(z, levels, channel_dim, num_codebooks, inverse_temperature)
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
