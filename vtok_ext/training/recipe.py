"""Recipes: everything that decides a training run, as YAML over dataclasses.

    model, data, loss, optimizer, run: see the classes; every key has a default but model.name

A key that does not exist is an error that names the closest one. `a.b=value` on the command line
replaces one value; it is read as YAML.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vtok_ext.models._config import closest
from vtok_ext.training.losses import LossConfig

BUILT_IN = Path(__file__).parent / "recipes"
SCHEDULES = ("constant", "cosine", "linear")
PRECISIONS = ("float32", "bfloat16")
PERCEPTUAL_NETWORKS = ("published", "random")
FREEZABLE = ("encoder",)
_MAX_BYTES = 1 << 20


def _require(ok: bool, name: str, requirement: str, value: Any) -> None:
    if not ok:
        raise ValueError(f"recipe: {name} must be {requirement}, got {value!r}")


def _at_least(section: str, values: object, minimum: float, *names: str) -> None:
    for name in names:
        value = getattr(values, name)
        _require(minimum <= value < math.inf, f"{section}.{name}", f">= {minimum:g}", value)


@dataclass(frozen=True)
class ModelRecipe:
    """Which network.

    Attributes:
        name: preset, or released YAML file, of random weights.
        overrides: fields of its configuration to change.
        weights: folder of a saved model to start from, instead of name and overrides.
        freeze: ["encoder"] trains the decoder alone; the encoder's losses then are constants and
            not computed.
    """

    name: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    freeze: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Checks every field."""
        given = (self.name, self.weights)
        _require(given.count(None) == 1, "one of model.name and model.weights", "given", given)
        _require(
            not (self.weights and self.overrides), "model.overrides", "empty with weights", given
        )
        for part in self.freeze:
            _require(part in FREEZABLE, "model.freeze", f"among {FREEZABLE}", part)


@dataclass(frozen=True)
class DataRecipe:
    """Which clips.

    Attributes:
        folder: of videos, or a .csv, .jsonl or .tar of them (see `list_videos`); null for
            procedural clips.
        root: where the paths of a .csv or .jsonl begin; null for the folder of that file.
        fraction: of the list that is used, from its beginning.
        num_clips, motion: procedural clips of an epoch, and "orbit" or "erratic".
        num_frames, height, width: T, H, W of a clip.
        buckets: [T, H, W] each, instead of one shape: videos of like shape and length share a
            batch; [] for none.
        fps: [] for a video's own frames, [rate], or [low, high] for a random rate between them;
            the published training has [3].
        sampling: "timestamps", or "reference" for the published rule (needs one rate).
        crop, zoom, flip: see `Augmentation`.
        scan: read every video's index at the start, so that unusable ones are named at once.
        damage_log: file that gets a line for every video found damaged while training.
        validation_folder: of held-out videos, in the same forms, where `folder` is given.
        validation_fps: their rate, from their beginning; null for their own frames.
        validation_clips: how many held-out clips are measured; 0 for none.
        num_workers: processes that prepare clips; 0 for the training process itself.
    """

    folder: str | None = None
    root: str | None = None
    fraction: float = 1.0
    num_clips: int = 4096
    motion: str = "orbit"
    num_frames: int = 17
    height: int = 128
    width: int = 128
    buckets: list[list[int]] = field(default_factory=list)
    fps: list[float] = field(default_factory=list)
    sampling: str = "timestamps"
    crop: str = "center"
    zoom: float = 1.0
    flip: bool = False
    scan: bool = True
    damage_log: str | None = None
    validation_folder: str | None = None
    validation_fps: float | None = None
    validation_clips: int = 8
    num_workers: int = 0

    def __post_init__(self) -> None:
        """Checks every field."""
        _at_least("data", self, 1, "num_clips", "num_frames", "height", "width")
        _at_least("data", self, 0, "validation_clips", "num_workers")
        _require(
            self.folder is not None or self.validation_folder is None,
            "data.validation_folder",
            "null without data.folder",
            self.validation_folder,
        )
        _require(len(self.fps) <= 2, "data.fps", "[], [rate] or [low, high]", self.fps)

    def all_buckets(self) -> list[tuple[int, int, int]]:
        """Returns the shapes (T, H, W) of clips."""
        shapes = self.buckets or [[self.num_frames, self.height, self.width]]
        for shape in shapes:
            _require(len(shape) == 3, "data.buckets", "[T, H, W] each", shape)
        return [(shape[0], shape[1], shape[2]) for shape in shapes]


@dataclass(frozen=True)
class LossRecipe(LossConfig):
    """What is minimised: `LossConfig`, and where LPIPS comes from.

    Attributes:
        perceptual_network: "published"; or "random", a narrow one that measures nothing known.
        perceptual_backbone, perceptual_heads: files of `published_lpips`; null for the caches.
    """

    perceptual_network: str = "published"
    perceptual_backbone: str | None = None
    perceptual_heads: str | None = None

    def __post_init__(self) -> None:
        """Checks every field."""
        super().__post_init__()
        known = self.perceptual_network in PERCEPTUAL_NETWORKS
        choices = f"one of {PERCEPTUAL_NETWORKS}"
        _require(known, "loss.perceptual_network", choices, self.perceptual_network)


@dataclass(frozen=True)
class OptimizerRecipe:
    """Adam for the tokenizer and for the discriminator; the defaults are VidTok's.

    Attributes:
        lr, discriminator_lr: learning rates at the top of the schedule; null for the same.
        betas: decays of the two moments.
        weight_decay: decoupled (AdamW).
        clip: largest norm of all gradients of an optimiser.
        schedule: "constant", "cosine" or "linear", down to `final` at the last step.
        warmup: steps of linear growth from 0 before it.
        final: fraction of the learning rate left at the end.
        ema_decay: of the moving averages of the weights; null for none.
    """

    lr: float = 1e-5
    discriminator_lr: float | None = None
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    weight_decay: float = 0.0
    clip: float = 20.0
    schedule: str = "constant"
    warmup: int = 0
    final: float = 0.0
    ema_decay: float | None = None

    def __post_init__(self) -> None:
        """Checks every field."""
        _at_least("optimizer", self, 0, "lr", "weight_decay", "warmup", "final")
        _require(self.clip > 0, "optimizer.clip", "positive", self.clip)
        known = self.schedule in SCHEDULES
        _require(known, "optimizer.schedule", f"one of {SCHEDULES}", self.schedule)
        ok = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        _require(ok, "optimizer.betas", "two numbers in [0, 1)", self.betas)
        for name, limit in (("discriminator_lr", math.inf), ("ema_decay", 1.0)):
            value = getattr(self, name)
            ok = value is None or 0 <= value < limit
            _require(ok, f"optimizer.{name}", f"null or in [0, {limit:g})", value)

    def scale(self, step: int, num_steps: int) -> float:
        """Returns the factor of the learning rates in step `step` (from 0) of `num_steps`."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        done = min(1.0, (step - self.warmup) / max(1, num_steps - self.warmup))
        left = {
            "constant": 1.0,
            "linear": 1 - done,
            "cosine": 0.5 * (1 + math.cos(math.pi * done)),
        }[self.schedule]
        return left if self.schedule == "constant" else self.final + (1 - self.final) * left


@dataclass(frozen=True)
class RunRecipe:
    """How long, how large, how often.

    Attributes:
        steps: optimiser steps of generator and discriminator each.
        batch_size: clips per micro-batch and process.
        accumulate: micro-batches per step.
        precision: "float32", or "bfloat16" for autocast.
        checkpoint_activations: recompute the blocks in the backward pass to save memory.
        compile: torch.compile of the blocks.
        log_every, validate_every, checkpoint_every: in steps; validation also precedes checkpoints.
        keep_last: newest checkpoints that stay, beside the best.
        seed: of weights, order of clips and noise.
    """

    steps: int = 50_000
    batch_size: int = 2
    accumulate: int = 1
    precision: str = "float32"
    checkpoint_activations: bool = False
    compile: bool = False
    log_every: int = 1
    validate_every: int = 2000
    checkpoint_every: int = 5000
    keep_last: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks every field."""
        _at_least("run", self, 1, "steps", "batch_size", "accumulate", "log_every")
        _at_least("run", self, 1, "validate_every", "checkpoint_every", "keep_last")
        _at_least("run", self, 0, "seed")
        choices = f"one of {PRECISIONS}"
        _require(self.precision in PRECISIONS, "run.precision", choices, self.precision)


@dataclass(frozen=True)
class Recipe:
    """A training run."""

    model: ModelRecipe
    data: DataRecipe = field(default_factory=DataRecipe)
    loss: LossRecipe = field(default_factory=LossRecipe)
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    run: RunRecipe = field(default_factory=RunRecipe)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """Returns the recipe with these values; raises ValueError as `load_recipe`."""
        return _build(cls, values, "")

    def to_dict(self) -> dict[str, Any]:
        """Returns all values, as YAML and JSON can hold them."""
        return dataclasses.asdict(self)


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Returns the recipe of a YAML file or of a built-in name, with single values replaced.

    Args:
        source: path of a YAML file, or one of `list_recipes()`.
        overrides: such as "run.steps=100".

    Raises:
        FileNotFoundError: neither a file nor a built-in name.
        ValueError: not YAML, an unknown key (the message names the closest) or a rejected value.
    """
    values = _read(_locate(str(source)))
    for override in overrides:
        _replace(values, override)
    return Recipe.from_dict(values)


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


def _replace(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ValueError(f"recipe: an override must be section.key=value, got {override!r}")
    *sections, name = key.split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ValueError(f"recipe: {section} must be a section for {override!r}, got {inner!r}")
        values = inner
    values[name] = _parse(f"value: {text}", override)["value"]


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
        _require(name in values, prefix + name, "given", None)
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
        _require(isinstance(value, list), where, "a list", value)
        return [_convert(typing.get_args(hint)[0], item, where) for item in value]
    if origin is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    right = isinstance(value, origin) and (origin is bool or not isinstance(value, bool))
    kind = {dict: "a mapping", int: "an integer", float: "a number", bool: "true or false"}
    _require(right, where, kind.get(origin, "text"), value)
    return value
