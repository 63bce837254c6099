"""Where benchmarks leave their results: after every case, or read back from a log."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import report
import results_from_log as log

BENCH = Path(__file__).parent.parent / "bench"

_CUT_OFF = """
import os
import harness

def case(shape):
    measured = harness.Measurement("native", "default", 1.0, 0.9, 1.1, 2.0, 0.5, None)
    return harness.Case("op", shape, "float32", "forward", 2_000_000, measurements=[measured])

def bench_one(record):
    record(case("small"))
    record(case("large"))

def bench_two():
    os._exit(3)
"""


def test_a_run_that_is_cut_off_leaves_what_it_measured(tmp_path):
    shutil.copy(BENCH / "conftest.py", tmp_path)
    (tmp_path / "bench_cut.py").write_text(_CUT_OFF)
    (tmp_path / "pytest.ini").write_text(
        f"[pytest]\npythonpath = {BENCH}\npython_files = bench_*.py\npython_functions = bench_*\n"
    )
    environment = {"VTOK_BENCH_OUT": str(tmp_path / "out"), "VTOK_BENCH_DEVICE": "cpu"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tmp_path],
        env={**_without_bench(), **environment},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 3, done.stdout + done.stderr
    (path,) = (tmp_path / "out").glob("*/*.json")
    assert path.name == "cut.json"
    cases = json.loads(path.read_text())["cases"]
    assert [case["shape"] for case in cases] == ["small", "large"]
    found = log.read_cases(done.stdout + "\n.")  # the dot was still in pytest's buffer
    assert [case["shape"] for case in found] == ["small", "large"]


def _without_bench():
    """The environment without settings of benchmarks, and of the pytest that runs this test."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("VTOK_BENCH", "PYTEST_"))}


# The second convolution failed, the last case was cut off.
_LOG = """
norm_act forward, 2 frames in front, 128 x 17x128x128, float32
  copy                    preallocated      0.004 ms [0.003, 0.005]    67.6 GB/s   100% of the limit
  native                  preallocated      0.080 ms [0.079, 0.082]     3.4 GB/s     5% of the limit
.
causal_conv3d forward, VidTok: 3 x 8->8 5x4x4 k1x3x3 after 2x space, 9.0 GFLOP, bfloat16
  pad + conv, channels lastdefault           1.000 ms [0.900, 1.100]   10.0 GB/s    17% of the limit
  native                  default           0.500 ms [0.400, 0.600]    20.0 GB/s    34% of the limit
.                                                                         [ 50%]
causal_conv3d forward, VidTok: 1 x 8->8 5x4x4 k3x1x1 front 2, 9.0 GFLOP, bfloat16
  native                  default           0.500 ms [0.400, 0.600]    20.0 GB/s    34% of the limit
F
fsq forward, small, float32
  copy                    preallocated      0.004 ms [0.003, 0.005]    67.6 GB/s   100% of the limit
  native                  prealloc"""


def test_cases_of_a_log():
    norm, conv = log.read_cases(_LOG)
    assert (norm["direction"], norm["shape"]) == (
        "forward, 2 frames in front",
        "128 x 17x128x128",
    )
    assert norm["bytes_moved"] == pytest.approx(0.080 * 3.4e6)  # the copy's median has one digit
    assert (norm["weight"], norm["gflop"]) == (1, 0.0)
    assert [m["provider"] for m in conv["measurements"]] == ["pad + conv, channels last", "native"]
    assert (conv["weight"], conv["gflop"], conv["dtype"]) == (3, 4.0, "bfloat16")
    native = conv["measurements"][1]
    assert native["allocation"] == "default" and native["floor_fraction"] == 0.34
    assert (native["median_ms"], native["p20_ms"], native["p80_ms"]) == (0.5, 0.4, 0.6)
    assert native["peak_mb"] is None and conv["achievable_gflop_per_s"] is None
    assert report.row(conv).endswith("| 2.0x pad + conv, channels last (default) | 34% | 8.00 |  |")


def test_files_of_a_log(tmp_path, monkeypatch):
    (tmp_path / "run.log").write_text(_LOG)
    log.main(
        [str(tmp_path / "run.log"), "--device", "nvidia-h200", "--torch", "2.11.0", "--cuda"]
        + ["13.0", "--commit", "abc", "--date", "2026-11-29", "--out", str(tmp_path)]
    )
    folder = tmp_path / "nvidia-h200"
    assert sorted(p.name for p in folder.iterdir()) == ["causal_conv3d.json", "norm_act.json"]
    result = json.loads((folder / "norm_act.json").read_text())
    assert result["source"] == "log of a run that its time limit cut off"
    assert result["environment"]["commit"] == "abc" and result["environment"]["threads"] is None
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    (folder / "conv_tile_times.json").write_text("[]")
    text = report.table("norm_act")
    assert text.startswith("nvidia-h200 (CUDA 13.0), torch 2.11.0, commit abc, 2026-11-29, log of")
    assert report.NO_GPU not in text and report.NO_GPU in report.table("fsq")
    assert "| norm_act | forward, 2 frames in front | float32 |" in report.summary()


def test_ops_without_a_gpu_are_named(tmp_path, monkeypatch):
    cpu = {"environment": dict.fromkeys(("torch", "commit", "date", "cpu_isa"), "x"), "cases": []}
    cpu["environment"]["device"] = "cpu"
    for device, names in (("cpu", ("fsq", "alpha_blend")), ("gpu", ("fsq",))):
        (tmp_path / device).mkdir()
        for name in names:
            environment = {**cpu["environment"], "device": device, "cuda": "13.0"}
            text = json.dumps({**cpu, "environment": environment})
            (tmp_path / device / f"{name}.json").write_text(text)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert "GPU: not measured yet: alpha_blend." in report.summary()


def test_largest_batches_are_those_of_this_code():
    """The JSON of `vtok bench max-batch` is what the code predicts today, by one of its models."""
    from vtok_ext.cli.max_batch import GIB, training_step
    from vtok_ext.training.training_memory import predict_training_memory

    (path,) = report.RESULTS.glob("cpu-*/max_batch.json")
    result = json.loads(path.read_text())
    rows = [row for row in result["rows"] if row["model"] == "coordtok_small_128"]
    assert {row["frames"] for row in rows} == {16, 32, 64, 128}
    for row in (rows[0], rows[-1]):
        options = {"recompute_encoder": row["recompute_encoder"]}
        build, step, _ = training_step(row["model"], row["frames"], result["size"], **options)
        memory = predict_training_memory(build, step, precision=result["precision"])
        # Releases of PyTorch save a little more or less.
        assert memory.per_clip / GIB == pytest.approx(row["per_clip_gib"], rel=0.05)
        assert memory.largest_batch(int(result["memory_gib"] * GIB)) == pytest.approx(
            row["largest_batch"], rel=0.05
        )


def test_coordtok_grows_as_little_as_the_table_says():
    (path,) = report.RESULTS.glob("cpu-*/max_batch.json")
    found = {}
    for row in json.loads(path.read_text())["rows"]:
        if row["model"] == "coordtok_large_128":
            found[row["recompute_encoder"], row["frames"]] = row["per_clip_gib"]
    assert found[False, 128] <= 1.4 * found[False, 32]
    assert found[True, 128] <= 1.1 * found[True, 32]


def test_table_of_largest_batches(tmp_path, monkeypatch):
    row = {"model": "a", "recompute_encoder": False, "largest_batch": 4}
    rows = [{**row, "frames": n, "per_clip_gib": n / 16} for n in (16, 32)]
    rows += [{**r, "recompute_encoder": True, "largest_batch": 5} for r in rows]
    facts = {"memory_gib": 80.0, "precision": "bfloat16", "size": 128, "torch": "2.13.0"}
    (tmp_path / "cpu").mkdir()
    path = tmp_path / "cpu" / "max_batch.json"
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    path.write_text(json.dumps({**facts, "rows": rows}))
    text = report.block("max_batch")
    assert "80 GiB, bfloat16, 128x128" in text and "predicted, not checked on a GPU:" in text
    assert "| a, encoder recomputed | 5 (1.00 GiB) | 5 (2.00 GiB) | 1.00x |" in text
    checked = [{**r, "measured_per_clip_gib": 1.5} for r in rows]
    path.write_text(json.dumps({**facts, "rows": checked}))
    text = report.block("max_batch")
    assert "checked on a GPU:" in text and "| 4 (2.00 GiB, measured 1.50)" in text
