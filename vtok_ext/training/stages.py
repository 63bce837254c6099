"""A training in stages: each begins with the model that the one before ended with.

    OUT/stage-1/, OUT/stage-2/     a run each, see `loop`

The optimisers begin anew; log variance, LeCam averages and discriminator go on. A stage that has a
checkpoint needs nothing but the model of the one before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vtok_ext.data.video_list import source_exists
from vtok_ext.training.checkpoint import has_checkpoints
from vtok_ext.training.recipe import TokenizerRecipe

# What a stage takes from the one before, whatever its recipe says.
_OF_THE_FIRST = ("name", "overrides", "weights", "start")
_STATE_OF_LOSSES = ("discriminator", "discriminator_width")


def stage_folder(out: Path, stage: int, num_stages: int) -> Path:
    """Returns the folder of stage `stage`, from 0: `out` itself if there is only one."""
    return out if num_stages == 1 else out / f"stage-{stage + 1}"


def following(recipe: Any, before: Path) -> Any:
    """Returns the recipe of a stage with the weights of the one before.

    Args:
        recipe: of the stage; name, overrides and start of its model have been used up.
        before: folder of the stage before.
    """
    model = dataclasses.replace(
        recipe.model,
        name=None,
        overrides={},
        weights=str(before / "model"),
        start="published",
    )
    recipe = dataclasses.replace(recipe, model=model)
    if isinstance(recipe, TokenizerRecipe):
        loss = dataclasses.replace(recipe.loss, continue_from=str(before / "checkpoints"))
        recipe = dataclasses.replace(recipe, loss=loss)
    return recipe


def stage_recipes(recipes: Sequence[Any], out: Path) -> list[tuple[Any, Path]]:
    """Returns (recipe, folder) of every stage.

    Args:
        recipes: one or more, the first with a model to begin with.
        out: folder of the whole training.

    Raises:
        ValueError: a later stage has a setting that only the first can have, losses that cannot go
            on from those before, or a folder of videos that does not exist: said before the first
            stage is trained.
    """
    for number, recipe in enumerate(recipes[1:], 2):
        _check_follows(number, recipe, recipes[0])
    folders = [stage_folder(out, i, len(recipes)) for i in range(len(recipes))]
    pairs = [(recipes[0], folders[0])]
    for recipe, before, folder in zip(recipes[1:], folders, folders[1:], strict=False):
        pairs.append((following(recipe, before), folder))
    return pairs


def _check_follows(number: int, recipe: Any, first: Any) -> None:
    """Raises ValueError unless stage `number` can go on from the first one."""
    settings = [("model", name) for name in _OF_THE_FIRST]
    if isinstance(recipe, TokenizerRecipe) and isinstance(first, TokenizerRecipe):
        settings += [("loss", name) for name in (*_STATE_OF_LOSSES, "continue_from")]
    for section, name in settings:
        wanted, found = (getattr(getattr(r, section), name) for r in (first, recipe))
        if found != wanted:
            raise ValueError(
                f"recipe: {section}.{name} of stage {number} must be that of the first stage, "
                f"which it goes on from, {wanted!r}, got {found!r}"
            )
    for name in ("folder", "validation_folder"):
        path = getattr(recipe.data, name)
        if path is not None and not source_exists(path):
            raise ValueError(f"recipe: data.{name} of stage {number} must exist, got {path}")


def stages_done(folders: Sequence[Path]) -> int:
    """Returns how many stages need not run again: those before the last one with a checkpoint."""
    begun = [i for i, folder in enumerate(folders) if has_checkpoints(folder / "checkpoints")]
    return max(begun, default=0)
