"""The loss of growing: mean absolute error and a weighted regulariser, without an adversary.

    loss = mean |x - y| + kl_weight * KL / N,  KL summed over a clip's latents, N = T H W pixels

A discrete latent has its quantizer's auxiliary loss instead of KL / N, with `aux_weight`. Source:
ProMAG (arXiv 2501.05442), "L1 + KL, no GAN"; the reduction of KL and its weight are ours.
"""

from __future__ import annotations

from torch import Tensor

from vtok_ext.models.encoding import Output

# Per pixel of the clip, not per latent: at 8 channels and 16x8x8 a nat per latent value costs 8e-5,
# under a hundredth of the absolute error that a trained model leaves (0.03 and more).
KL_WEIGHT = 0.01


def growth_loss(
    video: Tensor,  # [B, 3, T, H, W]
    output: Output,
    *,
    kl_weight: float = KL_WEIGHT,
    aux_weight: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the loss, a scalar, and its detached terms: rec_loss, and kl or aux_loss.

    Args:
        video: [B, 3, T, H, W] in [-1, 1].
        output: of the model on it.
        kl_weight: of the KL divergence per pixel.
        aux_weight: of a quantizer's own loss.
    """
    rec = (output.reconstruction.float() - video.float()).abs().mean()
    terms = {"rec_loss": rec}
    loss = rec
    losses = output.encoding.losses
    if "kl_loss" in losses:
        terms["kl"] = losses["kl_loss"] / video[0, 0].numel()
        loss = loss + kl_weight * terms["kl"]
    if "aux_loss" in losses:
        terms["aux_loss"] = losses["aux_loss"]
        loss = loss + aux_weight * losses["aux_loss"]
    return loss, {name: value.detach() for name, value in terms.items()}
