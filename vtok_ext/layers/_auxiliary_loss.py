"""What the auxiliary losses of all quantizers share."""

from __future__ import annotations

from torch import Tensor, distributed

from vtok_ext.ops.fsq_codebook_statistics import count_codes, fsq_codebook_statistics


def annealed(weight: float, step: int, num_steps: int, factor: float) -> float:
    """Returns factor * weight at step 0, falling linearly to `weight` at `num_steps`."""
    if num_steps <= 0 or step >= num_steps:
        return weight
    start = weight * factor
    return start - step / num_steps * (start - weight)


def all_ranks(wanted: bool) -> distributed.ProcessGroup | None:
    """Returns the group of all processes of a distributed run if `wanted`, else None."""
    if not (wanted and distributed.is_available() and distributed.is_initialized()):
        return None
    return distributed.group.WORLD


def code_use(indices: Tensor, codebook_size: int) -> dict[str, Tensor]:
    """Returns `codebook_use` and `codebook_perplexity` of a batch, float32 scalars."""
    counts = count_codes(indices.reshape(1, -1).long(), codebook_size)
    statistics = fsq_codebook_statistics(counts, [codebook_size])
    return {"codebook_use": statistics.use, "codebook_perplexity": statistics.perplexity}
