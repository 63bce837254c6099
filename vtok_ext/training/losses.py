"""The training loss of a tokenizer: reconstruction, perceptual, regularisation, adversarial.

    rec  = |x - y| or (x - y)^2, plus perceptual_weight * LPIPS per image
    nll  = sum over C, H, W of (rec / exp(logvar) + logvar), mean over images
    G    = nll + active * discriminator_weight * d * g + aux_weight * aux + kl_weight * kl
    D    = active * (hinge or vanilla + lecam_weight * LeCam)

x is the video and y its reconstruction; d is the adaptive weight, g the generator's adversarial
term; active is 0 before batch `discriminator_start`, else 1. Source: VidTok (specification section
7). LPIPS is added to every element of an image, hence counts C H W times.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vtok_ext.training.adversarial import (
    DISCRIMINATOR_LOSSES,
    LeCam,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
)
from vtok_ext.training.discriminators import PatchDiscriminator2d, PatchDiscriminator3d

PIXEL_LOSSES = ("l1", "l2")
DISCRIMINATORS = ("2d", "3d", "none")


def batches_of_global_steps(global_steps: int) -> int:
    """Returns the batches after which a counter that grows by two per batch reaches a number.

    Published settings count optimiser steps of generator and discriminator together: 20,001 of
    them are reached at batch 10,001.
    """
    return -(-global_steps // 2)


@dataclass(frozen=True)
class LossConfig:
    """What is minimised; the defaults are those of all released VidTok configurations.

    Attributes:
        pixel: "l1" or "l2".
        perceptual_weight: of LPIPS, 0 switches it off.
        learn_logvar, logvar: whether the log variance of the reconstruction is trained; its start.
        kl_weight, aux_weight: of a continuous latent's KL divergence and a quantizer's own loss.
        discriminator: "2d" sees frames, "3d" sees clips, "none".
        discriminator_width: channels of its first layer.
        discriminator_start: batches before adversarial terms count.
        discriminator_weight: of the adversarial term, times the adaptive weight.
        discriminator_loss: "hinge" or "vanilla".
        generator_cross_entropy: the generator's term, see `generator_loss`.
        lecam_weight: of the discriminator's regulariser, 0 switches it off.
    """

    pixel: str = "l1"
    perceptual_weight: float = 1.0
    learn_logvar: bool = True
    logvar: float = 0.0
    kl_weight: float = 1e-6
    aux_weight: float = 1.0
    discriminator: str = "2d"
    discriminator_width: int = 64
    discriminator_start: int = batches_of_global_steps(20001)
    discriminator_weight: float = 0.2
    discriminator_loss: str = "hinge"
    generator_cross_entropy: bool = True
    lecam_weight: float = 0.005

    def __post_init__(self) -> None:
        """Checks every field."""
        for name, choices in (
            ("pixel", PIXEL_LOSSES),
            ("discriminator", DISCRIMINATORS),
            ("discriminator_loss", DISCRIMINATOR_LOSSES),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"loss: {name} must be one of {choices}, got {getattr(self, name)!r}"
                )
        for name in ("perceptual_weight", "kl_weight", "aux_weight", "discriminator_weight"):
            self._require(name, 0)
        self._require("lecam_weight", 0)
        self._require("discriminator_start", 0)
        self._require("discriminator_width", 1)
        if not math.isfinite(self.logvar):
            raise ValueError(f"loss: logvar must be finite, got {self.logvar}")

    def _require(self, name: str, minimum: float) -> None:
        value = getattr(self, name)
        if not minimum <= value < math.inf:
            raise ValueError(f"loss: {name} must be a number >= {minimum}, got {value!r}")


class TokenizerLoss(nn.Module):
    """Loss terms of one batch; holds everything about them that is trained or remembered.

    Its state_dict is log variance, LeCam averages and discriminator; LPIPS, which is constant, is
    not part of it.

    Args:
        config: weights and choices.
        perceptual: module of two image batches that returns [N, 1, 1, 1]; not needed with
            perceptual_weight 0.

    Raises:
        ValueError: a perceptual weight without a perceptual network.
    """

    discriminator: nn.Module | None

    def __init__(self, config: LossConfig, perceptual: nn.Module | None = None) -> None:
        super().__init__()
        if config.perceptual_weight > 0 and perceptual is None:
            raise ValueError(
                "TokenizerLoss: perceptual must be a network for perceptual_weight "
                f"{config.perceptual_weight}, got None"
            )
        self.config = config
        # In a tuple so that it is neither saved nor trained.
        self._perceptual = (perceptual,)
        self.logvar = nn.Parameter(torch.tensor(config.logvar), requires_grad=config.learn_logvar)
        width = config.discriminator_width
        builders = {"2d": PatchDiscriminator2d, "3d": PatchDiscriminator3d}
        build = builders.get(config.discriminator)
        self.discriminator = build(width) if build else None
        self.lecam = LeCam()

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        if self._perceptual[0] is not None:
            self._perceptual[0]._apply(fn)
        return self

    def is_adversarial(self, batch: int) -> bool:
        """Returns whether adversarial terms count in batch `batch` (from 0)."""
        return self.discriminator is not None and batch >= self.config.discriminator_start

    def generator_terms(
        self,
        video: Tensor,  # [B, 3, T, H, W]
        reconstruction: Tensor,  # [B, 3, T, H, W]
        regularization: Mapping[str, Tensor],
        last_weight: Tensor,
        batch: int,
        loss_scale: float = 1.0,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns what the tokenizer minimises, and detached scalars for the log.

        Args:
            video: [B, 3, T, H, W] in [-1, 1].
            reconstruction: as `video`.
            regularization: `Encoding.losses`: `aux_loss`, `kl_loss` or neither.
            last_weight: the decoder's last weight, for the adaptive weight.
            batch: number of this batch, from 0.
            loss_scale: of float16, for the gradients of the adaptive weight; `d_weight` is NaN if
                they are not finite nevertheless.

        Raises:
            ValueError: shapes differ, or `last_weight` is frozen while adversarial.
        """
        if video.shape != reconstruction.shape or video.dim() != 5:
            raise ValueError(
                f"TokenizerLoss: video and reconstruction must be equal [B, 3, T, H, W], got "
                f"{list(video.shape)} and {list(reconstruction.shape)}"
            )
        video, reconstruction = video.float(), reconstruction.float()
        pixel, perceptual = self._reconstruction_terms(video, reconstruction)
        rec = pixel + self.config.perceptual_weight * perceptual
        elements = video[0, :, 0].numel()  # C H W of an image
        nll = elements * (rec * torch.exp(-self.logvar) + self.logvar)
        loss = nll + self._regularization(regularization)
        seen = {"rec_loss": rec, "pixel_loss": pixel, "nll_loss": nll, "logvar": self.logvar}
        if self.config.perceptual_weight > 0:
            seen["perceptual_loss"] = perceptual
        if self.is_adversarial(batch):
            g = self._generator_adversarial(reconstruction)
            weight = adaptive_weight(nll, g, last_weight, loss_scale)
            weight = weight * self.config.discriminator_weight
            loss = loss + weight * g
            seen |= {"g_loss": g, "d_weight": weight}
        seen |= dict(regularization)
        return loss, {name: value.detach() for name, value in seen.items()}

    def reconstruction_loss(self, video: Tensor, reconstruction: Tensor) -> Tensor:
        """Returns the mean of rec, a scalar: pixel loss plus weighted LPIPS."""
        pixel, perceptual = self._reconstruction_terms(video.float(), reconstruction.float())
        return pixel + self.config.perceptual_weight * perceptual

    def _reconstruction_terms(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        difference = x - y
        pixel = difference.abs() if self.config.pixel == "l1" else difference.square()
        if self.config.perceptual_weight <= 0:
            return pixel.mean(), pixel.new_zeros(())
        network = self._perceptual[0]
        assert network is not None  # checked at construction
        return pixel.mean(), network(_frames(x), _frames(y)).mean()

    def _regularization(self, terms: Mapping[str, Tensor]) -> Tensor | float:
        weights = {"aux_loss": self.config.aux_weight, "kl_loss": self.config.kl_weight}
        return sum((weights[k] * terms[k] for k in weights if k in terms), 0.0)

    def _generator_adversarial(self, reconstruction: Tensor) -> Tensor:
        assert self.discriminator is not None  # checked by is_adversarial
        logits = self.discriminator(self.as_seen(reconstruction)).float()
        return generator_loss(logits, self.config.generator_cross_entropy)

    def as_seen(self, video: Tensor) -> Tensor:
        """Returns what the discriminator sees of a video: its frames, or itself."""
        return _frames(video) if self.config.discriminator == "2d" else video

    def discriminator_terms(
        self,
        video: Tensor,  # [B, 3, T, H, W]
        reconstruction: Tensor,  # [B, 3, T, H, W]
        batch: int,
        discriminator: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns what the discriminator minimises, and detached scalars for the log.

        Before `discriminator_start` the loss is a zero without a graph, but LeCam's averages
        already follow the logits.

        Args:
            video, reconstruction: [B, 3, T, H, W]; no gradient goes back into them.
            batch: number of this batch, from 0.
            discriminator: what to call instead of `self.discriminator`, such as DDP around it.

        Raises:
            ValueError: there is no discriminator.
        """
        run = discriminator or self.discriminator
        if run is None:
            raise ValueError("TokenizerLoss: discriminator must be 2d or 3d for this, got 'none'")
        active = self.is_adversarial(batch)
        with torch.set_grad_enabled(active and torch.is_grad_enabled()):
            # Two calls: real and fake are normalised each by their own statistics.
            real = run(self.as_seen(video.detach().float()).contiguous()).float()
            fake = run(self.as_seen(reconstruction.detach().float()).contiguous()).float()
            self.lecam.update(real, fake)
            lecam = self.lecam(real, fake)
            base = discriminator_loss(real, fake, self.config.discriminator_loss)
            loss = float(active) * (base + self.config.lecam_weight * lecam)
        seen = {"d_loss": loss, "d_base_loss": base, "lecam_loss": lecam}
        seen |= {"logits_real": real.mean(), "logits_fake": fake.mean()}
        return loss, {name: value.detach() for name, value in seen.items()}


def _frames(
    video: Tensor,  # [B, C, T, H, W]
) -> Tensor:
    """Returns the images [B T, C, H, W] of a video."""
    return video.transpose(1, 2).flatten(0, 1)
