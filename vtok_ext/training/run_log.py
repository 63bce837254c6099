"""The log of a run: one JSON object per line, whole after a kill, continued by a resumed run."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from vtok_ext.data.atomic_output import output_file
from vtok_ext.training.log_sinks import LogSink


class RunLog:
    """Appends lines {"kind": ..., "step": ..., ...} to a file.

    Args:
        path: the file; lines of steps after `first_step` and a cut-off last line are removed.
        first_step: steps that the run has done.
        active: whether this process writes at all.
        sinks: further places that numbers and pictures go to.
        warn: called with one line if lines that are there cannot be read and are left out.
    """

    def __init__(
        self,
        path: Path,
        first_step: int,
        active: bool = True,
        sinks: Sequence[LogSink] = (),
        warn: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.path, self.active, self.sinks = path, active, sinks
        if not active:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_log(path, warn) if line["step"] <= first_step]
        with output_file(path, "log") as partial:
            partial.write_text("".join(f"{json.dumps(line)}\n" for line in kept), encoding="utf-8")

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Returns None after one line is on its way to the disk.

        Args:
            kind: "train", "validation", "checkpoint", ...
            step: steps done.
            **values: what JSON can hold; NaN and infinity, which it cannot, become null.
        """
        if not self.active:
            return
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }
        line = json.dumps({"kind": kind, "step": step, **finite}, allow_nan=False) + "\n"
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)
        scalars = {n: v for n, v in values.items() if isinstance(v, int | float)}
        for sink in self.sinks if scalars else ():
            sink.numbers(kind, step, scalars)

    def picture(self, name: str, step: int, image: Tensor) -> None:
        """Returns None after giving a picture [3, H, W] uint8 to the sinks."""
        for sink in self.sinks:
            sink.picture(name, step, image)

    def close(self) -> None:
        """Returns None once the sinks have everything."""
        for sink in self.sinks:
            sink.close()


def read_log(path: Path, warn: Callable[[str], None] = lambda line: None) -> list[dict[str, Any]]:
    """Returns the lines of a log; [] without a file. A cut-off last line is left out.

    Args:
        path: the file.
        warn: called with one line if others cannot be read, as after a power failure; they are
            left out too.
    """
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    complete = text[: text.rfind("\n") + 1].splitlines()
    found = [line for line in map(_parsed, complete) if line is not None]
    if len(found) < len(complete):
        warn(f"{len(complete) - len(found)} of {len(complete)} lines of {path} are damaged")
    return found


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        values = json.loads(line)
    except ValueError:
        return None
    return values if isinstance(values, dict) and isinstance(values.get("step"), int) else None
