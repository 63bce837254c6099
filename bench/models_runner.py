"""Runs the providers of a model in processes of their own, in turns, and compares their results."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from harness import Case, Measurement, achievable_gflop_per_s
from models_worker import family

# Values with which glibc keeps freed memory instead of returning it to the system.
TUNED = {"MALLOC_MMAP_THRESHOLD_": str(1 << 40), "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
# Mean |difference| over mean |value|: sums in another order, or some 60 roundings to 8 bits.
TOLERANCES = {"float32": 1e-4, "bfloat16": 0.1}


class Worker:
    """A process that runs one provider; what its tasks took, by task."""

    def __init__(self, provider: str, allocation: str, settings: dict) -> None:
        self.provider = provider
        self.answers: dict[str, list[dict]] = {}
        settings = {**settings, "provider": provider, "threads": torch.get_num_threads()}
        script = Path(__file__).with_name("models_worker.py")
        self.process = subprocess.Popen(
            [sys.executable, script, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **(TUNED if allocation == "tuned" else {})},
        )

    def run(self, task: str, save: Path | None = None) -> None:
        """Runs a task; one whose result is saved warms up and is not counted."""
        request = {"name": task, "save": None if save is None else str(save)}
        print(json.dumps(request), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        assert line, f"{self.provider}: the process ended in {task}"
        if save is None:
            self.answers.setdefault(task, []).append(json.loads(line))

    def measurement(self, task: str, case: Case, allocation: str, error: float | None):
        """Medians of what a task took."""
        answers = self.answers[task]
        times = torch.tensor([answer["ms"] for answer in answers])
        p20, median, p80 = times.quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
        return Measurement(
            provider=self.provider,
            allocation=allocation,
            median_ms=median,
            p20_ms=p20,
            p80_ms=p80,
            gb_per_s=case.bytes_moved / median / 1e6,
            floor_fraction=case.gflop / case.achievable_gflop_per_s * 1e3 / median,
            peak_mb=max(answer["peak_mb"] for answer in answers),
            num_frames=answers[0]["frames"],
            error=error,
        )

    def close(self) -> None:
        """Ends the process."""
        self.process.stdin.close()
        self.process.wait(60)


def expected_results(folder: Path, settings: dict, tasks: list[str]) -> dict[str, torch.Tensor]:
    """Those of the reference in float32."""
    path, expected = folder / "expected.pt", {}
    oracle = Worker("reference", "tuned", {**settings, "dtype": "float32"})
    for task in tasks:
        oracle.run(task, path)
        expected[task] = torch.load(path)
    oracle.close()
    return expected


def compare(path: Path, expected: torch.Tensor, dtype: str, what: str) -> float | None:
    """Mean |difference| over mean |value|; None where another number of frames was returned."""
    result = torch.load(path)
    if result.shape != expected.shape:
        return None
    error = float((result - expected).abs().mean() / expected.abs().mean())
    assert error <= TOLERANCES[dtype], f"{what}: {error}"
    return error


def run_tasks(tasks, providers, settings, allocation, folder) -> list[Case]:
    """A case per task: every provider warms up, then they take turns.

    Args:
        tasks: of the model's module, see `models_worker.family`.
        providers: their names, the reference first.
        settings: "title" of the shape, "model", "overrides", "batch", "frames", "size", "dtype",
            "device", "training", and how many "rounds" are timed.
        allocation: "default", or "tuned" for an allocator that keeps what is freed.
        folder: for results that are compared.
    """
    dtype, size, frames = settings["dtype"], settings["size"], settings["frames"]
    needed = family(settings["model"]).needed_gflop(settings)
    rate = achievable_gflop_per_s(getattr(torch, dtype), settings["device"])
    expected = {} if dtype == "float32" else expected_results(folder, settings, tasks)
    workers = [Worker(name, allocation, settings) for name in providers]
    errors = {}
    try:
        for worker in workers:
            for task in tasks:
                path = folder / "result.pt"
                worker.run(task, path)
                if task not in expected:  # the first provider is the reference
                    expected[task] = torch.load(path)
                what = f"{worker.provider}, {task}"
                errors[worker.provider, task] = compare(path, expected[task], dtype, what)
        for _ in range(settings["rounds"]):
            for worker in workers:
                for task in tasks:
                    worker.run(task)
    finally:
        for worker in workers:
            worker.close()
    cases = []
    for task in tasks:
        batch = "" if settings["batch"] == 1 else f"{settings['batch']}x"
        shape = f"{settings['title']}, {batch}{frames}x{size}x{size}"
        moved = 2 * settings["batch"] * 3 * frames * size**2 * 4
        case = Case(settings["model"].split("_")[0], shape, dtype, task, moved)
        case.gflop, case.achievable_gflop_per_s = needed[task], rate
        case.measurements = [
            worker.measurement(task, case, allocation, errors[worker.provider, task])
            for worker in workers
        ]
        cases.append(case)
    return cases
