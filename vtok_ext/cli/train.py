"""`vtok train`: runs a recipe, alone or in every process of torchrun."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vtok_ext.training.distributed import process_group, rank
from vtok_ext.training.loop import TrainProgress, TrainResult, train
from vtok_ext.training.recipe_file import load_recipe

from .console import Console
from .model_source import resolve_device


def run_train(
    *,
    recipe: str,
    overrides: Sequence[str],
    out: Path,
    resume: str,
    device: str,
    as_json: bool,
) -> str | None:
    """Returns None after training, or where the state is if a signal ended it early."""
    settings = load_recipe(recipe, overrides)
    start = time.monotonic()
    with process_group(resolve_device(device)) as place:
        leads = rank() == 0
        console = Console(as_json or not leads)
        result = train_visibly(settings, out, place, resume, console)
    if result.stopped_by is not None:
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
