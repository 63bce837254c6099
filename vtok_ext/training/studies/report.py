"""The report of a study: claims with verdicts, a table of rows, a plot, and what is missing."""

from __future__ import annotations

import os
import statistics
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from vtok_ext.data.atomic_output import output_file
from vtok_ext.training.studies.plot import draw_plot
from vtok_ext.training.studies.row_picture import comparison_picture
from vtok_ext.training.studies.row_result import FinishedRun
from vtok_ext.training.studies.runner import planned_runs, valid_result
from vtok_ext.training.studies.specification import Comparison, Study
from vtok_ext.training.studies.verdict import Verdict, judge

Runs = dict[tuple[str, int], FinishedRun]
_NAMED_ROWS = 6


def finished_runs(study: Study, out: Path, smoke: bool = False) -> Runs:
    """Returns by row and seed the results that belong to the study as it is now."""
    found = ((run, valid_result(study, out, run, smoke)) for run in planned_runs(study))
    return {(run.row, run.seed): result for run, result in found if result is not None}


def verdicts(study: Study, runs: Runs) -> list[tuple[Comparison, Verdict]]:
    """Returns the claims of a study with their verdicts.

    Raises:
        ValueError: see `judge`.
    """
    return [(comparison, judge(comparison, runs)) for comparison in study.comparisons]


def write_report(
    study: Study,
    out: Path,
    report: Path,
    *,
    smoke: bool = False,
    warn: Callable[[str], None] = print,
) -> list[tuple[Comparison, Verdict]]:
    """Returns the verdicts, after writing the report as Markdown and its plot beside it.

    Args:
        study: the study.
        out: folder of its results.
        report: file to write; the plot has its name with .png.
        smoke: of a smoke run.
        warn: called with one line if the plot cannot be drawn.

    Raises:
        ValueError: results cannot be compared.
    """
    runs = finished_runs(study, out, smoke)
    found = verdicts(study, runs)
    report.parent.mkdir(parents=True, exist_ok=True)
    picture = report.with_suffix(".png")
    drawn = False
    if study.plot is not None and runs:
        try:
            draw_plot(study, study.plot, runs, picture)
            drawn = True
        except ModuleNotFoundError as error:
            warn(f"no plot: {error}; install 'vtok_ext[eval]' for it")
    lines = [f"# Study: {study.name.replace('_', ' ')}", "", study.about.strip(), ""]
    if smoke:
        lines += ["**A smoke run: it shows that the study runs, its numbers mean nothing.**", ""]
    lines += _progress_lines(study, runs)
    lines += _claim_lines(found)
    lines += _row_lines(study, runs)
    if drawn:
        lines += [f"![{study.name}]({picture.name})", ""]
    lines += _sheet_lines(
        study, runs, out / "pictures", report.with_name(f"{report.stem}_rows.png")
    )
    lines += _picture_lines(study, runs, os.path.relpath(out / "pictures", report.parent))
    lines += _origin_lines(study, runs)
    with output_file(report, "study") as partial:
        partial.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    return found


def _progress_lines(study: Study, runs: Runs) -> list[str]:
    total = len(study.rows) * len(study.seeds)
    lines = [f"{len(runs)} of {total} runs ({len(study.rows)} rows, {len(study.seeds)} seeds)."]
    missing: dict[str, list[str]] = {}
    for run in planned_runs(study):
        if (run.row, run.seed) not in runs:
            missing.setdefault(run.row, []).append(str(run.seed))
    if missing:
        parts = [f"{row} (seed {', '.join(seeds)})" for row, seeds in missing.items()]
        lines.append(f"Missing: {'; '.join(parts)}.")
    return [" ".join(lines), ""]


def _claim_lines(found: list[tuple[Comparison, Verdict]]) -> list[str]:
    if not found:
        return []
    lines = ["## Claims", ""]
    lines += ["| claim | metric | better - worse | difference | 95 % | margin | seeds | verdict |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for comparison, verdict in found:
        interval = "-"
        if verdict.low is not None and verdict.high is not None:
            interval = f"{_number(verdict.low)} to {_number(verdict.high)}"
        difference = "-" if verdict.difference is None else _number(verdict.difference)
        metric = " - ".join(filter(None, [comparison.metric, comparison.worse_metric]))
        metric += " (lower)" if comparison.direction == "lower" else ""
        reason = f" ({verdict.reason})" if verdict.reason else ""
        lines.append(
            f"| {comparison.claim} | {metric} | {comparison.better} - {comparison.worse} | "
            f"{difference} | {interval} | {_number(comparison.margin)} | {verdict.num_seeds} | "
            f"**{verdict.verdict}**{reason} |"
        )
    lines += [
        "",
        "Differences are paired, by seed and held-out clip, and positive where the first row is "
        "better. Intervals are Student's over the seeds, for metrics per clip widened to the "
        "bootstrap over clips and seeds where that goes further. A claim holds if its interval "
        "lies above the margin, is reversed if it lies below minus the margin's size, and is "
        "undecided otherwise or with one seed.",
        "",
    ]
    return lines


def _row_lines(study: Study, runs: Runs) -> list[str]:
    if not runs:
        return []
    names = list(study.metrics)
    if not names:
        names = list(dict.fromkeys(n for run in runs.values() for n in run.metric_names()))
    labels = [study.metrics.get(name, name) for name in names]
    lines = ["## Rows", "", f"| row | seeds | {' | '.join(labels)} |"]
    lines.append("|---" * (len(names) + 2) + "|")
    for row in study.rows:
        own = [runs[row, seed] for seed in study.seeds if (row, seed) in runs]
        cells = [_spread([r.mean(n) for r in own if n in r.metric_names()]) for n in names]
        lines.append(f"| {row} | {len(own)} of {len(study.seeds)} | {' | '.join(cells)} |")
    return [*lines, "", "Mean over seeds, with the standard deviation between them.", ""]


def _spread(values: list[float]) -> str:
    if not values:
        return "-"
    text = _number(statistics.fmean(values))
    return f"{text} ± {_number(statistics.stdev(values))}" if len(values) > 1 else text


def _number(value: float) -> str:
    """Returns a number with about four digits."""
    if value == int(value) and abs(value) < 1e7:
        return f"{int(value):,}"
    digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 100 else 2 if abs(value) >= 1 else 4
    return f"{value:,.{digits}f}"


def _sheet_lines(study: Study, runs: Runs, folder: Path, sheet: Path) -> list[str]:
    """Rows of `sheet` below each other, of the first seed, written when all of them are there."""
    done = [runs.get((row, study.seeds[0])) for row in study.sheet]
    pictures = {
        run.row: folder / run.pictures[0] for run in done if run is not None and run.pictures
    }
    if not pictures or len(pictures) < len(study.sheet):
        return []
    comparison_picture(sheet, pictures)
    return [f"![{', '.join(pictures)}]({sheet.name})", ""]


def _picture_lines(study: Study, runs: Runs, folder: str) -> list[str]:
    """The pictures of the first seed."""
    lines = []
    for row in study.rows:
        run = runs.get((row, study.seeds[0]))
        for name in run.pictures if run is not None else []:
            lines += [f"{row}:", "", f"![{row}]({folder}/{name})", ""]
    return ["## Pictures", "", *lines] if lines else []


def _origin_lines(study: Study, runs: Runs) -> list[str]:
    """Where numbers come from, and how to go on."""
    lines = ["## Origin", ""]
    if runs:
        seconds = [run.seconds for run in runs.values()]
        machines = sorted({run.machine for run in runs.values()})
        codes = Counter(_code_of(run) for run in runs.values())
        lines += [
            f"Made on {'; '.join(machines)}; last run {max(run.date for run in runs.values())}; "
            f"{min(seconds):.0f} to {max(seconds):.0f} s a run on the wall clock, "
            f"{sum(seconds) / 3600:.1f} hours in all. Runs by commit: "
            f"{'; '.join(_code_words(runs, *found) for found in codes.most_common())}.",
            "",
        ]
    lines += [f"`vtok study {study.name} --resume` makes what is missing and writes this page."]
    return lines


def _code_of(run: FinishedRun) -> str:
    return run.code or "code not recorded"


def _code_words(runs: Runs, code: str, count: int) -> str:
    """Returns a commit with the number of its runs, and their rows where these are few."""
    rows = dict.fromkeys(row for (row, _), run in runs.items() if _code_of(run) == code)
    named = f": {', '.join(rows)}" if len(rows) <= _NAMED_ROWS else ""
    return f"{code} ({count}{named})"
