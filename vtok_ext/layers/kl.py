"""Diagonal Gaussian posterior of a continuous latent, and its KL divergence from N(0, 1).

    mean, logvar = moments;  latent = mean + exp(logvar / 2) * noise, or mean
    kl_loss = sum(mean^2 + var - 1 - logvar) / (2 B)

Source: Kingma and Welling (arXiv 1312.6114), appendix B; reduction and clamp as in VidTok.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# Bounds of logvar: standard deviations from 3e-7 to 2.2e4, so that exp and its gradient stay
# finite.
LOGVAR_RANGE = (-30.0, 20.0)
# Sources of noise: the global one, one for a batch, or one for each of its samples.
Generators = torch.Generator | Sequence[torch.Generator] | None


def kl_posterior(
    moments: Tensor,  # [B, 2 C, ...]
    sample: bool = False,
    generator: Generators = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the latent [B, C, ...] of a posterior, and its losses.

    Args:
        moments: [B, 2 C, ...]: C channels of mean, then C of log variance, clamped to [-30, 20].
        sample: draw from the posterior instead of returning its mean.
        generator: source of the noise; default the global CPU one on every device, so that a seed
            gives the same latent everywhere; or one generator per sample, whose latent then does
            not depend on the others of its batch.

    Returns:
        The mean in the dtype of `moments`, or a sample in float32 (float64 of float64); and
        {"kl_loss"}: a scalar in that dtype, summed over C and positions, averaged over B.

    Raises:
        ValueError: as many generators as samples are wanted, and there are more or fewer.
    """
    mean, logvar = moments.chunk(2, dim=1)
    wide = torch.promote_types(moments.dtype, torch.float32)
    mean_wide, logvar_wide = mean.to(wide), logvar.to(wide).clamp(*LOGVAR_RANGE)
    terms = mean_wide.square() + logvar_wide.exp() - 1 - logvar_wide
    losses = {"kl_loss": 0.5 * terms.sum() / moments.shape[0]}
    if not sample:
        return mean, losses
    noise = _noise(mean.shape, generator).to(mean.device)
    return mean_wide + torch.exp(0.5 * logvar_wide) * noise, losses


def _noise(shape: torch.Size, generator: Generators) -> Tensor:
    if generator is None or isinstance(generator, torch.Generator):
        device = "cpu" if generator is None else generator.device
        return torch.randn(shape, generator=generator, device=device)
    if len(generator) != shape[0]:
        raise ValueError(
            f"kl_posterior: generator must be one per sample of {shape[0]}, got {len(generator)}"
        )
    return torch.stack([torch.randn(shape[1:], generator=g, device=g.device) for g in generator])
