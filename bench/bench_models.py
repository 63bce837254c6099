"""VidTok 488: encode, decode, both as scripts call them, and a training step, against diffusers.

Providers run in processes of their own (models_worker.py) and take turns: diffusers'
AutoencoderVidTok where it is installed, the published op sequence of this package's reference
backend, and native. Weights are those of one seed, in the arithmetic of release 1.1, the only
causal one that diffusers has. Peaks are those of a whole process with its weights, on a GPU those
of its allocations. Every result is compared with the reference's in float32.

Environment: VTOK_BENCH_SIZES (128; 256 takes a CPU five times as long), VTOK_BENCH_ROUNDS,
VTOK_BENCH_TRAIN_SIZES (64 on a CPU, whose memory a larger step may not fit), VTOK_BENCH_COMPILED=1
for compiled providers on a CPU, VTOK_BENCH_MERGE=1 to keep what an earlier run of the same commit
measured (a CPU takes minutes for each parameter: run them one by one).
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness import QUICK, Case, Measurement, achievable_gflop_per_s
from models_worker import TASKS, needed_gflop
from shapes import IS_CUDA

MODEL = "vidtok_kl_causal_488_16chn_v1_1"
OVERRIDES = {"ch": 8, "num_res_blocks": 1} if QUICK else {}
FRAMES = 5 if QUICK else 17
# Timed calls after one that warms up; on a CPU one takes up to half a minute.
ROUNDS = 1 if QUICK else int(os.environ.get("VTOK_BENCH_ROUNDS", 10 if IS_CUDA else 1))


def _sizes(variable: str, default: str) -> list[int]:
    return [32] if QUICK else [int(size) for size in os.environ.get(variable, default).split(",")]


SIZES = _sizes("VTOK_BENCH_SIZES", "128,256" if IS_CUDA else "128")
TRAIN_SIZES = _sizes("VTOK_BENCH_TRAIN_SIZES", "128,256" if IS_CUDA else "64")
# A JSON of its own for the large clips, which a CPU measures apart from the others.
RESULTS_NAME = "models_256" if SIZES == [256] else "models"
DTYPES = ["float32"] if QUICK else ["bfloat16"] if IS_CUDA else ["float32", "bfloat16"]
TUNED_ID = pytest.param("tuned", id="tuned-instead-of-default")
ALLOCATIONS = ["default"] if QUICK or IS_CUDA else ["default", TUNED_ID]
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


def provider_names(training: bool) -> list[str]:
    """Those that are installed and wanted."""
    names = ["reference", "native"]
    if QUICK and training:  # a process that imports diffusers takes seconds
        return names
    if importlib.util.find_spec("diffusers") is not None:
        names.append("diffusers")
    if not QUICK and os.environ.get("VTOK_BENCH_COMPILED", str(int(IS_CUDA))) == "1":
        names += [f"{name}, compiled" for name in names if name != "reference"]
    return names


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


def run_tasks(tasks, settings, allocation, device, folder) -> list[Case]:
    """A case per task: every provider warms up, then they take turns."""
    dtype, size = settings["dtype"], settings["size"]
    needed = needed_gflop(MODEL, OVERRIDES, FRAMES, size)
    rate = achievable_gflop_per_s(getattr(torch, dtype), device)
    expected = {} if dtype == "float32" else expected_results(folder, settings, tasks)
    workers = [Worker(name, allocation, settings) for name in provider_names(settings["training"])]
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
        for _ in range(ROUNDS):
            for worker in workers:
                for task in tasks:
                    worker.run(task)
    finally:
        for worker in workers:
            worker.close()
    cases = []
    for task in tasks:
        name = f"VidTok 488, {FRAMES}x{size}x{size}"
        case = Case("vidtok", name, dtype, task, 2 * 3 * FRAMES * size**2 * 4)
        case.gflop, case.achievable_gflop_per_s = needed[task], rate
        case.measurements = [
            worker.measurement(task, case, allocation, errors[worker.provider, task])
            for worker in workers
        ]
        cases.append(case)
    return cases


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Where results lie that are compared."""
    return tmp_path_factory.mktemp("results")


def _settings(size: int, dtype: str, device: str, training: bool) -> dict:
    fields = {"model": MODEL, "overrides": OVERRIDES, "frames": FRAMES, "training": training}
    return {**fields, "size": size, "dtype": dtype, "device": device}


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def bench_vidtok(size, dtype, allocation, device, record, folder, benchmark):
    settings = _settings(size, dtype, device, training=False)
    # Both at once, as scripts call them, say nothing new for other dtypes and allocators.
    whole = IS_CUDA or (dtype, allocation) == ("float32", "default")
    tasks = list(TASKS[: 3 if whole else 2])
    cases = benchmark.pedantic(run_tasks, (tasks, settings, allocation, device, folder), rounds=1)
    for case in cases:
        record(case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", TRAIN_SIZES)
def bench_vidtok_training(size, dtype, device, record, folder, benchmark):
    settings = _settings(size, dtype, device, training=True)
    cases = benchmark.pedantic(
        run_tasks, ([TASKS[3]], settings, "default", device, folder), rounds=1
    )
    for case in cases:
        record(case)
