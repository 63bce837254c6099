"""FSQ as a layer: quantizes a latent and, in training, computes its auxiliary loss.

    aux = weight(step) * (H_per_sample - H_codebook) + commitment_weight * mean((z - codes)^2)

Source: VidTok's FSQ regulariser (specification section 6.1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vtok_ext.layers._auxiliary_loss import all_ranks, annealed
from vtok_ext.ops.fsq import _check_levels, fsq, fsq_codes_to_indices, fsq_indices_to_codes
from vtok_ext.ops.fsq_codebook_statistics import fsq_codebook_statistics
from vtok_ext.ops.fsq_entropy import fsq_entropy_loss


class FSQ(nn.Module):
    """Rounds every channel to one of `levels` values; has no parameters and no state_dict keys.

    Args:
        levels: D level counts in [2, 256]; the codebook has their product of entries.
        channel_dim: the dimension of the input that holds the channels; 1 for [B, C, T, H, W].
        num_codebooks: independent codebooks; the input has num_codebooks * D channels.
        entropy_weight: final weight of the entropy term, 0 switches it off.
        entropy_annealing_steps: steps over which the weight falls linearly to `entropy_weight`.
        entropy_annealing_factor: the weight at step 0 is this times `entropy_weight`.
        commitment_weight: weight of mean((z - codes)^2), 0 switches it off.
        inverse_temperature, diversity_gamma: as in `fsq_entropy_loss`.
        clamp_per_sample: as in `fsq_entropy_loss`; True, the published loss, by default. False is
            the exact entropy, which is faster while tokens are undecided.
        synchronize: in training with torch.distributed, whether the codebook entropy is that of all
            ranks' tokens. Every rank must then call the layer equally often.

    Raises:
        ValueError, TypeError: levels or num_codebooks out of range.
    """

    def __init__(
        self,
        levels: Sequence[int],
        *,
        channel_dim: int = 1,
        num_codebooks: int = 1,
        entropy_weight: float = 0.1,
        entropy_annealing_steps: int = 2000,
        entropy_annealing_factor: float = 3.0,
        commitment_weight: float = 0.25,
        inverse_temperature: float = 100.0,
        diversity_gamma: float = 1.0,
        clamp_per_sample: bool = True,
        synchronize: bool = True,
    ) -> None:
        super().__init__()
        _check_levels("FSQ", levels, num_codebooks)
        self.levels = tuple(levels)
        self.channel_dim = channel_dim
        self.num_codebooks = num_codebooks
        self.entropy_weight = entropy_weight
        self.entropy_annealing_steps = entropy_annealing_steps
        self.entropy_annealing_factor = entropy_annealing_factor
        self.commitment_weight = commitment_weight
        self.inverse_temperature = inverse_temperature
        self.diversity_gamma = diversity_gamma
        self.clamp_per_sample = clamp_per_sample
        self.synchronize = synchronize

    @property
    def codebook_size(self) -> int:
        """Number of entries of one codebook."""
        return math.prod(self.levels)

    def annealed_entropy_weight(self, step: int) -> float:
        """Weight of the entropy term after `step` optimiser steps."""
        steps, factor = self.entropy_annealing_steps, self.entropy_annealing_factor
        return annealed(self.entropy_weight, step, steps, factor)

    def forward(
        self, z: Tensor, step: int = 0, compute_loss: bool | None = None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Codes, indices and losses.

        Args:
            z: [B, num_codebooks * D, ...] floating (channels at `channel_dim`).
            step: optimiser steps done so far, for the annealed entropy weight.
            compute_loss: whether to compute the auxiliary loss; by default in training mode only.

        Returns:
            codes as z, indices (see `fsq`), and float32 scalars, none when not computed:
                aux_loss: what to minimise.
                entropy, commitment: its terms before they are weighted.
                codebook_use, codebook_perplexity, dead_levels: of this process's tokens, not
                    differentiable, with the entropy only; see `FsqCodebookStatistics`.
        """
        codes, indices = fsq(
            z, self.levels, channel_dim=self.channel_dim, num_codebooks=self.num_codebooks
        )
        if compute_loss is None:
            compute_loss = self.training
        return codes, indices, self._losses(z, codes, step) if compute_loss else {}

    def _losses(self, z: Tensor, codes: Tensor, step: int) -> dict[str, Tensor]:
        weight = self.annealed_entropy_weight(step)
        if weight <= 0:
            commitment = torch.zeros((), device=z.device)
            if self.commitment_weight > 0:
                commitment = (z.float() - codes.detach().float()).square().mean()
            losses = {"entropy": torch.zeros((), device=z.device), "commitment": commitment}
            return {"aux_loss": self.commitment_weight * commitment, **losses}
        terms = fsq_entropy_loss(
            z,
            self.levels,
            channel_dim=self.channel_dim,
            num_codebooks=self.num_codebooks,
            inverse_temperature=self.inverse_temperature,
            diversity_gamma=self.diversity_gamma,
            clamp_per_sample=self.clamp_per_sample,
            process_group=all_ranks(self.synchronize and self.training),
        )
        statistics = fsq_codebook_statistics(terms.counts, self.levels)
        return {
            "aux_loss": weight * terms.loss + self.commitment_weight * terms.commitment,
            "entropy": terms.loss,
            "commitment": terms.commitment,
            "codebook_use": statistics.use,
            "codebook_perplexity": statistics.perplexity,
            "dead_levels": statistics.dead_levels,
        }

    def indices_to_codes(self, indices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Codes [B, num_codebooks * D, ...] of indices; see `fsq_indices_to_codes`."""
        return fsq_indices_to_codes(
            indices,
            self.levels,
            channel_dim=self.channel_dim,
            num_codebooks=self.num_codebooks,
            dtype=dtype,
        )

    def codes_to_indices(self, codes: Tensor) -> Tensor:
        """Indices of codes; see `fsq_codes_to_indices`."""
        return fsq_codes_to_indices(
            codes, self.levels, channel_dim=self.channel_dim, num_codebooks=self.num_codebooks
        )

    def extra_repr(self) -> str:
        """Levels and codebooks, for printing."""
        return f"levels={self.levels}, num_codebooks={self.num_codebooks}"
