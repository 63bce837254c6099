"""What one run of a study, a row with a seed, has measured; and its file.

    OUT/runs/ROW/seed-N.json    the result, complete or absent
    OUT/pictures/               pictures of runs
    OUT/work/                   what runs keep while they run; may be deleted

A result belongs to the settings whose hash it carries: changed settings mean another run.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import subprocess
from dataclasses import asdict, dataclass, field
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import torch

from vtok_ext._version import __version__
from vtok_ext.data.atomic_output import output_file


@dataclass
class RowResult:
    """What `run_row` of a kind returns.

    Attributes:
        per_clip: metric -> one value per held-out clip, the same clips in the same order for every
            row and seed of a study.
        summary: metric -> one value of the whole run: codebook use, parameters, seconds.
        pictures: files in the run's folder that are kept.
        held_out: what identifies the held-out clips, such as a hash of their bytes; results with
            different ones are not compared. "" if not known.
    """

    per_clip: dict[str, list[float]] = field(default_factory=dict)
    summary: dict[str, float] = field(default_factory=dict)
    pictures: list[Path] = field(default_factory=list)
    held_out: str = ""

    def check(self) -> None:
        """Returns None if all values are finite numbers.

        Raises:
            ValueError: one is not, or a metric is in both groups.
        """
        both = self.per_clip.keys() & self.summary.keys()
        if both:
            raise ValueError(f"study: a metric must be per clip or in the summary, got {both}")
        single = {name: [value] for name, value in self.summary.items()}
        for name, values in {**self.per_clip, **single}.items():
            for value in values:
                if not math.isfinite(value):
                    raise ValueError(f"study: metric {name} must be finite, got {value}")


@dataclass
class FinishedRun:
    """A result with what it belongs to.

    Attributes:
        study, row, seed: which run.
        settings, settings_hash: what it was run with.
        per_clip, summary, held_out: see `RowResult`.
        pictures: names in the pictures folder.
        seconds: wall time.
        machine: device and versions, in words.
        date: of its end, YYYY-MM-DD.
        code: what it was made with: a commit, or the version of a package outside a clone; "" of
            runs before this was recorded.
    """

    study: str
    row: str
    seed: int
    settings: dict[str, Any]
    settings_hash: str
    per_clip: dict[str, list[float]]
    summary: dict[str, float]
    pictures: list[str]
    held_out: str
    seconds: float
    machine: str
    date: str
    code: str = ""

    def metric_names(self) -> list[str]:
        """Returns the names of all metrics, those per clip first."""
        return [*self.per_clip, *self.summary]

    def mean(self, metric: str) -> float:
        """Returns the metric's mean over clips, or its value in the summary."""
        if metric in self.per_clip:
            return math.fsum(self.per_clip[metric]) / len(self.per_clip[metric])
        return self.summary[metric]


def settings_hash(kind: str, settings: dict[str, Any]) -> str:
    """Returns 16 hexadecimal digits that change with the kind or any setting."""
    text = json.dumps([kind, settings], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def result_path(out: Path, row: str, seed: int) -> Path:
    """Returns where the result of a run is."""
    return out / "runs" / row / f"seed-{seed}.json"


def read_result(path: Path) -> FinishedRun | None:
    """Returns the result in a file, or None if there is no file.

    Raises:
        ValueError: the file is no result of a run.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"study: {path} must be a result as JSON, got {error}") from error
    try:
        return FinishedRun(**values)
    except TypeError as error:
        raise ValueError(f"study: {path} must be a result of a run, got {error}") from error


def write_result(path: Path, run: FinishedRun) -> None:
    """Returns None when the file holds the result; it appears complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = asdict(run)
    values["per_clip"] = {
        name: [round(value, 6) for value in found] for name, found in run.per_clip.items()
    }
    with output_file(path, "study") as partial:
        partial.write_text(json.dumps(values, allow_nan=False) + "\n", encoding="utf-8")


def machine_in_words() -> str:
    """Returns device, threads and versions of this process."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)"
    return f"{device}, torch {torch.__version__}, vtok_ext {__version__}"


@cache
def code_in_words() -> str:
    """Returns the commit of this package, "COMMIT with changes", or its version outside a clone."""
    package = Path(__file__).parents[2]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package.parent), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return ""
        return done.stdout.strip()

    if not git("ls-files", "--", package.name):
        return f"vtok_ext {__version__}"
    changed = git("status", "--porcelain", "--untracked-files=no", "--", "csrc", package.name)
    return git("rev-parse", "--short", "HEAD") + (" with changes" if changed else "")


def today() -> str:
    """Returns the date as YYYY-MM-DD."""
    return date.today().isoformat()
