"""SIGTERM and Ctrl-C as a wish that a loop can fulfil at a good moment."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass
class StopRequest:
    """Attributes: signal_name: "SIGTERM" or "SIGINT" once one came, else None."""

    signal_name: str | None = None


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Yields what tells whether a signal came; the second one does what it did before.

    Outside the main thread, which alone receives signals, nothing is changed.
    """
    request = StopRequest()
    previous: dict[signal.Signals, Any] = {}

    def note(number: int, frame: object) -> None:
        request.signal_name = signal.Signals(number).name
        restore()

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            previous[number] = signal.signal(number, note)
    except ValueError:  # not the main thread
        previous.clear()
    try:
        yield request
    finally:
        restore()
