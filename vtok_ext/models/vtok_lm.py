"""VTokLM: one language model that answers questions about videos and makes videos from text.

    L = L_under + lambda_vis L_visLM + lambda_dec L_dec
    L_under   cross-entropy of answers
    L_visLM   loss of a head (`vtok_heads`) that says the next visual token from the model's state;
              its targets are normalised by stored statistics and take no gradient
    L_dec     flow matching of the decoder on true or, more and more often, predicted tokens

Any causal language model of transformers. Trained: language model, or its LoRA and the rows of
control tokens (`vtok_control`), projections, the tokenizer's residual pool and decoder; its image
encoder is frozen.
Source: VTok (arXiv 2602.04202), second-hand notes; head, normalisation and schedule are our own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok_ext.models import _video_input as video_input
from vtok_ext.models.sit_network import sincos_1d
from vtok_ext.models.vtok import VTok, nothing_of
from vtok_ext.models.vtok_control import ControlTokens
from vtok_ext.models.vtok_heads import (
    TRAINING_STEPS,
    CodeHead,
    FlowHead,
    Generators,
    MseHead,
    normal_rows,
)
from vtok_ext.models.vtok_lm_checks import check_language_model, output_head, text_logits
from vtok_ext.models.vtok_lm_config import VTokLMConfig, add_lora, build_lm
from vtok_ext.models.vtok_sequence import (
    GENERATION,
    IGNORED,
    Sequences,
    Turn,
    build_sequences,
    check_one_per_clip,
)
from vtok_ext.models.vtok_text import TextTokenizer

_LEAST_DEVIATION = 1e-3
# Channels of sines and cosines that tell the frame of a token.
_FRAME_WAVES = 32


class VTokLM(nn.Module):
    """The unified model.

    Args:
        config: sizes, weights of the losses, and the language model's configuration.
        tokenizer: a VTok whose key frame is the first.
        text: gives the ids of words.
        lm: a causal language model of transformers with that configuration; random if not given.

    Raises:
        ImportError: transformers or peft is not installed.
        ValueError: a head that does not go with the tokenizer, or a language model that is not
            causal or of another kind; see `vtok_lm_checks`.
    """

    lm: Any
    token_mean: Tensor
    token_deviation: Tensor

    def __init__(
        self,
        config: VTokLMConfig,
        tokenizer: VTok,
        text: TextTokenizer,
        lm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if (config.head == "codes") != tokenizer.is_discrete:
            raise ValueError(
                f"VTokLM: head must be 'codes' for a discrete tokenizer and only then, "
                f"got {config.head!r} with {tokenizer.name}"
            )
        rules = tokenizer.config
        if rules.key_frame != "first" or rules.cut_threshold:
            raise ValueError(
                "VTokLM: tokenizer must have the first frame as key and no cuts, got key_frame "
                f"{rules.key_frame!r} and cut_threshold {rules.cut_threshold}"
            )
        self.config, self.text, self.tokenizer = config, text, tokenizer
        self.lm = build_lm(config.lm_config) if lm is None else lm
        if len(text) > self.lm.get_input_embeddings().num_embeddings:
            self.lm.resize_token_embeddings(len(text))
        check_language_model(self.lm)
        if config.lora_rank:
            add_lora(self.lm, config.lora_rank, config.lora_alpha, config.lora_targets)
        width = self.lm.get_input_embeddings().embedding_dim
        special = text.special.values()
        self.control = ControlTokens(special, width) if config.lora_rank else None
        dim, slots = tokenizer.config.latent_dim, tokenizer.config.key_tokens
        layers = nn.Linear(dim, width), nn.Linear(width, width)
        self.projector = nn.Sequential(layers[0], nn.GELU(), layers[1])
        self.slot_embed = nn.Embedding(slots + 1, width)
        self.frame_embed = nn.Linear(_FRAME_WAVES, width, bias=False)
        for embed in (self.slot_embed, self.frame_embed):
            nn.init.normal_(embed.weight, std=0.02)
        # Keeps the size of tokens: torch's own initial weights leave a third of their variance at
        # each layer, and next to positions little of what differs between tokens.
        for layer in layers:
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
            nn.init.zeros_(layer.bias)
        self.head = self._build_head(width, dim)
        # What no loss reaches: else a weight decay would wear it out.
        if config.lambda_dec == 0:
            tokenizer.decoder.requires_grad_(False)
        if config.lambda_vis == 0 and config.lambda_dec * config.predicted == 0:
            self.head.requires_grad_(False)
        # Of key tokens and of residual tokens, whose sizes differ.
        self.register_buffer("token_mean", torch.zeros(2, dim))
        self.register_buffer("token_deviation", torch.ones(2, dim))

    def _build_head(self, width: int, dim: int) -> FlowHead | MseHead | CodeHead:
        config = self.config
        if config.head == "codes":
            ids = torch.arange(self.tokenizer.codebook_size or 0)
            return CodeHead(width, self.tokenizer.indices_to_latent(ids[None])[0].float())
        kind = FlowHead if config.head == "flow" else MseHead
        return kind(width, dim, config.head_width, config.head_depth)

    @torch.no_grad()
    def fit_statistics(self, videos: Sequence[Tensor], fps: float | None = None) -> None:
        """Stores mean and deviation of the key and of the residual tokens of some videos.

        Residual tokens get those of key tokens if there are fewer than two of them.

        Args:
            videos: batches [B, 3, T, H, W].
            fps: frames per second.

        Raises:
            ValueError: fewer than two key tokens in all.
        """
        key: list[Tensor] = []
        residual: list[Tensor] = []
        for video in videos:
            tokens, positions, _, _ = self._encode(video, fps)
            kinds = self._kinds(positions)
            key.append(tokens[kinds == 0].float())
            residual.append(tokens[kinds == 1].float())
        count = sum(map(len, key))
        if count < 2:
            raise ValueError(f"fit_statistics: videos must have two tokens or more, got {count}")
        enough = sum(map(len, residual)) > 1
        for kind, rows in enumerate((key, residual if enough else key)):
            values = torch.cat(rows)
            self.token_mean[kind] = values.mean(0)
            self.token_deviation[kind] = values.std(0).clamp(min=_LEAST_DEVIATION)

    def _kinds(self, positions: Tensor) -> Tensor:
        """Returns 0 for key tokens, 1 for residual tokens [...] at positions [..., 2]."""
        return (positions[..., 1] >= self.tokenizer.config.key_tokens).long()

    def normalised(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Returns tokens [..., D] at [..., 2], by the stored statistics of mean 0, deviation 1."""
        kinds = self._kinds(positions)
        return (tokens - self.token_mean[kinds]) / self.token_deviation[kinds]

    def denormalised(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Returns the inverse of `normalised`."""
        kinds = self._kinds(positions)
        return tokens * self.token_deviation[kinds] + self.token_mean[kinds]

    # Training.

    def forward(
        self,
        video: Tensor,
        turns: Sequence[Turn],
        *,
        fps: float | None = None,
        step: int = 0,
        generators: Generators = None,
    ) -> dict[str, Tensor]:
        """Returns scalars: `loss` and its terms `under_loss`, `vis_loss`, `dec_loss`.

        Samples of both tasks may be mixed. `under_loss` is the mean over all tokens of answers in
        this batch, so that long answers count more; the others are means over the samples that are
        videos; a term is 0 where nothing has it. A batch in parts, of several processes or steps
        of accumulation, weighs each part's mean alike, those of 0 too.

        Args:
            video: [B, 3, T, H, W], float in [-1, 1] or uint8.
            turns: one per clip.
            fps: frames per second.
            step: optimiser steps done, for the part of predicted tokens.
            generators: sources of noise, one per clip; default torch's global one.

        Raises:
            TypeError, ValueError: a video that is none, another number of turns, or sequences that
                are longer than the language model's positions.
        """
        check_one_per_clip("VTokLM", "turns", turns, video)
        if isinstance(generators, Sequence) and len(generators) != len(video):
            raise ValueError(
                f"VTokLM: generators must be one per clip ({len(video)}), got {len(generators)}"
            )
        latent, positions, indices, extra = self._encode(video, fps, step)
        length = latent.shape[1]
        if self.training and self.config.text_dropout > 0:
            turns = self._some_without_text(turns, generators)
        batch = build_sequences(turns, [length] * len(turns), self.text)
        states = self._states(batch, latent, positions)
        under = self._answer_loss(states, batch)
        is_generated = torch.tensor([turn.task == GENERATION for turn in turns])
        zero = states.sum() * 0.0
        vis = dec = zero
        if bool(is_generated.any()):
            before = self._before_targets(states, batch)
            chosen = is_generated.to(latent.device)
            gens = _chosen(generators, is_generated)
            counts, places = [length] * int(is_generated.sum()), positions[chosen]
            if isinstance(self.head, CodeHead):
                assert indices is not None
                vis = self.head.loss(before, indices[chosen].flatten())
            else:
                # Stop-gradient targets, see the module.
                targets = self.normalised(latent[chosen], places).detach().flatten(0, 1)
                vis = self.head.loss(before, targets, counts, gens)
            if self.config.lambda_dec > 0:
                seen = self._decoder_tokens(latent[chosen], before, places, step, gens)
                clip = self._float_video(video)[chosen]
                dec = self.tokenizer.decoder.loss(clip, seen, places, gens)[0]
        else:
            # DDP waits for a gradient of every parameter in every step.
            vis = zero + nothing_of(self.head)
            if self.config.lambda_dec > 0:
                dec = zero + self._nothing_of_decoder(latent, positions)
        loss = under + self.config.lambda_vis * vis + self.config.lambda_dec * dec
        if extra is not None:
            loss = loss + extra
        return {"loss": loss, "under_loss": under, "vis_loss": vis, "dec_loss": dec}

    def _encode(
        self, video: Tensor, fps: float | None, step: int = 0
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Returns tokens [B, L, D], positions [B, L, 2], ids and FSQ's own loss."""
        encoding = self.tokenizer.encode(video, fps=self.rate(fps), step=step)
        assert isinstance(encoding.latent, Tensor) and encoding.positions is not None
        indices, extra = encoding.indices, encoding.losses.get("aux_loss")
        return encoding.latent, encoding.positions, indices, extra

    def _some_without_text(self, turns: Sequence[Turn], generators: Generators) -> list[Turn]:
        """Returns turns of which the part `text_dropout` of the videos from text has none."""
        draw = normal_rows([1] * len(turns), 1, self.token_mean, generators)
        dropped = (torch.special.ndtr(draw[:, 0]) < self.config.text_dropout).tolist()
        return [
            Turn(GENERATION, "") if drop and turn.task == GENERATION else turn
            for turn, drop in zip(turns, dropped, strict=True)
        ]

    def _nothing_of_decoder(self, latent: Tensor, positions: Tensor) -> Tensor:
        """Returns 0 with zero gradients for all of the decoder, which is run on one patch: with
        FSDP2 every process must run a block that any of them runs, and only a block itself can
        read its parameters."""
        decoder = self.tokenizer.decoder
        patch = latent.new_zeros(1, 3, *decoder.patch)
        return 0.0 * decoder.predict(patch, patch[:, 0, 0, 0, 0], latent[:1], positions[:1]).sum()

    def positions_for(self, num_frames: int, fps: float | None) -> Tensor:
        """Returns int32 [L, 2]: frame and slot of the tokens of a video of T frames."""
        return self.tokenizer.default_positions(num_frames, self.rate(fps))

    def rate(self, fps: float | None) -> float | None:
        """Returns the frames per second that are meant: those given, or `config.fps`."""
        return self.config.fps if fps is None else fps

    def _float_video(self, video: Tensor) -> Tensor:
        return video_input.to_float(video, self.tokenizer.dtype)

    def check_length(self, length: int) -> None:
        """Raises ValueError if the language model has no positions for so many tokens."""
        limit = getattr(self.lm.config, "max_position_embeddings", None)
        if limit is not None and length > limit:
            raise ValueError(
                f"VTokLM: a sequence must have at most {limit} tokens, the language model's "
                f"max_position_embeddings, got {length}: take fewer frames (--max-frames of vtok "
                "ask, --frames of vtok generate), or with a tokenizer that has no stride a higher "
                "fps (--fps)"
            )

    def embed_visual(self, latent: Tensor, positions: Tensor) -> Tensor:
        """Returns what the language model sees [..., H] of tokens [..., D] at [..., 2], their
        frames and slots."""
        frames, slots = positions.long().unbind(-1)
        seen = self.normalised(latent, positions).to(latent.dtype)
        waves = sincos_1d(frames.flatten(), _FRAME_WAVES).view(*frames.shape, -1).to(latent)
        return self.projector(seen) + self.slot_embed(slots) + self.frame_embed(waves)

    def embed_text(self, ids: Tensor) -> Tensor:
        """Returns what the language model sees [..., H] of text ids [...]."""
        words = self.lm.get_input_embeddings()(ids)
        return words if self.control is None else self.control.embedded(words, ids)

    def _inputs(self, batch: Sequences, latent: Tensor | None, positions: Tensor | None) -> Tensor:
        """Returns embeddings [B, N, H] of a batch of sequences."""
        device = self.slot_embed.weight.device
        embedded = self.embed_text(batch.ids.to(device))
        if latent is None or positions is None or not bool(batch.is_visual.any()):
            return embedded
        visual = self.embed_visual(latent, positions).to(embedded.dtype)
        holes = batch.is_visual.to(device)[..., None].expand_as(embedded)
        rows = batch.is_visual.any(1).to(device)  # a beginning of a generation has no token yet
        return embedded.masked_scatter(holes, visual[rows])

    def _states(self, batch: Sequences, latent: Tensor, positions: Tensor) -> Tensor:
        """Returns the language model's last states [B, N, H]."""
        self.check_length(batch.ids.shape[1])
        inputs = self._inputs(batch, latent, positions)
        return self.lm.base_model(
            inputs_embeds=inputs, attention_mask=batch.attended.to(inputs.device).long()
        ).last_hidden_state

    def _answer_loss(self, states: Tensor, batch: Sequences) -> Tensor:
        labels = batch.labels.to(states.device)[:, 1:]
        learnt = labels != IGNORED
        if not bool(learnt.any()):
            nothing = states.sum() * 0.0 + nothing_of(output_head(self.lm))
            return nothing if self.control is None else nothing + nothing_of(self.control)
        logits = self.text_logits(states[:, :-1][learnt])
        return F.cross_entropy(logits.float(), labels[learnt])

    def text_logits(self, states: Tensor) -> Tensor:
        """Returns the language model's logits [..., ids] of its states [..., H]."""
        return text_logits(self.lm, states, self.control)

    @staticmethod
    def _before_targets(states: Tensor, batch: Sequences) -> Tensor:
        """Returns the states [n, H] from which visual tokens are predicted."""
        return states[:, :-1][batch.is_target.to(states.device)[:, 1:]]

    def predict(
        self, states: Tensor, positions: Tensor, counts: Sequence[int], generators: Generators
    ) -> Tensor:
        """Returns predicted tokens [n, D] at [n, 2] of states [n, H], with gradients."""
        if isinstance(self.head, CodeHead):
            return self.head.expected(states)
        noise = normal_rows(counts, self.head.token_dim, states, generators)
        predicted = self.head.predict(states, noise, TRAINING_STEPS)
        return self.denormalised(predicted, positions)

    def _decoder_tokens(
        self,
        latent: Tensor,
        before: Tensor,
        positions: Tensor,
        step: int,
        generators: Generators,
    ) -> Tensor:
        """Returns tokens [B, L, D], for some clips predicted ones."""
        part = self.config.predicted_part(step)
        batch, length, dim = latent.shape
        if part == 0:
            return latent
        draw = normal_rows([1] * batch, 1, latent, generators)
        is_predicted = torch.special.ndtr(draw) < part  # [B, 1]
        flat = self.predict(before, positions.flatten(0, 1), [length] * batch, generators)
        predicted = flat.view(batch, length, dim)
        return torch.where(is_predicted[..., None], predicted.to(latent.dtype), latent)

    @torch.no_grad()
    def decoder_gap(
        self, video: Tensor, prompts: Sequence[str], *, fps: float | None = None, seed: int = 0
    ) -> dict[str, float]:
        """Returns the decoder's loss on true tokens (`true`), on tokens predicted from true ones
        (`teacher_forced`) and on tokens that were generated (`free_running`): both drawn alike, and
        all given to the decoder with equal noise.

        Args:
            video: [B, 3, T, H, W].
            prompts: what each clip is a video of.
            fps: frames per second.
            seed: of all noise.
        """
        from vtok_ext.models.vtok_generation import generate_tokens, next_tokens

        check_one_per_clip("decoder_gap", "prompts", prompts, video)
        latent, positions, _, _ = self._encode(video, fps)
        turns = [Turn(GENERATION, prompt) for prompt in prompts]
        batch = build_sequences(turns, [latent.shape[1]] * len(turns), self.text)
        states = self._before_targets(self._states(batch, latent, positions), batch)

        def generator() -> torch.Generator:
            return torch.Generator().manual_seed(seed)

        flat = positions.flatten(0, 1)
        forced = next_tokens(self, states, flat, temperature=1.0, generator=generator())
        free = generate_tokens(
            self, prompts, num_frames=video.shape[2], fps=fps, generator=generator()
        )
        tokens = {"true": latent, "teacher_forced": forced.view_as(latent), "free_running": free}
        clip = self._float_video(video)
        decoder = self.tokenizer.decoder
        return {
            name: float(decoder.loss(clip, value, positions, generator())[0])
            for name, value in tokens.items()
        }

    # What a trained model does, see `vtok_generation`.

    def answer(self, video: Tensor, questions: Sequence[str], **options: Any) -> list[str]:
        """Returns one answer per clip [B, 3, T, H, W]; see `vtok_generation.answer`."""
        from vtok_ext.models.vtok_generation import answer

        return answer(self, video, questions, **options)

    def generate(self, prompts: Sequence[str], **options: Any) -> Tensor:
        """Returns videos of texts; see `vtok_generation.generate`."""
        from vtok_ext.models.vtok_generation import generate

        return generate(self, prompts, **options)

    def save_pretrained(self, folder: str) -> None:
        """Writes everything into one folder; see `vtok_lm_files`."""
        from vtok_ext.models.vtok_lm_files import save

        save(self, folder)

    @classmethod
    def from_pretrained(cls, folder: str) -> VTokLM:
        """Returns the model of such a folder, in eval mode; see `vtok_lm_files`."""
        from vtok_ext.models.vtok_lm_files import load

        return load(folder)


def _chosen(generators: Generators, wanted: Tensor) -> Generators:
    """Returns the generators of the chosen samples; one that all share as it is."""
    if generators is None or isinstance(generators, torch.Generator):
        return generators
    return [generator for generator, use in zip(generators, wanted.tolist(), strict=True) if use]
