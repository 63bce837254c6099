"""LFQ: one bit per channel, its sign, with an entropy loss that keeps all codes in use.

    code = sign(z) in {-1, 1}^D,  index = sum_d 2^d [z_d > 0],  d code / d z = 1
    aux  = weight(step) * (mean H(p) - gamma H(mean p)) + commitment_weight * mean (z - code)^2

p_j = softmax_j(2 * inverse_temperature * <z, c_j>) over all 2^D codes, which factorises over bits:
see Note [Entropy of independent bits].
Source: Yu et al. 2023, "Language Model Beats Diffusion" (arXiv 2310.05737), section 3.2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from vtok_ext.layers._auxiliary_loss import all_ranks, annealed, code_use
from vtok_ext.layers._straight_through import straight_through
from vtok_ext.ops._mean_over_ranks import MeanOverRanks

# The average distribution over 2^D codes is stored: 4 MB.
MAX_BITS = 20
# Keeps p ln p and its gradient finite where p underflows.
_SMALLEST = 1e-30

# Note [Entropy of independent bits]
# With c in {-1, 1}^D the distribution of a token is a product of D Bernoulli ones with
# P(bit d) = sigmoid(4 * inverse_temperature * z_d). Its entropy is the sum of theirs. The average
# over tokens is no product, but a token's distribution over 2^D codes is the outer product of
# those over the first and the other half of the bits, so that the average over N tokens is one
# matrix product of [2^(D/2), N] and [N, 2^(D/2)]: for 2^18 codes and 5,120 tokens 21 MB instead
# of 5.4 GB.


class LFQ(nn.Module):
    """Replaces every channel by its sign; has no parameters and no state_dict keys.

    Zero counts as negative. Gradients pass straight through the sign.

    Args:
        num_bits: D, channels of the latent; 2^D codes.
        channel_dim: the dimension of the input that holds the channels; 1 for [B, C, T, H, W].
        entropy_weight, entropy_annealing_steps, entropy_annealing_factor, commitment_weight,
            inverse_temperature, diversity_gamma, synchronize: as for `FSQ`.

    Raises:
        ValueError: num_bits outside 1..20.
    """

    def __init__(
        self,
        num_bits: int,
        *,
        channel_dim: int = 1,
        entropy_weight: float = 0.1,
        entropy_annealing_steps: int = 2000,
        entropy_annealing_factor: float = 3.0,
        commitment_weight: float = 0.25,
        inverse_temperature: float = 100.0,
        diversity_gamma: float = 1.0,
        synchronize: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(num_bits, int) or not 1 <= num_bits <= MAX_BITS:
            raise ValueError(f"LFQ: num_bits must be in 1..{MAX_BITS}, got {num_bits}")
        self.num_bits, self.channel_dim = num_bits, channel_dim
        self.entropy_weight = entropy_weight
        self.entropy_annealing_steps = entropy_annealing_steps
        self.entropy_annealing_factor = entropy_annealing_factor
        self.commitment_weight = commitment_weight
        self.inverse_temperature = inverse_temperature
        self.diversity_gamma = diversity_gamma
        self.synchronize = synchronize

    @property
    def codebook_size(self) -> int:
        """Number of codes."""
        return 2**self.num_bits

    def forward(
        self, z: Tensor, step: int = 0, compute_loss: bool | None = None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Codes, indices and losses.

        Args:
            z: [B, D, ...] floating (channels at `channel_dim`).
            step: optimiser steps done so far, for the annealed entropy weight.
            compute_loss: whether to compute the auxiliary loss; by default in training mode only.

        Returns:
            codes as z, int32 indices [B, ...], -1 where z has a NaN, and float32 scalars (float64
            for float64 z):
                aux_loss: what to minimise.
                entropy, commitment: its terms before they are weighted.
                codebook_use, codebook_perplexity: of this process's tokens.

        Raises:
            ValueError, TypeError: z is not floating or has other than D channels.
        """
        if not z.is_floating_point():
            raise TypeError(f"LFQ: z must be floating, got {z.dtype}")
        if z.shape[self.channel_dim] != self.num_bits:
            raise ValueError(
                f"LFQ: z must have {self.num_bits} channels in dimension {self.channel_dim}, "
                f"got {list(z.shape)}"
            )
        signs = torch.where(z > 0, 1.0, -1.0).to(z.dtype)
        indices = self.codes_to_indices(signs)
        losses = {}
        if self.training if compute_loss is None else compute_loss:
            losses = self._losses(z, signs, indices, step)
        indices = indices.masked_fill(z.isnan().any(self.channel_dim), -1)
        return straight_through(z, signs), indices, losses

    def codes_to_indices(self, codes: Tensor) -> Tensor:
        """int32 indices [B, ...] of codes [B, D, ...]; the first channel is least significant."""
        places = 2 ** torch.arange(self.num_bits, dtype=torch.int32, device=codes.device)
        bits = (codes.movedim(self.channel_dim, -1) > 0).int()
        return (bits * places).sum(-1, dtype=torch.int32)

    def indices_to_codes(self, indices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Codes [B, D, ...] in {-1, 1} of indices [B, ...].

        Raises:
            TypeError, ValueError: indices are not integers, or (CPU) outside 0..2^D - 1.
        """
        if indices.is_floating_point() or indices.dtype == torch.bool:
            raise TypeError(f"LFQ: indices must be integers, got {indices.dtype}")
        # Elsewhere the values would be waited for, and a graph would break.
        if indices.numel() and indices.is_cpu and not torch.compiler.is_compiling():
            low, high = (int(bound) for bound in torch.aminmax(indices))
            if low < 0 or high >= self.codebook_size:
                raise ValueError(
                    f"LFQ: indices must lie in 0..{self.codebook_size - 1}, got {low}..{high}"
                )
        places = torch.arange(self.num_bits, device=indices.device)
        bits = (indices.long().unsqueeze(-1) >> places) & 1
        return (2 * bits - 1).to(dtype).movedim(-1, self.channel_dim)

    def _losses(self, z: Tensor, signs: Tensor, indices: Tensor, step: int) -> dict[str, Tensor]:
        tokens = z.movedim(self.channel_dim, -1).reshape(-1, self.num_bits)
        tokens = tokens.to(torch.promote_types(z.dtype, torch.float32))
        commitment = (z.to(tokens.dtype) - signs.to(tokens.dtype)).square().mean()
        steps, factor = self.entropy_annealing_steps, self.entropy_annealing_factor
        weight = annealed(self.entropy_weight, step, steps, factor)
        entropy = torch.zeros((), device=z.device)
        if weight > 0:
            group = all_ranks(self.synchronize and self.training)
            with torch.autocast(z.device.type, enabled=False):
                logits = 4 * self.inverse_temperature * tokens
                entropy = entropy_of_bits(logits, self.diversity_gamma, group)
        return {
            "aux_loss": weight * entropy + self.commitment_weight * commitment,
            "entropy": entropy,
            "commitment": commitment,
            **code_use(indices, self.codebook_size),
        }

    def extra_repr(self) -> str:
        """Bits, for printing."""
        return f"num_bits={self.num_bits}"


def entropy_of_bits(
    logits: Tensor,  # [N, D]
    diversity_gamma: float = 1.0,
    group: distributed.ProcessGroup | None = None,
) -> Tensor:
    """Returns mean H(p) - gamma H(mean p) over N tokens of D bits with the given log odds, in nats.

    Exact; memory for N x 2^(D/2). With a `group`, the mean distribution is that of its processes.
    """
    ones = logits.sigmoid()
    # H = -P ln P - (1 - P) ln (1 - P), with logarithms that do not underflow.
    per_sample = -(ones * F.logsigmoid(logits) + (1 - ones) * F.logsigmoid(-logits)).sum(1).mean()
    both = torch.stack([1 - ones, ones], dim=2)  # [N, D, 2]
    half = logits.shape[1] // 2
    average = _joint(both[:, :half]).T @ _joint(both[:, half:]) / logits.shape[0]
    if group is not None:
        average = MeanOverRanks.apply(average, group)
    diversity = -(average * average.clamp(min=_SMALLEST).log()).sum()
    return per_sample - diversity_gamma * diversity


def _joint(both: Tensor) -> Tensor:
    """Returns [N, 2^d], the products of one of both probabilities of every bit of [N, d, 2]."""
    joint = both.new_ones(both.shape[0], 1)
    for bit in both.unbind(1):
        joint = (joint.unsqueeze(2) * bit.unsqueeze(1)).flatten(1)
    return joint
