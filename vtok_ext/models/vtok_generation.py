"""Answers and videos from a VTokLM, token by token with the language model's key-value cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vtok_ext.models.failed_computation import FailedComputationError
from vtok_ext.models.vtok import check_sampling, checked_seed
from vtok_ext.models.vtok_heads import SAMPLING_STEPS, CodeHead, normal_rows
from vtok_ext.models.vtok_lm import VTokLM
from vtok_ext.models.vtok_lm_checks import cache_name
from vtok_ext.models.vtok_sequence import (
    GENERATION,
    UNDERSTANDING,
    Sequences,
    Turn,
    build_sequences,
    check_list,
    check_one_per_clip,
)


class _Cache:
    """The language model's memory of a batch whose sequences end at the same place."""

    def __init__(self, model: VTokLM, batch: Sequences, inputs: Tensor) -> None:
        self.lm, self.past = model.lm, None
        self.name = cache_name(model.lm.base_model)
        self.attended = batch.attended.to(inputs.device).long()
        # Padding stands on the left: places count from the first real token.
        self.places = (self.attended.cumsum(1) - 1).clamp(min=0)
        self.state = self._run(inputs, self.places)

    def _run(self, inputs: Tensor, places: Tensor) -> Tensor:
        output: Any = self.lm.base_model(
            inputs_embeds=inputs,
            attention_mask=self.attended,
            position_ids=places,
            use_cache=True,
            **{self.name: self.past},
        )
        self.past = output[self.name]
        return output.last_hidden_state[:, -1]

    def push(self, inputs: Tensor) -> Tensor:
        """Returns the state [B, H] after one more embedding [B, H]."""
        self.attended = torch.cat([self.attended, self.attended.new_ones(len(inputs), 1)], 1)
        self.places = self.places[:, -1:] + 1
        self.state = self._run(inputs[:, None], self.places)
        return self.state


@torch.no_grad()
def answer(
    model: VTokLM,
    video: Tensor,
    questions: Sequence[str],
    *,
    fps: float | None = None,
    max_tokens: int = 16,
) -> list[str]:
    """Returns the likeliest answers, word by word, one per clip.

    Args:
        model: in eval mode.
        video: [B, 3, T, H, W], float in [-1, 1] or uint8.
        questions: one per clip.
        fps: frames per second.
        max_tokens: at which an answer ends at the latest.

    Raises:
        FailedComputationError: the language model gives NaN or infinity.
        TypeError, ValueError: other numbers of clips and questions, one question instead of a list,
            a video that is none, or one that is too long for the language model.
    """
    check_one_per_clip("answer", "questions", questions, video)
    if not isinstance(max_tokens, int) or max_tokens < 1:
        raise ValueError(f"answer: max_tokens must be an integer >= 1, got {max_tokens!r}")
    latent, positions, _, _ = model._encode(video, fps)
    turns = [Turn(UNDERSTANDING, question) for question in questions]
    counts = [latent.shape[1]] * len(turns)
    batch = build_sequences(turns, counts, model.text, begin_only=True, left=True)
    model.check_length(batch.ids.shape[1] + max_tokens)
    cache = _Cache(model, batch, model._inputs(batch, latent, positions))
    end = model.text.special["<eos>"]
    found: list[list[int]] = [[] for _ in turns]
    is_open = [True] * len(turns)
    for _ in range(max_tokens):
        logits = model.text_logits(cache.state)[:, : len(model.text)]
        if not bool(logits.isfinite().all()):
            raise _not_finite("answer", "logits")
        chosen = logits.argmax(-1)
        for row, number in enumerate(chosen.tolist()):
            is_open[row] = is_open[row] and number != end
            if is_open[row]:
                found[row].append(number)
        if not any(is_open):
            break
        cache.push(model.embed_text(chosen))
    return [model.text.decode(ids) for ids in found]


def check_guidance(model: VTokLM, guidance: float) -> None:
    """Raises ValueError unless guidance is finite and, if not 1, was prepared by training."""
    if not math.isfinite(guidance):
        raise ValueError(f"generate: guidance must be finite, got {guidance}")
    if guidance != 1 and model.config.text_dropout == 0:
        raise ValueError(
            f"generate: guidance must be 1 for a model trained without text_dropout, got {guidance}"
        )


@torch.no_grad()
def generate_tokens(
    model: VTokLM,
    prompts: Sequence[str],
    *,
    num_frames: int,
    fps: float | None = None,
    temperature: float = 1.0,
    guidance: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Returns visual tokens [B, L, D] of texts, one after the other.

    Args:
        model: in eval mode.
        prompts: texts.
        num_frames: T >= 1, which decides how many tokens there are.
        fps: frames per second.
        temperature: factor of the flow's noise, or of a code's uncertainty; 0 for the likeliest.
        guidance: predictions become none + guidance * (text - none), none being those without a
            text; 1 is no guidance, more holds closer to the text and costs twice the time.
        generator: source of noise; default one of seed 0.

    Raises:
        FailedComputationError: a token would be NaN or infinite.
        TypeError: one text instead of a list.
        ValueError: no text, no frame, a temperature that is negative or no number, guidance that
            is not finite or of a model trained without text_dropout, or a video that is too long
            for the language model.
    """
    check_list("generate", "prompts", prompts)
    if not isinstance(num_frames, int) or num_frames < 1:
        raise ValueError(f"generate: num_frames must be an integer >= 1, got {num_frames!r}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"generate: temperature must be >= 0, got {temperature}")
    check_guidance(model, guidance)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    places = model.positions_for(num_frames, fps).to(model.token_mean.device)  # [L, 2]
    texts = [*prompts] if guidance == 1 else [*prompts, *([""] * len(prompts))]
    turns = [Turn(GENERATION, text) for text in texts]
    batch = build_sequences(turns, [0] * len(turns), model.text, begin_only=True, left=True)
    model.check_length(batch.ids.shape[1] + len(places))
    cache = _Cache(model, batch, model._inputs(batch, None, None))
    tokens: list[Tensor] = []
    for place in places.expand(len(texts), -1, -1).unbind(1):
        drawn = next_tokens(
            model,
            cache.state,
            place[: len(prompts)],
            temperature=temperature,
            guidance=guidance,
            generator=generator,
        )
        tokens.append(drawn)
        if len(tokens) < len(places):
            seen = drawn.repeat(len(texts) // len(prompts), 1)
            cache.push(model.embed_visual(seen, place).to(cache.state.dtype))
    found = torch.stack(tokens, dim=1)
    if not bool(found.isfinite().all()):
        raise _not_finite("generate", "tokens")
    return found


def _not_finite(op: str, what: str) -> FailedComputationError:
    return FailedComputationError(
        f"{op}: the model must give finite {what}, got NaN or infinity; its weights are damaged or "
        "too large, or guidance or temperature are"
    )


def next_tokens(
    model: VTokLM,
    states: Tensor,
    positions: Tensor,
    *,
    temperature: float,
    generator: torch.Generator,
    guidance: float = 1.0,
) -> Tensor:
    """Returns tokens [n, D] drawn at [n, 2] for states [n, H], with guidance [2n, H], see
    `vtok_heads`."""
    if isinstance(model.head, CodeHead):
        return model.head.codes[model.head.choose(states, temperature, generator, guidance)]
    noise = normal_rows([len(positions)], model.head.token_dim, states, generator)
    predicted = model.head.predict(states, temperature * noise, SAMPLING_STEPS, guidance)
    return model.denormalised(predicted, positions)


@torch.no_grad()
def generate(
    model: VTokLM,
    prompts: Sequence[str],
    *,
    num_frames: int,
    size: tuple[int, int] | None = None,
    fps: float | None = None,
    temperature: float = 1.0,
    guidance: float = 1.0,
    num_steps: int | None = None,
    seed: int = 0,
    output: str = "float",
) -> Tensor:
    """Returns videos [B, 3, T, H, W] of texts.

    Args:
        model: in eval mode.
        prompts: texts.
        num_frames: T.
        size: (H, W), default that of the image encoder.
        fps: frames per second.
        temperature, guidance: see `generate_tokens`.
        num_steps: of the decoder's flow, default that of the tokenizer.
        seed: of all noise.
        output: "float" or "uint8".

    Raises:
        FailedComputationError, TypeError, ValueError: as `generate_tokens` and `VTok.decode`.
    """
    side = model.tokenizer.config.image_size
    size = (side, side) if size is None else size
    steps = model.tokenizer.config.sampling_steps if num_steps is None else num_steps
    check_sampling("generate", num_frames, size, steps, output)
    generator = torch.Generator().manual_seed(checked_seed("generate", seed))
    tokens = generate_tokens(
        model,
        prompts,
        num_frames=num_frames,
        fps=fps,
        temperature=temperature,
        guidance=guidance,
        generator=generator,
    )
    from vtok_ext.models.encoding import Encoding

    encoding = Encoding(
        tokens,
        num_frames,
        size,
        fps=model.rate(fps),
        positions=model.positions_for(num_frames, fps),
    )
    return model.tokenizer.decode(encoding, num_steps=steps, seed=seed, output=output)
