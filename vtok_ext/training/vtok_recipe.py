"""Recipes of VTok's three trainings: image encoder, tokenizer with decoder, unified model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vtok_ext.models.vtok_heads import HEADS
from vtok_ext.training.recipe import Recipe

CLIP_SETS = ("captioned", "clips")


def _check(ok: bool, name: str, requirement: str, value: Any) -> None:
    if not ok:
        raise ValueError(f"recipe: {name} must be {requirement}, got {value!r}")


@dataclass(frozen=True)
class VTokRecipe(Recipe):
    """Of tasks "vtok_encoder" and "vtok".

    Attributes:
        clips: "captioned", coloured shapes of data.num_frames >= 24 frames; or "clips", what
            `data` says.
        encoder: folder of a saved VTok whose image encoder is taken; null for random weights.
        fps: frames per second of the clips; null for the model's default.
    """

    clips: str = "captioned"
    encoder: str | None = None
    fps: float | None = None

    def __post_init__(self) -> None:
        """Checks every field."""
        super().__post_init__()
        _check(self.clips in CLIP_SETS, "clips", f"one of {CLIP_SETS}", self.clips)
        _check(self.fps is None or self.fps > 0, "fps", "null or positive", self.fps)
        _check(not self.model.freeze, "model.freeze", "[] for VTok", self.model.freeze)
        if self.clips == "captioned":
            source, motion = self.data.folder, self.data.motion
            _check(source is None, "data.folder", "null, or clips 'clips'", source)
            _check(motion == "orbit", "data.motion", "its default, or clips 'clips'", motion)


@dataclass(frozen=True)
class LanguageModelRecipe:
    """Which language model.

    Attributes:
        architecture: model_type in transformers, of random weights.
        sizes: fields of its configuration to change; the defaults are tiny.
        source: folder or hub id of a pretrained one instead, with its own text tokenizer.
    """

    architecture: str = "llama"
    sizes: dict[str, Any] = field(default_factory=dict)
    source: str | None = None

    def __post_init__(self) -> None:
        """Checks that sizes come with random weights only."""
        ok = not (self.source and self.sizes)
        _check(ok, "language_model.sizes", "empty with source", self.sizes)


@dataclass(frozen=True)
class UnifiedRecipe:
    """Fields of `VTokLMConfig`, and what is asked.

    Attributes:
        head: "flow", "mse", or "codes" for a discrete tokenizer.
        head_width, head_depth, lambda_vis, lambda_dec, predicted, predicted_steps, text_dropout,
        lora_rank, lora_alpha, lora_targets: see there.
        generation: part of the samples that are videos from text, the others are questions.
        questions: kinds that are asked; empty for all.
    """

    head: str = "flow"
    head_width: int = 128
    head_depth: int = 2
    lambda_vis: float = 1.0
    lambda_dec: float = 1.0
    predicted: float = 0.5
    predicted_steps: int = 1000
    text_dropout: float = 0.0
    lora_rank: int = 0
    lora_alpha: int = 16
    lora_targets: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])
    generation: float = 0.5
    questions: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Checks what the model does not check."""
        _check(self.head in HEADS, "unified.head", f"one of {HEADS}", self.head)
        _check(0 <= self.generation <= 1, "unified.generation", "in [0, 1]", self.generation)


@dataclass(frozen=True)
class VTokLMRecipe(VTokRecipe):
    """Of task "vtok_lm": `model` names the tokenizer."""

    language_model: LanguageModelRecipe = field(default_factory=LanguageModelRecipe)
    unified: UnifiedRecipe = field(default_factory=UnifiedRecipe)
