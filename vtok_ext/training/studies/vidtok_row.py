"""Kind "vidtok": trains a small VidTok on procedural clips and measures it on held-out ones.

    loss   mean (reconstruction - video)^2 + aux_weight * auxiliary loss of the quantizer
    Muon for matrices and AdamW for the rest, linear warm-up, then half a cosine down to zero

Every row of a study sees the same clips in the same order. Metrics per clip: psnr, ssim, and
psnr_mean_colour and psnr_mean_frame, see `without_training`; with `strata` also psnr_motion_1, ...,
where the clips are sorted by mean frame difference. Of the run: codebook_use, perplexity and tokens
of `usage_clips` clips; million_parameters; cpu_seconds and training_tera_macs, 10^12 multiply-adds.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vtok_ext.metrics import CodebookCounter, psnr, ssim
from vtok_ext.models.multiply_adds import multiply_adds_of
from vtok_ext.models.vidtok import VidTok
from vtok_ext.models.vidtok_config import VidTokConfig
from vtok_ext.training.clip_order import ClipOrder
from vtok_ext.training.overfit import center_latent, muon_and_adamw, raw_latent
from vtok_ext.training.start_weights import start
from vtok_ext.training.studies.clip_measures import strata, without_training
from vtok_ext.training.studies.clip_store import clip_store, fingerprint
from vtok_ext.training.studies.kinds import Progress, shared_folder
from vtok_ext.training.studies.row_picture import reconstruction_picture
from vtok_ext.training.studies.row_result import RowResult
from vtok_ext.training.studies.row_settings import read_settings
from vtok_ext.training.studies.row_training import train_steps
from vtok_ext.training.tokenizer_task import to_video

# Beyond any number of training clips, so that the held-out ones are none of them.
_HELD_OUT_SEED = 1_000_000_000
_CENTERING_CLIPS = 16
_PICTURE_FRAMES = 6


@dataclass(frozen=True)
class VidTokRow:
    """Settings of a row.

    Attributes:
        model: fields of `VidTokConfig`, of a discrete one.
        start: of the weights, see `start_weights`.
        variant, codes: what plots and tables call the row; `codes` must be the codebook's size.
        stages: one after the other, each a mapping that replaces some of steps, size, batch_size,
            lr, and `freeze_encoder` (false); by default one stage.
        steps, batch_size, warmup: of the training, per stage.
        lr, adam_lr: of Muon, and of AdamW for vectors, output layers and codebooks.
        center_latent: spread the first latents over the levels, see `overfit.center_latent`.
        start_codebook: of a VQ, put the codes on first latents, see `VQ.start_from`.
        aux_weight: of the quantizer's auxiliary loss.
        num_frames, size: T and H = W of the clips, >= 11 px.
        motion: of the procedural clips.
        train_clips, train_frame_step: how many, and every how manieth frame they show.
        eval_clips, eval_frame_step, eval_size: of the held-out clips; size null for `size`.
        usage_clips: held-out clips whose codes are counted, >= eval_clips.
        strata: groups of motion that PSNR is reported for; 0 for none.
    """

    model: dict[str, Any]
    start: str = "scaled"
    variant: str = ""
    codes: int | None = None
    stages: list[dict[str, Any]] = field(default_factory=list)
    steps: int = 300
    batch_size: int = 8
    lr: float = 0.01
    adam_lr: float = 2e-3
    warmup: int = 10
    center_latent: bool = True
    start_codebook: bool = False
    aux_weight: float = 1.0
    num_frames: int = 17
    size: int = 32
    motion: str = "erratic"
    train_clips: int = 1024
    train_frame_step: int = 1
    eval_clips: int = 128
    eval_frame_step: int = 1
    eval_size: int | None = None
    usage_clips: int = 128
    strata: int = 0

    @classmethod
    def of(cls, settings: dict[str, Any]) -> VidTokRow:
        """Returns checked settings.

        Raises:
            ValueError: a wrong key, which names the closest, or a wrong value.
        """
        row = read_settings(cls, "vidtok", settings)
        if row.model.get("regularizer") == "kl":
            raise ValueError("study: model must be discrete, its loss has no KL term, got kl")
        if row.start_codebook and row.model.get("regularizer") != "vq":
            found = row.model.get("regularizer")
            raise ValueError(f"study: start_codebook must be of regularizer 'vq', got {found!r}")
        if not 1 <= row.eval_clips <= row.usage_clips:
            raise ValueError(
                f"study: usage_clips must be >= eval_clips >= 1, "
                f"got {row.usage_clips} and {row.eval_clips}"
            )
        return row

    def all_stages(self) -> list[Stage]:
        """Returns the stages of the training."""
        names = ("steps", "size", "batch_size", "lr")
        common = {name: getattr(self, name) for name in names}
        for stage in self.stages:
            for key in stage:
                if key not in (*names, "freeze_encoder"):
                    raise ValueError(
                        f"study: a stage must have keys among {names} and freeze_encoder, "
                        f"got {key!r}"
                    )
        return [Stage(**{**common, **stage}) for stage in self.stages or [{}]]


@dataclass(frozen=True)
class Stage:
    """One stage of the training."""

    steps: int
    size: int
    batch_size: int
    lr: float
    freeze_encoder: bool = False


def run_row(settings: dict[str, Any], seed: int, folder: Path, progress: Progress) -> RowResult:
    """Returns what a row measured with a seed; see the file's opening.

    Raises:
        ValueError: wrong settings.
        FailedComputationError: the loss became NaN or infinite.
    """
    row = VidTokRow.of(settings)
    torch.manual_seed(seed)
    model = VidTok(VidTokConfig.from_dict(row.model), "study")
    start(model, row.start)
    if row.codes is not None and model.quantizer.codebook_size != row.codes:  # type: ignore[union-attr]
        raise ValueError(
            f"study: codes must be the size of the codebook, got {row.codes} for {model.quantizer}"
        )
    progress(0.0, "clips")
    stages = row.all_stages()
    total, done = sum(stage.steps for stage in stages), 0
    seconds = 0.0
    for stage in stages:
        # Before the clock runs: whichever row comes first draws them for all.
        clips = _training_clips(row, stage, folder)
        begin = time.process_time()
        done = _train(model, row, stage, seed, clips, progress, done, total)
        seconds += time.process_time() - begin
    result = _measure(model, row, folder, progress, picture=seed == 0)
    parameters = sum(p.numel() for p in model.parameters())
    result.summary |= {
        "million_parameters": parameters / 1e6,
        # Of training in this process, so that what else a machine does changes little.
        "cpu_seconds": round(seconds, 1),
        "training_tera_macs": sum(_multiply_adds(model, row, stage) for stage in stages) / 1e12,
    }
    return result


def _multiply_adds(model: VidTok, row: VidTokRow, stage: Stage) -> int:
    """Returns the multiply-adds of a stage: a backward pass counts as two forward passes."""
    video = torch.zeros(1, 3, row.num_frames, stage.size, stage.size)
    encodings: list[Any] = []
    encoder = multiply_adds_of(lambda: encodings.append(model.encode(video, compute_loss=False)))
    decoder = multiply_adds_of(lambda: model.decode(encodings[0]))
    passes = (1 if stage.freeze_encoder else 3) * encoder + 3 * decoder
    return passes * stage.steps * stage.batch_size


def _training_clips(row: VidTokRow, stage: Stage, folder: Path) -> Tensor:
    """Returns the clips of a stage, uint8."""
    return clip_store(
        shared_folder(folder),
        row.train_clips,
        row.num_frames,
        stage.size,
        motion=row.motion,
        frame_step=row.train_frame_step,
    )


def _train(
    model: VidTok,
    row: VidTokRow,
    stage: Stage,
    seed: int,
    clips: Tensor,
    progress: Progress,
    done: int,
    total: int,
) -> int:
    """Returns the steps done after training for one stage."""
    encoding = [part for part in (model.encoder, model.quantizer) if part is not None]
    for part in encoding:
        part.requires_grad_(not stage.freeze_encoder)
    optimizers = muon_and_adamw(model, stage.lr, row.adam_lr * stage.lr / row.lr)
    order = ClipOrder(len(clips), stage.batch_size, seed=seed)
    model.train()
    if done == 0 and row.center_latent:
        center_latent(model, to_video(clips[:_CENTERING_CLIPS]))
    if done == 0 and row.start_codebook:
        _start_codebook(model, clips)
    if stage.freeze_encoder:
        for part in encoding:  # moving averages of a codebook stay too
            part.eval()

    def loss_of(step: int) -> Tensor:
        places = [index for _, index in order.places(step, 0)]
        video = to_video(clips[places])
        output = model(video, step=done + step, compute_loss=not stage.freeze_encoder)
        loss = (output.reconstruction - video).square().mean()
        auxiliary = output.encoding.losses.get("aux_loss")
        if auxiliary is not None and not stage.freeze_encoder:
            loss = loss + row.aux_weight * auxiliary
        return loss

    def on_step(step: int, loss: float) -> None:
        progress(0.9 * (done + step + 1) / total, f"step {done + step}, loss {loss:.4f}")

    train_steps(loss_of, optimizers, stage.steps, warmup=row.warmup, on_step=on_step)
    return done + stage.steps


def _start_codebook(model: VidTok, clips: Tensor) -> None:
    """Puts the codes of a VQ on latents of the first clips, of as many as there need be."""
    quantizer: Any = model.quantizer
    per_clip = math.prod(model.token_grid(*clips.shape[2:]))
    count = max(_CENTERING_CLIPS, -(-quantizer.codebook_size // per_clip))
    parts = to_video(clips[:count]).split(_CENTERING_CLIPS)
    quantizer.start_from(torch.cat([raw_latent(model, part) for part in parts]))


@torch.no_grad()
def _measure(
    model: VidTok, row: VidTokRow, folder: Path, progress: Progress, picture: bool
) -> RowResult:
    """Returns metrics on the held-out clips."""
    model.eval()
    clips = clip_store(
        shared_folder(folder),
        row.usage_clips,
        row.num_frames,
        row.eval_size or row.size,
        motion=row.motion,
        frame_step=row.eval_frame_step,
        first_seed=_HELD_OUT_SEED,
    )
    quantizer: Any = model.quantizer
    counter = CodebookCounter(quantizer.codebook_size) if model.is_discrete else None
    values: dict[str, list[float]] = {}
    motion: list[float] = []
    result = RowResult(held_out=fingerprint(clips[: row.eval_clips]))
    for first in range(0, row.usage_clips, row.batch_size):
        video = to_video(clips[first : first + row.batch_size])
        encoding = model.encode(video, compute_loss=False)
        if counter is not None:
            assert encoding.indices is not None  # a discrete model has them
            counter.update(encoding.indices)
        measured = video[: max(0, row.eval_clips - first)]
        if len(measured):
            decoded = model.decode(encoding)[: len(measured)]
            for a, b in zip(decoded.split(1), measured.split(1), strict=True):
                found = {"psnr": psnr(a, b).item(), "ssim": ssim(a, b).item()}
                for name, value in (found | without_training(b)).items():
                    values.setdefault(name, []).append(value)
                motion.append((b[:, :, 1:] - b[:, :, :-1]).abs().mean().item())
            if picture and first == 0:
                result.pictures = [
                    reconstruction_picture(
                        folder / "held-out.png", measured[0], decoded[0], _PICTURE_FRAMES
                    )
                ]
        progress(0.9 + 0.1 * first / row.usage_clips, "measuring")
    result.per_clip = values | strata("psnr_motion", values["psnr"], motion, row.strata)
    if counter is not None:
        usage = counter.result()
        result.summary = {
            "codebook_use": usage.fraction_used,
            "perplexity": usage.perplexity,
            "bits_per_token": usage.bits_per_token,
            "tokens": float(usage.num_tokens),
        }
    return result
