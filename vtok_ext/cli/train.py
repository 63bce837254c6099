"""`vtok train`: runs a recipe, alone or in every process of torchrun."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vtok_ext.training.distributed import on_rank_0, process_group, rank, world_size
from vtok_ext.training.loop import TrainProgress, TrainResult, train
from vtok_ext.training.recipe_file import load_stages
from vtok_ext.training.setup import index_kept_in
from vtok_ext.training.stages import stage_recipes, stages_done

from .console import Console
from .model_source import resolve_device
from .train_checks import run_dry, run_overfit

# What is known of the videos of all stages, so that a run which goes on need not open them again.
INDEX = "index.json"


def run_train(
    *,
    recipe: str,
    overrides: Sequence[str],
    out: Path,
    resume: str,
    device: str,
    as_json: bool,
    dry: bool = False,
    overfit: int | None = None,
) -> str | None:
    """Returns None after training, or where the state is if a signal ended it early."""
    if dry and overfit is not None:
        raise ValueError("train: one of --dry-run and --overfit may be given, got both")
    stages = stage_recipes(load_stages(recipe, overrides), out)
    start = time.monotonic()
    with process_group(resolve_device(device)) as place:
        leads = rank() == 0
        console = Console(as_json or not leads)
        if dry or overfit is not None:
            _check(load_stages(recipe, overrides), out, place, console, dry, overfit)
            return None
        folders = [folder for _, folder in stages]
        done = on_rank_0(lambda: stages_done(folders)) if resume == "auto" else 0
        for number, (settings, folder) in enumerate(stages, 1):
            if number <= done:
                console.say(f"stage {number} of {len(stages)} is done: a later one has begun")
                continue
            if len(stages) > 1:
                console.say(f"stage {number} of {len(stages)}, in {folder}")
            with index_kept_in(out / INDEX):
                result = train_visibly(settings, folder, place, resume, console)
            if result.stopped_by is not None or (result.stop_wished and number < len(stages)):
                return where_to_go_on(result)
    if leads:
        values = {
            **{k: str(v) if isinstance(v, Path) else v for k, v in vars(result).items()},
            "seconds": round(time.monotonic() - start, 1),
        }
        quality = ", ".join(f"{name} {v:.4g}" for name, v in result.validation.items())
        lines = [f"{result.step} steps, model in {result.model}"]
        console.result(values, lines + ([f"held-out clips: {quality}"] if quality else []))
    return None


def _check(
    recipes: list[Any],
    out: Path,
    place: torch.device,
    console: Console,
    dry: bool,
    overfit: int | None,
) -> None:
    """Makes a dry run of every stage, or overfits four clips with the model of the first."""
    if world_size() > 1:
        raise ValueError(
            f"train: --dry-run and --overfit must run in one process, got {world_size()}"
        )
    if dry:
        values = []
        for number, recipe in enumerate(recipes, 1):
            if len(recipes) > 1:
                console.say(f"stage {number} of {len(recipes)}")
            name = "dry-run.png" if len(recipes) == 1 else f"dry-run-{number}.png"
            values.append(run_dry(recipe, out / name, place, console))
        console.result(values if len(values) > 1 else values[0], [])
        return
    assert overfit is not None  # one of the two is asked for
    facts, lines, passed = run_overfit(recipes[0], overfit, out, place, console)
    console.result(facts, lines)
    if not passed:
        raise SystemExit(1)


def train_visibly(
    settings: Any, out: Path, place: torch.device, resume: str, console: Console
) -> TrainResult:
    """Returns how a training ended that was shown on the console."""
    with console.progress("training", settings.run.steps) as progress:

        def show(now: TrainProgress) -> None:
            note = ", ".join(
                f"{n} {now.terms[n]:.4g}" for n in ("loss", "rec_loss") if n in now.terms
            )
            # The bar shows what this call has to do, or the ETA of a resumed run were wrong.
            here = (now.step - now.first_step) / (now.num_steps - now.first_step)
            note = f"step {now.step}, {note}, {now.clips_per_s:.1f} clips/s"
            progress.update(here * now.num_steps, note)

        return train(settings, out, device=place, resume=resume, warn=console.warn, on_step=show)


def where_to_go_on(result: TrainResult) -> str:
    """Returns the message of a training that a signal ended."""
    return f"the state after step {result.step} is in {result.checkpoint}, --resume auto goes on"
