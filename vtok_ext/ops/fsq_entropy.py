"""Entropy of FSQ code assignments: confident per token, diverse over the codebook.

    p_j = softmax_j(2 * inverse_temperature * <z, c_j>) over every code c_j of the product codebook
    loss = mean over tokens of H(p) - diversity_gamma * H(mean over tokens of p)

Source: VidTok's FSQ regulariser; the idea is MAGVIT-v2's entropy penalty (Yu et al. 2023).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vtok_ext.ops.fsq import _check_fsq, fsq_indices_to_codes_reference

# The published log argument is clamped here, which caps the entropy of a code at -ln(1e-5) = 11.5
# nats.
LOG_CLAMP = 1e-5


class FsqEntropy(NamedTuple):
    """Scalars, in nats: loss = per_sample - diversity_gamma * codebook."""

    loss: Tensor
    per_sample: Tensor
    codebook: Tensor


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
) -> FsqEntropy:
    """The entropy loss by its definition: a dense softmax over the whole codebook for every token.

    Takes about 16 bytes x tokens x codebook of memory with gradients: 21 GB for 5,120 tokens and
        2^18 codes.

    Args:
        z: the latent before rounding and bounding, as in `fsq`.
        levels, channel_dim, num_codebooks: as in `fsq`.
        inverse_temperature: sharpness of the assignment; affinity is 2 * inverse_temperature * <z,
            c>.
        diversity_gamma: weight of the codebook entropy.

    Returns:
        loss, per_sample and codebook entropy, float32 scalars in nats (float64 for float64 z).

    Raises: as `fsq`.
    """
    channel_dim = _check_fsq("fsq_entropy_loss", z, levels, channel_dim, num_codebooks)
    real = z.dtype if z.dtype == torch.float64 else torch.float32
    with torch.autocast(z.device.type, enabled=False):
        tokens = z.to(real).movedim(channel_dim, -1).reshape(-1, len(levels))
        every_index = torch.arange(math.prod(levels), device=z.device)
        codebook = fsq_indices_to_codes_reference(every_index, levels, dtype=real)
        probabilities = (2 * inverse_temperature * (tokens @ codebook.T)).softmax(-1)
        per_sample = _entropy(probabilities).mean()
        average = probabilities.unflatten(0, (-1, num_codebooks)).mean(0)
        diversity = _entropy(average).mean()
    return FsqEntropy(per_sample - diversity_gamma * diversity, per_sample, diversity)
