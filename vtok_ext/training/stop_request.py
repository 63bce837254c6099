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
    """Yields what tells whether a signal came; a second Ctrl-C does what it did before.

    SIGTERM is noted however often it comes: a service manager sends it to every process, and so
    does torchrun's agent that got it too, while a checkpoint may be half written.

    Outside the main thread, which alone receives signals, nothing is changed.
    """
    request = StopRequest()
    previous: dict[signal.Signals, Any] = {}

    def note(number: int, frame: object) -> None:
        request.signal_name = request.signal_name or signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(number, previous[signal.SIGINT])

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
