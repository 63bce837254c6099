"""The log of a run: one JSON object per line, whole after a kill, continued by a resumed run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from vtok_ext.data.atomic_output import output_file


class RunLog:
    """Appends lines {"kind": ..., "step": ..., ...} to a file.

    Args:
        path: the file; lines of steps after `first_step` and a cut-off last line are removed.
        first_step: steps that the run has done.
        active: whether this process writes at all.
    """

    def __init__(self, path: Path, first_step: int, active: bool = True) -> None:
        self.path, self.active = path, active
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


def read_log(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a log; [] without a file. A cut-off last line is left out."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    complete = text[: text.rfind("\n") + 1]
    return [json.loads(line) for line in complete.splitlines()]
