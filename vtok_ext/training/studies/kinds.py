"""The kinds of studies: a fixed table, since a YAML file must not be able to name code to run.

To add a kind, write a module with

    run_row(settings: dict, seed: int, folder: Path, progress: Progress) -> RowResult

and enter it below. `settings` are the row's merged with the common ones; a wrong key must be an
error. `folder` belongs to this row and seed and survives being killed: a run may keep its own
checkpoints there. What several rows use lies in `shared_folder(folder)`, written atomically and
named by a hash of what it depends on. `progress(fraction, note)` is called now and then. The seed
decides weights and order of clips; the held-out clips must not depend on it.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from vtok_ext.models._config import closest
from vtok_ext.training.studies.row_result import RowResult

Progress = Callable[[float, str], None]
RunRow = Callable[[dict[str, Any], int, Path, Progress], RowResult]

# kind -> module of this package that has its run_row; imported when a study of that kind runs.
KINDS: dict[str, str | RunRow] = {
    "coordtok": "vtok_ext.training.studies.coordtok_row",
    "promag": "vtok_ext.training.studies.promag_row",
    "vidtok": "vtok_ext.training.studies.vidtok_row",
    "vtok": "vtok_ext.training.studies.vtok_row",
    "vtok_generation": "vtok_ext.training.studies.vtok_generation_row",
}


def run_row_of(kind: str) -> RunRow:
    """Returns the function that runs a row of a kind.

    Raises:
        ValueError: there is no such kind.
    """
    if kind not in KINDS:
        raise ValueError(
            f"study: kind must be one of {', '.join(KINDS)}, got {kind!r}{closest(kind, KINDS)}"
        )
    found = KINDS[kind]
    return import_module(found).run_row if isinstance(found, str) else found


def shared_folder(folder: Path) -> Path:
    """Returns the folder, made if absent, that all runs of a study share; see above."""
    shared = folder.parent.parent / "shared"
    shared.mkdir(parents=True, exist_ok=True)
    return shared
