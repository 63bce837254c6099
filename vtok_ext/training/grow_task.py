"""Training of grown tokenizers: stage II, the new parts alone, and stage III, the decoder alone.

    grow          growth_loss over what `vt.grow` adds; the base is frozen
    grow_decoder  VidTok's losses (L1, LPIPS, adversary) over all decoders; latents stay as they are

Source: ProMAG (arXiv 2501.05442) for stage II. Stage III is ours: its description is not public.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vtok_ext.metrics import psnr
from vtok_ext.models.promag_grown import MIXINGS, Grown, grow
from vtok_ext.training.growth_loss import KL_WEIGHT, growth_loss
from vtok_ext.training.optimizers import tokenizer_optimizers
from vtok_ext.training.recipe import Recipe, TokenizerRecipe
from vtok_ext.training.task import MicroBatch, Task
from vtok_ext.training.tokenizer_task import TokenizerTask, build_model, to_video


@dataclass(frozen=True)
class GrowSection:
    """How the model grows.

    Attributes:
        mixing: "per_position" or "global", see `vt.grow`.
        kl_weight: of the KL divergence per pixel, see `growth_loss`.
        aux_weight: of a quantizer's own loss.
    """

    mixing: str = "per_position"
    kl_weight: float = KL_WEIGHT
    aux_weight: float = 1.0

    def __post_init__(self) -> None:
        """Checks every field."""
        if self.mixing not in MIXINGS:
            raise ValueError(f"recipe: grow.mixing must be one of {MIXINGS}, got {self.mixing!r}")
        for name in ("kl_weight", "aux_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"recipe: grow.{name} must be >= 0, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class GrowRecipe(Recipe):
    """Of task "grow"; `model` is the base."""

    grow: GrowSection = field(default_factory=GrowSection)

    def __post_init__(self) -> None:
        """Checks what the sections do not know of each other."""
        super().__post_init__()
        if self.model.freeze:
            raise ValueError(
                f"recipe: model.freeze must be empty to grow, where the base is frozen anyway, "
                f"got {self.model.freeze}"
            )


class GrowTask(Task):
    """Grows the recipe's model and trains what is new.

    Raises:
        ValueError, OSError: the base cannot be had, or cannot grow.
    """

    recipe_class: ClassVar[type[Recipe]] = GrowRecipe
    recipe: GrowRecipe

    def __init__(self, recipe: GrowRecipe, device: torch.device) -> None:
        super().__init__(recipe, device)
        base = build_model(recipe.model)
        self.model = grow(base, mixing=recipe.grow.mixing).to(device)
        self.modules = self.networks = {"model": self.model}

    def frozen(self) -> list[nn.Module]:
        """Returns the base."""
        return [self.model.base]

    def notes(self) -> list[str]:
        """Returns what trains and what does not."""
        new = sum(p.numel() for p in self.model.trainable().values())
        old = sum(p.numel() for p in self.model.base.parameters())
        return [f"{self.model.name}: {new:,} parameters train, {old:,} of the base are frozen"]

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Returns those of the new parts."""
        return tokenizer_optimizers(self.model, self.recipe.optimizer, [])

    def accumulate(
        self, batch: MicroBatch, backward: Callable[[Tensor], None]
    ) -> dict[str, Tensor]:
        """Returns the loss terms after adding the gradients of a micro-batch."""
        video = to_video(batch.data)
        with self.autocast():
            output = self.call["model"](video, step=batch.step, generator=batch.generators())
        loss, terms = growth_loss(
            video,
            output,
            kl_weight=self.recipe.grow.kl_weight,
            aux_weight=self.recipe.grow.aux_weight,
        )
        backward(loss)
        return {"loss": loss.detach(), **terms}

    def probe(self, batch: MicroBatch) -> None:
        """Runs the model as `accumulate` does, alone and without gradients."""
        with self.autocast():
            self.model(to_video(batch.data), compute_loss=False, generator=batch.generators())

    def validate(self, samples: list[Tensor]) -> dict[str, float]:
        """Returns `rec_loss` (L1) and `psnr` in dB, means over clips; latents are not sampled."""
        totals = {"rec_loss": 0.0, "psnr": 0.0}
        for clip in samples:
            video = to_video(clip.unsqueeze(0).to(self.device))
            with self.autocast():
                reconstruction = self.model(video).reconstruction.float()
            totals["rec_loss"] += (reconstruction - video).abs().mean().item() / len(samples)
            totals["psnr"] += psnr(reconstruction, video).mean().item() / len(samples)
        return totals


class GrowDecoderTask(TokenizerTask):
    """Stage III: trains all decoders of a grown model, the recipe's `model.weights`.

    Raises:
        ValueError, OSError: as TokenizerTask, or the model has not been grown.
    """

    recipe: TokenizerRecipe

    def __init__(self, recipe: TokenizerRecipe, device: torch.device) -> None:
        super().__init__(recipe, device)
        if not isinstance(self.model, Grown):
            raise ValueError(
                f"grow_decoder: model must be a grown one, got {type(self.model).__name__}"
            )
        self.model.unlock_decoder()

    @property
    def encoder_is_frozen(self) -> bool:
        """Whether the decoder trains alone: always."""
        return True

    @property
    def last_weight(self) -> Tensor:
        """The last weight of the innermost base's decoder."""
        model: Any = self.model
        while isinstance(model, Grown):
            model = model.base
        return next(model.decoder.conv_out.parameters())
