"""The command line `vtok`. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

import sys


def main() -> None:
    """Returns never: runs `vtok` on sys.argv and exits with its code.

    Exit codes: 0 done, 1 internal error, 2 bad input or usage, 130 interrupted.
    """
    from .app import run

    sys.exit(run(sys.argv[1:]))
