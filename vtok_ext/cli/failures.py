"""Turns an exception into one line and an exit code.

Bad input (ValueError, which includes VideoError; OSError such as a full disk; SafetensorError,
which is how the weights' library reports both; a TypeError or an ImportError in the house form `op:
argument must be ...`; a computation that its weights or settings made fail) exits with 2. Anything
else is a defect of ours and exits with 1.
"""

from __future__ import annotations

import os
import re

from vtok_ext.models.failed_computation import FailedComputationError

EXIT_INTERNAL_ERROR = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130

_HOUSE_FORM = re.compile(r"^[\w.]+: .* must ")


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM; not a KeyboardInterrupt, which the option parser takes for its own."""


def wants_traceback() -> bool:
    """Returns True if VTOK_DEBUG=1 asks for the full traceback."""
    return os.environ.get("VTOK_DEBUG", "0") not in ("", "0")


def describe_failure(error: BaseException) -> tuple[int, str]:
    """Returns (exit code, one line without a line break) for an exception of a command."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, ValueError | FailedComputationError):
        return EXIT_BAD_INPUT, text
    if isinstance(error, OSError):
        return EXIT_BAD_INPUT, _describe_os_error(error, text)
    if type(error).__name__ == "SafetensorError":  # compared by name: not loaded for every command
        return EXIT_BAD_INPUT, f"model or token file: {text}"
    if isinstance(error, TypeError | ImportError) and _HOUSE_FORM.match(text):
        return EXIT_BAD_INPUT, text
    if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("vtok_ext"):
        return EXIT_BAD_INPUT, f"{text}; this command needs the package '{error.name}'"
    hint = "set VTOK_DEBUG=1 for the traceback"
    return EXIT_INTERNAL_ERROR, f"internal error: {type(error).__name__}: {text} ({hint})"


def _describe_os_error(error: OSError, text: str) -> str:
    """Returns the system's words and the file, without the number."""
    if error.strerror is None:
        return text
    return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
