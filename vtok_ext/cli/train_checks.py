"""`vtok train --dry-run` and `--overfit`: what a recipe asks for, whether its model can learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vtok_ext.data.atomic_output import check_output_file
from vtok_ext.data.picture import write_png
from vtok_ext.training.dry_run import DryRun, dry_run
from vtok_ext.training.overfit import OverfitProgress
from vtok_ext.training.overfit_check import (
    MARGIN_DB,
    OverfitCheck,
    check_can_overfit,
    four_clips,
    overfit_check,
)
from vtok_ext.training.sample_pictures import reconstruction_video, write_samples
from vtok_ext.training.setup import build_task

from .console import Console


def run_dry(recipe: Any, picture: Path, device: torch.device, console: Console) -> dict[str, Any]:
    """Returns the facts of a dry run, for JSON, after showing them.

    Args:
        recipe: of a training, or of a stage of one.
        picture: .png file for the first batch.
        device: where the training would run.
        console: where lines go to.
    """
    picture.parent.mkdir(parents=True, exist_ok=True)
    check_output_file(picture, "train")
    found = dry_run(recipe, device)
    for line in found.notes:
        console.warn(line)
    if found.picture is not None:
        write_png(picture, found.picture)
    for line in _dry_lines(recipe, found, picture):
        console.say(line)
    return {
        "parameters": {name: {"all": a, "trained": t} for name, a, t in found.parameters},
        "memory_bytes": found.memory,
        "samples_per_step": found.samples_per_step,
        "samples_per_epoch": found.samples_per_epoch,
        "picture": str(picture) if found.picture is not None else None,
    }


def _dry_lines(recipe: Any, found: DryRun, picture: Path) -> list[str]:
    width = max(len(name) for name, _, _ in found.parameters)
    lines = [
        f"{name.ljust(width)}  {count:>13,} parameters, {trained:,} trained"
        for name, count, trained in found.parameters
    ]
    parts = ", ".join(f"{name} {_size(count)}" for name, count in found.memory.items())
    lines.append(f"memory of a process: {parts}; in all {_size(sum(found.memory.values()))}")
    epochs = recipe.run.steps * found.samples_per_step / found.samples_per_epoch
    lines.append(
        f"{recipe.run.steps:,} steps of {found.samples_per_step} samples: {epochs:.4g} epochs of "
        f"{found.samples_per_epoch:,}"
    )
    if found.picture is not None:
        lines.append(f"first batch: {picture}")
    return lines


def _size(count: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count / 2**10:.0f} KiB"


def run_overfit(
    recipe: Any, steps: int, out: Path, device: torch.device, console: Console
) -> tuple[dict[str, Any], list[str], bool]:
    """Returns values for JSON, lines for people, and whether the rule holds.

    Args:
        recipe: whose model and clips are taken.
        steps: optimiser steps.
        out: folder; the four clips beside their reconstructions go into `out`/overfit.
        device: where to train.
        console: where progress is shown.
    """
    torch.manual_seed(recipe.run.seed)
    task = build_task(recipe, device)
    check_can_overfit(task)  # before clips are read
    clips, _ = task.data(console.warn)
    chosen = four_clips(clips)
    with console.progress("overfitting", 1.0) as progress:

        def show(state: OverfitProgress) -> None:
            progress.update(state.fraction, f"step {state.step}, {state.psnr:.1f} dB")

        check = overfit_check(task, chosen, steps, show)
    pairs = enumerate(zip(check.clips, check.outputs, strict=True))
    videos = {f"clip-{i}": reconstruction_video(a, b) for i, (a, b) in pairs}
    write_samples(out / "overfit", videos)
    values = {
        "passed": check.passed,
        "psnr": check.psnr,
        "least_psnr": check.least_psnr,
        "least_margin": check.least_margin,
        "steps": check.steps,
        "seconds": round(check.seconds, 1),
    }
    return values, _overfit_lines(check, out), check.passed


def _overfit_lines(check: OverfitCheck, out: Path) -> list[str]:
    rows = ["  ".join(f"{value:5.1f}" for value in row) for row in check.psnr]
    verdict = "passed" if check.passed else "FAILED"
    return [
        "PSNR of decode(encode(clip a)) against clip b, in dB; rows a, columns b:",
        *rows,
        f"{verdict}: every output is {check.least_margin:.1f} dB closer to its own clip than to "
        f"another, {MARGIN_DB:g} wanted; worst clip {check.least_psnr:.1f} dB; {check.steps} steps "
        f"in {check.seconds:.0f} s; {out / 'overfit'} shows them",
    ]
