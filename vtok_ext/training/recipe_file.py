"""Recipes as files: YAML, built-in names, single values replaced from the command line.

A key that does not exist is an error that names the closest one. `a.b=value` replaces one value; it
is read as YAML.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vtok_ext.models._config import closest
from vtok_ext.training.recipe import Recipe
from vtok_ext.training.released_recipe import is_released, released_recipe, require_clips
from vtok_ext.training.tasks import task_class

BUILT_IN = Path(__file__).parent / "recipes"
_MAX_BYTES = 1 << 20


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Any:
    """Returns the recipe of a YAML file or of a built-in name, with single values replaced.

    Args:
        source: path of a YAML file, one of `list_recipes()`, or a released file of VidTok.
        overrides: such as "run.steps=100".

    Raises:
        FileNotFoundError: neither a file nor a built-in name.
        ValueError: not YAML, several stages, an unknown key (the message names the closest) or a
            rejected value.
    """
    recipes = load_stages(source, overrides)
    if len(recipes) > 1:
        raise ValueError(f"recipe: {source} must have one stage for this, got {len(recipes)}")
    return recipes[0]


def load_stages(source: str | Path, overrides: Sequence[str] = ()) -> list[Any]:
    """Returns the recipes of all stages of a YAML file or of a built-in name.

    A file may have a list `stages` of sections that replace values of the file, one item per stage;
    without it there is one stage.

    Args:
        source: as `load_recipe`.
        overrides: "run.steps=100" for every stage, "stages.0.run.steps=100" for the first;
            "stages.0={}" replaces all that the first has for itself.

    Raises:
        FileNotFoundError, ValueError: as `load_recipe`.
    """
    path = _locate(str(source))
    values = _read(path)
    if is_released(values):
        values = released_recipe(values, path)
        require_clips(values, path, overrides)
    own = [text for text in overrides if text.startswith("stages.")]
    for override in own:
        _replace(values, override)
    stages = values.pop("stages", [{}])
    if not (isinstance(stages, list) and stages and all(isinstance(s, dict) for s in stages)):
        raise ValueError(f"recipe: stages must be a list of sections, got {stages!r}")
    recipes = []
    for stage in stages:
        merged = _merged(values, stage)
        for override in overrides:
            if override not in own:
                _replace(merged, override)
        recipes.append(recipe_from_dict(merged))
    return recipes


def _merged(values: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Returns a copy of nested mappings with those values replaced that `over` has too."""
    result = {k: _merged(v, {}) if isinstance(v, dict) else v for k, v in values.items()}
    for key, value in over.items():
        old = result.get(key)
        both = isinstance(old, dict) and isinstance(value, dict)
        result[key] = _merged(old, value) if both else value  # type: ignore[arg-type]
    return result


def recipe_from_dict(values: Mapping[str, Any]) -> Any:
    """Returns the recipe with these values, of the class that its task has.

    Raises:
        ValueError: as `load_recipe`.
    """
    name = values.get("task", Recipe.task)
    return _build(task_class(name).recipe_class, values, "")


def list_recipes() -> list[str]:
    """Returns the names of the built-in recipes."""
    return sorted(path.stem for path in BUILT_IN.glob("*.yaml"))


def _locate(source: str) -> Path:
    for path in (Path(source), BUILT_IN / f"{source}.yaml"):
        if path.is_file():
            return path
    names = list_recipes()
    raise FileNotFoundError(
        f"recipe: must be a YAML file or one of {', '.join(names)}, "
        f"got {source!r}{closest(source, names)}"
    )


def _parse(text: str, where: str) -> Any:
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        # Aliases of aliases are how a small file becomes a huge object.
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):
            raise ValueError(f"recipe: {where} must have no YAML aliases, got some")
        return OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"recipe: {where} must be YAML, got {reason}") from error


def _read(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(f"recipe: {path} must be <= 1 MiB, got a larger file")
    try:
        values = _parse(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise ValueError(f"recipe: {path} must be UTF-8 text, got {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"recipe: {path} must be a mapping, got {type(values).__name__}")
    return values


def _replace(values: Any, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ValueError(f"recipe: an override must be section.key=value, got {override!r}")
    *sections, name = key.split(".")
    for section in sections:
        inner = _inner(values, section, override)
        if not isinstance(inner, dict) and not (section == "stages" and isinstance(inner, list)):
            raise ValueError(f"recipe: {section} must be a section for {override!r}, got {inner!r}")
        values = inner
    place = _place(values, name, override) if isinstance(values, list) else name
    values[place] = _parse(f"value: {text}", override)["value"]


def _inner(values: Any, section: str, override: str) -> Any:
    if isinstance(values, list):
        return values[_place(values, section, override)]
    return values.setdefault(section, {})


def _place(stages: list[Any], number: str, override: str) -> int:
    if not number.isdecimal() or int(number) >= len(stages):
        raise ValueError(f"recipe: stages must be numbered 0..{len(stages) - 1}, got {override!r}")
    return int(number)


def _build(cls: Any, values: Any, prefix: str) -> Any:
    """Returns an instance of dataclass `cls`; `prefix` is where it stands, such as "run."."""
    if not isinstance(values, Mapping):
        where = prefix.rstrip(".") or "the recipe"
        raise ValueError(f"recipe: {where} must be a section, got {values!r}")
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            raise ValueError(
                f"recipe: key must be one of {', '.join(prefix + name for name in hints)}, "
                f"got {prefix + str(key)!r}{closest(key, hints)}"
            )
    required = [f.name for f in dataclasses.fields(cls) if _is_required(f)]
    for name in required:
        if name not in values:
            raise ValueError(f"recipe: {prefix + name} must be given, got None")
    return cls(**{key: _convert(hints[key], v, prefix + key) for key, v in values.items()})


def _is_required(item: dataclasses.Field) -> bool:
    missing = dataclasses.MISSING
    return item.default is missing and item.default_factory is missing


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Returns `value` as the annotation `hint` wants it."""
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, f"{where}.")
    if isinstance(hint, types.UnionType):  # X | None
        if value is None:
            return None
        hint = typing.get_args(hint)[0]
    origin = typing.get_origin(hint) or hint
    if origin is list:
        if not isinstance(value, list):
            raise ValueError(f"recipe: {where} must be a list, got {value!r}")
        return [_convert(typing.get_args(hint)[0], item, where) for item in value]
    if origin is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    right = isinstance(value, origin) and (origin is bool or not isinstance(value, bool))
    kind = {dict: "a mapping", int: "an integer", float: "a number", bool: "true or false"}
    if not right:
        raise ValueError(f"recipe: {where} must be {kind.get(origin, 'text')}, got {value!r}")
    return value
