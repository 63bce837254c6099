"""How much of a codebook is in use: the fraction of codes seen, and their perplexity.

perplexity = exp(-sum p ln p): the number of equally frequent codes that would carry as much.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class CodebookUsage:
    """Use of a codebook by a set of tokens.

    Attributes:
        num_tokens: tokens counted.
        num_used: distinct codes among them.
        fraction_used: num_used / codebook size. Few tokens cannot use a large codebook: it is at
            most num_tokens / codebook size.
        perplexity: 1 (a single code) to num_used (all equally frequent).
        bits_per_token: log2(perplexity), the entropy of the code frequencies.
    """

    num_tokens: int
    num_used: int
    fraction_used: float
    perplexity: float
    bits_per_token: float


class CodebookCounter:
    """Counts codes over any number of batches; memory grows with the distinct codes seen.

    Args:
        codebook_size: number of codes, >= 1; may exceed 2^31.

    Raises:
        ValueError: codebook_size < 1.
    """

    def __init__(self, codebook_size: int) -> None:
        if codebook_size < 1:
            raise ValueError(
                f"codebook_usage: codebook_size must be at least 1, got {codebook_size}"
            )
        self.codebook_size = codebook_size
        self._codes = torch.empty(0, dtype=torch.int64)
        self._counts = torch.empty(0, dtype=torch.int64)

    def update(self, indices: torch.Tensor) -> None:
        """Returns None after counting `indices`, an integer tensor of any shape on any device.

        Raises:
            TypeError: not an integer tensor.
            ValueError: an index outside 0..codebook_size-1.
        """
        if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
            raise TypeError(f"codebook_usage: indices must be integers, got {indices.dtype}")
        if indices.numel() == 0:
            return
        codes, counts = torch.unique(indices.detach().long().cpu(), return_counts=True)
        if codes[0] < 0 or codes[-1] >= self.codebook_size:
            raise ValueError(
                f"codebook_usage: indices must lie in 0..{self.codebook_size - 1}, "
                f"got {int(codes[0])}..{int(codes[-1])}"
            )
        all_counts = torch.cat([self._counts, counts])
        self._codes, position = torch.unique(torch.cat([self._codes, codes]), return_inverse=True)
        self._counts = torch.zeros_like(self._codes).index_add_(0, position, all_counts)

    def result(self) -> CodebookUsage:
        """Returns the usage so far.

        Raises:
            ValueError: nothing was counted.
        """
        num_tokens = int(self._counts.sum())
        if num_tokens == 0:
            raise ValueError("codebook_usage: indices must not be empty, got 0 tokens")
        frequency = self._counts.double() / num_tokens
        entropy = float(-(frequency * frequency.log()).sum().clamp(max=0))
        return CodebookUsage(
            num_tokens=num_tokens,
            num_used=self._codes.numel(),
            fraction_used=self._codes.numel() / self.codebook_size,
            perplexity=math.exp(entropy),
            bits_per_token=entropy / math.log(2),
        )


def codebook_usage(indices: torch.Tensor, codebook_size: int) -> CodebookUsage:
    """Returns the fraction of codes used and the perplexity of their frequencies.

    Args:
        indices: integer tensor of any shape, values 0..codebook_size-1, any device.
        codebook_size: number of codes; the product of the levels for FSQ.

    Raises:
        TypeError: indices are not integers.
        ValueError: no index, or one out of range.

    Deterministic.
    """
    counter = CodebookCounter(codebook_size)
    counter.update(indices)
    return counter.result()
