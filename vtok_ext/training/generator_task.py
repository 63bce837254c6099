"""The training of a generator on the latents, or ids, of a frozen tokenizer.

    SiT   flow matching loss of normalised latents; their statistics are part of the checkpoint
    GPT   negative log likelihood per token

Latents are made while training, or once for all clips (`latent.cache`), or come from a folder of
`vtok tokenize` (`latent.folder`). Source: CoordTok (specification sections 9.2 to 9.4).
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vtok_ext.models._checkpoint import is_checkpoint
from vtok_ext.models._generators import create_generator, load_generator
from vtok_ext.models._registry import load_model
from vtok_ext.models.generator import LatentOrigin
from vtok_ext.models.gpt import GPT, balanced_factors
from vtok_ext.models.latent_statistics import Latent, LatentStatistics, StatisticsCounter
from vtok_ext.models.sit import SiT
from vtok_ext.training.generator_recipe import GeneratorRecipe
from vtok_ext.training.latent_clips import CachedLatents, LabelledClips
from vtok_ext.training.latent_folder import LatentFolder
from vtok_ext.training.optimizers import transformer_optimizers
from vtok_ext.training.parallel import is_sharded, plain_class
from vtok_ext.training.recipe import Recipe
from vtok_ext.training.task import MicroBatch, Task

# Clips that are encoded together for the statistics.
_STATISTICS_BATCH = 8
_VALIDATION_SEED = 20_240


class GeneratorTask(Task):
    """Trains a generator; see the subclasses for what it is.

    Args:
        recipe: all settings.
        device: where to train.

    Raises:
        ValueError, OSError: there is no such tokenizer or generator, or the two do not fit.
    """

    recipe_class: ClassVar[type[Recipe]] = GeneratorRecipe
    metric: ClassVar[str] = "val_loss"
    generator_class: ClassVar[type]
    # What it makes, as `vtok tokenize` calls it.
    kind: ClassVar[str]
    # Fewer steps than `sample` takes by itself: pictures interrupt the training.
    picture_options: ClassVar[dict[str, Any]] = {}
    recipe: GeneratorRecipe

    def __init__(self, recipe: GeneratorRecipe, device: torch.device) -> None:
        super().__init__(recipe, device)
        self.tokenizer = load_model(recipe.latent.tokenizer).to(device).requires_grad_(False)
        self.clips: Any = None
        self.stored: LatentFolder | None = None
        if recipe.latent.folder is not None:
            self.stored = LatentFolder(recipe, self.tokenizer, self.kind)
        self.model: Any = self._build().to(device)
        if not isinstance(self.model, self.generator_class):
            raise ValueError(
                f"train: model must be a {self.generator_class.__name__} for task {recipe.task!r}, "
                f"got {type(self.model).__name__}"
            )
        self.origin = LatentOrigin(
            *self._clip_shape(),
            self._rate(),
            tokenizer_id=self.tokenizer.model_id,
            tokenizer=_lasting(recipe.latent.tokenizer),
        )
        self.modules, self.networks = {"model": self.model}, {"model": self.model}

    def _clip_shape(self) -> tuple[int, int, int]:
        """Returns T, H, W of the clips that latents stand for."""
        if self.stored is not None:
            return self.stored.shape
        data = self.recipe.data
        return data.num_frames, data.height, data.width

    def _rate(self) -> float | None:
        """Returns frames per second, known where every clip is brought to one rate."""
        if self.stored is not None:
            return self.stored.fps
        data = self.recipe.data
        return data.fps[0] if data.folder is not None and len(data.fps) == 1 else None

    def _build(self) -> nn.Module:
        recipe = self.recipe.model
        if recipe.weights is not None:
            if is_checkpoint(recipe.weights):
                raise ValueError(
                    f"train: model.weights must be a folder, got {recipe.weights}; `vtok convert` "
                    "with --name makes one of a released checkpoint"
                )
            model = load_generator(recipe.weights)
            if model.origin is not None:
                self.tokenizer.check_origin("train", model.origin.tokenizer_id)
            return model
        assert recipe.name is not None  # checked by the recipe
        return create_generator(recipe.name, **{**self._implied(), **recipe.overrides})

    @abstractmethod
    def _implied(self) -> dict[str, Any]:
        """Returns the fields of the configuration that tokenizer and clips decide."""

    @abstractmethod
    def encode(self, clips: Tensor) -> Latent:
        """Returns the latents, or ids, of clips [B, 3, T, H, W] uint8."""

    def facts(self) -> dict[str, Any]:
        """Returns which tokenizer the latents, and their statistics, are of."""
        return {"tokenizer": self.tokenizer.model_id}

    def check_facts(self, facts: dict[str, Any]) -> None:
        """Raises ValueError for a run on the latents of another tokenizer."""
        before, now = facts.get("tokenizer"), self.tokenizer.model_id
        if before not in (None, now):
            raise ValueError(
                f"train: latent.tokenizer must be {before}, with which the run began, got {now}"
            )

    def data(self, warn: Callable[[str], None]) -> tuple[Any, list[Any]]:
        """Returns clips or latents to train on, and held-out ones."""
        settings = self.recipe
        if self.stored is not None:
            if self.stored.num_classes is not None:
                self._check_classes(self.stored.num_classes, self.stored.names_classes)
            else:
                self._require_one_class()
            self.clips, held_out = self.stored.split()
            return self.clips, held_out
        if settings.latent.labels == "none":
            self._require_one_class()
        clips, held_out = super().data(warn)
        if settings.latent.labels == "folders":
            assert settings.data.folder is not None  # checked by the recipe
            clips = LabelledClips(clips, settings.data.folder)
            self._check_classes(len(clips.names))
            held_out = self._labelled_held_out(held_out, clips.names)
        if settings.latent.cache:
            if settings.data.num_workers:
                raise ValueError(
                    "train: data.num_workers must be 0 with latent.cache, "
                    f"got {settings.data.num_workers}"
                )
            clips = CachedLatents(clips, lambda batch: self.encode(batch.to(self.device)))
        self.clips = clips
        return clips, held_out

    def _check_classes(self, count: int, is_exact: bool = True) -> None:
        known = self.model.config.num_classes
        if known < count or (is_exact and known != count):
            what = f"{count}, the number of folders with videos"
            if self.stored is not None:
                what = f"{count}{'' if is_exact else ' or more'}, as the labels of the latents have"
            raise ValueError(f"train: model.overrides.num_classes must be {what}, got {known}")

    def _require_one_class(self) -> None:
        count = self.model.config.num_classes
        if count != 1:  # the first one alone would train
            raise ValueError(
                f"train: model.overrides.num_classes must be 1 without latent.labels or "
                f"latent.label_field, got {count}"
            )

    def _labelled_held_out(self, held_out: list[Any], names: list[str]) -> list[Any]:
        from vtok_ext.training.setup import held_out_clips

        data = self.recipe.data
        if not held_out:
            return []
        assert data.validation_folder is not None  # there are held-out clips
        files = held_out_clips(data, lambda line: None)  # what is left out was said before
        labels = LabelledClips(files, data.validation_folder, names).labels
        # Read again, because only what is read says which video it is from.
        return [(clip, labels[i]) for i, clip in files.readable(len(held_out)).items()]

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Returns AdamW over every parameter."""
        return transformer_optimizers(self.model, self.recipe.optimizer)

    def accumulate(
        self, batch: MicroBatch, backward: Callable[[Tensor], None]
    ) -> dict[str, Tensor]:
        """Returns the loss after adding its gradients."""
        loss = self._loss(batch, self.call["model"])
        backward(loss)
        return {"loss": loss.detach()}

    def probe(self, batch: MicroBatch) -> None:
        """Runs the network as `accumulate` does, alone and without gradients."""
        self._loss(batch, self.model)

    def _loss(self, batch: MicroBatch, call: Callable[..., Any]) -> Tensor:
        latent, labels = self._latents(batch.data)
        with self.autocast():
            return self.model.loss(latent, labels, batch.generators(), call).mean()

    def _latents(self, data: Any) -> tuple[Latent, Tensor | None]:
        """Returns latents, or ids, and labels of collated items."""
        labels = None
        if isinstance(data, list | tuple):
            data, labels = data
        is_clip = isinstance(data, Tensor) and data.dtype == torch.uint8
        return (self.encode(data) if is_clip else _in_float32(data)), labels

    def validate(self, samples: list[Any]) -> dict[str, float]:
        """Returns `val_loss`: the loss of held-out clips at times and noises that stay the same."""
        total, draws = 0.0, self.recipe.latent.validation_draws
        for i, sample in enumerate(samples):
            clip, label = sample if isinstance(sample, tuple) else (sample, 0)
            latent = self._latents(self._batch([clip]))[0]
            labels = torch.tensor([label], device=self.device)
            for draw in range(draws):
                generator = torch.Generator().manual_seed(_VALIDATION_SEED + i * draws + draw)
                with self.autocast():
                    total += self.model.loss(latent, labels, generator).item()
        return {"val_loss": total / (len(samples) * draws)}

    def _batch(self, items: list[Any]) -> Any:
        """Returns clips or latents without labels, collated, where the task is."""
        batch = torch.utils.data.default_collate(items)
        if isinstance(batch, dict):
            return {name: plane.to(self.device) for name, plane in batch.items()}
        return batch.to(self.device)

    def pictures(self, samples: list[Any]) -> dict[str, Tensor]:
        """Returns as many new videos as there are samples, from the same noise every time.

        Their classes come in turn. None of a model that FSDP2 has divided: sampling reads weights
        outside of its forward pass.
        """
        if is_sharded(self.model):
            return {}
        self.model.origin = self.origin
        found = {}
        for i in range(len(samples)):
            generator = torch.Generator().manual_seed(_VALIDATION_SEED + i)
            labels = torch.tensor([i % self.model.config.num_classes])
            latent = self.model.sample(
                1, labels=labels, generator=generator, **self.picture_options
            )
            found[f"sample-{i}"] = self.model.decode(self.tokenizer, latent)[0].cpu()
        return found

    def export(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Writes the generator with the facts about its latents."""
        plain = plain_class(self.model)(self.model.config, self.model.name)
        plain.load_state_dict(weights, strict=True)
        plain.origin, plain.statistics = self.origin, self.model.statistics
        plain.eval().save_pretrained(folder)


def _lasting(source: str) -> str:
    """Returns a path that holds in other folders too; a hub id stays as it is."""
    return os.path.abspath(source) if os.path.exists(source) else source


def _in_float32(latent: Latent) -> Latent:
    """Returns latents as they are computed with; they may be stored in 16 bits. Ids stay ids."""
    if isinstance(latent, dict):
        return {name: plane.float() for name, plane in latent.items()}
    return latent.float() if latent.is_floating_point() else latent


class _KeptStatistics(nn.Module):
    """The statistics as buffers, so that they are in the checkpoints; `known` is 0 before."""

    def __init__(self, parts: tuple[str, ...], channels: int) -> None:
        super().__init__()
        self.parts = parts
        self.register_buffer("known", torch.zeros((), dtype=torch.int32))
        for part in parts:
            self.register_buffer(f"mean_{part}", torch.zeros(channels))
            self.register_buffer(f"std_{part}", torch.ones(channels))

    def keep(self, statistics: LatentStatistics) -> None:
        """Returns None after taking over statistics."""
        for part in self.parts:
            self.get_buffer(f"mean_{part}").copy_(statistics.mean[part])
            self.get_buffer(f"std_{part}").copy_(statistics.std[part])
        self.get_buffer("known").fill_(1)

    def statistics(self) -> LatentStatistics:
        """Returns what is kept."""
        mean, std = (
            {part: self.get_buffer(f"{kind}_{part}").cpu().clone() for part in self.parts}
            for kind in ("mean", "std")
        )
        return LatentStatistics(mean, std)


class SiTTask(GeneratorTask):
    """Trains a SiT on planes of CoordTok or grids of a continuous VidTok."""

    generator_class = SiT
    kind = "latent"
    picture_options: ClassVar[dict[str, Any]] = {
        "sampler": "ode",
        "method": "heun",
        "num_steps": 16,
    }

    def __init__(self, recipe: GeneratorRecipe, device: torch.device) -> None:
        super().__init__(recipe, device)
        config = self.model.config
        self.kept = _KeptStatistics(config.parts(), config.in_channels).to(device)
        if self.model.statistics is not None:  # of a generator that is trained on
            self.kept.keep(self.model.statistics)
        self.modules["statistics"] = self.kept

    def _implied(self) -> dict[str, Any]:
        if self.tokenizer.is_discrete:
            raise ValueError(
                f"train: latent.tokenizer must be continuous for a SiT, got {self.tokenizer.name}; "
                "a GPT takes tokens"
            )
        if self.stored is not None:
            latent = self._batch([self.stored.example()])
        else:
            empty = torch.zeros(1, 3, *self._clip_shape(), dtype=torch.uint8)
            latent = self.encode(empty.to(self.device))
        if isinstance(latent, dict):
            size = (latent["yt"].shape[1], *latent["xy"].shape[1:3])
            return {"latent": "triplane", "input_size": size, "in_channels": latent["xy"].shape[3]}
        size = tuple(latent.shape[2:])
        return {"latent": "grid", "input_size": size, "in_channels": latent.shape[1]}

    @torch.no_grad()
    def encode(self, clips: Tensor) -> Latent:
        """Returns the latents of clips [B, 3, T, H, W] uint8."""
        return self.tokenizer.encode(clips).latent

    def prepare(self) -> None:
        """Makes sure of the statistics: measured within a step, they would be undone with it."""
        self._ensure_statistics()

    def validate(self, samples: list[Any]) -> dict[str, float]:
        """Returns `val_loss`, see `GeneratorTask`."""
        self._ensure_statistics()
        return super().validate(samples)

    def pictures(self, samples: list[Any]) -> dict[str, Tensor]:
        """Returns new videos, see `GeneratorTask`."""
        self._ensure_statistics()
        return super().pictures(samples)

    def _ensure_statistics(self) -> None:
        """Takes the statistics of the checkpoint, or measures them before the first step."""
        if self.model.statistics is not None:
            return
        if not bool(self.kept.get_buffer("known")):
            self.kept.keep(self._measured())
        self.model.statistics = self.kept.statistics()

    def _measured(self) -> LatentStatistics:
        """Returns the statistics of clips that are spread over the first epoch.

        Every process measures the same clips, so that all have the same numbers.
        """
        counter, count = StatisticsCounter(), len(self.clips)
        wanted = min(count, self.recipe.latent.statistics_clips)
        indices = [i * count // wanted for i in range(wanted)]
        for start in range(0, wanted, _STATISTICS_BATCH):
            items = [self.clips[0, i] for i in indices[start : start + _STATISTICS_BATCH]]
            first = [item[0] if isinstance(item, tuple) else item for item in items]
            counter.update(self._latents(self._batch(first))[0])
        return counter.result()


class GPTTask(GeneratorTask):
    """Trains a GPT on the ids of a discrete tokenizer."""

    generator_class = GPT
    kind = "tokens"

    def _implied(self) -> dict[str, Any]:
        if not self.tokenizer.is_discrete:
            raise ValueError(
                f"train: latent.tokenizer must be discrete for a GPT, got {self.tokenizer.name}; "
                "a SiT takes continuous latents"
            )
        grid = self.tokenizer.token_grid(*self._clip_shape())
        size = self.tokenizer.codebook_size
        levels = getattr(self.tokenizer.config, "levels", ())
        return {"codebook_size": size, "grid": grid, "factors": balanced_factors(levels)}

    @torch.no_grad()
    def encode(self, clips: Tensor) -> Latent:
        """Returns the ids of clips [B, 3, T, H, W] uint8."""
        return self.tokenizer.tokenize(clips).ids
