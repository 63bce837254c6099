"""Kind "vtok_generation": a small unified model makes videos of captions; a checker reads them.

    first  L_dec: tokens and decoder learn to reconstruct; rows of equal tokens share the result
    then   L_visLM of videos from text and L_under of questions in mixed batches, tokens fixed

A clip costs the decoder ten times what it costs the language model, which needs many more of them.

Metrics per held-out caption, whose combinations of attributes no training clip has: the parts of
its shapes whose colour, shape, direction and speed are in the generated video as asked, whether
their number is right, and the same of the held-out clip decoded from its own tokens
(`reconstructed_*`): what the decoder loses is not the language model's fault. Of the run: tokens,
the decoder's loss on true, teacher-forced and generated tokens, cpu_seconds of both trainings.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtok_ext.data.captioned import (
    CaptionedClips,
    caption_matches,
    caption_of,
    questions_of,
    read_scene,
)
from vtok_ext.data.captioned.questions import vocabulary
from vtok_ext.data.picture import write_png
from vtok_ext.models._video_input import to_float, to_uint8
from vtok_ext.models.vision_encoder import SmallViT
from vtok_ext.models.vtok_lm_config import VTokLMConfig
from vtok_ext.models.vtok_sequence import GENERATION, UNDERSTANDING, Turn
from vtok_ext.models.vtok_text import WordTokenizer
from vtok_ext.training.clip_order import ClipOrder
from vtok_ext.training.optimizers import transformer_optimizers
from vtok_ext.training.recipe import OptimizerRecipe
from vtok_ext.training.studies.clip_store import fingerprint
from vtok_ext.training.studies.kinds import Progress, shared_folder
from vtok_ext.training.studies.row_result import RowResult
from vtok_ext.training.studies.row_training import train_steps, trained_once
from vtok_ext.training.studies.vtok_clips import HELD_OUT_SEED, StudyClips
from vtok_ext.training.studies.vtok_row import VTokRow
from vtok_ext.training.studies.vtok_tokens import VideoStudyLM

# What tokens and decoder depend on, beside the tokenizer's sizes and what is shown of clips.
_OF_DECODER = (
    *("decoder_steps", "decoder_batch", "decoder_lr", "muon_lr", "warmup"),
    *("encoder_steps", "train_clips", "num_frames", "size"),
)
_PICTURE_FRAMES, _PICTURE_SCALE = 6, 2


@dataclass(frozen=True)
class GenerationRow(VTokRow):
    """Settings of a row: those of `VTokRow`, and

    Attributes:
        head, head_width, head_depth: see `VTokLMConfig`.
        generation: part of the samples that are videos from text.
        decoder_dim, decoder_depth, decoder_heads, decoder_patch, sampling_steps: the decoder.
        decoder_steps, decoder_batch, decoder_lr, muon_lr: of its training, by Muon for the matrices
            within and AdamW for all else.
        temperature, guidance: of the generated tokens.
        text_dropout: see `VTokLMConfig`.
    """

    kind: ClassVar[str] = "vtok_generation"

    head: str = "flow"
    head_width: int = 128
    head_depth: int = 2
    generation: float = 0.75
    decoder_dim: int = 96
    decoder_depth: int = 4
    decoder_heads: int = 4
    decoder_patch: tuple[int, ...] = (4, 8, 8)
    sampling_steps: int = 8
    decoder_steps: int = 1000
    decoder_batch: int = 8
    decoder_lr: float = 1.5e-3
    muon_lr: float = 0.02
    temperature: float = 1.0
    guidance: float = 1.0
    text_dropout: float = 0.1

    def build(self, encoder: SmallViT, clips: CaptionedClips) -> VideoStudyLM:
        """Returns the model of a row; see `VTokRow.build`."""
        names = ("decoder_dim", "decoder_depth", "decoder_heads", "decoder_patch")
        decoder = {name: getattr(self, name) for name in (*names, "sampling_steps")}
        text = WordTokenizer(vocabulary())
        unified = VTokLMConfig(
            self.language_model(len(text)),
            head="codes" if self.levels else self.head,
            head_width=self.head_width,
            head_depth=self.head_depth,
            text_dropout=self.text_dropout,
            lambda_dec=0.0,  # trained before
        )
        tokenizer = self.tokenizer(encoder, clips, **decoder)
        return VideoStudyLM(unified, tokenizer, text, **self.shows())


def run_row(settings: dict[str, Any], seed: int, folder: Path, progress: Progress) -> RowResult:
    """Returns what a row measured with a seed; see the file's opening.

    Raises:
        ValueError: wrong settings.
        FailedComputationError: the loss became NaN or infinite.
    """
    row, shared = GenerationRow.of(settings), shared_folder(folder)
    shape = (row.num_frames, row.size, row.size)
    train = CaptionedClips(row.train_clips, *shape)
    test = CaptionedClips(row.eval_clips, *shape, split="test", first_seed=HELD_OUT_SEED)
    stock = StudyClips(shared, train, row.encoder(), train, progress)
    torch.manual_seed(seed)
    model = row.build(stock.encoder, train)
    seconds = trained_once(
        model.tokenizer,
        shared,
        "decoder",
        _facts_of_decoder(model, row, seed),
        lambda: _train_decoder(model, row, stock, seed, progress),
    )
    start = time.process_time()
    torch.manual_seed(seed)  # whether the decoder was trained now or before
    _train(model, row, stock, seed, progress)
    seconds += time.process_time() - start
    result = _measure(model.eval(), row, test, folder, seed, progress)
    result.summary["cpu_seconds"] = round(seconds, 1)
    return result


def _facts_of_decoder(model: VideoStudyLM, row: GenerationRow, seed: int) -> dict[str, Any]:
    """Returns what the training of tokens and decoder depends on."""
    facts = {name: getattr(row, name) for name in _OF_DECODER}
    config = model.tokenizer.config.to_dict()
    return {**facts, **row.shows(), "tokenizer": config, "seed": seed}


def _train_decoder(
    model: VideoStudyLM, row: GenerationRow, stock: StudyClips, seed: int, progress: Progress
) -> None:
    """Trains the tokens and the decoder to reconstruct clips."""
    videos, tokenizer = stock.videos(), model.tokenizer
    tokenizer.requires_grad_(True)
    tokenizer.encoder.requires_grad_(False)
    settings = OptimizerRecipe(
        lr=row.decoder_lr, muon_lr=row.muon_lr, betas=[0.9, 0.98], weight_decay=0.01
    )
    optimizers = list(transformer_optimizers(tokenizer, settings).values())
    order = ClipOrder(len(videos), row.decoder_batch, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    tokenizer.train()

    def loss_of(step: int) -> Tensor:
        places = [index for _, index in order.places(step, 0)]
        tokens, positions, _, extra = model._encode(stock.maps[places].float(), None, step)
        clip = to_float(videos[places], tokenizer.dtype)
        loss = tokenizer.decoder.loss(clip, tokens, positions, generator)[0]
        return loss if extra is None else loss + extra

    def on_step(step: int, loss: float) -> None:
        progress(0.2 + 0.3 * step / row.decoder_steps, f"decoder, step {step}, loss {loss:.3f}")

    train_steps(loss_of, optimizers, row.decoder_steps, warmup=row.warmup, on_step=on_step)


def _train(
    model: VideoStudyLM, row: GenerationRow, stock: StudyClips, seed: int, progress: Progress
) -> None:
    """Trains the language model and its head; tokens stay as they are."""
    model.tokenizer.requires_grad_(False)
    if not row.levels:
        model.eval().fit_statistics([part.float() for part in stock.maps[:32].split(4)])
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=row.lr, betas=(0.9, 0.98), weight_decay=0.01)
    order = ClipOrder(len(stock.maps), row.batch_size, seed=seed)
    chooser = torch.Generator().manual_seed(seed)
    model.train()
    model.tokenizer.eval()

    def loss_of(step: int) -> Tensor:
        places = [index for _, index in order.places(step, 0)]
        turns = [_turn(stock.clips, index, row.generation, chooser) for index in places]
        return model(stock.maps[places].float(), turns, generators=chooser)["loss"]

    def on_step(step: int, loss: float) -> None:
        progress(0.5 + 0.4 * step / row.steps, f"step {step}, loss {loss:.3f}")

    train_steps(loss_of, [optimizer], row.steps, warmup=row.warmup, on_step=on_step)


def _turn(clips: CaptionedClips, index: int, generation: float, chooser: torch.Generator) -> Turn:
    scene = clips.scene(index)
    if float(torch.rand((), generator=chooser)) < generation:
        return Turn(GENERATION, caption_of(scene))
    questions = questions_of(scene)
    question = questions[int(torch.randint(len(questions), (), generator=chooser))]
    return Turn(UNDERSTANDING, question.text, question.answer)


@torch.no_grad()
def _measure(
    model: VideoStudyLM,
    row: GenerationRow,
    clips: CaptionedClips,
    folder: Path,
    seed: int,
    progress: Progress,
) -> RowResult:
    """Returns how much of held-out captions is in the videos that are made of them."""
    values: dict[str, list[float]] = {}
    size, shown = (row.size, row.size), []
    for index in range(len(clips)):
        item = clips.clip(index)
        made = model.generate(
            [item.caption],
            num_frames=row.num_frames,
            size=size,
            temperature=row.temperature,
            guidance=row.guidance,
            seed=index,
            output="uint8",
        )[0]
        tokens, positions, _, _ = model._encode(item.video[None], None)
        generator = torch.Generator().manual_seed(index)
        decoded = model.tokenizer.decoder.sample(
            tokens,
            positions,
            row.num_frames,
            size,
            num_steps=row.sampling_steps,
            generator=generator,
        )
        back = to_uint8(decoded)[0]
        for prefix, video in (("", made), ("reconstructed_", back)):
            for name, value in caption_matches(item.scene, read_scene(video)).items():
                values.setdefault(prefix + name, []).append(value)
        if index < 2:
            shown += [item.video, back, made]
        progress(0.9 + 0.1 * index / len(clips), "measuring")
    videos = torch.stack([clips[0, i] for i in range(min(4, len(clips)))])
    captions = [caption_of(clips.scene(i)) for i in range(len(videos))]
    gap = model.decoder_gap(videos, captions)
    summary = {f"dec_loss_{name}": value for name, value in gap.items()}
    summary["tokens"] = float(len(model.positions_for(row.num_frames, None)))
    result = RowResult(values, summary, held_out=fingerprint(videos))
    if seed == 0:
        result.pictures = [_picture(folder / "generated.png", shown)]
    return result


def _picture(
    path: Path,
    videos: list[Tensor],  # [3, T, H, W] uint8
) -> Path:
    """Returns the path of a picture: some frames of each video, one below the other."""
    times = torch.linspace(0, videos[0].shape[1] - 1, _PICTURE_FRAMES).long()
    rows = [torch.cat(list(video[:, times].unbind(1)), -1) for video in videos]
    image = torch.cat(rows, 1)
    image = image.repeat_interleave(_PICTURE_SCALE, 1).repeat_interleave(_PICTURE_SCALE, 2)
    write_png(path, image)
    return path
