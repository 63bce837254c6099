"""Runs what is missing of a study, one run after the other, in one or several processes.

Runs go seed by seed, so that every row has a first result early. Each is claimed by a lock on a
file, which ends with its process: any number of processes can work on one study, and one that was
killed leaves nothing to clean up.
"""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, MutableSequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from vtok_ext.training.studies.kinds import Progress, run_row_of
from vtok_ext.training.studies.row_result import (
    FinishedRun,
    code_in_words,
    machine_in_words,
    read_result,
    result_path,
    settings_hash,
    today,
    write_result,
)
from vtok_ext.training.studies.specification import Study

_POLL_S = 0.2


@dataclass(frozen=True)
class PlannedRun:
    """A run: which row with which seed."""

    row: str
    seed: int

    def __str__(self) -> str:
        """As people write it."""
        return f"{self.row}, seed {self.seed}"


@dataclass
class StudyOutcome:
    """What a call of `run_study` did.

    Attributes:
        done: runs that were made now.
        skipped: runs that had a result of the same settings.
        elsewhere: runs that another process was making.
        failed: run -> the last line of its error; the others went on.
    """

    done: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def planned_runs(
    study: Study, rows: list[str] | None = None, seeds: list[int] | None = None
) -> list[PlannedRun]:
    """Returns the runs of a study, or those of some rows and seeds, in the order they are made.

    Raises:
        ValueError: a row or seed that the study does not have.
    """
    for row in rows or []:
        study.check_row(row)
    for seed in seeds or []:
        if seed not in study.seeds:
            raise ValueError(f"study: seed must be one of {study.seeds}, got {seed}")
    if rows == [] or seeds == []:
        raise ValueError(f"study: rows and seeds must name some, got {rows} and {seeds}")
    chosen_seeds = study.seeds if seeds is None else [s for s in study.seeds if s in seeds]
    chosen_rows = [row for row in study.rows if rows is None or row in rows]
    return [PlannedRun(row, seed) for seed in chosen_seeds for row in chosen_rows]


def valid_result(study: Study, out: Path, run: PlannedRun, smoke: bool) -> FinishedRun | None:
    """Returns the result of a run if there is one of the very settings it would have now."""
    found = read_result(result_path(out, run.row, run.seed))
    wanted = settings_hash(study.kind, study.settings_of(run.row, smoke))
    return found if found is not None and found.settings_hash == wanted else None


def run_study(
    study: Study,
    out: Path,
    runs: list[PlannedRun],
    *,
    smoke: bool = False,
    jobs: int = 1,
    progress: Progress = lambda fraction, note: None,
    warn: Callable[[str], None] = print,
) -> StudyOutcome:
    """Returns what was done, after making those of `runs` that have no valid result yet.

    Args:
        study: the study.
        out: folder of results, made if absent.
        runs: see `planned_runs`.
        smoke: with the settings of a smoke run.
        jobs: processes; each gets an equal share of the threads.
        progress: called with the fraction of the runs that are done, and what is going on.
        warn: called with lines that the user should read.

    Raises:
        ValueError: the kind is not known, or jobs < 1.
    """
    run_row_of(study.kind)
    if jobs < 1:
        raise ValueError(f"study: jobs must be at least 1, got {jobs}")
    out.mkdir(parents=True, exist_ok=True)
    for run in runs:
        stale = result_path(out, run.row, run.seed).exists()
        if stale and valid_result(study, out, run, smoke) is None:
            warn(f"{run}: made with other settings, is made again")
    if jobs == 1:
        return _work(study, out, runs, smoke, progress, warn)
    return _work_in_processes(study, out, runs, smoke, jobs, progress, warn)


def _work(
    study: Study,
    out: Path,
    runs: list[PlannedRun],
    smoke: bool,
    progress: Progress,
    warn: Callable[[str], None],
    failures: MutableSequence[int] | None = None,
) -> StudyOutcome:
    """Makes the missing runs in this process.

    `failures` says by position in `runs`, for several processes, which one of them failed at.
    """
    failures = [0] * len(runs) if failures is None else failures
    outcome = StudyOutcome()
    missing = [run for run in runs if valid_result(study, out, run, smoke) is None]
    outcome.skipped = [str(run) for run in runs if run not in missing]
    for position, run in enumerate(missing):

        def show(fraction: float, note: str, run: PlannedRun = run, at: int = position) -> None:
            progress((at + fraction) / len(missing), f"{run}: {note}" if note else str(run))

        with _claimed(out, run) as folder:
            number = runs.index(run)
            if folder is None or failures[number]:
                outcome.elsewhere.append(str(run))
            elif valid_result(study, out, run, smoke) is not None:
                outcome.skipped.append(str(run))
            else:
                try:
                    make_run(study, out, run, folder, smoke, show)
                    outcome.done.append(str(run))
                except Exception as error:  # the other runs are worth having nevertheless
                    failures[number] = 1
                    outcome.failed[str(run)] = " ".join(f"{type(error).__name__}: {error}".split())
                    warn(f"{run} failed: {traceback.format_exc()}")
        progress((position + 1) / len(missing), str(run))
    return outcome


def make_run(
    study: Study, out: Path, run: PlannedRun, folder: Path, smoke: bool, progress: Progress
) -> FinishedRun:
    """Returns the result of a run after writing it; the work folder is removed.

    Raises:
        Exception: whatever the kind's function raises.
    """
    settings, code = study.settings_of(run.row, smoke), code_in_words()
    start = time.monotonic()
    result = run_row_of(study.kind)(settings, run.seed, folder, progress)
    result.check()
    pictures = []
    for picture in result.pictures:
        name = f"{run.row}-seed-{run.seed}-{picture.name}"
        (out / "pictures").mkdir(exist_ok=True)
        os.replace(picture, out / "pictures" / name)
        pictures.append(name)
    finished = FinishedRun(
        study=study.name,
        row=run.row,
        seed=run.seed,
        settings=settings,
        settings_hash=settings_hash(study.kind, settings),
        per_clip=result.per_clip,
        summary=result.summary,
        pictures=pictures,
        held_out=result.held_out,
        seconds=round(time.monotonic() - start, 1),
        machine=machine_in_words(),
        date=today(),
        code=code,
    )
    write_result(result_path(out, run.row, run.seed), finished)
    shutil.rmtree(folder, ignore_errors=True)
    return finished


@contextmanager
def _claimed(out: Path, run: PlannedRun) -> Iterator[Path | None]:
    """Yields the work folder of a run, or None while another process has it."""
    folder = out / "work" / run.row / f"seed-{run.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        folder.mkdir(exist_ok=True)  # its former owner may have removed it
        yield folder


def _work_in_processes(
    study: Study,
    out: Path,
    runs: list[PlannedRun],
    smoke: bool,
    jobs: int,
    progress: Progress,
    warn: Callable[[str], None],
) -> StudyOutcome:
    """Makes the missing runs in `jobs` processes that all go through the whole list."""
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    threads = max(1, torch.get_num_threads() // jobs)
    failures = context.Array("b", len(runs), lock=False)  # written under the lock of a run
    arguments = (study, out, runs, smoke, threads, os.getpid(), queue, failures)
    workers = [context.Process(target=_worker, args=arguments, daemon=True) for _ in range(jobs)]
    before = {run for run in runs if valid_result(study, out, run, smoke) is not None}
    missing = [run for run in runs if run not in before]
    for worker in workers:
        worker.start()
    failed: dict[str, str] = {}
    ended, note, alive = 0, "", True
    while alive:
        alive = any(worker.is_alive() for worker in workers)
        while not queue.empty():
            kind, text, detail = queue.get()
            if kind == "failed":
                failed[text] = detail
            elif kind == "warn":
                warn(text)
            else:
                note = text
        ended = sum(valid_result(study, out, run, smoke) is not None for run in missing)
        if missing:
            progress((ended + len(failed)) / len(missing), note)
        if alive:
            time.sleep(_POLL_S)
    done = [str(run) for run in missing if valid_result(study, out, run, smoke) is not None]
    failed = {run: reason for run, reason in failed.items() if run not in done}
    rest = [str(run) for run in missing if str(run) not in done and str(run) not in failed]
    for worker in workers:
        worker.join()
        if worker.exitcode:
            failed[f"process {worker.pid}"] = f"ended with exit code {worker.exitcode}"
    if any(worker.exitcode for worker in workers):
        failed |= dict.fromkeys(rest, "not made, a process ended before")
        rest = []
    # A run that no process of this call made although none failed was another call's.
    return StudyOutcome(done, [str(run) for run in before], rest, failed)


def _worker(study, out, runs, smoke, threads, parent, queue, failures) -> None:
    """One of the processes."""
    torch.set_num_threads(threads)

    def show(fraction: float, note: str) -> None:
        if os.getppid() != parent:  # killed: nobody waits for what this process does
            os._exit(1)
        queue.put(("note", note, ""))

    def warn(line: str) -> None:
        queue.put(("warn", line, ""))

    outcome = _work(study, out, runs, smoke, show, warn, failures)
    for run, reason in outcome.failed.items():
        queue.put(("failed", run, reason))
