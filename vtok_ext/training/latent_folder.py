"""Latents, or ids, that `vtok tokenize` wrote, as the data of a generator.

Which of them are trained on and which are held out, what class each is of, and whether they are
those of the tokenizer: nothing is encoded any more.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from torch import Tensor

from vtok_ext.data.latent_shards import LatentDataset
from vtok_ext.training.generator_recipe import GeneratorRecipe


class StoredLatents:
    """Some of the latents of a folder: a latent, or (latent, label), at (epoch, index).

    Args:
        latents: all of the folder.
        chosen: indices of those that are meant.
        labels: the class of each of the chosen ones; None for none.
    """

    def __init__(
        self, latents: LatentDataset, chosen: Sequence[int], labels: Sequence[int] | None
    ) -> None:
        self.latents, self.chosen, self.labels = latents, list(chosen), labels

    def __len__(self) -> int:
        """Number of latents of an epoch."""
        return len(self.chosen)

    def __getitem__(self, place: tuple[int, int]) -> Any:
        """Returns the latent, or (latent, label), at (epoch, index)."""
        index = place[1]
        latent = self.latents[self.chosen[index]]
        return latent if self.labels is None else (latent, self.labels[index])


class LatentFolder:
    """What a recipe says of `latent.folder`, after it was looked at.

    Args:
        recipe: whose `latent.folder` is given.
        tokenizer: that the latents must be of.
        kind: "latent" or "tokens", what they must be.

    Attributes:
        shape: (T, H, W) of the clips that the latents stand for.
        fps: frames per second of all of them, None if unknown or different.
        num_classes: of the labels, None without.
        names_classes: whether the classes are numbered here, so that there are just so many.

    Raises:
        FileNotFoundError, ValueError: no finished folder, one of another model or kind or of clips
            of several shapes, or videos without the label.
    """

    def __init__(self, recipe: GeneratorRecipe, tokenizer: Any, kind: str) -> None:
        self.settings, self.num_held_out = recipe.latent, recipe.data.validation_clips
        assert self.settings.folder is not None  # the caller asked
        self.latents = self._opened(self.settings.folder, "folder", tokenizer, kind)
        self.shape, self.fps = _clip_shape(self.latents, "folder"), _rate(self.latents)
        self.held_out: LatentDataset | None = None
        if self.settings.validation_folder is not None:
            where = "validation_folder"
            self.held_out = self._opened(self.settings.validation_folder, where, tokenizer, kind)
            found = _clip_shape(self.held_out, where)
            if found != self.shape:
                raise ValueError(
                    f"train: latent.validation_folder must hold clips of {self.shape} (T, H, W) as "
                    f"latent.folder, got {found}"
                )
        self.names_classes = False
        self._class_of: dict[Any, int] | None = None
        self.num_classes: int | None = None
        if self.settings.labels == "folders" or self.settings.label_field is not None:
            self._number_classes()

    def _opened(self, folder: str, key: str, tokenizer: Any, kind: str) -> LatentDataset:
        latents = LatentDataset(folder)
        manifest = latents.manifest
        if manifest["model_id"] != tokenizer.model_id:
            raise ValueError(
                f"train: latent.{key} must be of latent.tokenizer, {tokenizer.model_id}, got "
                f"latents of {manifest['model_id']} in {folder}"
            )
        if manifest["kind"] != kind:
            raise ValueError(
                f"train: latent.{key} must be made with --output {kind} for this generator, got "
                f"{manifest['kind']} in {folder}"
            )
        if not len(latents):
            raise ValueError(f"train: latent.{key} must hold latents, got none in {folder}")
        return latents

    def _number_classes(self) -> None:
        values = self._classes(self.latents)
        if self.settings.label_field and all(str(value).isdecimal() for value in values):
            self._class_of = {value: int(value) for value in values}
            self.num_classes = max(map(int, values)) + 1
            return
        names = sorted(set(map(str, values)))
        self._class_of = {value: names.index(str(value)) for value in values}
        self.num_classes, self.names_classes = len(names), True

    def _classes(self, latents: LatentDataset) -> list[Any]:
        """Returns what says the class of each latent: a value of the field, or a folder."""
        name = self.settings.label_field
        found = []
        for entry in latents.entries:
            folders = PurePosixPath(entry["video"]).parts[:-1]
            value = folders[0] if name is None and folders else entry["fields"].get(name)
            if not isinstance(value, str | int) or isinstance(value, bool):
                needed = "lie in the folder of its class" if name is None else f"have {name!r}"
                raise ValueError(
                    f"train: every video of the latents must {needed} for labels, got {value!r} of "
                    f"{entry['video']}"
                )
            found.append(value)
        return found

    def _labels(self, latents: LatentDataset) -> list[int] | None:
        if self._class_of is None:
            return None
        values = self._classes(latents)
        unknown = sorted({str(value) for value in values if value not in self._class_of})
        if unknown:
            raise ValueError(
                "train: held-out latents must be of classes that are trained on, got "
                f"{', '.join(unknown[:5])}"
            )
        return [self._class_of[value] for value in values]

    def split(self) -> tuple[StoredLatents, list[Any]]:
        """Returns the latents to train on, and `data.validation_clips` held-out ones.

        The latter are the first of `latent.validation_folder`; without it the first of the last
        videos, of which none is trained on.

        Raises:
            ValueError: there are not so many.
        """
        wanted, labels = self.num_held_out, self._labels(self.latents)
        first, held_out = len(self.latents), []
        if wanted:
            source, start = self.held_out, 0
            if source is None:
                source, start = self.latents, self._first_held_out(wanted)
                first = start
            if not first or len(source) - start < wanted:
                raise ValueError(
                    f"train: there must be {wanted} held-out latents for data.validation_clips, "
                    f"and others to train on, got {len(source)} in {source.folder}"
                )
            own = self._labels(source)
            places = range(start, start + wanted)
            stored = StoredLatents(source, places, own and [own[i] for i in places])
            held_out = [stored[0, i] for i in range(wanted)]
        return StoredLatents(self.latents, range(first), labels and labels[:first]), held_out

    def _first_held_out(self, wanted: int) -> int:
        """Returns the index of the first latent of the last videos that have so many together."""
        first = max(0, len(self.latents) - wanted)
        entries = self.latents.entries
        while first and entries[first]["video"] == entries[first - 1]["video"]:
            first -= 1
        return first

    def example(self) -> Tensor | dict[str, Tensor]:
        """Returns the first latent."""
        return self.latents[0]


def _clip_shape(latents: LatentDataset, key: str) -> tuple[int, int, int]:
    """Returns (T, H, W) of all clips of a folder."""
    shapes = {(entry["num_frames"], *entry["size"]): None for entry in latents.entries}
    first, *others = shapes
    if others:
        raise ValueError(
            f"train: latent.{key} must hold clips of one T, H, W (vtok tokenize --frames, --size), "
            f"got {first} and {others[0]}"
        )
    return first


def _rate(latents: LatentDataset) -> float | None:
    rates = {entry["fps"] for entry in latents.entries}
    return rates.pop() if len(rates) == 1 else None
