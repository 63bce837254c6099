"""The table of tasks: what `task:` in a recipe may name."""

from __future__ import annotations

from typing import Any

from vtok_ext.models._config import closest
from vtok_ext.training.generator_task import GPTTask, SiTTask
from vtok_ext.training.grow_task import GrowDecoderTask, GrowTask
from vtok_ext.training.point_task import PointTask
from vtok_ext.training.task import Task
from vtok_ext.training.tokenizer_task import TokenizerTask
from vtok_ext.training.vtok_lm_task import VTokLMTask
from vtok_ext.training.vtok_task import VTokEncoderTask, VTokTask

TASKS: dict[str, type[Task]] = {
    "gpt": GPTTask,
    "grow": GrowTask,
    "grow_decoder": GrowDecoderTask,
    "points": PointTask,
    "sit": SiTTask,
    "tokenizer": TokenizerTask,
    "vtok": VTokTask,
    "vtok_encoder": VTokEncoderTask,
    "vtok_lm": VTokLMTask,
}


def task_class(name: Any) -> type[Task]:
    """Returns the class of a task.

    Raises:
        ValueError: another name; the message names the closest one.
    """
    if name not in TASKS:
        raise ValueError(
            f"recipe: task must be one of {', '.join(TASKS)}, got {name!r}{closest(name, TASKS)}"
        )
    return TASKS[name]
