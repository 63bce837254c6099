"""A run killed with SIGKILL and resumed gives the very numbers of one that was not."""

import signal
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from vtok_ext.training.run_log import read_log

SCRIPT = Path(__file__).with_name("killed_run.py")


def start(out, kill_at):
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), str(out), kill_at], stderr=subprocess.PIPE, text=True
    )


def finish(process, code):
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == code, errors


def curve(out):
    lines = read_log(out / "log.jsonl")
    for line in lines:
        line.pop("clips_per_s", None)
    return lines


def test_killed_and_resumed(tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "killed"
    uninterrupted = start(whole, "never")
    for kill_at in ("step 1", "rename 2", "state 4"):
        finish(start(out, kill_at), -signal.SIGKILL)
    finish(start(out, "never"), 0)
    finish(uninterrupted, 0)
    assert curve(out) == curve(whole)
    steps = [line["step"] for line in curve(out) if line["kind"] == "train"]
    assert steps == list(range(1, 7))
    # All loss terms were at work, and so were noise, moving averages and schedule.
    assert {"d_weight", "lecam_loss", "kl_loss", "perceptual_loss"} <= set(curve(out)[-3])
    for file in ("model/model.safetensors", "checkpoints/step-00000006/part-0.safetensors"):
        ours, theirs = load_file(out / file), load_file(whole / file)
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert not list((out / "checkpoints").glob(".partial*"))
