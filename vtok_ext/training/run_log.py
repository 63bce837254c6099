"""The log of a run: one JSON object per line, whole after a kill, continued by a resumed run."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
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
    """

    def __init__(
        self, path: Path, first_step: int, active: bool = True, sinks: Sequence[LogSink] = ()
    ) -> None:
        self.path, self.active, self.sinks = path, active, sinks
        if not active:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_log(path) if line["step"] <= first_step]
        with output_file(path, "log") as partial:
            partial.write_text("".join(f"{json.dumps(line)}\n" for line in kept), encoding="utf-8")

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Returns None after one line is on its way to the disk.

        Args:
            kind: "train", "validation", "checkpoint", ...
            step: steps done.
            **values: what JSON can hold.
        """
        if not self.active:
            return
        line = json.dumps({"kind": kind, "step": step, **values}) + "\n"
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


def read_log(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a log; [] without a file. A cut-off last line is left out."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    complete = text[: text.rfind("\n") + 1]
    return [json.loads(line) for line in complete.splitlines()]
