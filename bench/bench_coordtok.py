"""CoordTok: encode, decode of a whole clip and a training step, against the published op sequence.

Providers (coordtok_tasks.py) run in processes of their own and take turns. A step encodes clips and
decodes 1,024 random patches of each, as the first step of the published training; a clip is decoded
in slices as large. Weights are random, and the same for all; results are compared with those of the
reference in float32.

Environment: VTOK_BENCH_ROUNDS, VTOK_BENCH_FRAMES (lengths of clips), VTOK_BENCH_MERGE as for
bench_models.
"""

import os

import pytest
from coordtok_tasks import WRITTEN_OUT
from harness import QUICK
from models_runner import run_tasks
from shapes import IS_CUDA

MODEL = "coordtok_large_128" if IS_CUDA else "coordtok_small_128"
NARROW = {"enc_num_layers": 1, "enc_patch_num_layers": 1, "dec_num_layers": 1} if QUICK else {}
SIZE = 32 if QUICK else 128
FRAMES = [int(n) for n in os.environ.get("VTOK_BENCH_FRAMES", "32,128").split(",")]
FRAMES = [16] if QUICK else FRAMES
TRAIN_BATCH = 8 if IS_CUDA else 2
# Timed calls after one that warms up.
ROUNDS = 1 if QUICK else int(os.environ.get("VTOK_BENCH_ROUNDS", 10 if IS_CUDA else 3))
DTYPES = ["float32"] if QUICK else ["bfloat16"] if IS_CUDA else ["float32", "bfloat16"]
PROVIDERS = ["reference", "native"]


def _settings(frames: int, dtype: str, device: str, training: bool) -> dict:
    return {
        "title": " ".join(MODEL.split("_")[:2]).replace("coordtok", "CoordTok"),
        "model": MODEL,
        "overrides": {"video_shape": (frames, SIZE, SIZE), **NARROW},
        "batch": TRAIN_BATCH if training else 1,
        "frames": frames,
        "size": SIZE,
        "dtype": dtype,
        "device": device,
        "training": training,
        "rounds": ROUNDS,
    }


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("frames", FRAMES)
def bench_coordtok(frames, dtype, training, device, record, tmp_path, benchmark):
    settings = _settings(frames, dtype, device, training)
    tasks = ["training step"] if training else ["encode", "decode"]
    providers = [*PROVIDERS, WRITTEN_OUT] if training else PROVIDERS
    arguments = (tasks, providers, settings, "default", tmp_path)
    for case in benchmark.pedantic(run_tasks, arguments, rounds=1):
        record(case)
