"""The training of CoordTok: encode whole clips, decode a random part of each.

    step 1   1,024 random patches per clip, pixel loss
    step 2   whole frames and LPIPS, from the weights of step 1 with a new optimizer

What a step costs beyond the encoder does not depend on the clip's length. Clips may be shorter than
the model's; their padding is masked as the model is configured to.

The loss is a mean over the clips where the reference takes a sum: AdamW, which divides by the size
of the gradient, trains the same. Source: CoordTok (arXiv 2411.14762), specification section 8.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtok_ext.metrics import psnr
from vtok_ext.models.coordtok import CoordTok
from vtok_ext.models.coordtok_config import CoordTokConfig
from vtok_ext.models.coordtok_sampling import video_patches
from vtok_ext.training.blocks import recompute_activations
from vtok_ext.training.coordtok_loss import PointLoss, PointLossConfig, draw_points
from vtok_ext.training.optimizers import transformer_optimizers
from vtok_ext.training.point_clips import PointClips
from vtok_ext.training.recipe import DataRecipe, ModelRecipe, PerceptualRecipe, Recipe
from vtok_ext.training.sample_pictures import reconstruction_video
from vtok_ext.training.task import MicroBatch, Task
from vtok_ext.training.tokenizer_task import build_model, perceptual_network, to_video


@dataclass(frozen=True)
class PointModelRecipe(ModelRecipe):
    """Which network.

    Attributes:
        recompute_encoder: recompute the encoder's blocks in the backward pass; then memory hardly
            grows with the length of the clips. `run.checkpoint_activations` recomputes all blocks.
    """

    recompute_encoder: bool = False


@dataclass(frozen=True)
class PointLossRecipe(PerceptualRecipe, PointLossConfig):
    """What is minimised: `PointLossConfig`, and where LPIPS comes from.

    Attributes:
        validation_slices: calls of the decoder that a held-out clip is cut into. The published
            training evaluated slices as large as the drawn points: 32 and 8.
    """

    validation_slices: int = 1

    def __post_init__(self) -> None:
        """Checks every field."""
        PointLossConfig.__post_init__(self)
        PerceptualRecipe.__post_init__(self)
        for name in ("perceptual_network", "perceptual_backbone", "perceptual_heads"):
            value, default = getattr(self, name), getattr(PerceptualRecipe, name)
            if value != default and not self.perceptual_weight:
                raise ValueError(
                    f"recipe: loss.{name} must be {json.dumps(default)} with "
                    f"loss.perceptual_weight 0, got {value!r}"
                )
        if self.validation_slices < 1:
            raise ValueError(
                f"recipe: loss.validation_slices must be >= 1, got {self.validation_slices}"
            )


@dataclass(frozen=True)
class PointDataRecipe(DataRecipe):
    """Which clips, of which lengths.

    Attributes:
        min_frames: clips have from so many to `num_frames` real frames, drawn for each clip; null
            for `num_frames` always.
        shortest_video: videos of so few frames are taken too, the rest of their clips being padding
            that the model knows about; null leaves those under `num_frames` out. Held-out videos
            are never shorter.
    """

    min_frames: int | None = None
    shortest_video: int | None = None

    def __post_init__(self) -> None:
        """Checks every field."""
        super().__post_init__()
        least = self.num_frames if self.min_frames is None else self.min_frames
        if not 1 <= least <= self.num_frames:
            raise ValueError(
                f"recipe: data.min_frames must be null or in 1..{self.num_frames}, "
                f"got {self.min_frames}"
            )
        if self.shortest_video is not None and not 1 <= self.shortest_video <= self.num_frames:
            raise ValueError(
                f"recipe: data.shortest_video must be null or in 1..{self.num_frames}, "
                f"got {self.shortest_video}"
            )
        if self.shortest_video is not None and self.folder is None:
            raise ValueError(
                "recipe: data.shortest_video must be null without data.folder, "
                f"got {self.shortest_video}"
            )
        if self.buckets:
            raise ValueError(
                f"recipe: data.buckets must be [] for task 'points', got {self.buckets}"
            )

    @property
    def least_frames(self) -> int | None:
        """See `DataRecipe`."""
        return self.shortest_video


@dataclass(frozen=True)
class PointRecipe(Recipe):
    """Of task "points": a CoordTok trained on random points of its clips."""

    model: PointModelRecipe
    task: str = "points"
    data: PointDataRecipe = field(default_factory=PointDataRecipe)
    loss: PointLossRecipe = field(default_factory=PointLossRecipe)


class PointTask(Task):
    """Trains a CoordTok on random points; see the module.

    Args:
        recipe: all settings.
        device: where to train.

    Raises:
        ValueError, OSError: the model is no CoordTok or does not fit the clips, the points or the
            slices of held-out clips, or LPIPS cannot be had.
    """

    recipe_class: ClassVar[type[Recipe]] = PointRecipe
    recipe: PointRecipe

    def __init__(self, recipe: PointRecipe, device: torch.device) -> None:
        super().__init__(recipe, device)
        if recipe.model.freeze:
            raise ValueError(
                f"recipe: model.freeze must be empty for task 'points', got {recipe.model.freeze}"
            )
        if recipe.optimizer.discriminator_lr is not None:
            raise ValueError(
                "recipe: optimizer.discriminator_lr must be null for task 'points', "
                f"got {recipe.optimizer.discriminator_lr}"
            )
        model: Any = build_model(recipe.model)
        if not isinstance(model, CoordTok):
            raise ValueError(
                f"recipe: model must be a CoordTok for task 'points', got {type(model).__name__}"
            )
        data, shape = recipe.data, model.config.video_shape
        if (data.num_frames > shape[0]) or (data.height, data.width) != shape[1:]:
            raise ValueError(
                f"recipe: data must have clips of {shape[1]}x{shape[2]} and at most {shape[0]} "
                f"frames for this model, got {data.height}x{data.width} and {data.num_frames}"
            )
        _check_patches(recipe, model.config)
        perceptual = perceptual_network(recipe.loss)
        if perceptual is not None:
            perceptual = perceptual.to(device)
        self.model = model.to(device)
        if recipe.model.recompute_encoder and not recipe.run.checkpoint_activations:
            recompute_activations(self.model.encoder)
        self.loss = PointLoss(recipe.loss, model.config, perceptual)
        self.modules = self.networks = {"model": self.model}

    def data(self, warn: Callable[[str], None]) -> tuple[Any, list[Any]]:
        """Returns clips with their numbers of real frames, and held-out ones."""
        settings, seed = self.recipe.data, self.recipe.run.seed
        clips, held_out = super().data(warn)
        least = settings.num_frames if settings.min_frames is None else settings.min_frames
        whole = torch.tensor(settings.num_frames)
        return (
            PointClips(clips, least, settings.num_frames, seed),
            [{"video": clip, "num_frames": whole} for clip in held_out],
        )

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Returns AdamW over every parameter, decay of norms and biases included, as published; or
        Muon for the matrices within, see `transformer_optimizers`."""
        return transformer_optimizers(self.model, self.recipe.optimizer)

    def accumulate(
        self, batch: MicroBatch, backward: Callable[[Tensor], None]
    ) -> dict[str, Tensor]:
        """Returns the loss terms after adding the gradients of a micro-batch."""
        video, num_frames = to_video(batch.data["video"]), batch.data["num_frames"]
        generators = batch.generators()
        points = self._points(num_frames, generators)
        with self.autocast():
            output = self.call["model"](video, points=points, num_frames=num_frames)
            loss, terms = self.loss(output.reconstruction, video, points, generators)
        loss = loss / video.shape[0]
        backward(loss)
        return {"loss": loss.detach(), **terms}

    def _points(self, num_frames: Tensor, generators: list[torch.Generator]) -> Tensor:
        config = self.model.config
        drawn = draw_points(self.recipe.loss, config, num_frames.cpu(), generators)
        return drawn.to(self.device)

    def probe(self, batch: MicroBatch) -> None:
        """Runs the model as `accumulate` does, alone and without gradients."""
        video, num_frames = to_video(batch.data["video"]), batch.data["num_frames"]
        points = self._points(num_frames, batch.generators())
        with self.autocast():
            self.model(video, points=points, num_frames=num_frames)

    def overfit_loss(self, batch: MicroBatch) -> Tensor:
        """Returns the mean squared error of random points, others in every step."""
        video = batch.data
        whole = torch.full((len(video),), video.shape[2])
        points = self._points(whole, batch.generators())
        with self.autocast():
            patches = self.model(video, points=points).reconstruction
        targets = video_patches(video, points, self.model.config.dec_patch_size)
        return (patches.float() - targets).square().mean()

    def validate(self, samples: list[Any]) -> dict[str, float]:
        """Returns `rec_loss`, the mean squared error of whole clips, and `psnr` in dB."""
        totals = {"rec_loss": 0.0, "psnr": 0.0}
        for sample in samples:
            video, reconstruction = self._reconstruct(sample)
            error = (reconstruction - video).square().mean()
            totals["rec_loss"] += error.item() / len(samples)
            totals["psnr"] += psnr(reconstruction, video).mean().item() / len(samples)
        return totals

    def pictures(self, samples: list[Any]) -> dict[str, Tensor]:
        """Returns input, output and error map of each clip, side by side."""
        pairs = (self._reconstruct(sample) for sample in samples)
        return {f"clip-{i}": reconstruction_video(a[0], b[0]) for i, (a, b) in enumerate(pairs)}

    def _reconstruct(self, sample: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Returns video and reconstruction [1, 3, T, H, W] of the real frames of a sample."""
        frames = int(sample["num_frames"])
        video = to_video(sample["video"][None, :, :frames].to(self.device))
        slices = self.recipe.loss.validation_slices
        # In the precision of the weights, as published.
        return video, self.model(video, num_slices=slices).reconstruction


def _check_patches(recipe: PointRecipe, model: CoordTokConfig) -> None:
    """Raises ValueError for clips shorter than a decoded patch, or more slices than patches."""
    frames = model.dec_patch_size[0]
    for name in ("num_frames", "min_frames", "shortest_video"):
        count = getattr(recipe.data, name)
        if count is not None and count < frames:
            raise ValueError(
                f"recipe: data.{name} must be >= {frames}, the frames of a decoded patch of this "
                f"model, got {count}"
            )
    _, rows, columns = model.point_grid()
    patches = math.ceil(recipe.data.num_frames / frames) * rows * columns
    if recipe.loss.validation_slices > patches:
        raise ValueError(
            f"recipe: loss.validation_slices must be <= {patches}, the patches of a held-out clip, "
            f"got {recipe.loss.validation_slices}"
        )
