"""Recipes of generators: the tokenizer that their latents come from, and what is done to them."""

from __future__ import annotations

from dataclasses import dataclass, field

from vtok_ext.training.recipe import Recipe, _at_least, _require

LABELS = ("none", "folders")


@dataclass(frozen=True)
class LatentRecipe:
    """Where latents come from.

    Attributes:
        tokenizer: folder of a saved tokenizer; it is frozen.
        folder: of `vtok tokenize` with that tokenizer: its latents are trained on, and no video is
            read or encoded; null for the clips of section `data`. It decides T, H and W too.
        validation_folder: another one of held-out latents; null holds the last videos of `folder`
            back.
        statistics_clips: clips whose latents give the mean and deviation for all.
        cache: keep the latents of all clips in memory, after encoding each one once; videos then
            give the same window in every epoch.
        labels: "none"; or "folders", the number of the folder in which a file lies, for classes.
        label_field: field of the videos of `folder` that is their class: numbers from 0, or names,
            which are numbered in their order; null for none.
        validation_draws: times and noises per held-out clip.
    """

    tokenizer: str
    folder: str | None = None
    validation_folder: str | None = None
    statistics_clips: int = 2048
    cache: bool = False
    labels: str = "none"
    label_field: str | None = None
    validation_draws: int = 4

    def __post_init__(self) -> None:
        """Checks every field."""
        _at_least("latent", self, 1, "statistics_clips", "validation_draws")
        _require(self.labels in LABELS, "latent.labels", f"one of {LABELS}", self.labels)
        stored = self.folder is not None
        needs = "null without latent.folder"
        _require(
            stored or self.validation_folder is None,
            "latent.validation_folder",
            needs,
            self.validation_folder,
        )
        _require(stored or self.label_field is None, "latent.label_field", needs, self.label_field)
        one = self.labels == "none" or self.label_field is None
        _require(one, "latent.label_field", "null with latent.labels folders", self.label_field)
        _require(not (stored and self.cache), "latent.cache", "false with latent.folder", True)


@dataclass(frozen=True)
class GeneratorRecipe(Recipe):
    """Of tasks "sit" and "gpt": a generator of the latents of a tokenizer.

    `model.name` is one of `vt.list_generators()`; what the tokenizer and the clips decide of its
    configuration (sizes, channels, codes) is filled in where `model.overrides` does not say it.
    """

    latent: LatentRecipe = field(default_factory=lambda: LatentRecipe(""))

    def __post_init__(self) -> None:
        """Checks what concerns several sections."""
        super().__post_init__()
        muon = self.optimizer.muon_lr
        _require(muon is None, "optimizer.muon_lr", "null for a generator", muon)
        _require(self.latent.tokenizer != "", "latent.tokenizer", "the folder of a tokenizer", "")
        _require(not self.model.freeze, "model.freeze", "empty for a generator", self.model.freeze)
        folders, stored = self.latent.labels == "folders", self.latent.folder is not None
        _require(
            not stored or self.data.folder is None,
            "data.folder",
            "null with latent.folder",
            self.data.folder,
        )
        _require(
            not folders or stored or self.data.folder is not None,
            "latent.labels",
            "none without files",
            "folders",
        )
