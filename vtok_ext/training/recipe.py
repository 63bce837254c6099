"""Recipes: everything that decides a training run.

    task, model, data, optimizer, run, and the sections of the task, such as loss: see the classes

Every key has a default but model.name. They are written as YAML, see `recipe_file`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import MISSING, dataclass, field
from typing import Any

from vtok_ext.data.clips import CROPS, RESIZES
from vtok_ext.data.frame_sampling import RULES
from vtok_ext.training.log_sinks import LOGGERS
from vtok_ext.training.losses import LossConfig

SCHEDULES = ("constant", "cosine", "linear")
PARALLEL = ("ddp", "fsdp")
PRECISIONS = ("float32", "bfloat16", "float16")
PERCEPTUAL_NETWORKS = ("published", "random")
FREEZABLE = ("encoder",)
STARTS = ("published", "scaled", "sinusoidal")
# Of section data, what says nothing of procedural clips.
_OF_FILES = (
    *("root", "fraction", "buckets", "fps", "sampling", "crop", "zoom", "flip", "resize", "scan"),
    *("validation_folder", "validation_root", "validation_size", "validation_fps"),
)


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
        start: of random weights, "published"; or, what learns faster from nothing, "scaled" for a
            VidTok and "sinusoidal" for a CoordTok; see `start_weights`.
        freeze: ["encoder"] trains the decoder alone; the encoder's losses then are constants and
            not computed.
    """

    name: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    start: str = "published"
    freeze: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Checks every field."""
        given = (self.name, self.weights)
        _require(given.count(None) == 1, "one of model.name and model.weights", "given", given)
        _require(
            not (self.weights and self.overrides), "model.overrides", "empty with weights", given
        )
        _require(self.start in STARTS, "model.start", f"one of {STARTS}", self.start)
        is_random = self.start == "published" or self.weights is None
        _require(is_random, "model.start", "published with model.weights", self.start)
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
        crop, zoom, flip, resize: see `Augmentation`; `resize` is that of held-out clips too.
        scan: read every video's index at the start, so that unusable ones are named at once.
        damage_log: file that gets a line for every video found damaged while training; null for
            damaged.txt in the folder of the run.
        validation_folder: of held-out videos, in the same forms, where `folder` is given.
        validation_root: where its paths begin; null for `root`.
        validation_size: their [H, W]; [] for that of the training clips.
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
    resize: str = "bilinear"
    scan: bool = True
    damage_log: str | None = None
    validation_folder: str | None = None
    validation_root: str | None = None
    validation_size: list[int] = field(default_factory=list)
    validation_fps: float | None = None
    validation_clips: int = 8
    num_workers: int = 0

    def __post_init__(self) -> None:
        """Checks every field."""
        _at_least("data", self, 1, "num_clips", "num_frames", "height", "width")
        _at_least("data", self, 0, "validation_clips", "num_workers")
        if self.folder is None:
            for name in _OF_FILES:
                value, default = getattr(self, name), _DEFAULTS.get(name, [])
                requirement = f"{json.dumps(default)} without data.folder"
                _require(value == default, f"data.{name}", requirement, value)
        size = self.validation_size
        ok = not size or (len(size) == 2 and min(size) >= 1 and self.validation_folder is not None)
        _require(ok, "data.validation_size", "[], or [H, W] with data.validation_folder", size)
        _require(len(self.fps) <= 2, "data.fps", "[], [rate] or [low, high]", self.fps)
        _require(0 < self.fraction <= 1, "data.fraction", "in (0, 1]", self.fraction)
        for name, choices in (("crop", CROPS), ("resize", RESIZES), ("sampling", RULES)):
            value = getattr(self, name)
            _require(value in choices, f"data.{name}", f"one of {choices}", value)

    @property
    def least_frames(self) -> int | None:
        """Frames of the shortest video that is taken, None for those of a clip."""
        return None

    def all_buckets(self) -> list[tuple[int, int, int]]:
        """Returns the shapes (T, H, W) of clips."""
        shapes = self.buckets or [[self.num_frames, self.height, self.width]]
        for shape in shapes:
            _require(len(shape) == 3, "data.buckets", "[T, H, W] each", shape)
        return [(shape[0], shape[1], shape[2]) for shape in shapes]


# Of the values above, but for the empty lists.
_DEFAULTS = {f.name: f.default for f in dataclasses.fields(DataRecipe) if f.default is not MISSING}


@dataclass(frozen=True)
class PerceptualRecipe:
    """Where LPIPS comes from.

    Attributes:
        perceptual_network: "published"; or "random", a narrow one that measures nothing known.
        perceptual_backbone, perceptual_heads: files of `published_lpips`; null for the caches.
        trust_checkpoint: read such a file, if pickled, with torch < 2.6, which is unsafe.
    """

    perceptual_network: str = "published"
    perceptual_backbone: str | None = None
    perceptual_heads: str | None = None
    trust_checkpoint: bool = False

    def __post_init__(self) -> None:
        """Checks every field."""
        known = self.perceptual_network in PERCEPTUAL_NETWORKS
        choices = f"one of {PERCEPTUAL_NETWORKS}"
        _require(known, "loss.perceptual_network", choices, self.perceptual_network)


@dataclass(frozen=True)
class LossRecipe(PerceptualRecipe, LossConfig):
    """What is minimised: `LossConfig`, and where LPIPS comes from.

    Attributes:
        continue_from: folder of checkpoints whose log variance, LeCam averages and discriminator
            are the first ones here; null to begin anew.
    """

    continue_from: str | None = None

    def __post_init__(self) -> None:
        """Checks every field."""
        LossConfig.__post_init__(self)
        PerceptualRecipe.__post_init__(self)


@dataclass(frozen=True)
class OptimizerRecipe:
    """Adam for the tokenizer and for the discriminator; the defaults are VidTok's.

    Attributes:
        lr, discriminator_lr: learning rates at the top of the schedule; null for the same.
        muon_lr: of Muon for the matrices within the network; null for Adam everywhere.
        betas: decays of the two moments.
        weight_decay: decoupled (AdamW).
        clip: largest norm of all gradients of an optimiser.
        schedule: "constant", "cosine" or "linear", which reach `final` after the last step.
        warmup: steps of linear growth from 0 before it.
        final: fraction of the learning rate left at the end.
        ema_decay: of the moving averages of the weights; null for none.
    """

    lr: float = 1e-5
    discriminator_lr: float | None = None
    muon_lr: float | None = None
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
        _require(self.muon_lr is None or self.muon_lr > 0, "optimizer.muon_lr", "> 0", self.muon_lr)
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
        precision: "float32", or "bfloat16" or "float16" for autocast; the latter scales the loss.
        parallel: with several processes, "ddp" copies the model, "fsdp" divides it.
        checkpoint_activations: recompute the blocks in the backward pass to save memory.
        compile: torch.compile of the blocks.
        log_every, validate_every, checkpoint_every: in steps; validation also precedes checkpoints.
        sample_every: in steps; videos and error maps of held-out clips, 0 for none.
        sample_clips: how many.
        loggers: beside log.jsonl, "tensorboard" and "wandb".
        keep_last: newest checkpoints that stay, beside the best.
        background_checkpoints: train on while a copy of everything is written.
        seed: of weights, order of clips and noise; in 0 .. 2^63 - 1.
    """

    steps: int = 50_000
    batch_size: int = 2
    accumulate: int = 1
    precision: str = "float32"
    parallel: str = "ddp"
    checkpoint_activations: bool = False
    compile: bool = False
    log_every: int = 1
    validate_every: int = 2000
    checkpoint_every: int = 5000
    sample_every: int = 0
    sample_clips: int = 2
    loggers: list[str] = field(default_factory=list)
    keep_last: int = 3
    background_checkpoints: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks every field."""
        _at_least("run", self, 1, "steps", "batch_size", "accumulate", "log_every")
        _at_least("run", self, 1, "validate_every", "checkpoint_every", "keep_last")
        _at_least("run", self, 0, "seed", "sample_every", "sample_clips")
        _require(self.seed < 2**63, "run.seed", "< 2**63", self.seed)
        for name in self.loggers:
            _require(name in LOGGERS, "run.loggers", f"among {LOGGERS}", name)
        for name, choices in (("precision", PRECISIONS), ("parallel", PARALLEL)):
            value = getattr(self, name)
            _require(value in choices, f"run.{name}", f"one of {choices}", value)


@dataclass(frozen=True)
class Recipe:
    """A training run: what is common to all tasks, whose own recipes add sections.

    Attributes:
        task: name in the table of `tasks`.
    """

    model: ModelRecipe
    task: str = "tokenizer"
    data: DataRecipe = field(default_factory=DataRecipe)
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    run: RunRecipe = field(default_factory=RunRecipe)

    def __post_init__(self) -> None:
        """Checks what concerns several sections."""
        # Muon needs whole matrices, of which a process then has a part.
        whole = self.optimizer.muon_lr is None or self.run.parallel != "fsdp"
        _require(whole, "optimizer.muon_lr", "null with run.parallel fsdp", self.optimizer.muon_lr)

    def to_dict(self) -> dict[str, Any]:
        """Returns all values, as YAML and JSON can hold them."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class TokenizerRecipe(Recipe):
    """Of task "tokenizer": a tokenizer trained with the losses of VidTok."""

    loss: LossRecipe = field(default_factory=LossRecipe)
