"""Random numbers of batches: from torch's global source, one generator, or one for each sample.

With one generator per sample a sample does not depend on the others of its batch. Generators are
drawn from on their own device: those of the CPU give the same numbers everywhere.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vtok_ext.layers.kl import Generators


def normal_like(x: Tensor, generator: Generators) -> Tensor:
    """Returns standard normal numbers of the shape, dtype and device of x [B, ...]."""
    if generator is None:
        return torch.randn_like(x)

    def draw(shape: torch.Size, source: torch.Generator) -> Tensor:
        return torch.randn(shape, generator=source, device=source.device, dtype=x.dtype)

    return _per_sample(draw, x.shape, generator).to(x.device)


def uniform(batch: int, generator: Generators) -> Tensor:
    """Returns numbers [batch] in [0, 1), of the global source on the CPU."""
    if generator is None:
        return torch.rand(batch)

    def draw(shape: torch.Size, source: torch.Generator) -> Tensor:
        return torch.rand(shape, generator=source, device=source.device)

    return _per_sample(draw, torch.Size([batch]), generator)


def choose(probabilities: Tensor, generator: Generators) -> Tensor:
    """Returns an index [B] drawn from each row of probabilities [B, size]."""
    if generator is None or isinstance(generator, torch.Generator):
        source = probabilities if generator is None else probabilities.to(generator.device)
        chosen = torch.multinomial(source, 1, generator=generator)
    else:
        _check(len(probabilities), len(generator))
        chosen = torch.stack(
            [
                torch.multinomial(row.to(g.device), 1, generator=g)
                for row, g in zip(probabilities, generator, strict=True)
            ]
        )
    return chosen[:, 0].to(probabilities.device)


def _per_sample(
    draw: Callable[[torch.Size, torch.Generator], Tensor], shape: torch.Size, generator: Generators
) -> Tensor:
    if isinstance(generator, torch.Generator):
        return draw(shape, generator)
    assert generator is not None  # callers have dealt with it
    _check(shape[0], len(generator))
    return torch.stack([draw(shape[1:], source) for source in generator])


def _check(batch: int, count: int) -> None:
    if batch != count:
        raise ValueError(f"generator: must be one per sample of {batch}, got {count}")
