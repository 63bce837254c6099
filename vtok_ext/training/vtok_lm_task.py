"""The training of VTok's unified model on captioned clips: questions and videos from text, mixed.

Which questions a clip is asked changes from epoch to epoch; all choices come from the sample's own
generator. Held-out clips have combinations of attributes that no training clip has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vtok_ext.data.captioned import QUESTION_KINDS, CaptionedClips, caption_of, questions_of
from vtok_ext.data.captioned.clips import FPS
from vtok_ext.data.captioned.questions import OF_SEVERAL_SHAPES, vocabulary
from vtok_ext.models._optional import require
from vtok_ext.models._persistence import check_source
from vtok_ext.models.vtok import VTok
from vtok_ext.models.vtok_lm import VTokLM
from vtok_ext.models.vtok_lm_checks import output_head
from vtok_ext.models.vtok_lm_config import VTokLMConfig, config_json, load_lm, tiny_lm_config
from vtok_ext.models.vtok_sequence import GENERATION, UNDERSTANDING, Turn
from vtok_ext.models.vtok_text import HuggingFaceText, TextTokenizer, WordTokenizer
from vtok_ext.training.optimizers import transformer_optimizers
from vtok_ext.training.recipe import Recipe
from vtok_ext.training.task import MicroBatch, Task
from vtok_ext.training.tokenizer_task import to_video
from vtok_ext.training.vtok_recipe import LanguageModelRecipe, UnifiedRecipe, VTokLMRecipe
from vtok_ext.training.vtok_task import (
    HELD_OUT_SEED,
    build_vtok,
    captioned_clips,
    fit_features_if_needed,
)

# Clips whose tokens give the statistics that targets are normalised by.
_STATISTICS_CLIPS = 32


class IndexedClips:
    """Captioned clips that say which they are: {"video": [3, T, H, W] uint8, "index": number}."""

    def __init__(self, clips: CaptionedClips) -> None:
        self.clips = clips

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, place: tuple[int, int]) -> dict[str, Any]:
        return {"video": self.clips[place], "index": place[1]}


class VTokLMTask(Task):
    """Trains a VTokLM.

    Args:
        recipe: all settings.
        device: where to train.

    Raises:
        ValueError: clips that have no captions, or an unknown kind of question.
        ImportError: transformers or peft is not installed.
    """

    recipe_class: ClassVar[type[Recipe]] = VTokLMRecipe
    metric: ClassVar[str] = "under_loss"
    recipe: VTokLMRecipe

    def __init__(self, recipe: VTokLMRecipe, device: torch.device) -> None:
        super().__init__(recipe, device)
        if recipe.clips != "captioned":
            raise ValueError(f"train: clips must be 'captioned' for vtok_lm, got {recipe.clips!r}")
        unknown = set(recipe.unified.questions) - set(QUESTION_KINDS)
        if unknown:
            raise ValueError(
                f"recipe: unified.questions must be among {', '.join(QUESTION_KINDS)}, "
                f"got {sorted(unknown)}"
            )
        self.kinds = recipe.unified.questions or list(QUESTION_KINDS)
        if not set(self.kinds) - set(OF_SEVERAL_SHAPES):
            raise ValueError(
                "recipe: unified.questions must have a kind that clips of one shape answer, "
                f"beside {' and '.join(OF_SEVERAL_SHAPES)}, got {self.kinds}"
            )
        self.fps = FPS if recipe.fps is None else recipe.fps
        self.train_clips, self.held_out = captioned_clips(recipe)
        tokenizer = build_vtok(recipe).to(device)
        fit_features_if_needed(recipe, tokenizer, self.train_clips)
        sections = (recipe.language_model, recipe.unified)
        self.model: Any = build_unified(tokenizer, *sections, fps=self.fps)
        self.model.to(device)
        if not self.model.tokenizer.is_discrete:
            count = min(_STATISTICS_CLIPS, len(self.train_clips))
            self.model.eval().fit_statistics(
                [to_video(self.train_clips[0, i][None]).to(device) for i in range(count)], self.fps
            )
        self.modules = self.networks = {"model": self.model}

    def data(self, warn: Callable[[str], None]) -> tuple[Any, list[Any]]:
        """Returns the clips with their numbers."""
        held_out = IndexedClips(self.held_out)
        count = self.recipe.data.validation_clips
        return IndexedClips(self.train_clips), [held_out[0, i] for i in range(count)]

    def frozen(self) -> list[nn.Module]:
        """Returns the image encoder."""
        return [self.model.tokenizer.encoder]

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Returns AdamW, or Muon for the matrices within; see `transformer_optimizers`."""
        return transformer_optimizers(self.model, self.recipe.optimizer)

    def turns(self, indices: Sequence[int], generators: Sequence[torch.Generator]) -> list[Turn]:
        """Returns what some training clips are asked."""
        found = []
        for index, generator in zip(indices, generators, strict=True):
            scene = self.train_clips.scene(int(index))
            if float(torch.rand((), generator=generator)) < self.recipe.unified.generation:
                found.append(Turn(GENERATION, caption_of(scene)))
                continue
            asked = [q for q in questions_of(scene) if q.kind in self.kinds]
            question = asked[int(torch.randint(len(asked), (), generator=generator))]
            found.append(Turn(UNDERSTANDING, question.text, question.answer))
        return found

    def accumulate(
        self, batch: MicroBatch, backward: Callable[[Tensor], None]
    ) -> dict[str, Tensor]:
        """Returns the terms of the loss after adding gradients."""
        with self.autocast():
            losses = self._losses(self.call["model"], batch)
        backward(losses["loss"])
        return {name: term.detach() for name, term in losses.items()}

    def _losses(self, network: Any, batch: MicroBatch) -> dict[str, Tensor]:
        generators = batch.generators()
        turns = self.turns(batch.data["index"].tolist(), generators)
        video = to_video(batch.data["video"])
        return network(video, turns, fps=self.fps, step=batch.step, generators=generators)

    def probe(self, batch: MicroBatch) -> None:
        """Runs the network as `accumulate` does."""
        with self.autocast():
            self._losses(self.model, batch)

    def validate(self, samples: list[dict[str, Any]]) -> dict[str, float]:
        """Returns `under_loss` and `accuracy` of questions to held-out clips, and `vis_loss`."""
        totals = {"under_loss": 0.0, "vis_loss": 0.0, "accuracy": 0.0}
        for sample in samples:
            item = self.held_out.clip(int(sample["index"]))
            asked = [q for q in item.questions if q.kind in self.kinds]
            turns = [Turn(UNDERSTANDING, q.text, q.answer) for q in asked]
            turns.append(Turn(GENERATION, item.caption))
            video = to_video(item.video[None].to(self.device)).expand(len(turns), -1, -1, -1, -1)
            noise = [torch.Generator().manual_seed(HELD_OUT_SEED) for _ in turns]
            with self.autocast():
                losses = self.model(video, turns, fps=self.fps, generators=noise)
                answers = self.model.answer(video[:-1], [q.text for q in asked], fps=self.fps)
            right = sum(a == q.answer for a, q in zip(answers, asked, strict=True)) / len(asked)
            totals["under_loss"] += float(losses["under_loss"]) / len(samples)
            totals["vis_loss"] += float(losses["vis_loss"]) / len(samples)
            totals["accuracy"] += right / len(samples)
        return totals

    def export(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Writes the unified model as one folder."""
        model = self.model
        tokenizer = VTok(model.tokenizer.config, model.tokenizer.name)
        plain = VTokLM(model.config, tokenizer, model.text)
        plain.load_state_dict(weights, strict=True)
        plain.eval().save_pretrained(str(folder))


def build_unified(
    tokenizer: VTok,
    language_model: LanguageModelRecipe,
    unified: UnifiedRecipe,
    *,
    fps: float | None = None,
) -> VTokLM:
    """Returns a VTokLM with a random or pretrained language model, without gradients for what makes
    videos, or answers, if none are trained on.

    Args:
        tokenizer: of the videos.
        language_model, unified: sections of the recipe.
        fps: frames per second of the clips.
    """
    text: TextTokenizer
    lm = None
    if language_model.source is None:
        text = WordTokenizer(vocabulary())
        described = tiny_lm_config(len(text), language_model.architecture, language_model.sizes)
    else:
        transformers = require("build_unified", "transformers")
        check_source("language_model", language_model.source)
        text = HuggingFaceText(transformers.AutoTokenizer.from_pretrained(language_model.source))
        lm = load_lm(language_model.source)
        if len(text) > lm.config.vocab_size:
            lm.resize_token_embeddings(len(text))
        described = config_json(lm.config)
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(unified).items()
        if name not in ("generation", "questions")
    }
    model = VTokLM(VTokLMConfig(described, fps=fps, **fields), tokenizer, text, lm)
    # What no loss reaches: else a weight decay would wear it out.
    if unified.generation == 0:
        model.head.requires_grad_(False)
        tokenizer.decoder.requires_grad_(False)
    if unified.generation == 1:
        words = model.lm.get_input_embeddings().weight  # often those of the output layer too
        for parameter in output_head(model.lm).parameters():
            parameter.requires_grad_(parameter.requires_grad and parameter is words)
    return model
