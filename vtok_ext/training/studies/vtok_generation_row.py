"""Kind "vtok_generation": a small unified model makes videos of captions; a checker reads them.

    loss   L_visLM + L_dec of videos from text, and L_under of questions, in mixed batches

Metrics per held-out caption, whose combinations of attributes no training clip has: the parts of
its shapes whose colour, shape, direction and speed are in the generated video as asked, whether
their number is right, and the same of the held-out clip decoded from its own tokens
(`reconstructed_*`): what the decoder loses is not the language model's fault. Of the run: tokens,
the decoder's loss on true, teacher-forced and generated tokens, cpu_seconds.
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
from vtok_ext.models._video_input import to_uint8
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
from vtok_ext.training.studies.row_training import train_steps
from vtok_ext.training.studies.vtok_clips import HELD_OUT_SEED, trained_encoder
from vtok_ext.training.studies.vtok_row import VTokRow
from vtok_ext.training.studies.vtok_tokens import VideoStudyLM

_PICTURE_FRAMES, _PICTURE_SCALE = 6, 2


@dataclass(frozen=True)
class GenerationRow(VTokRow):
    """Settings of a row: those of `VTokRow`, and

    Attributes:
        head, head_width, head_depth, predicted, predicted_steps: see `VTokLMConfig`.
        generation: part of the samples that are videos from text.
        decoder_dim, decoder_depth, decoder_heads, decoder_patch, sampling_steps: the decoder.
        temperature: of the generated tokens.
        muon_lr: of the matrices within, `lr` being that of all else.
    """

    kind: ClassVar[str] = "vtok_generation"

    head: str = "flow"
    head_width: int = 128
    head_depth: int = 2
    predicted: float = 0.5
    predicted_steps: int = 1000
    generation: float = 0.75
    decoder_dim: int = 96
    decoder_depth: int = 4
    decoder_heads: int = 4
    decoder_patch: tuple[int, ...] = (4, 8, 8)
    sampling_steps: int = 8
    temperature: float = 1.0
    muon_lr: float = 0.02

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
            predicted=self.predicted,
            predicted_steps=self.predicted_steps,
        )
        tokenizer = self.tokenizer(encoder, clips, **decoder)
        return VideoStudyLM(unified, tokenizer, text, **self.shows())


def run_row(settings: dict[str, Any], seed: int, folder: Path, progress: Progress) -> RowResult:
    """Returns what a row measured with a seed; see the file's opening.

    Raises:
        ValueError: wrong settings.
        FailedComputationError: the loss became NaN or infinite.
    """
    row = GenerationRow.of(settings)
    shape = (row.num_frames, row.size, row.size)
    train = CaptionedClips(row.train_clips, *shape)
    test = CaptionedClips(row.eval_clips, *shape, split="test", first_seed=HELD_OUT_SEED)
    encoder = trained_encoder(shared_folder(folder), train, row.encoder(), progress)
    torch.manual_seed(seed)
    model = row.build(encoder, train)
    start = time.process_time()
    _train(model, row, train, seed, progress)
    result = _measure(model.eval(), row, test, folder, seed, progress)
    result.summary["cpu_seconds"] = round(time.process_time() - start, 1)
    return result


def _train(
    model: VideoStudyLM, row: GenerationRow, clips: CaptionedClips, seed: int, progress: Progress
) -> None:
    videos = torch.stack([clips[0, i] for i in range(len(clips))])
    if not row.levels:
        model.eval().fit_statistics([part for part in videos[:32].split(4)])
    settings = OptimizerRecipe(lr=row.lr, muon_lr=row.muon_lr, betas=[0.9, 0.98], weight_decay=0.01)
    optimizers = list(transformer_optimizers(model, settings).values())
    order = ClipOrder(len(videos), row.batch_size, seed=seed)
    chooser = torch.Generator().manual_seed(seed)
    model.train()

    def loss_of(step: int) -> Tensor:
        places = [index for _, index in order.places(step, 0)]
        turns = [_turn(clips, index, row.generation, chooser) for index in places]
        return model(videos[places], turns, step=step, generators=chooser)["loss"]

    def on_step(step: int, loss: float) -> None:
        progress(0.1 + 0.8 * step / row.steps, f"step {step}, loss {loss:.3f}")

    train_steps(loss_of, optimizers, row.steps, warmup=row.warmup, on_step=on_step)


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
