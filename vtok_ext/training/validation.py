"""How good a training is on held-out samples."""

from __future__ import annotations

from typing import Any

from vtok_ext.training.state import Training


def validate(training: Training, samples: list[Any]) -> dict[str, float]:
    """Returns the task's means over held-out samples, among them its metric.

    With moving averages these are the weights that are measured. No global random generator is
    used. Everything is left in training mode.

    Args:
        training: what is trained.
        samples: at least one.
    """
    with training.evaluating():
        return training.task.validate(samples)
