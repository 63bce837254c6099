"""How much of a codebook is in use, from how often each code is the nearest one.

    use = codes that occur / codes,  perplexity = exp(-sum_j f_j ln f_j),  f_j = counts_j / tokens

`metrics.codebook_usage` counts over a whole data set; this one works on a batch, on its device and
without waiting for it.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


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


def count_codes(
    indices: Tensor,  # [codebooks, tokens], -1 is not counted
    codebook_size: int,
) -> Tensor:  # [codebooks, codebook size] int32
    """How often each code occurs."""
    books = indices.shape[0]
    start = torch.arange(0, books * codebook_size, codebook_size, device=indices.device)
    flat = (indices.clamp(min=0) + start[:, None]).flatten()
    counts = torch.zeros(books * codebook_size, dtype=torch.int32, device=indices.device)
    return counts.index_add_(0, flat, (indices >= 0).int().flatten()).view(books, codebook_size)


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
