"""Builds from a recipe what is trained and what it is trained on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vtok_ext.data.clips import Augmentation, Clips, ProceduralClips, VideoClips
from vtok_ext.data.frame_sampling import FrameSampling
from vtok_ext.data.video_list import list_videos
from vtok_ext.models._registry import create_model, load_model
from vtok_ext.training.blocks import compile_blocks, recompute_activations
from vtok_ext.training.ema import ExponentialMovingAverage
from vtok_ext.training.losses import TokenizerLoss
from vtok_ext.training.lpips import published_lpips, random_lpips
from vtok_ext.training.recipe import DataRecipe, LossRecipe, ModelRecipe, Recipe

# Beyond any number of training clips, so that the held-out ones are none of them.
_VALIDATION_SEED = 1_000_000_000
# The random LPIPS is an eighth as wide as the published one: its code runs, quickly.
_RANDOM_LPIPS_CHANNELS = (8, 16, 32, 64, 64)


@dataclass
class Training:
    """All that changes while training, and the recipe that says how.

    Attributes:
        recipe: the settings.
        device: where everything is.
        model: the tokenizer.
        loss: loss terms, log variance, discriminator.
        optimizer: of the tokenizer and the log variance.
        discriminator_optimizer: None without a discriminator.
        averages: moving averages of the model's weights, None if not wanted.
        step: steps done.
    """

    recipe: Recipe
    device: torch.device
    model: Any
    loss: TokenizerLoss
    optimizer: torch.optim.Optimizer
    discriminator_optimizer: torch.optim.Optimizer | None
    averages: ExponentialMovingAverage | None
    step: int = 0

    def state_dict(self) -> dict[str, Any]:
        """Returns everything that a continued run needs, but the random generators."""
        adversary = self.discriminator_optimizer
        return {
            "step": self.step,
            "recipe": self.recipe.to_dict(),
            "model": self.model.state_dict(),
            "loss": self.loss.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "discriminator_optimizer": adversary.state_dict() if adversary else None,
            "averages": self.averages.state_dict() if self.averages else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Returns None after taking over a state. Raises ValueError for that of another recipe."""
        try:
            self.model.load_state_dict(state["model"], strict=True)
            self.loss.load_state_dict(state["loss"], strict=True)
            self.optimizer.load_state_dict(state["optimizer"])
            for own, saved in (
                (self.discriminator_optimizer, state["discriminator_optimizer"]),
                (self.averages, state["averages"]),
            ):
                if (own is None) != (saved is None):
                    raise ValueError("discriminator or moving averages are new or gone")
                if own is not None:
                    own.load_state_dict(saved)
        except (RuntimeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"train: the checkpoint must be of the same model and losses, got {reason}"
            ) from error
        self.step = state["step"]

    def train_mode(self) -> None:
        """Returns None with everything in training mode but what is frozen."""
        self.model.train()
        self.loss.train()
        for part in frozen_parts(self.model, self.recipe.model):
            part.eval()

    @property
    def last_weight(self) -> torch.Tensor:
        """The decoder's last weight."""
        return next(self.model.decoder.conv_out.parameters())

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """bfloat16, or None for float32."""
        return torch.bfloat16 if self.recipe.run.precision == "bfloat16" else None


def build_training(recipe: Recipe, device: torch.device) -> Training:
    """Returns a training at step 0, the same on every process.

    Raises:
        ValueError, OSError: the model or the weights of LPIPS cannot be had.
    """
    torch.manual_seed(recipe.run.seed)
    model = _model(recipe.model).to(device)
    loss = TokenizerLoss(recipe.loss, _perceptual(recipe.loss)).to(device)
    for part in frozen_parts(model, recipe.model):
        part.requires_grad_(False)
    trained = [p for p in (*model.parameters(), loss.logvar) if p.requires_grad]
    settings = recipe.optimizer
    options: dict[str, Any] = {
        "betas": tuple(settings.betas),
        "weight_decay": settings.weight_decay,
    }
    adversary = None
    if loss.discriminator is not None:
        lr = settings.lr if settings.discriminator_lr is None else settings.discriminator_lr
        adversary = torch.optim.AdamW(loss.discriminator.parameters(), lr=lr, **options)
    decay = settings.ema_decay
    training = Training(
        recipe=recipe,
        device=device,
        model=model,
        loss=loss,
        optimizer=torch.optim.AdamW(trained, lr=settings.lr, **options),
        discriminator_optimizer=adversary,
        averages=None if decay is None else ExponentialMovingAverage(model, decay),
    )
    if recipe.run.compile:
        compile_blocks(model)
    if recipe.run.checkpoint_activations:
        recompute_activations(model)
    return training


def _model(recipe: ModelRecipe) -> Any:
    if recipe.weights is not None:
        return load_model(recipe.weights)
    assert recipe.name is not None  # checked by the recipe
    return create_model(recipe.name, **recipe.overrides)


def frozen_parts(model: Any, recipe: ModelRecipe) -> list[nn.Module]:
    """Returns what does not train: with the encoder also the quantizer behind it."""
    if "encoder" not in recipe.freeze:
        return []
    return [model.encoder] + ([] if model.quantizer is None else [model.quantizer])


def _perceptual(recipe: LossRecipe) -> nn.Module | None:
    if recipe.perceptual_weight <= 0:
        return None
    if recipe.perceptual_network == "random":
        return random_lpips(0, _RANDOM_LPIPS_CHANNELS)
    return published_lpips(recipe.perceptual_backbone, recipe.perceptual_heads)


def build_clips(
    recipe: DataRecipe, seed: int, warn: Callable[[str], None]
) -> tuple[Clips, list[torch.Tensor]]:
    """Returns the clips to train on and the held-out ones [3, T, H, W] uint8.

    Args:
        recipe: which clips.
        seed: decides where windows of video files begin.
        warn: called with one line for every file that is left out.

    Raises:
        ValueError: no usable files, or fewer held-out ones than wanted.
    """
    shape = (recipe.num_frames, recipe.height, recipe.width)
    wanted = recipe.validation_clips
    if recipe.folder is None:
        motion = recipe.motion
        held_out: Clips = ProceduralClips(max(1, wanted), *shape, _VALIDATION_SEED, motion)
        procedural = ProceduralClips(recipe.num_clips, *shape, 0, motion)
        return procedural, [held_out[0, i] for i in range(wanted)]
    clips = _video_clips(recipe, seed, warn)
    sources = [clips]
    if wanted:
        if recipe.validation_folder is None:
            raise ValueError(
                "train: data.validation_folder must be given for data.validation_clips "
                f"{wanted}, got null"
            )
        sources.append(_held_out_clips(recipe, warn))
        if len(sources[1]) < wanted:
            raise ValueError(
                f"train: data.validation_folder must hold {wanted} usable files, "
                f"got {len(sources[1])}"
            )
    for source in sources:
        for line in source.unreadable:
            warn(f"left out: {line}")
    return clips, [sources[-1][0, i] for i in range(wanted)]


def _video_clips(recipe: DataRecipe, seed: int, warn: Callable[[str], None]) -> VideoClips:
    videos = list_videos(str(recipe.folder), root=recipe.root, fraction=recipe.fraction, warn=warn)
    rate = recipe.fps
    return VideoClips(
        videos,
        FrameSampling(
            recipe.num_frames,
            None if not rate else rate[0] if len(rate) == 1 else (rate[0], rate[1]),
            recipe.sampling,
        ),
        recipe.all_buckets(),
        augmentation=Augmentation(recipe.crop, recipe.zoom, recipe.flip),
        seed=seed,
        scan=recipe.scan,
        damage_log=None if recipe.damage_log is None else Path(recipe.damage_log),
    )


def _held_out_clips(recipe: DataRecipe, warn: Callable[[str], None]) -> VideoClips:
    """Clips from the beginning of each video, by the published rule at 8 fps where that is used."""
    fps = recipe.validation_fps
    sampling = FrameSampling(recipe.num_frames, fps, "timestamps", "first")
    if recipe.sampling == "reference" and fps is not None:
        sampling = FrameSampling(recipe.num_frames, fps, "reference", "first")
    videos = list_videos(str(recipe.validation_folder), root=recipe.root, warn=warn)
    return VideoClips(videos, sampling, [(recipe.num_frames, recipe.height, recipe.width)])
