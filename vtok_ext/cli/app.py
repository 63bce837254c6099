"""The command `vtok`: its subcommands, exit codes, and what an interrupt does."""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

from . import training_commands as training
from . import video_commands as video
from .failures import EXIT_INTERRUPTED, Interrupted, describe_failure, wants_traceback

app = typer.Typer(
    name="vtok",
    help="Video tokenizers: turn a video into tokens and back.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
bench_app = typer.Typer(no_args_is_help=True, help="Measure or predict what a model takes.")

# In the order in which `vtok --help` shows them.
COMMANDS: dict[str, Any] = {
    "demo": video.demo,
    "reconstruct": video.reconstruct,
    "encode": video.encode,
    "decode": video.decode,
    "stream": video.stream,
    "convert": video.convert,
    "eval": video.evaluate,
    "train": training.train,
    "grow": training.grow,
    "tokenize": training.tokenize,
    "stats": training.stats,
    "generate": training.generate,
    "ask": training.ask,
    "study": training.study,
    "models": video.models,
    "doctor": video.doctor,
}
for _name, _function in COMMANDS.items():
    app.command(name=_name)(_function)
bench_app.command(name="max-batch")(training.max_batch)
app.add_typer(bench_app, name="bench")


def run(arguments: list[str]) -> int:
    """Returns the exit code of `vtok ARGUMENTS...`; a failure is one line on stderr.

    Args:
        arguments: as on the command line, without the program name.
    """
    with _interrupts_as_exception():
        try:
            outcome: Any = app(args=arguments, prog_name="vtok", standalone_mode=True)
            return outcome if isinstance(outcome, int) else 0
        except SystemExit as stop:
            return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except Interrupted as interruption:
            left = interruption.args[0] if interruption.args else "nothing was left behind"
            print(f"vtok: interrupted, {left}", file=sys.stderr)
            return EXIT_INTERRUPTED
        except Exception as error:
            if wants_traceback():
                traceback.print_exc()
            code, line = describe_failure(error)
            print(f"vtok: {line}", file=sys.stderr)
            return code


@contextmanager
def _interrupts_as_exception() -> Iterator[None]:
    """Within it, Ctrl-C and SIGTERM unwind the stack, so that partial output is removed."""

    def interrupt(signum: int, frame: object) -> None:
        raise Interrupted

    previous = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, interrupt)
    except ValueError:  # not the main thread: signals are someone else's business
        pass
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
