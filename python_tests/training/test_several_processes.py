"""Two processes over gloo, with the variables that torchrun sets."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_recipe import OVERRIDES, tiny

from vtok_ext.training.loop import train
from vtok_ext.training.run_log import read_log

SCRIPT = Path(__file__).with_name("several_runs.py")
# Batch norm sees a process's own clips, as published, so that a discriminator would make runs of
# one and two processes differ; noise of KL latents is each process's own. At VidTok's learning rate
# rounding does not grow into other codes within 20 steps.
COMPARABLE = ["loss.discriminator=none", "optimizer.lr=1e-5", "run.steps=20",
              "run.checkpoint_every=20", "run.validate_every=20"]  # fmt: skip
ADVERSARIAL = ["run.accumulate=2", "run.batch_size=1", "run.steps=4"]


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for free in sockets:
        free.bind(("127.0.0.1", 0))
    ports = [free.getsockname()[1] for free in sockets]
    for free in sockets:
        free.close()
    return ports


def run_two(*calls):
    """Returns (stdout, stderr) of two processes that make all calls of `vtok` together."""
    ports = free_ports(len(calls))
    plan = json.dumps(
        [[port, list(map(str, call))] for port, call in zip(ports, calls, strict=True)]
    )
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), plan],
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    done = [process.communicate(timeout=200) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], done
    return done


def call(out, recipe, *overrides):
    options = ["-o", out, "--device", "cpu", "--resume", "auto"]
    return ["train", recipe, *OVERRIDES, *overrides, *options]


def losses(out):
    return [line["loss"] for line in read_log(out / "log.jsonl") if line["kind"] == "train"]


def test_two_processes(tmp_path):
    """The losses of one process with both batches together; resumed bit by bit; one of them talks.

    The adversarial run has every loss term, accumulation, and checkpoints of two processes.
    """
    equal, whole, parts = (tmp_path / name for name in ("equal", "whole", "parts"))
    done = run_two(
        call(equal, "smoke_fsq", *COMPARABLE, "run.batch_size=2"),
        call(whole, "smoke_kl", *ADVERSARIAL),
        call(parts, "smoke_kl", *ADVERSARIAL, "run.steps=2"),
        call(parts, "smoke_kl", *ADVERSARIAL),
    )
    one = tiny(*COMPARABLE, "run.batch_size=4", base="smoke_fsq")
    train(one, tmp_path / "one")
    expected = losses(tmp_path / "one")
    assert len(expected) == 20
    assert losses(equal) == pytest.approx(expected, rel=1e-6)

    assert len(losses(whole)) == 4 and losses(parts) == losses(whole)
    assert "4 steps, model in" in done[0][0] and done[1][0] == ""
    assert "run.steps was 2, is 4" in done[0][1] and "warning" not in done[1][1]
    warnings = []
    train(tiny(*ADVERSARIAL, "run.steps=4"), parts, resume="auto", warn=warnings.append)
    assert any("the checkpoint is of 2 processes and these are 1" in line for line in warnings)
