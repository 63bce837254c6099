"""The rule of overfitting: four clips at once, each output close to its own clip and to no other.

    PSNR(decode(encode(A)), A) >= PSNR(decode(encode(A)), B) + 6 dB   for all A != B

An encoder that ignores its input, or a decoder that gives one picture, fails by far.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtok_ext.metrics import psnr
from vtok_ext.models.vidtok import VidTok
from vtok_ext.training.clip_order import buckets_of
from vtok_ext.training.optimizers import tokenizer_optimizers
from vtok_ext.training.overfit import (
    ADAM_LR,
    MUON_LR,
    OverfitProgress,
    OverfitResult,
    learn_by_heart,
    overfit_clip,
)
from vtok_ext.training.point_clips import PointClips
from vtok_ext.training.recipe import OptimizerRecipe
from vtok_ext.training.task import AUTOCAST_DTYPES, MicroBatch, Task
from vtok_ext.training.tokenizer_task import TokenizerTask

NUM_CLIPS = 4
MARGIN_DB = 6.0
# Clips that are closer than this to each other cannot be told apart by a margin of 6 dB unless the
# reconstruction is better than most: the check would blame the model for the data.
_LARGEST_LIKENESS_DB = 22.0
# Convolutions learn faster with Muon, transformers are left to AdamW.
_CONVOLUTIONS = OptimizerRecipe(lr=ADAM_LR, muon_lr=MUON_LR, betas=[0.9, 0.99], weight_decay=0.0)
_TRANSFORMERS = OptimizerRecipe(lr=3e-3, betas=[0.9, 0.99], weight_decay=0.0)


@dataclass(frozen=True)
class OverfitCheck:
    """How a tokenizer knows four clips by heart.

    Attributes:
        psnr: [a][b] is PSNR(decode(encode(A)), B) in dB.
        steps, seconds: of the training.
        clips, outputs: [4, 3, T, H, W] in [-1, 1].
    """

    psnr: list[list[float]]
    steps: int
    seconds: float
    clips: Tensor
    outputs: Tensor

    @property
    def least_psnr(self) -> float:
        """Returns the PSNR of the worst clip."""
        return min(self.psnr[a][a] for a in range(NUM_CLIPS))

    @property
    def least_margin(self) -> float:
        """Returns how many dB an output is closer to its own clip than to another, at least."""
        others = [(a, b) for a in range(NUM_CLIPS) for b in range(NUM_CLIPS) if a != b]
        return min(self.psnr[a][a] - self.psnr[a][b] for a, b in others)

    @property
    def passed(self) -> bool:
        """Whether the rule holds."""
        return self.least_margin >= MARGIN_DB


def four_clips(clips: Any) -> Tensor:
    """Returns [4, 3, T, H, W] uint8: the first clips of a data set, of later epochs if it is small.

    With several buckets those of the first clip's bucket, for clips of one shape.

    Raises:
        ValueError: two of them are too much alike to be told apart.
    """
    clips = clips.clips if isinstance(clips, PointClips) else clips  # all frames of each
    buckets = buckets_of(clips)
    alike = [i for i, bucket in enumerate(buckets) if bucket == buckets[0]] or range(len(clips))
    places = (divmod(n, len(alike)) for n in range(NUM_CLIPS))
    found = torch.stack([clips[epoch, alike[n]] for epoch, n in places])
    for a, b, value in _pairs(found.float() / 127.5 - 1):
        if value > _LARGEST_LIKENESS_DB:
            raise ValueError(
                f"train: the four clips of --overfit must differ by less than "
                f"{_LARGEST_LIKENESS_DB:g} dB PSNR, got {value:.1f} dB between clips {a} and {b}: "
                "no margin could tell them apart"
            )
    return found


def _pairs(videos: Tensor) -> list[tuple[int, int, float]]:
    return [
        (a, b, psnr(videos[a : a + 1], videos[b : b + 1]).item())
        for a in range(NUM_CLIPS)
        for b in range(a)
    ]


def check_can_overfit(task: Task) -> None:
    """Raises ValueError if a task trains no tokenizer from the start."""
    if type(task).overfit_loss is Task.overfit_loss:
        raise ValueError(
            "train: --overfit must have a recipe that trains a tokenizer from the start, got task "
            f"{task.recipe.task!r}"
        )


def overfit_check(
    task: Task,
    clips: Tensor,  # [4, 3, T, H, W] uint8
    steps: int,
    on_step: Callable[[OverfitProgress], None] | None = None,
) -> OverfitCheck:
    """Returns how well the model of a task learns four clips by heart; the model is changed.

    Not the recipe's losses, which are made for large data sets and would take thousands of steps
    for this, but `overfit_clip` for a VidTok and `Task.overfit_loss` for others.

    Args:
        task: that trains a tokenizer.
        clips: [4, 3, T, H, W] uint8.
        steps: optimiser steps.
        on_step: called after every step.

    Raises:
        ValueError: a task that trains something else.
    """
    check_can_overfit(task)
    model: Any = task.networks[task.exported]
    videos = clips.to(task.device).float() / 127.5 - 1
    result = _train(task, model, videos, steps, on_step)
    with torch.no_grad():
        outputs = torch.cat([model(video[None]).reconstruction for video in videos]).float()
    matrix = [
        [psnr(outputs[a : a + 1], videos[b : b + 1]).item() for b in range(NUM_CLIPS)]
        for a in range(NUM_CLIPS)
    ]
    return OverfitCheck(matrix, result.steps, result.seconds, videos, outputs)


def _train(
    task: Task,
    model: Any,
    videos: Tensor,  # [4, 3, T, H, W]
    steps: int,
    on_step: Callable[[OverfitProgress], None] | None,
) -> OverfitResult:
    """Returns the course of the training; leaves the model in evaluation mode."""
    if isinstance(model, VidTok):
        dtype = AUTOCAST_DTYPES[task.recipe.run.precision]
        return overfit_clip(model, videos, max_steps=steps, autocast_dtype=dtype, on_step=on_step)
    settings = _CONVOLUTIONS if isinstance(task, TokenizerTask) else _TRANSFORMERS

    def loss_of(step: int) -> Tensor:
        numbers = range(step * NUM_CLIPS, (step + 1) * NUM_CLIPS)
        return task.overfit_loss(MicroBatch(videos, step, numbers, task.recipe.run.seed))

    task.train_mode()
    result = learn_by_heart(
        loss_of,
        list(tokenizer_optimizers(model, settings, []).values()),
        max_steps=steps,
        on_step=on_step,
    )
    task.eval_mode()
    return result
