"""What a command shows while it runs: bars with ETA on a terminal, plain lines elsewhere.

Progress and messages go to stderr, results to stdout, so that `--json` output can be piped.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Without a terminal (CI logs, files) one line per this many seconds is enough to see life.
_PLAIN_INTERVAL_S = 10.0


class Console:
    """Messages, progress and the result of one command.

    Args:
        as_json: print nothing but one JSON document on stdout (and errors on stderr).
    """

    def __init__(self, as_json: bool = False) -> None:
        self.as_json = as_json

    def say(self, line: str) -> None:
        """Returns None after showing one line about what is being done."""
        if not self.as_json:
            print(line, file=sys.stderr, flush=True)

    def warn(self, line: str) -> None:
        """Returns None after showing a warning; shown in JSON mode too, on stderr."""
        print(f"warning: {line}", file=sys.stderr, flush=True)

    def result(self, values: dict[str, Any] | list[Any], lines: list[str]) -> None:
        """Returns None after printing the result: `values` as JSON, or `lines` for people."""
        if self.as_json:
            print(json.dumps(values, indent=2, sort_keys=False), flush=True)
        else:
            print("\n".join(lines), flush=True)

    @contextmanager
    def progress(self, title: str, total: float | None) -> Iterator[Progress]:
        """Yields a Progress; `total` in any unit, None when unknown."""
        if self.as_json:
            yield Progress()
        elif sys.stderr.isatty():
            with _terminal_progress(title, total) as progress:
                yield progress
        else:
            yield _PlainProgress(title, total)


class Progress:
    """How far a job has come. This base class shows nothing."""

    def update(self, done: float, note: str = "") -> None:
        """Returns None.

        Args:
            done: amount done so far, in the unit of `total`.
            note: a few words such as "26.1 dB".
        """


class _PlainProgress(Progress):
    def __init__(self, title: str, total: float | None) -> None:
        self._title, self._total = title, total
        self._start = self._last_shown = time.monotonic()
        print(f"{title} ...", file=sys.stderr, flush=True)

    def update(self, done: float, note: str = "") -> None:
        now = time.monotonic()
        finished = self._total is not None and done >= self._total
        if now - self._last_shown < _PLAIN_INTERVAL_S and not finished:
            return
        self._last_shown = now
        amount = f"{done:.0f}"
        if self._total:
            amount = f"{min(1.0, done / self._total):4.0%}"
        line = f"{self._title} {amount}, {now - self._start:.0f} s"
        if self._total and 0 < done < self._total:
            line += f", ETA {(now - self._start) * (self._total / done - 1):.0f} s"
        print(f"{line}{', ' + note if note else ''}", file=sys.stderr, flush=True)


@contextmanager
def _terminal_progress(title: str, total: float | None) -> Iterator[Progress]:
    from rich.console import Console as RichConsole
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with RichProgress(*columns, console=RichConsole(stderr=True)) as bar:
        task = bar.add_task(title, total=total, note="")

        class TerminalProgress(Progress):
            def update(self, done: float, note: str = "") -> None:
                bar.update(task, completed=done, note=note)

        yield TerminalProgress()
