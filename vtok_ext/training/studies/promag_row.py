"""Kind "promag": grown tokenizers against interpolation and against training directly.

    method "interpolated"  the base on every k-th frame, k = factor / 4, and frames between by
                           linear interpolation
    method "direct"        a model of that temporal factor trained from random weights, with as much
                           work as base and growth together, or as growth alone
    method "grown"         grown to 8x, and from there to 16x; at factor 4 the base itself

All train with `growth_loss` by Muon and AdamW, warm-up and half a cosine, on the same clips in the
same order. Trained stages are kept in the study's shared folder. Metrics per held-out clip:

    psnr, ssim
    psnr_kept, sharpness   of every (factor / 4)-th frame; sharpness is the ratio of mean |gradient|
                           to the source's
    corner_error           mean |error| in the corners over that elsewhere

With `overlap`, clips of `long_frames` are coded in chunks or as a stream; then metrics are psnr and
boundary_jump at chunk borders. With `generator_work`, a SiT is trained on the latents instead, see
`latent_generation`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vtok_ext.metrics import boundary_jump, psnr, ssim
from vtok_ext.models._video_input import to_float
from vtok_ext.models.promag import ProMAG
from vtok_ext.models.promag_config import ProMAGConfig
from vtok_ext.models.promag_grown import Grown, grow
from vtok_ext.models.promag_overlap import (
    CHUNK_FRAMES,
    chunk_bounds,
    decode_overlapping,
    encode_overlapping,
)
from vtok_ext.training.clip_order import ClipOrder
from vtok_ext.training.growth_loss import KL_WEIGHT, growth_loss
from vtok_ext.training.growth_work import step_multiply_adds
from vtok_ext.training.optimizers import tokenizer_optimizers
from vtok_ext.training.recipe import OptimizerRecipe
from vtok_ext.training.studies.clip_measures import measure_clips
from vtok_ext.training.studies.clip_store import clip_store
from vtok_ext.training.studies.kinds import Progress, shared_folder
from vtok_ext.training.studies.latent_generation import generation_result
from vtok_ext.training.studies.row_result import RowResult
from vtok_ext.training.studies.row_settings import read_settings
from vtok_ext.training.studies.row_training import train_steps, trained_once

METHODS = ("interpolated", "direct", "grown")
BUDGETS = ("summed", "growth")
# Beyond any number of training clips, so that the held-out ones are none of them.
_HELD_OUT_SEED = 1_000_000_000


@dataclass(frozen=True)
class PromagRow:
    """Settings of a row.

    Attributes:
        method, factor: see above; factor 4, 8 or 16.
        model: fields of `ProMAGConfig` for all models.
        budget: of method "direct": the work of "summed" base and growth, or of "growth" alone.
        mixing, use_subsampled: of method "grown".
        overlap: frames by which chunks of 17 overlap, -1 for an exact stream; null measures clips
            of 17 frames.
        base_steps, growth_steps: of the base, and of each growth; 0 leaves the base untrained.
        batch_size, muon_lr, adam_lr, warmup, kl_weight: of all trainings; see
            `tokenizer_optimizers`.
        size, train_clips, eval_clips: of the clips of 17 frames, H = W.
        long_frames, long_clips: of the clips with `overlap`.
        generator_work: 10^12 multiply-adds for training a SiT on the latents; null for none.
    """

    method: str
    factor: int
    model: dict[str, Any]
    budget: str = "summed"
    mixing: str = "per_position"
    use_subsampled: bool = True
    overlap: int | None = None
    base_steps: int = 400
    growth_steps: int = 200
    batch_size: int = 4
    muon_lr: float = 0.01
    adam_lr: float = 2e-3
    warmup: int = 20
    kl_weight: float = KL_WEIGHT
    size: int = 32
    train_clips: int = 1024
    eval_clips: int = 64
    long_frames: int = 56
    long_clips: int = 16
    generator_work: float | None = None

    def __post_init__(self) -> None:
        """Checks every field."""
        for name, choices in (
            ("method", METHODS),
            ("factor", (4, 8, 16)),
            ("budget", BUDGETS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"study: {name} must be one of {choices}, got {getattr(self, name)!r}"
                )

    @classmethod
    def of(cls, settings: dict[str, Any]) -> PromagRow:
        """Returns checked settings. Raises ValueError for a wrong key or value."""
        return read_settings(cls, "promag", settings)


def run_row(settings: dict[str, Any], seed: int, folder: Path, progress: Progress) -> RowResult:
    """Returns what a row measured with a seed; see the file's opening.

    Raises:
        ValueError: wrong settings.
        FailedComputationError: a loss became NaN or infinite.
    """
    row = PromagRow.of(settings)
    shared = shared_folder(folder)
    model, work = _Stages(row, seed, shared, progress).trained()
    if row.generator_work is not None:
        clips = clip_store(shared, row.train_clips, CHUNK_FRAMES, row.size)
        held_out = _held_out(row, shared, row.eval_clips, CHUNK_FRAMES)
        tera = row.generator_work
        return generation_result(model.eval(), clips, held_out, tera, seed, folder, progress)
    result = _measure(model.eval(), row, folder, picture=seed == 0)
    result.summary = {
        "million_parameters": sum(p.numel() for p in model.parameters()) / 1e6,
        "training_tera_macs": work / 1e12,
    }
    return result


def _held_out(row: PromagRow, shared: Path, num_clips: int, num_frames: int) -> Tensor:
    return clip_store(shared, num_clips, num_frames, row.size, first_seed=_HELD_OUT_SEED)


class _Stages:
    """The trainings behind a row; each is done once per study and seed, whatever row needs it."""

    def __init__(self, row: PromagRow, seed: int, shared: Path, progress: Progress) -> None:
        self.row, self.seed, self.shared, self.progress = row, seed, shared, progress
        self.shape = (CHUNK_FRAMES, row.size, row.size)
        self.clips: Tensor | None = None

    def trained(self) -> tuple[Any, int]:
        """Returns the model of the row and the multiply-adds of all its training."""
        row, steps = self.row, self.row.growth_steps
        if row.method == "direct":
            return self._direct()
        model: Any = self._new_base()
        work = self._train(model, "base", row.base_steps)
        if row.method == "interpolated":
            return model, work
        factor = 4
        while factor < row.factor:
            factor *= 2
            model = self._grown(model)
            work += self._train(model, f"grown {factor}x", steps)
        return model, work

    def _new_base(self, extra_halvings: int = 0) -> ProMAG:
        torch.manual_seed(self.seed)
        fields = {**self.row.model, "extra_halvings": extra_halvings}
        return ProMAG(ProMAGConfig.from_dict(fields), "study")

    def _grown(self, model: Any) -> Grown:
        torch.manual_seed(self.seed)
        grown = grow(model, mixing=self.row.mixing)
        if self.row.use_subsampled:
            return grown
        return Grown(grown.config.replace(use_subsampled=False), grown.name, grown.base)

    def _direct(self) -> tuple[Any, int]:
        """Returns a directly trained model, with the steps that its work pays for."""
        row = self.row
        halvings = {4: 0, 8: 1, 16: 2}[row.factor]
        stages: list[tuple[Any, int]] = [(self._new_base(), row.base_steps)]
        for _ in range(halvings):
            stages.append((self._grown(stages[-1][0]), row.growth_steps))
        paid = stages if row.budget == "summed" else stages[1:]
        work = sum(steps * step_multiply_adds(model, *self.shape) for model, steps in paid)
        model = self._new_base(halvings)
        steps = round(work / step_multiply_adds(model, *self.shape))
        done = self._train(model, f"direct {row.factor}x", steps)
        return model, done

    def _train(self, model: Any, name: str, steps: int) -> int:
        """Returns the multiply-adds of training `model` in place, or of loading the result."""
        row = self.row
        facts = [name, model.config.to_dict(), steps, row.batch_size, row.muon_lr, row.adam_lr]
        facts += [row.warmup, row.kl_weight, row.size, row.train_clips, self.seed]
        # The lineage in a grown model's configuration stands for how its base was trained.
        work = row.batch_size * steps * step_multiply_adds(model, *self.shape)
        if steps:
            trained_once(model, self.shared, "promag", facts, lambda: self._run(model, name, steps))
        return work

    def _run(self, model: Any, name: str, num_steps: int) -> None:
        row = self.row
        if self.clips is None:
            self.clips = clip_store(self.shared, row.train_clips, CHUNK_FRAMES, row.size)
        clips = self.clips
        torch.manual_seed(self.seed)
        settings = OptimizerRecipe(lr=row.adam_lr, muon_lr=row.muon_lr, betas=[0.9, 0.99])
        optimizers = list(tokenizer_optimizers(model, settings, []).values())
        order = ClipOrder(len(clips), row.batch_size, seed=self.seed)
        model.train()

        def loss_of(step: int) -> Tensor:
            places = [index for _, index in order.places(step, 0)]
            video = to_float(clips[places], torch.float32)
            return growth_loss(video, model(video), kl_weight=row.kl_weight)[0]

        def on_step(step: int, loss: float) -> None:
            self.progress(0.9 * step / num_steps, f"{name}, step {step}, loss {loss:.4f}")

        train_steps(loss_of, optimizers, num_steps, warmup=row.warmup, on_step=on_step)


def _reconstruct(model: Any, row: PromagRow, video: Tensor) -> Tensor:
    """Returns the reconstruction of clips [B, 3, T, H, W] by the method of a row."""
    if row.overlap is not None and row.overlap >= 0:
        return decode_overlapping(
            model, encode_overlapping(model, video, overlap=row.overlap), overlap=row.overlap
        )
    if row.method != "interpolated":
        return model(video).reconstruction
    kept = model(video[:, :, :: row.factor // 4]).reconstruction
    return F.interpolate(kept, size=list(video.shape[2:]), mode="trilinear", align_corners=True)


def _measure(model: Any, row: PromagRow, folder: Path, picture: bool) -> RowResult:
    """Returns metrics on the held-out clips."""
    is_long = row.overlap is not None
    num_clips, frames = row.eval_clips, CHUNK_FRAMES
    if is_long:
        num_clips, frames = row.long_clips, row.long_frames

    def metrics(a: Tensor, b: Tensor) -> dict[str, float]:
        if is_long:
            return _long_metrics(a, b, max(0, row.overlap or 0))
        return _clip_metrics(a, b, row.factor // 4)

    return measure_clips(
        _held_out(row, shared_folder(folder), num_clips, frames),
        lambda video: _reconstruct(model, row, video),
        metrics,
        batch_size=row.batch_size,
        picture=folder / "held-out.png" if picture else None,
    )


def _clip_metrics(a: Tensor, b: Tensor, step: int) -> dict[str, float]:
    """Returns metrics of reconstruction a of b, [1, 3, T, H, W]; every step-th frame is kept."""
    kept_a, kept_b = a[:, :, ::step], b[:, :, ::step]
    error = (a - b).abs().mean((0, 1, 2))  # [H, W]
    side = max(1, error.shape[0] // 8)
    corner = torch.zeros_like(error, dtype=torch.bool)
    for rows in (slice(None, side), slice(-side, None)):
        for columns in (slice(None, side), slice(-side, None)):
            corner[rows, columns] = True
    return {
        "psnr": psnr(a, b).item(),
        "ssim": ssim(a, b).item(),
        "psnr_kept": psnr(kept_a, kept_b).item(),
        "sharpness": (_gradient(kept_a) / _gradient(kept_b)).item(),
        "corner_error": (error[corner].mean() / error[~corner].mean()).item(),
    }


def _gradient(video: Tensor) -> Tensor:
    """Returns the mean absolute difference of neighbouring pixels of [1, 3, T, H, W]."""
    rows = (video[..., 1:, :] - video[..., :-1, :]).abs().mean()
    return rows + (video[..., 1:] - video[..., :-1]).abs().mean()


def _long_metrics(a: Tensor, b: Tensor, overlap: int) -> dict[str, float]:
    """Returns metrics of long clips; a blend has a border before each frame it changes."""
    starts = [start for start, _ in chunk_bounds(b.shape[2], overlap=overlap)[1:]]
    borders = [start + i for start in starts for i in range(overlap + 1) if start + i < b.shape[2]]
    return {"psnr": psnr(a, b).item(), "boundary_jump": boundary_jump(a, b, borders=borders).item()}
