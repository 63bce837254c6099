"""What a study compares, read from `bench/studies/NAME.yaml`.

kind         which function runs a row; one of `kinds.KINDS`
about        what is asked and why, in Markdown; opens the report
settings     of every row
smoke        replaces settings in a smoke run, which has one seed
rows         name -> settings of that row alone
seeds        a row is run once per seed
comparisons  claims: `better` exceeds `worse` in `metric` by more than `margin`
metrics      name -> label, what the report's table shows; by default everything
plot         x (a setting), lines (a setting) and metrics to draw
sheet        rows whose pictures of the first seed are shown below each other
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vtok_ext.models._config import closest

DIRECTIONS = ("higher", "lower")
_MAX_BYTES = 1 << 20
# Names of rows become names of files.
_ROW_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}")


def _require(ok: bool, name: str, requirement: str, value: Any) -> None:
    if not ok:
        raise ValueError(f"study: {name} must be {requirement}, got {value!r}")


@dataclass(frozen=True)
class Comparison:
    """The claim that `better` exceeds `worse` in `metric` by more than `margin`.

    Attributes:
        better, worse: names of rows.
        metric: of the runs, per clip or of their summaries.
        claim: in words.
        margin: smallest difference that counts, in the metric's unit; below zero it says how much
            worse `better` may be ("is not worse by more than").
        direction: "higher" or "lower", which values of the metric are better.
        worse_metric: of `worse`, where it is another one: two metrics of a single row can be
            compared as well. Values are paired in the order that they have.
    """

    better: str
    worse: str
    metric: str
    claim: str
    margin: float = 0.0
    direction: str = "higher"
    worse_metric: str | None = None

    def __post_init__(self) -> None:
        """Checks every field."""
        for name in ("better", "worse", "metric", "claim"):
            _require(isinstance(getattr(self, name), str), name, "text", getattr(self, name))
        if self.worse_metric is not None:
            _require(isinstance(self.worse_metric, str), "worse_metric", "text", self.worse_metric)
        number = isinstance(self.margin, int | float) and not isinstance(self.margin, bool)
        _require(number, "margin", "a number", self.margin)
        _require(self.direction in DIRECTIONS, "direction", f"one of {DIRECTIONS}", self.direction)


@dataclass(frozen=True)
class Plot:
    """What is drawn: each of `metrics` over setting `x`, one line per value of setting `lines`."""

    x: str
    lines: str
    metrics: list[str]


@dataclass(frozen=True)
class Study:
    """A study; see the file's opening for its fields."""

    name: str
    kind: str
    rows: dict[str, dict[str, Any]]
    seeds: list[int]
    about: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    smoke: dict[str, Any] = field(default_factory=dict)
    comparisons: list[Comparison] = field(default_factory=list)
    metrics: dict[str, str] = field(default_factory=dict)
    plot: Plot | None = None
    sheet: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Checks rows, seeds and the names in comparisons."""
        _require(isinstance(self.kind, str), "kind", "text", self.kind)
        mapping = isinstance(self.rows, Mapping) and bool(self.rows)
        _require(mapping, "rows", "a mapping of names to settings", self.rows)
        for name, settings in self.rows.items():
            ok = isinstance(name, str) and _ROW_NAME.fullmatch(name) is not None
            _require(ok, "a row's name", "letters, digits and _.+-", name)
            _require(isinstance(settings, Mapping), f"rows.{name}", "settings", settings)
        for name in ("settings", "smoke", "metrics"):
            found = getattr(self, name)
            _require(isinstance(found, Mapping), name, "a mapping", found)
        ok = isinstance(self.seeds, list) and bool(self.seeds)
        ok = ok and all(isinstance(s, int) and not isinstance(s, bool) for s in self.seeds)
        ok = ok and len(set(self.seeds)) == len(self.seeds) and min(self.seeds) >= 0
        _require(ok, "seeds", "different integers >= 0", self.seeds)
        _require(isinstance(self.sheet, list), "sheet", "names of rows", self.sheet)
        named = [row for c in self.comparisons for row in (c.better, c.worse)]
        for row in (*named, *self.sheet):
            self.check_row(row)

    def check_row(self, name: str) -> None:
        """Returns None if there is such a row.

        Raises:
            ValueError: there is none; names the closest.
        """
        if name not in self.rows:
            raise ValueError(
                f"study: row must be one of {', '.join(self.rows)}, "
                f"got {name!r}{closest(name, self.rows)}"
            )

    def settings_of(self, row: str, smoke: bool = False) -> dict[str, Any]:
        """Returns the settings of a row: common ones, its own, and those of a smoke run.

        Mappings within them are merged key by key.
        """
        merged = _merge(self.settings, self.rows[row])
        return _merge(merged, self.smoke) if smoke else merged


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def load_study(path: Path) -> Study:
    """Returns the study in a YAML file; its name is the file's.

    Raises:
        ValueError: the file is no study; a wrong key names the closest one.
        OSError: it cannot be read.
    """
    values = _read(path)
    values = {"name": path.stem, **_checked(Study, values, "study", given={"name"})}
    values["comparisons"] = [
        Comparison(**_checked(Comparison, item, "study: comparisons"))
        for item in values.get("comparisons") or []
    ]
    if values.get("plot") is not None:
        values["plot"] = Plot(**_checked(Plot, values["plot"], "study: plot"))
    return Study(**values)


def _read(path: Path) -> Any:
    import yaml

    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(f"study: {path} must be <= 1 MiB, got a larger file")
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"study: {path} must be YAML, got {reason}") from error


def _checked(cls: Any, values: Any, where: str, given: set[str] = frozenset()) -> dict[str, Any]:  # type: ignore[assignment]
    """Returns `values`, a mapping with the keys of dataclass `cls` but those `given` elsewhere."""
    _require(isinstance(values, Mapping), where, "a mapping", values)
    fields = [f for f in dataclasses.fields(cls) if f.name not in given]
    names = [f.name for f in fields]
    for key in values:
        if key not in names:
            raise ValueError(
                f"{where}: key must be one of {', '.join(names)}, got {key!r}{closest(key, names)}"
            )
    missing = dataclasses.MISSING
    for f in fields:
        if f.default is missing and f.default_factory is missing and f.name not in values:
            raise ValueError(f"{where}: {f.name} must be given, got none")
    return dict(values)


def find_study(name: str) -> Path:
    """Returns the YAML file of a study: a path, or a name in `bench/studies` here or above.

    Raises:
        FileNotFoundError: there is none; names those that exist.
    """
    if Path(name).suffix in (".yaml", ".yml") and Path(name).is_file():
        return Path(name).absolute()
    folder = studies_folder()
    found = [] if folder is None else sorted(p.stem for p in folder.glob("*.yaml"))
    if folder is not None and name in found:
        return folder / f"{name}.yaml"
    where = "no folder bench/studies here or above" if folder is None else ", ".join(found)
    raise FileNotFoundError(
        f"study: must be a YAML file or one of ({where}), got {name!r}{closest(name, found)}"
    )


def studies_folder() -> Path | None:
    """Returns `bench/studies` of the present folder or the nearest one above that has it."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "bench" / "studies").is_dir():
            return folder / "bench" / "studies"
    return None
