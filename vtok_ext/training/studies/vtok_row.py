"""Kind "vtok": a small language model learns to answer questions about clips that a row shows it.

    loss   cross-entropy of the answers; AdamW, linear warm-up, then half a cosine down to zero

Every row has the same clips, questions, order, language model and steps; only what it is shown of a
clip differs (`vtok_tokens`). Metrics per held-out clip, whose combinations of attributes no
training clip has: accuracy; accuracy_appearance, _motion and _events; and of every kind of
question, in the clips that have one of it. Of the run: tokens, train_seconds, cpu_seconds.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from vtok_ext.data.captioned import QUESTION_KINDS, CaptionedClips
from vtok_ext.data.captioned.questions import vocabulary
from vtok_ext.models.vision_encoder import SmallViT
from vtok_ext.models.vtok import VTok
from vtok_ext.models.vtok_config import VTokConfig
from vtok_ext.models.vtok_lm_config import VTokLMConfig, tiny_lm_config
from vtok_ext.models.vtok_sequence import UNDERSTANDING, Turn
from vtok_ext.models.vtok_text import WordTokenizer
from vtok_ext.training.clip_order import ClipOrder
from vtok_ext.training.studies.kinds import Progress, shared_folder
from vtok_ext.training.studies.row_result import RowResult
from vtok_ext.training.studies.row_settings import read_settings
from vtok_ext.training.studies.row_training import train_steps
from vtok_ext.training.studies.vtok_clips import HELD_OUT_SEED, EncoderSettings, StudyClips
from vtok_ext.training.studies.vtok_tokens import StudyLM
from vtok_ext.training.vtok_task import fit_features

GROUPS = {
    "appearance": ("colour", "shape", "count"),
    "motion": ("direction", "speed"),
    "events": ("reversal", "blink", "appearance", "appearing shape", "disappearance", "order"),
}


_Row = TypeVar("_Row", bound="VTokRow")


@dataclass(frozen=True)
class VTokRow:
    """Settings of a row.

    Attributes:
        shown, num_shown, key_frame: see `StudyLM`.
        residual_pool, num_queries, key_tokens, stride, levels, token_dim: see `VTokConfig`; tokens
            have the encoder's channels if token_dim is null.
        image_size, patch, encoder_dim, encoder_depth, encoder_heads, encoder_steps: the image
            encoder and its training, equal in all rows.
        lm_dim, lm_depth, lm_heads: the language model, a Llama.
        steps, batch_size, lr, warmup: of the training; a batch has one question per clip.
        num_frames, size: T and H = W of the clips.
        train_clips, eval_clips: how many.
    """

    kind: ClassVar[str] = "vtok"

    shown: str = "vtok"
    num_shown: int = 4
    key_frame: str = "first"
    residual_pool: str = "grid"
    num_queries: int = 4
    key_tokens: int = 16
    stride: int = 1
    levels: tuple[int, ...] = ()
    token_dim: int | None = None
    image_size: int = 64
    patch: int = 8
    encoder_dim: int = 64
    encoder_depth: int = 3
    encoder_heads: int = 4
    encoder_steps: int = 1500
    lm_dim: int = 96
    lm_depth: int = 3
    lm_heads: int = 4
    steps: int = 2000
    batch_size: int = 32
    lr: float = 1e-3
    warmup: int = 50
    num_frames: int = 32
    size: int = 64
    train_clips: int = 1024
    eval_clips: int = 128

    @classmethod
    def of(cls: type[_Row], settings: dict[str, Any]) -> _Row:
        """Returns checked settings. Raises ValueError for a wrong key, naming the closest."""
        plain: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()
        }
        return read_settings(cls, cls.kind, plain)

    def encoder(self) -> EncoderSettings:
        """Returns the settings that all rows share."""
        shape = (self.encoder_dim, self.encoder_depth, self.encoder_heads)
        return EncoderSettings(self.image_size, self.patch, *shape, self.encoder_steps)

    def tokenizer(self, encoder: SmallViT, clips: CaptionedClips, **decoder: Any) -> VTok:
        """Returns a VTok with this encoder and otherwise random weights.

        Args:
            encoder: shared by all rows.
            clips: of the training, for the statistics of features.
            **decoder: fields of `VTokConfig` that concern the decoder.
        """
        config = VTokConfig(
            image_size=self.image_size,
            encoder_patch=self.patch,
            encoder_dim=self.encoder_dim,
            encoder_depth=self.encoder_depth,
            encoder_heads=self.encoder_heads,
            token_dim=self.encoder_dim if self.token_dim is None else self.token_dim,
            key_tokens=self.key_tokens,
            residual_pool=self.residual_pool,
            num_queries=self.num_queries,
            stride=self.stride,
            levels=self.levels,
            **decoder,
        )
        tokenizer = VTok(config, "study")
        tokenizer.encoder.load_state_dict(encoder.state_dict())
        fit_features(tokenizer, clips)
        return tokenizer

    def language_model(self, vocabulary_size: int) -> str:
        """Returns the configuration of the language model as JSON."""
        sizes = {
            "hidden_size": self.lm_dim,
            "intermediate_size": 2 * self.lm_dim,
            "num_hidden_layers": self.lm_depth,
            "num_attention_heads": self.lm_heads,
            "num_key_value_heads": self.lm_heads,
        }
        return tiny_lm_config(vocabulary_size, "llama", sizes)

    def shows(self) -> dict[str, Any]:
        """Returns the arguments of `StudyLM`."""
        return {"shown": self.shown, "num_shown": self.num_shown, "key_frame": self.key_frame}

    def build(self, encoder: SmallViT, clips: CaptionedClips) -> StudyLM:
        """Returns the model of a row.

        Args:
            encoder: shared by all rows.
            clips: of the training.
        """
        # Questions need no decoder and no head: as small as can be.
        tokenizer = self.tokenizer(encoder, clips, decoder_dim=4, decoder_depth=1, decoder_heads=1)
        text = WordTokenizer(vocabulary())
        head = "codes" if self.levels else "mse"
        unified = VTokLMConfig(self.language_model(len(text)), head=head, head_width=8)
        return StudyLM(unified, tokenizer, text, **self.shows())


def run_row(settings: dict[str, Any], seed: int, folder: Path, progress: Progress) -> RowResult:
    """Returns what a row measured with a seed; see the file's opening.

    Raises:
        ValueError: wrong settings.
        FailedComputationError: the loss became NaN or infinite.
    """
    row, shared = VTokRow.of(settings), shared_folder(folder)
    shape = (row.num_frames, row.size, row.size)
    train = CaptionedClips(row.train_clips, *shape)
    test = CaptionedClips(row.eval_clips, *shape, split="test", first_seed=HELD_OUT_SEED)
    stock = StudyClips(shared, train, row.encoder(), train, progress)
    held_out = StudyClips(shared, test, row.encoder(), train, progress)
    torch.manual_seed(seed)
    model = row.build(stock.encoder, train)
    wall, cpu = time.monotonic(), time.process_time()
    _train(model, row, stock, seed, progress)
    seconds = {"train_seconds": time.monotonic() - wall, "cpu_seconds": time.process_time() - cpu}
    result = _measure(model.eval(), row, held_out, progress)
    result.summary |= {name: round(value, 1) for name, value in seconds.items()}
    return result


def _train(model: StudyLM, row: VTokRow, stock: StudyClips, seed: int, progress: Progress) -> None:
    trained = [
        p
        for name, p in model.named_parameters()
        if p.requires_grad and not name.startswith(("tokenizer.decoder.", "head."))
    ]
    optimizer = torch.optim.AdamW(trained, lr=row.lr, betas=(0.9, 0.98), weight_decay=0.01)
    order = ClipOrder(len(stock.maps), row.batch_size, seed=seed)
    # Answers by clip, drawn once: rendering is not part of what is compared.
    asked = [stock.questions(i) for i in range(len(stock.maps))]
    chooser = torch.Generator().manual_seed(seed)
    model.train()

    def loss_of(step: int) -> Tensor:
        places = [index for _, index in order.places(step, 0)]
        turns = []
        for index in places:
            number = int(torch.randint(len(asked[index]), (), generator=chooser))
            question = asked[index][number]
            turns.append(Turn(UNDERSTANDING, question.text, question.answer))
        return model(stock.maps[places].float(), turns, step=step)["loss"]

    def on_step(step: int, loss: float) -> None:
        progress(0.2 + 0.7 * step / row.steps, f"step {step}, loss {loss:.3f}")

    train_steps(loss_of, [optimizer], row.steps, warmup=row.warmup, on_step=on_step)


@torch.no_grad()
def _measure(model: StudyLM, row: VTokRow, held_out: StudyClips, progress: Progress) -> RowResult:
    """Returns accuracies on the held-out clips."""
    result = RowResult(held_out=held_out.fingerprint())
    rights: list[dict[str, float]] = []  # of every clip, by kind of question
    count = len(held_out.maps)
    for index in range(count):
        questions = held_out.questions(index)
        maps = held_out.maps[index : index + 1].float().expand(len(questions), -1, -1, -1, -1)
        answers = model.answer(maps, [question.text for question in questions], max_tokens=2)
        pairs = zip(questions, answers, strict=True)
        rights.append({question.kind: float(a == question.answer) for question, a in pairs})
        progress(0.9 + 0.1 * index / count, "measuring")
    for kind in QUESTION_KINDS:
        asked = [right[kind] for right in rights if kind in right]
        if asked:
            result.per_clip[f"accuracy_{kind.replace(' ', '_')}"] = asked
    for group, kinds in {**GROUPS, "": tuple(QUESTION_KINDS)}.items():
        name = f"accuracy_{group}_questions" if group else "accuracy"
        result.per_clip[name] = [_mean([r[k] for k in kinds if k in r]) for r in rights]
    tokens: Tensor = model._encode(held_out.maps[:1].float(), None)[0]
    result.summary = {"tokens": float(tokens.shape[1])}
    return result


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
