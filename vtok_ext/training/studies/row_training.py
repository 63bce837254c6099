"""The training of a row's model, and its weights kept for the other rows that need the same.

learning rate  linear warm-up, then half a cosine down to zero
gradient       clipped to norm 1 over all that is trained
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn, optim

from vtok_ext.data.atomic_output import output_file
from vtok_ext.models.failed_computation import FailedComputationError
from vtok_ext.training.overfit import clipped_step
from vtok_ext.training.studies.row_result import code_in_words


def train_steps(
    loss_of: Callable[[int], Tensor],
    optimizers: list[optim.Optimizer],
    num_steps: int,
    *,
    warmup: int,
    on_step: Callable[[int, float], None],
) -> None:
    """Returns None after training what the optimizers hold.

    Args:
        loss_of: the step, from 0 -> its loss.
        optimizers: at their highest learning rates.
        num_steps: of the training.
        warmup: steps until the highest rate.
        on_step: called after each step with it and its loss.

    Raises:
        FailedComputationError: the loss became NaN or infinite.
    """
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    trained = [parameter for group in groups for parameter in group["params"]]
    peaks = [group["lr"] for group in groups]
    for step in range(num_steps):
        rising = min(1.0, (step + 1) / max(1, warmup))
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = peak * rising * 0.5 * (1 + math.cos(math.pi * step / num_steps))
        loss = clipped_step(loss_of(step), trained, optimizers)
        if not math.isfinite(loss):
            raise FailedComputationError(
                f"study: the loss must be finite, got {loss} at step {step}"
            )
        on_step(step, loss)


def trained_once(
    model: nn.Module, folder: Path, kind: str, facts: Any, train: Callable[[], None]
) -> float:
    """Returns the CPU seconds of the training whose weights `model` has then, in eval mode.

    Args:
        model: of random weights.
        folder: shared by the runs of a study; the weights are kept there.
        kind: begins the file's name.
        facts: all that the training depends on, as JSON can hold it.
        train: trains `model`, called if no run has done it before.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    facts = {"facts": facts, "code": code_in_words()}  # weights of other code are other weights
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    path = folder / f"{kind}-{digest}.safetensors"
    if path.exists():
        model.load_state_dict(load_file(path))
        model.eval()
        with safe_open(path, "pt") as file:
            return float((file.metadata() or {}).get("cpu_seconds", 0.0))
    start = time.process_time()  # of this process: what else the machine does changes little
    train()
    seconds = time.process_time() - start
    model.eval()
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    with output_file(path, "study") as partial:
        save_file(weights, partial, {"cpu_seconds": f"{seconds:.1f}"})
    return seconds
