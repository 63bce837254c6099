"""Two processes of torchrun: one that fails alone, and the end of a job in the middle of a run."""

import json
import signal
import time
from pathlib import Path

import pytest
import torch
from helpers import start_torchrun, torchrun
from safetensors.torch import load_file
from tiny_recipe import OVERRIDES, tiny

from vtok_ext.training.checkpoint import latest_checkpoint
from vtok_ext.training.loop import train
from vtok_ext.training.run_log import read_log

FAULTY = Path(__file__).with_name("faulty_process.py")
KILLED = Path(__file__).with_name("killed_run.py")
SHORT = ["run.steps=4", "run.checkpoint_every=1", "run.validate_every=9", "run.batch_size=1"]


def test_a_nan_of_one_process_stops_both_and_is_named_by_both(tmp_path):
    """The other has it too, in its averaged gradients. Each has random generators of its own."""
    done = torchrun(FAULTY, tmp_path)
    assert done.returncode == 0, done.stderr
    results = [json.loads((tmp_path / f"result-{rank}.json").read_text()) for rank in (0, 1)]
    where = "layer decoder.mid.block_1.norm2 (process 1)"
    for parallel in ("ddp", "fsdp"):
        for result in results:
            assert f"step 3 must be finite, got NaN or inf first in {where}" in result[parallel]
            assert "step-00000002" in result[parallel]
        assert latest_checkpoint(tmp_path / parallel / "checkpoints", pytest.fail).step == 2
        assert read_log(tmp_path / parallel / "log.jsonl")[-1]["where"] == where
    draws = [result["draws"] for result in results]
    assert draws[0][0] == draws[0][1] != draws[1][0] == draws[1][1]


@pytest.mark.slow
def test_a_killed_process_and_a_restart_change_no_number(tmp_path):
    """Killed while both write the checkpoint of step 2; the losses are those of a whole run."""
    folders = f"{tmp_path / 'killed'}:{tmp_path / 'whole'}"
    restarted = torchrun(
        *("--max-restarts", 1, KILLED, folders, "state 2", *SHORT),
        TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
    )
    assert restarted.returncode == 0, restarted.stderr
    assert "failed (exitcode: -9) local_rank: 1" in restarted.stderr
    curves = [read_log(tmp_path / name / "log.jsonl") for name in ("killed", "whole")]
    for line in [line for curve in curves for line in curve]:
        line.pop("clips_per_s", None)
    assert curves[0] == curves[1]
    steps = [line["step"] for line in curves[0] if line["kind"] == "train"]
    assert steps == list(range(1, 5)) and "d_weight" in str(curves[0])
    weights = [load_file(tmp_path / n / "model/model.safetensors") for n in ("killed", "whole")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert not list((tmp_path / "killed" / "checkpoints").glob(".partial*"))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_sigterm_to_torchrun_saves_and_the_run_goes_on(tmp_path, num_workers):
    """As a scheduler ends a job: every process gets the signal, at a step of its own, and so do the
    processes that prepare its clips."""
    endless = ["run.steps=100000", "run.checkpoint_every=100000", "run.validate_every=100000"]
    recipe = [*endless, "run.batch_size=1", f"data.num_workers={num_workers}"]
    call = ["train", "smoke_kl", *OVERRIDES, *recipe, "-o", tmp_path, "--device", "cpu"]
    process = start_torchrun("-m", "vtok_ext.cli", *call)
    deadline = time.monotonic() + 90
    while len(read_log(tmp_path / "log.jsonl")) < 4 and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and "--resume auto goes on" in errors
    found = latest_checkpoint(tmp_path / "checkpoints", pytest.fail)
    steps = [line["step"] for line in read_log(tmp_path / "log.jsonl") if line["kind"] == "train"]
    assert found.world_size == 2 and steps == list(range(1, found.step + 1)) and len(steps) >= 4
    one = tiny(*recipe, "run.accumulate=2", f"run.steps={found.step + 1}")
    result = train(one, tmp_path, resume="auto", warn=lambda line: None)
    assert (result.resumed_from, result.step) == (found.step, found.step + 1)
