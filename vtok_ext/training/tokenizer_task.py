"""The training of VidTok: a tokenizer and its discriminator, one step of each per batch.

The discriminator sees the reconstructions that the tokenizer was just trained on. Both gradients
are computed before either optimiser moves; this equals the published order, generator first: the
reconstructions were made before, and the generator's gradient does not need the discriminator's new
weights. Source: VidTok (specification sections 7 and 8).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vtok_ext.metrics import psnr
from vtok_ext.models._registry import create_model, load_model
from vtok_ext.training.checkpoint import latest_checkpoint, read_shapes, read_tensors
from vtok_ext.training.losses import TokenizerLoss
from vtok_ext.training.lpips import published_lpips, random_lpips
from vtok_ext.training.optimizers import tokenizer_optimizers
from vtok_ext.training.parallel import partial_backward
from vtok_ext.training.recipe import ModelRecipe, Recipe, TokenizerRecipe
from vtok_ext.training.sample_pictures import reconstruction_video
from vtok_ext.training.start_weights import start
from vtok_ext.training.task import MicroBatch, Task

# The random LPIPS is an eighth as wide as the published one: its code runs, quickly.
_RANDOM_LPIPS_CHANNELS = (8, 16, 32, 64, 64)


class TokenizerTask(Task):
    """Trains a tokenizer with a `decoder.conv_out` by reconstruction, LPIPS and a discriminator.

    Args:
        recipe: all settings.
        device: where to train.

    Raises:
        ValueError, OSError: the model or the weights of LPIPS cannot be had.
    """

    recipe_class: ClassVar[type[Recipe]] = TokenizerRecipe
    recipe: TokenizerRecipe
    gradient_terms: ClassVar[tuple[str, ...]] = ("d_weight",)

    def __init__(self, recipe: TokenizerRecipe, device: torch.device) -> None:
        super().__init__(recipe, device)
        self.model: Any = build_model(recipe.model).to(device)
        if not hasattr(self, "last_weight"):
            raise ValueError(
                f"train: model must be a VidTok or ProMAG for task {recipe.task}, got "
                f"{self.model.name}; task points trains a CoordTok, task vtok a VTok"
            )
        self.loss = TokenizerLoss(recipe.loss, perceptual_network(recipe.loss)).to(device)
        self.discriminator = self.loss.discriminator
        self.modules = {"model": self.model, "loss": self.loss}
        self.networks = {"model": self.model}
        if self.discriminator is not None:
            self.networks["discriminator"] = self.discriminator
        for part in self.frozen():
            part.requires_grad_(False)

    @property
    def encoder_is_frozen(self) -> bool:
        """Whether the decoder trains alone."""
        return "encoder" in self.recipe.model.freeze

    def frozen(self) -> list[nn.Module]:
        """Returns what does not train: with the encoder also the quantizer behind it."""
        if not self.encoder_is_frozen:
            return []
        return [part for part in (self.model.encoder, self.model.quantizer) if part is not None]

    def begin(self) -> None:
        """Takes over log variance, LeCam averages and discriminator of the stage before."""
        if self.recipe.loss.continue_from is not None:
            continue_losses(self.loss, Path(self.recipe.loss.continue_from))

    def notes(self) -> list[str]:
        """Returns which loss terms a frozen encoder leaves."""
        if not self.encoder_is_frozen:
            return []
        config = self.recipe.loss
        left = ["pixel loss"]
        left += ["LPIPS"] if config.perceptual_weight > 0 else []
        left += ["log variance"] if config.learn_logvar else []
        if self.discriminator is not None:
            left.append(f"adversarial terms from batch {config.discriminator_start} on")
        gone = "kl_loss" if self.model.quantizer is None else "aux_loss"
        return [
            f"the encoder is frozen: of the loss stay {', '.join(left)}; {gone} is a constant and "
            "not computed"
        ]

    def overfit_loss(self, batch: MicroBatch) -> Tensor:
        """Returns the mean squared error of the reconstruction."""
        with self.autocast():
            reconstruction = self.model(batch.data, compute_loss=False).reconstruction
        return (reconstruction.float() - batch.data).square().mean()

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Returns those of the tokenizer with the log variance, and of the discriminator."""
        settings = self.recipe.optimizer
        options: dict[str, Any] = {
            "betas": tuple(settings.betas),
            "weight_decay": settings.weight_decay,
        }
        logvar = [self.loss.logvar] if self.loss.logvar.requires_grad else []
        found = tokenizer_optimizers(self.model, settings, logvar)
        if self.discriminator is not None:
            lr = settings.lr if settings.discriminator_lr is None else settings.discriminator_lr
            parameters = self.discriminator.parameters()
            found["discriminator"] = torch.optim.AdamW(parameters, lr=lr, **options)
        return found

    def accumulate(
        self, batch: MicroBatch, backward: Callable[[Tensor], None]
    ) -> dict[str, Tensor]:
        """Returns the terms of both losses after adding the gradients of a micro-batch."""
        video = to_video(batch.data)
        loss, terms, reconstruction = self._generator(video, batch)
        backward(loss)
        if self.discriminator is not None:
            with self.autocast():
                d_loss, d_terms = self.loss.discriminator_terms(
                    video, reconstruction, batch.step, self.call["discriminator"]
                )
            if d_loss.requires_grad:
                backward(d_loss)
            else:  # before the start they are zero; Adam counts the step nevertheless, as published
                for parameter in self.discriminator.parameters():
                    if parameter.grad is None:
                        parameter.grad = torch.zeros_like(parameter)
            terms |= d_terms
        return {"loss": loss.detach(), **terms}

    def _generator(
        self, video: Tensor, batch: MicroBatch
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Returns the tokenizer's loss, its terms and the reconstruction."""
        frozen = self.encoder_is_frozen
        with self.autocast(), _without_gradients(self.discriminator):
            output = self.call["model"](
                video, step=batch.step, compute_loss=not frozen, generator=batch.generators()
            )
            # Those of a frozen encoder are constants.
            regularization = {} if frozen else output.encoding.losses
            with partial_backward(self.model):
                loss, terms = self.loss.generator_terms(
                    video,
                    output.reconstruction,
                    regularization,
                    self.last_weight,
                    batch.step,
                    batch.loss_scale,
                )
        return loss, terms, output.reconstruction.detach()

    @property
    def last_weight(self) -> Tensor:
        """The decoder's last weight."""
        return next(self.model.decoder.conv_out.parameters())

    def probe(self, batch: MicroBatch) -> None:
        """Runs all networks as `accumulate` does, alone and without gradients."""
        if self.model.quantizer is not None:
            self.model.quantizer.eval()
        with self.autocast():
            reconstruction = self.model(
                to_video(batch.data), compute_loss=False, generator=batch.generators()
            ).reconstruction
            if self.discriminator is not None and self.loss.is_adversarial(batch.step):
                self.discriminator(self.loss.as_seen(reconstruction.float()))

    def validate(self, samples: list[Tensor]) -> dict[str, float]:
        """Returns `rec_loss` and `psnr` in dB, means over clips; latents are not sampled."""
        totals = {"rec_loss": 0.0, "psnr": 0.0}
        for clip in samples:
            video, reconstruction = self._reconstruct(clip)
            with self.autocast():
                rec = self.loss.reconstruction_loss(video, reconstruction)
            totals["rec_loss"] += rec.item() / len(samples)
            totals["psnr"] += psnr(reconstruction.float(), video).mean().item() / len(samples)
        return totals

    def pictures(self, samples: list[Tensor]) -> dict[str, Tensor]:
        """Returns input, output and error map of each clip, side by side."""
        pairs = (self._reconstruct(clip) for clip in samples)
        return {f"clip-{i}": reconstruction_video(a[0], b[0]) for i, (a, b) in enumerate(pairs)}

    def _reconstruct(
        self,
        clip: Tensor,  # [3, T, H, W] uint8
    ) -> tuple[Tensor, Tensor]:
        """Returns video and reconstruction [1, 3, T, H, W]."""
        video = to_video(clip.unsqueeze(0).to(self.device))
        with self.autocast():
            return video, self.model(video).reconstruction


def continue_losses(loss: TokenizerLoss, root: Path) -> None:
    """Returns None after taking over the state of the losses from the newest checkpoint in `root`.

    Raises:
        ValueError: there is no undamaged checkpoint, or its losses are others.
    """
    found = latest_checkpoint(root, lambda line: print(line, file=sys.stderr))
    own = {f"loss.{name}": tensor for name, tensor in loss.state_dict().items()}
    shapes = {} if found is None else read_shapes(found)
    if found is None or any(shapes.get(name) != tensor.shape for name, tensor in own.items()):
        what = "none" if found is None else "one with other losses"
        raise ValueError(
            f"recipe: loss.continue_from must hold a checkpoint with the same losses, got {what} "
            f"in {root}"
        )
    read_tensors(found, own)


def build_model(recipe: ModelRecipe) -> Any:
    """Returns the model that a recipe names, with random or saved weights."""
    if recipe.weights is not None:
        return load_model(recipe.weights)
    assert recipe.name is not None  # checked by the recipe
    model = create_model(recipe.name, **recipe.overrides)
    start(model, recipe.start)
    return model


def perceptual_network(recipe: Any) -> nn.Module | None:
    """Returns the LPIPS that a loss recipe wants, None for a weight of 0.

    Args:
        recipe: a `PerceptualRecipe` with a `perceptual_weight`.

    Raises:
        ValueError, OSError: its files are absent or damaged.
    """
    if recipe.perceptual_weight <= 0:
        return None
    if recipe.perceptual_network == "random":
        return random_lpips(0, _RANDOM_LPIPS_CHANNELS)
    files = (recipe.perceptual_backbone, recipe.perceptual_heads)
    return published_lpips(*files, trust_checkpoint=recipe.trust_checkpoint)


def to_video(
    clips: Tensor,  # [B, 3, T, H, W] uint8
    device: torch.device | None = None,
) -> Tensor:
    """Returns [B, 3, T, H, W] float32 in [-1, 1], on another device if one is given."""
    return clips.to(device, non_blocking=True).float() / 127.5 - 1


@contextmanager
def _without_gradients(network: nn.Module | None) -> Iterator[None]:
    """Within it the parameters of `network` get no gradients, what passes through it does."""
    if network is not None:
        network.requires_grad_(False)
    try:
        yield
    finally:
        if network is not None:
            network.requires_grad_(True)
