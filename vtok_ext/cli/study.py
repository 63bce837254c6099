"""`vtok study`: runs what is missing of a study and writes its report."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from vtok_ext.training.studies.report import finished_runs, write_report
from vtok_ext.training.studies.row_result import result_path
from vtok_ext.training.studies.runner import (
    StudyOutcome,
    planned_runs,
    run_study,
    valid_result,
)
from vtok_ext.training.studies.specification import (
    Study,
    find_study,
    load_study,
    studies_folder,
)

from .console import Console


def run_list(*, as_json: bool) -> None:
    """Returns None after printing the studies of `bench/studies` and how far they are."""
    folder = studies_folder()
    if folder is None:
        raise FileNotFoundError("study: there must be a folder bench/studies here or above")
    values: list[dict[str, Any]] = []
    for path in sorted(folder.glob("*.yaml")):
        study = load_study(path)
        total = len(study.rows) * len(study.seeds)
        done = len(finished_runs(study, _places(path, study, None, False)[0]))
        values.append({"name": study.name, "kind": study.kind, "runs": total, "done": done})
    lines = [f"{v['name']}: {v['done']} of {v['runs']} runs, kind {v['kind']}" for v in values]
    Console(as_json).result(values, lines or [f"no studies in {folder}"])


def run_study_command(
    *,
    name: str,
    rows: str | None,
    seeds: str | None,
    jobs: int,
    resume: bool,
    smoke: bool,
    report_only: bool,
    out: Path | None,
    as_json: bool,
) -> list[str]:
    """Returns what failed, after making missing runs and writing the report.

    Raises:
        ValueError, OSError: see `load_study`, `planned_runs`, `run_study`, `write_report`; or there
            are results already and neither `resume` nor `report_only` was given, or a smoke run
            would replace others.
    """
    console = Console(as_json)
    path = find_study(name)
    study = load_study(path)
    results, report = _places(path, study, out, smoke)
    chosen_seeds = _integers(seeds)
    if smoke and chosen_seeds is None:
        chosen_seeds = study.seeds[:1]
    runs = planned_runs(study, _names(rows), chosen_seeds)
    outcome = StudyOutcome()
    if not report_only:
        if not resume and not smoke and any((results / "runs").glob("*/*.json")):
            raise ValueError(
                f"study: out must be a folder without results, got {results}; --resume goes on"
            )
        if smoke and out is not None:
            _check_only_smoke(study, results)
        with console.progress(f"study {study.name}", 1.0) as progress:
            outcome = run_study(
                study,
                results,
                runs,
                smoke=smoke,
                jobs=jobs,
                progress=progress.update,
                warn=console.warn,
            )
    found = write_report(study, results, report, smoke=smoke, warn=console.warn)
    values = {
        "report": str(report),
        **asdict(outcome),
        "claims": [{**asdict(comparison), **asdict(v)} for comparison, v in found],
    }
    lines = [f"{v.verdict}: {comparison.claim}" for comparison, v in found]
    lines += [f"failed: {run}: {reason}" for run, reason in outcome.failed.items()]
    if outcome.elsewhere:
        lines.append(f"made by another process: {'; '.join(outcome.elsewhere)}")
    counts = f"{len(outcome.done)} runs made, {len(outcome.skipped)} were there"
    console.result(values, [*lines, f"{counts}; report in {report}"])
    return [f"{run}: {reason}" for run, reason in outcome.failed.items()]


def _check_only_smoke(study: Study, results: Path) -> None:
    """Raises ValueError if a smoke run would replace results of other settings."""
    for run in planned_runs(study):
        known = result_path(results, run.row, run.seed).exists()
        if known and valid_result(study, results, run, smoke=True) is None:
            raise ValueError(
                f"study: out of a smoke run must be a folder without other results, got {results}, "
                f"which has one of {run}"
            )


def _places(path: Path, study: Study, out: Path | None, smoke: bool) -> tuple[Path, Path]:
    """Returns the folder of results and the report of a study.

    A study of a checkout's bench/studies has its results in bench/results/studies and its page in
    docs/studies; others, and smoke runs, have a folder that holds both.
    """
    if out is None and not smoke and path.parent.parts[-2:] == ("bench", "studies"):
        root = path.parent.parent.parent
        report = root / "docs" / "studies" / f"{study.name}.md"
        return root / "bench" / "results" / "studies" / study.name, report
    if out is None:
        out = Path(f"vtok-study-{study.name}{'-smoke' if smoke else ''}")
    return out, out / "report.md"


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def _integers(text: str | None) -> list[int] | None:
    try:
        names = _names(text)
        return None if names is None else [int(name) for name in names]
    except ValueError:
        raise ValueError(f"study: seeds must be integers like 0,1,2, got {text!r}") from None
