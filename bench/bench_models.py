"""VidTok 488: encode, decode, both as scripts call them, and a training step, against diffusers.

Providers run in processes of their own (models_runner.py) and take turns: diffusers'
AutoencoderVidTok where it is installed, the published op sequence of this package's reference
backend, and native. Weights are those of one seed, in the arithmetic of release 1.1, the only
causal one that diffusers has. Peaks are those of a whole process with its weights, on a GPU those
of its allocations. Every result is compared with the reference's in float32.

Environment: VTOK_BENCH_SIZES (128; 256 takes a CPU five times as long), VTOK_BENCH_ROUNDS,
VTOK_BENCH_TRAIN_SIZES (64 on a CPU, whose memory a larger step may not fit), VTOK_BENCH_COMPILED=1
for compiled providers on a CPU, VTOK_BENCH_MERGE=1 to keep what an earlier run of the same commit
measured (a CPU takes minutes for each parameter: run them one by one), VTOK_BENCH_PROVIDERS for
some of them only (all at once need more than 24 GB for float32 at 256; results are compared with
those of the first).
"""

import importlib.util
import os

import pytest
from harness import QUICK
from models_runner import run_tasks
from shapes import IS_CUDA
from vidtok_tasks import TASKS

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


def provider_names(training: bool) -> list[str]:
    """Those that are installed and wanted."""
    names = ["reference", "native"]
    if QUICK and training:  # a process that imports diffusers takes seconds
        return names
    if importlib.util.find_spec("diffusers") is not None:
        names.append("diffusers")
    if not QUICK and os.environ.get("VTOK_BENCH_COMPILED", str(int(IS_CUDA))) == "1":
        names += [f"{name}, compiled" for name in names if name != "reference"]
    wanted = os.environ.get("VTOK_BENCH_PROVIDERS")
    return names if wanted is None else [name for name in names if name in wanted.split(",")]


def _settings(size: int, dtype: str, device: str, training: bool) -> dict:
    return {
        "title": "VidTok 488",
        "model": MODEL,
        "overrides": OVERRIDES,
        "batch": 1,
        "frames": FRAMES,
        "size": size,
        "dtype": dtype,
        "device": device,
        "training": training,
        "rounds": ROUNDS,
    }


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def bench_vidtok(size, dtype, allocation, device, record, tmp_path, benchmark):
    settings = _settings(size, dtype, device, training=False)
    # Both at once, as scripts call them, say nothing new for other dtypes, allocators and sizes.
    whole = IS_CUDA or (dtype == "float32" and allocation == "default" and size < 256)
    tasks = list(TASKS[: 3 if whole else 2])
    arguments = (tasks, provider_names(False), settings, allocation, tmp_path)
    cases = benchmark.pedantic(run_tasks, arguments, rounds=1)
    for case in cases:
        record(case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", TRAIN_SIZES)
def bench_vidtok_training(size, dtype, device, record, tmp_path, benchmark):
    settings = _settings(size, dtype, device, training=True)
    arguments = ([TASKS[3]], provider_names(True), settings, "default", tmp_path)
    cases = benchmark.pedantic(run_tasks, arguments, rounds=1)
    for case in cases:
        record(case)
