"""Adversarial loss terms: what discriminator and generator minimise, LeCam, the adaptive weight.

Sources: hinge, Lim and Ye (arXiv 1705.02894); vanilla, Goodfellow et al. (arXiv 1406.2661); LeCam,
Tseng et al., "Regularizing generative adversarial networks under limited data" (arXiv 2104.03310),
equation 4; adaptive weight, Esser et al., VQGAN (arXiv 2012.09841), equation 7. Constants as in
VidTok (specification section 7).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok_ext.training.distributed import mean_over_ranks

DISCRIMINATOR_LOSSES = ("hinge", "vanilla")
_LECAM_DECAY = 0.999
# Keep the quotient of gradient norms finite and bounded.
_WEIGHT_EPS = 1e-4
_LARGEST_WEIGHT = 1e4


def discriminator_loss(
    real: Tensor,  # logits, any shape
    fake: Tensor,  # logits, any shape
    kind: str = "hinge",
) -> Tensor:
    """Returns a scalar: half the mean penalty of real logits plus half that of fake ones.

    hinge: relu(1 - real), relu(1 + fake);  vanilla: softplus(-real), softplus(fake)

    Raises:
        ValueError: another kind.
    """
    if kind not in DISCRIMINATOR_LOSSES:
        raise ValueError(
            f"discriminator_loss: kind must be one of {DISCRIMINATOR_LOSSES}, got {kind!r}"
        )
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def generator_loss(
    fake: Tensor,  # logits [N, ...]
    cross_entropy: bool = True,
) -> Tensor:
    """Returns a scalar: mean softplus(-m) over the mean logits m of the N samples, or -mean logits.

    Args:
        fake: logits [N, ...] of reconstructions.
        cross_entropy: the first of the two; else the second.
    """
    if cross_entropy:
        return F.softplus(-fake.flatten(1).mean(1)).mean()
    return -fake.mean()


class LeCam(nn.Module):
    """Keeps the discriminator's logits near moving averages of the opposite kind's mean logit.

    mean relu(real - fake_mean)^2 + mean relu(real_mean - fake)^2; both averages start at 0, are
    updated before use, are the same on every rank, and are part of the state_dict.
    """

    real_mean: Tensor
    fake_mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        # float64, as published: float32 would lose the increments of a decay of 0.999.
        self.register_buffer("real_mean", torch.zeros((), dtype=torch.float64))
        self.register_buffer("fake_mean", torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def update(self, real: Tensor, fake: Tensor) -> None:
        """Returns None after moving both averages by these logits of all ranks."""
        means = mean_over_ranks(torch.stack([real.mean(), fake.mean()])).double()
        self.real_mean.lerp_(means[0], 1 - _LECAM_DECAY)
        self.fake_mean.lerp_(means[1], 1 - _LECAM_DECAY)

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        """Returns the penalty, a scalar; the averages stay as they are."""
        above = F.relu(real - self.fake_mean.to(real.dtype)).square().mean()
        below = F.relu(self.real_mean.to(fake.dtype) - fake).square().mean()
        return above + below


def adaptive_weight(
    reconstruction_loss: Tensor,  # scalar
    adversarial_loss: Tensor,  # scalar
    last_weight: Tensor,  # the generator's last weight
    loss_scale: float = 1.0,
) -> Tensor:
    """Returns |grad reconstruction| / (|grad adversarial| + 1e-4), clamped to [0, 1e4], detached.

    Gradients are those of `last_weight`, averaged over ranks; both graphs stay usable. NaN if
    one of them is not finite, which clamping would hide.

    Args:
        reconstruction_loss, adversarial_loss: scalars.
        last_weight: any shape.
        loss_scale: losses are multiplied by it and their gradients divided: with float16 these
            overflow or vanish without it, see Note [Loss scale].

    Raises:
        ValueError: `last_weight` does not require gradients.
    """
    if not last_weight.requires_grad:
        raise ValueError(
            "adaptive_weight: last_weight must require gradients, got a frozen one: "
            "a frozen decoder cannot be trained adversarially"
        )

    def norm_of_gradient(loss: Tensor) -> Tensor:
        gradient = torch.autograd.grad(loss * loss_scale, last_weight, retain_graph=True)[0]
        return mean_over_ranks(gradient).norm()

    losses = (reconstruction_loss, adversarial_loss)
    norms = torch.stack([norm_of_gradient(loss) for loss in losses]) / loss_scale
    weight = (norms[0] / (norms[1] + _WEIGHT_EPS)).clamp(0, _LARGEST_WEIGHT)
    return weight.where(norms.isfinite().all(), torch.nan)
