"""Validated configuration dataclasses: a misspelt field is an error that names the closest one."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, TypeVar

Config = TypeVar("Config", bound="ModelConfig")


def closest(name: str, choices) -> str:
    """Returns "; did you mean 'x'?", or "" when nothing in `choices` resembles `name`."""
    found = difflib.get_close_matches(str(name), [str(choice) for choice in choices], n=1)
    return f"; did you mean {found[0]!r}?" if found else ""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Base of the model configurations: immutable, built from and written to plain JSON values.

    Subclasses check their values in `__post_init__` and raise ValueError in the house form.
    """

    @property
    def is_discrete(self) -> bool:
        """Whether the model has a codebook."""
        return False

    @classmethod
    def from_dict(cls: type[Config], fields: Mapping[str, Any]) -> Config:
        """Returns the configuration with the given fields, lists turned into tuples.

        Raises:
            ValueError: an unknown field (the message names the closest one) or a rejected value.
        """
        return cls(**cls._checked(fields))

    def replace(self: Config, **overrides: Any) -> Config:
        """Returns a copy with some fields replaced. Raises as `from_dict`."""
        return dataclasses.replace(self, **self._checked(overrides))

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as values that JSON can hold."""
        return {
            field.name: list(value) if isinstance(value, tuple) else value
            for field in dataclasses.fields(self)
            for value in (getattr(self, field.name),)
        }

    @classmethod
    def _checked(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        known = [field.name for field in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                raise ValueError(
                    f"{cls.__name__}: field must be one of {', '.join(known)}, "
                    f"got {name!r}{closest(name, known)}"
                )
        return {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}

    def _error(self, name: str, requirement: str) -> ValueError:
        value = getattr(self, name)
        return ValueError(f"{type(self).__name__}: {name} must be {requirement}, got {value!r}")

    def _require_int(self, name: str, minimum: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise self._error(name, f"an integer >= {minimum}")

    def _require_ints(self, name: str, minimum: int, maximum: int, *, empty: bool) -> None:
        value = getattr(self, name)
        ok = isinstance(value, tuple) and (value or empty)
        ok = ok and all(isinstance(v, int) and not isinstance(v, bool) for v in value)
        if not ok or not all(minimum <= v <= maximum for v in value):
            sequence = "a sequence" if empty else "a non-empty sequence"
            raise self._error(name, f"{sequence} of integers in {minimum}..{maximum}")

    def _require_choice(self, name: str, choices) -> None:
        value = getattr(self, name)
        if value not in choices:
            raise ValueError(
                f"{type(self).__name__}: {name} must be one of {', '.join(map(repr, choices))}, "
                f"got {value!r}{closest(value, choices)}"
            )

    def _require_number(self, name: str, minimum: float) -> None:
        value = getattr(self, name)
        ok = isinstance(value, int | float) and not isinstance(value, bool)
        if not ok or not minimum <= value < float("inf"):
            raise self._error(name, f"a number >= {minimum}")
