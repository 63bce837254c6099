"""Kind "coordtok": a small CoordTok on random points of procedural clips, and a VidTok beside it.

    loss     mean squared error of the drawn patches, see `coordtok_loss`
    Muon for matrices and AdamW for the rest, or AdamW alone, linear warm-up, then half a cosine
    down to zero, see `row_training`

With `vidtok` the row trains that model instead, without noise on its latent, on a random window of
`window` frames of every clip, for as many steps as cost the multiply-adds of the CoordTok that the
row describes otherwise; held-out clips are cut into such windows. All rows see the same clips in
the same order. Trained models are kept in the study's shared folder. Metrics per held-out clip:

    psnr, ssim, boundary_jump    the latter where windows would meet, for both models
    psnr_mean_colour, psnr_mean_frame    what needs no training, see `without_training`
    psnr_sliced                  of a CoordTok, decoded in slices of as many points as it trained on
    psnr_dynamic_1, ... _3       of the third of the clips with the least change of frames, ..., the
                                 most; see `video_dynamics`
    psnr_frequency_1, ... _3     by spatial detail; see `sobel_frequency`
    fall_dynamic, fall_frequency differences of the first and the last third, in pairs of clips, of
                                 PSNR above that of the mean colour: what has more contrast is
                                 further from its mean colour by itself

With `generates`, a SiT is trained on the latents instead, see `latent_generation`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vtok_ext.metrics import boundary_jump, psnr, sobel_frequency, ssim, video_dynamics
from vtok_ext.models.coordtok import CoordTok
from vtok_ext.models.coordtok_config import CoordTokConfig
from vtok_ext.models.multiply_adds import count_multiply_adds, multiply_adds_of
from vtok_ext.models.vidtok import VidTok
from vtok_ext.models.vidtok_config import VidTokConfig
from vtok_ext.training.clip_order import ClipOrder
from vtok_ext.training.coordtok_loss import PointLoss, PointLossConfig, draw_points
from vtok_ext.training.optimizers import transformer_optimizers
from vtok_ext.training.overfit import muon_and_adamw
from vtok_ext.training.recipe import OptimizerRecipe
from vtok_ext.training.start_weights import start
from vtok_ext.training.studies.clip_measures import measure_clips, strata, without_training
from vtok_ext.training.studies.clip_store import clip_store
from vtok_ext.training.studies.kinds import Progress, shared_folder
from vtok_ext.training.studies.latent_generation import generation_result
from vtok_ext.training.studies.row_result import RowResult
from vtok_ext.training.studies.row_settings import read_settings
from vtok_ext.training.studies.row_training import train_steps, trained_once
from vtok_ext.training.tokenizer_task import to_video

# Beyond any number of training clips, so that the held-out ones are none of them.
_HELD_OUT_SEED = 1_000_000_000
_THIRDS = 3
# What a training does not depend on.
_OF_MEASURING = ("eval_clips", "generates", "generator_work", "generator_clips")


@dataclass(frozen=True)
class CoordTokRow:
    """Settings of a row.

    Attributes:
        model: fields of `CoordTokConfig`; `video_shape` is that of the clips.
        sampling: "patches" or "frames", see `PointLossConfig`.
        ratio: points per clip and step, as a fraction of all its points.
        start: of a CoordTok's weights, see `start_weights`.
        vidtok: fields of a `VidTokConfig` with "kl" to train that model; null for the CoordTok.
        window: frames of a VidTok's clips.
        steps, batch_size, warmup: of a CoordTok's training.
        lr: of AdamW.
        muon_lr: of Muon for the matrices of blocks, or of a VidTok's network; null for AdamW alone,
            of a CoordTok only.
        weight_decay: of AdamW for a CoordTok, of every parameter of its own as published.
        motion: of the procedural clips.
        train_clips, eval_clips: how many, the latter a multiple of three.
        generates: whether a SiT is trained on the latents and measured.
        generator_work: 10^12 multiply-adds for its training.
        generator_clips: held-out clips, and samples, that are compared then.
    """

    model: dict[str, Any]
    sampling: str = "patches"
    ratio: float = 0.03125
    start: str = "published"
    vidtok: dict[str, Any] | None = None
    window: int = 16
    steps: int = 1500
    batch_size: int = 8
    warmup: int = 50
    lr: float = 2e-3
    muon_lr: float | None = None
    weight_decay: float = 1e-3
    motion: str = "erratic"
    train_clips: int = 1024
    eval_clips: int = 48
    generates: bool = False
    generator_work: float = 1.5
    generator_clips: int = 256

    @classmethod
    def of(cls, settings: dict[str, Any]) -> CoordTokRow:
        """Returns checked settings. Raises ValueError for a wrong key or value."""
        row = read_settings(cls, "coordtok", settings)
        frames, height, width = row.config().video_shape
        if height != width:
            raise ValueError(f"study: clips must be square, got video_shape {height} x {width}")
        if not 0 < row.ratio <= 1:
            raise ValueError(f"study: ratio must be in (0, 1], got {row.ratio}")
        row.points().check_model(row.config())
        if row.eval_clips < 1 or row.eval_clips % _THIRDS:
            raise ValueError(f"study: eval_clips must be a multiple of 3, got {row.eval_clips}")
        if not 1 <= row.window < frames or frames % row.window:
            raise ValueError(
                f"study: window must divide the {frames} frames of a clip, got {row.window}"
            )
        if row.vidtok is not None and row.vidtok.get("regularizer") != "kl":
            found = row.vidtok.get("regularizer")
            raise ValueError(f"study: vidtok must have regularizer 'kl', got {found!r}")
        if row.vidtok is not None and row.muon_lr is None:
            raise ValueError("study: muon_lr must be given for a VidTok, got null")
        if row.vidtok is not None and row.start != "published":
            raise ValueError(f"study: start must not be given with vidtok, got {row.start!r}")
        return row

    def config(self) -> CoordTokConfig:
        """Returns the configuration of the CoordTok."""
        return CoordTokConfig.from_dict(self.model)

    def points(self) -> PointLossConfig:
        """Returns which points are drawn."""
        number = round(self.ratio * math.prod(self.config().point_grid()))
        return PointLossConfig(self.sampling, number)

    def new_model(self) -> CoordTok | VidTok:
        """Returns the model of random weights."""
        if self.vidtok is None:
            coordtok = CoordTok(self.config(), "study")
            start(coordtok, self.start)
            return coordtok
        model = VidTok(VidTokConfig.from_dict(self.vidtok), "study")
        start(model, "scaled")
        return model

    def clips(self, folder: Path, count: int, first_seed: int = 0) -> Tensor:
        """Returns the clips [count, 3, T, H, W] uint8 from a seed on."""
        frames, size, _ = self.config().video_shape
        shared = shared_folder(folder)
        return clip_store(shared, count, frames, size, motion=self.motion, first_seed=first_seed)


def run_row(settings: dict[str, Any], seed: int, folder: Path, progress: Progress) -> RowResult:
    """Returns what a row measured with a seed; see the file's opening.

    Raises:
        ValueError: wrong settings.
        FailedComputationError: a loss became NaN or infinite.
    """
    row = CoordTokRow.of(settings)
    torch.manual_seed(seed)
    model = row.new_model()
    training = _Training(row, seed, folder, progress)
    summary = training.costs(model)
    facts = {name: value for name, value in asdict(row).items() if name not in _OF_MEASURING}
    facts |= {"model": row.config().to_dict(), "seed": seed}
    seconds = trained_once(
        model, shared_folder(folder), "coordtok", facts, lambda: training.run(model)
    )
    if row.generates:
        clips, unseen = (
            row.clips(folder, row.train_clips),
            row.clips(folder, row.generator_clips, _HELD_OUT_SEED),
        )
        return generation_result(model, clips, unseen, row.generator_work, seed, folder, progress)
    held_out = row.clips(folder, row.eval_clips, _HELD_OUT_SEED)
    progress(0.9, "measuring")
    result = _measure(model, row, held_out, folder / "held-out.png" if seed == 0 else None)
    result.summary = {**summary, "cpu_seconds": round(seconds, 1)}
    return result


class _Training:
    """The training of a row's model, and what it costs."""

    def __init__(self, row: CoordTokRow, seed: int, folder: Path, progress: Progress) -> None:
        self.row, self.seed, self.folder, self.progress = row, seed, folder, progress
        self.config, self.points = row.config(), row.points()

    def costs(self, model: CoordTok | VidTok) -> dict[str, float]:
        """Returns parameters, tokens, numbers of a clip's latent, steps and multiply-adds."""
        frames, height, width = self.config.video_shape
        windows = 1 if self.row.vidtok is None else frames // self.row.window
        tokens = windows * math.prod(model.token_grid(frames // windows, height, width))
        steps, per_clip = self._steps_and_cost()
        found = {
            "million_parameters": sum(p.numel() for p in model.parameters()) / 1e6,
            "tokens": float(tokens),
            "latent_numbers": float(tokens * model.latent_channels),
            "training_steps": float(steps),
            "training_tera_macs": steps * self.row.batch_size * per_clip / 1e12,
        }
        if self.row.vidtok is None:
            found["points_per_step"] = float(self.row.batch_size * self.points.num_points)
        return found

    def _steps_and_cost(self) -> tuple[int, int]:
        """Returns the steps, and the multiply-adds of a step per clip: three forward passes."""
        row = self.row
        per_clip = 3 * self._point_multiply_adds()
        if row.vidtok is None:
            return row.steps, per_clip
        config, shape = VidTokConfig.from_dict(row.vidtok), self.config.video_shape
        per_window = 3 * count_multiply_adds(VidTok, config, row.window, *shape[1:])
        return max(1, round(row.steps * per_clip / per_window)), per_window

    def _point_multiply_adds(self) -> int:
        """Returns the multiply-adds of encoding a clip and decoding the points of a step."""
        with torch.random.fork_rng(devices=[]):
            model = CoordTok(self.config, "study").eval().requires_grad_(False)
            frames = torch.tensor([self.config.video_shape[0]])
            points = draw_points(self.points, self.config, frames)
            video = torch.zeros(1, 3, *self.config.video_shape)
            return multiply_adds_of(lambda: model(video, points=points))

    def run(self, model: CoordTok | VidTok) -> None:
        """Returns None after training the model."""
        row = self.row
        clips = row.clips(self.folder, row.train_clips)
        order = ClipOrder(len(clips), row.batch_size, seed=self.seed)
        draws = torch.Generator().manual_seed(self.seed)
        num_steps, _ = self._steps_and_cost()
        loss = self._of_points if row.vidtok is None else self._of_window
        optimizers = self._optimizers(model)
        model.train()

        def loss_of(step: int) -> Tensor:
            places = [index for _, index in order.places(step, 0)]
            return loss(model, to_video(clips[places]), draws)

        def on_step(step: int, value: float) -> None:
            self.progress(0.9 * step / num_steps, f"step {step}, loss {value:.4f}")

        train_steps(loss_of, optimizers, num_steps, warmup=row.warmup, on_step=on_step)

    def _optimizers(self, model: CoordTok | VidTok) -> list[torch.optim.Optimizer]:
        row = self.row
        if isinstance(model, VidTok):
            assert row.muon_lr is not None  # checked by `of`
            return muon_and_adamw(model, row.muon_lr, row.lr)
        settings = OptimizerRecipe(
            lr=row.lr, muon_lr=row.muon_lr, betas=[0.9, 0.99], weight_decay=row.weight_decay
        )
        return list(transformer_optimizers(model, settings).values())

    def _of_points(self, model: Any, video: Tensor, draws: torch.Generator) -> Tensor:
        """Returns the mean squared error of random points of clips [B, 3, T, H, W]."""
        frames = torch.full((len(video),), video.shape[2])
        points = draw_points(self.points, self.config, frames, [draws] * len(video))
        patches = model(video, points=points).reconstruction
        return PointLoss(self.points, self.config)(patches, video, points)[0] / len(video)

    def _of_window(self, model: Any, video: Tensor, draws: torch.Generator) -> Tensor:
        """Returns the mean squared error of a random window of each clip."""
        last = video.shape[2] - self.row.window
        starts = torch.randint(last + 1, (len(video),), generator=draws).tolist()
        windows = torch.stack(
            [clip[:, at : at + self.row.window] for clip, at in zip(video, starts, strict=True)]
        )
        return (model(windows, sample=False).reconstruction - windows).square().mean()


def _measure(model: Any, row: CoordTokRow, clips: Tensor, picture: Path | None) -> RowResult:
    """Returns metrics on the held-out clips [N, 3, T, H, W] uint8."""

    def reconstruct(video: Tensor) -> Tensor:
        if row.vidtok is None:
            return model(video).reconstruction
        windows = video.split(row.window, dim=2)
        return torch.cat([model(window).reconstruction for window in windows], dim=2)

    def metrics(a: Tensor, b: Tensor) -> dict[str, float]:
        return {
            "psnr": psnr(a, b).item(),
            "ssim": ssim(a, b).item(),
            "boundary_jump": boundary_jump(a, b, row.window).item(),
            **without_training(b),
        }

    batch = row.batch_size
    result = measure_clips(clips, reconstruct, metrics, batch_size=batch, picture=picture)
    if row.vidtok is None:
        slices = math.prod(row.config().point_grid()) // row.points().num_points
        sliced = measure_clips(
            clips,
            lambda video: model(video, num_slices=slices).reconstruction,
            lambda a, b: {"psnr_sliced": psnr(a, b).item()},
            batch_size=batch,
        )
        result.per_clip |= sliced.per_clip
    above = [
        a - b
        for a, b in zip(result.per_clip["psnr"], result.per_clip["psnr_mean_colour"], strict=True)
    ]
    for name, measure in (
        ("dynamic", video_dynamics(clips)),
        ("frequency", sobel_frequency(clips)),
    ):
        order = measure.tolist()
        first, *_, last = strata(name, above, order, _THIRDS).values()
        fall = [a - b for a, b in zip(first, last, strict=True)]
        result.per_clip |= strata(f"psnr_{name}", result.per_clip["psnr"], order, _THIRDS)
        result.per_clip[f"fall_{name}"] = fall
    return result
