"""The training of VTok: its image encoder by masked autoencoding, then tokens and decoder together.

    vtok_encoder  loss of hidden patches of single frames; exports a VTok whose encoder is trained
    vtok          flow matching of the decoder, with gradients into g; the encoder is frozen

Source: VTok (arXiv 2602.04202); the encoder's training is our own, for use without downloads.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vtok_ext.data.captioned import CaptionedClips
from vtok_ext.data.captioned.clips import FPS
from vtok_ext.metrics import psnr
from vtok_ext.models._registry import load_model
from vtok_ext.models.vision_encoder import SmallViT, resized
from vtok_ext.models.vision_mae import MaskedAutoencoder
from vtok_ext.models.vtok import VTok
from vtok_ext.training.optimizers import transformer_optimizers
from vtok_ext.training.recipe import Recipe
from vtok_ext.training.task import MicroBatch, Task
from vtok_ext.training.tokenizer_task import build_model, to_video
from vtok_ext.training.vtok_recipe import VTokRecipe

# Beyond any number of training clips.
HELD_OUT_SEED = 1_000_000_000
# Clips whose features give the statistics by which they are standardised.
_FEATURE_CLIPS = 32


def captioned_clips(recipe: VTokRecipe) -> tuple[CaptionedClips, CaptionedClips]:
    """Returns the clips to train on, and held-out ones of combinations that those do not have."""
    data = recipe.data
    shape = (data.num_frames, data.height, data.width)
    held_out = CaptionedClips(
        max(1, data.validation_clips), *shape, split="test", first_seed=HELD_OUT_SEED
    )
    return CaptionedClips(data.num_clips, *shape), held_out


def build_vtok(recipe: VTokRecipe) -> VTok:
    """Returns the tokenizer that a recipe names. Raises ValueError if it is none, or its encoder
    and the given one differ."""
    model = build_model(recipe.model)
    if not isinstance(model, VTok):
        raise ValueError(f"train: model must be a VTok for task {recipe.task}, got {model.name}")
    if recipe.encoder is not None:
        source = load_model(recipe.encoder)
        if not isinstance(source, VTok):
            raise ValueError(f"train: encoder must be a saved VTok, got {source.name}")
        try:
            model.encoder.load_state_dict(source.encoder.state_dict())
        except RuntimeError as error:
            raise ValueError(
                f"train: encoder must be that of {model.encoder.name}, got {source.encoder.name}"
            ) from error
    return model


def fit_features_if_needed(recipe: VTokRecipe, model: VTok, clips: Any) -> None:
    """Fits the statistics of a VTok's features, unless it comes with those of its own encoder."""
    is_whole = recipe.model.weights is not None and recipe.encoder is None
    if not (is_whole and model.knows_its_features):
        fit_features(model, clips)


def fit_features(model: VTok, clips: Any) -> None:
    """Fits the statistics of a VTok's features to the first clips of a data set."""
    device = model.feature_mean.device
    count = min(_FEATURE_CLIPS, len(clips))
    model.fit_features(to_video(clips[0, i][None]).to(device) for i in range(count))


class _VTokTask(Task):
    """What both trainings share: their clips."""

    recipe_class: ClassVar[type[Recipe]] = VTokRecipe
    recipe: VTokRecipe
    model: Any

    def data(self, warn: Callable[[str], None]) -> tuple[Any, list[Any]]:
        """Returns the data set and held-out clips [3, T, H, W] uint8."""
        if self.recipe.clips == "clips":
            return super().data(warn)
        clips, held_out = captioned_clips(self.recipe)
        return clips, [held_out[0, i] for i in range(self.recipe.data.validation_clips)]

    @property
    def fps(self) -> float | None:
        """Frames per second of the clips."""
        if self.recipe.fps is None and self.recipe.clips == "captioned":
            return FPS
        return self.recipe.fps

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Returns AdamW, or Muon for the matrices within; see `transformer_optimizers`."""
        return transformer_optimizers(self.model, self.recipe.optimizer)


class VTokEncoderTask(_VTokTask):
    """Trains the image encoder of a VTok on one frame of each clip.

    Args:
        recipe: all settings.
        device: where to train.

    Raises:
        ValueError: the model's encoder is a tower of transformers.
    """

    metric: ClassVar[str] = "mae_loss"

    def __init__(self, recipe: VTokRecipe, device: torch.device) -> None:
        super().__init__(recipe, device)
        vtok = build_vtok(recipe)
        if not isinstance(vtok.encoder, SmallViT):
            raise ValueError(
                f"train: encoder must be a vit for task vtok_encoder, got {vtok.encoder.name}"
            )
        self.config, self.name = vtok.config, vtok.name
        self.model = MaskedAutoencoder(vtok.encoder).to(device)
        self.modules = self.networks = {"model": self.model}

    def accumulate(
        self, batch: MicroBatch, backward: Callable[[Tensor], None]
    ) -> dict[str, Tensor]:
        """Returns the loss after adding its gradients."""
        generators = batch.generators()
        frames = torch.stack(
            [
                clip[:, int(torch.randint(clip.shape[1], (), generator=generator))]
                for clip, generator in zip(batch.data, generators, strict=True)
            ]
        )
        with self.autocast():
            loss = self.call["model"](self._pictures(frames), generators)
        backward(loss)
        return {"loss": loss.detach()}

    def _pictures(self, frames: Tensor) -> Tensor:
        """Returns pictures as the encoder gets them, of frames [B, 3, H, W] uint8."""
        return resized(to_video(frames), self.config.image_size)

    def probe(self, batch: MicroBatch) -> None:
        """Runs the network on the first frames."""
        self.model(self._pictures(batch.data[:, :, 0]), torch.Generator().manual_seed(0))

    def validate(self, samples: list[Tensor]) -> dict[str, float]:
        """Returns the mean loss over the middle frames of held-out clips."""
        frames = torch.stack([clip[:, clip.shape[1] // 2] for clip in samples]).to(self.device)
        generator = torch.Generator().manual_seed(0)
        with self.autocast():
            return {"mae_loss": float(self.model(self._pictures(frames), generator))}

    def export(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Writes a VTok with this encoder and random other weights."""
        torch.manual_seed(self.recipe.run.seed)
        vtok = VTok(self.config, self.name)
        stem = "encoder."
        own = {n.removeprefix(stem): t for n, t in weights.items() if n.startswith(stem)}
        vtok.encoder.load_state_dict(own, strict=True)
        vtok.eval().save_pretrained(folder)


class VTokTask(_VTokTask):
    """Trains residual tokens and decoder of a VTok to reconstruct clips.

    Args:
        recipe: all settings.
        device: where to train.
    """

    def __init__(self, recipe: VTokRecipe, device: torch.device) -> None:
        super().__init__(recipe, device)
        self.model = build_vtok(recipe).to(device)
        self.modules = self.networks = {"model": self.model}
        # Now, while no process holds a part of the weights only.
        self._warnings: list[str] = []
        self._data = super().data(self._warnings.append)
        fit_features_if_needed(recipe, self.model, self._data[0])

    def data(self, warn: Callable[[str], None]) -> tuple[Any, list[Any]]:
        """Returns the data set and held-out clips [3, T, H, W] uint8."""
        for line in self._warnings:
            warn(line)
        return self._data

    def frozen(self) -> list[nn.Module]:
        """Returns the image encoder."""
        return [self.model.encoder]

    def accumulate(
        self, batch: MicroBatch, backward: Callable[[Tensor], None]
    ) -> dict[str, Tensor]:
        """Returns the terms of the loss after adding gradients."""
        with self.autocast():
            losses = self._losses(self.call["model"], batch)
        loss = losses["flow_loss"] + losses.get("aux_loss", 0.0)
        backward(loss)
        return {"loss": loss.detach(), **{name: term.detach() for name, term in losses.items()}}

    def _losses(self, network: Any, batch: MicroBatch) -> dict[str, Tensor]:
        video, generators = to_video(batch.data), batch.generators()
        output = network(video, step=batch.step, fps=self.fps, generator=generators)
        return output.encoding.losses

    def probe(self, batch: MicroBatch) -> None:
        """Runs the networks as `accumulate` does."""
        self.model.train()
        self.train_mode()
        with self.autocast():
            self._losses(self.model, batch)

    def overfit_loss(self, batch: MicroBatch) -> Tensor:
        """Returns the loss of flow matching, with other noise in every step."""
        options = {"step": batch.step, "fps": self.fps, "generator": batch.generators()}
        with self.autocast():
            return self.model(batch.data, **options).encoding.losses["flow_loss"]

    def validate(self, samples: list[Tensor]) -> dict[str, float]:
        """Returns `rec_loss`, mean absolute error, and `psnr` in dB of decoded held-out clips."""
        totals = {"rec_loss": 0.0, "psnr": 0.0}
        for clip in samples:
            video, decoded = self._decoded(clip)
            totals["rec_loss"] += float((decoded - video).abs().mean()) / len(samples)
            totals["psnr"] += float(psnr(decoded, video).mean()) / len(samples)
        return totals

    def _decoded(self, clip: Tensor) -> tuple[Tensor, Tensor]:
        """Returns a clip and its reconstruction, [1, 3, T, H, W]."""
        video = to_video(clip[None].to(self.device))
        with self.autocast():
            # The module itself is called, where FSDP2 gathers what it has divided.
            return video, self.model(video, fps=self.fps).reconstruction.float()

    def pictures(self, samples: list[Tensor]) -> dict[str, Tensor]:
        """Returns held-out clips beside their reconstructions."""
        found = {}
        for number, clip in enumerate(samples):
            decoded = self._decoded(clip)[1][0].clamp(-1, 1).add(1).mul(127.5).round()
            pair = [clip.cpu(), decoded.to(torch.uint8).cpu()]
            found[f"reconstruction-{number}"] = torch.cat(pair, dim=3)
        return found
