"""Settings of a row, read from a study's file into the dataclass of their kind."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from vtok_ext.models._config import closest

_Row = TypeVar("_Row")


def read_settings(row_class: type[_Row], kind: str, settings: dict[str, Any]) -> _Row:
    """Returns settings of a kind, checked by their class.

    Args:
        row_class: a dataclass.
        kind: its name in `kinds`.
        settings: values of its fields.

    Raises:
        ValueError: a wrong key, which names the closest, or what the class finds wrong.
    """
    known = [f.name for f in dataclasses.fields(row_class)]  # type: ignore[arg-type]
    for key in settings:
        if key not in known:
            raise ValueError(
                f"study: settings of kind {kind} must be among {', '.join(known)}, "
                f"got {key!r}{closest(key, known)}"
            )
    return row_class(**settings)
