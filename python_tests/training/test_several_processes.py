"""Two processes over gloo, with the variables that torchrun sets."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_recipe import OVERRIDES, tiny

from vtok_ext.training.checkpoint import read_numbers, read_shapes, verify_checkpoint
from vtok_ext.training.loop import train
from vtok_ext.training.run_log import read_log

SCRIPT = Path(__file__).with_name("several_runs.py")
# Batch norm sees a process's own clips, as published, so that a discriminator would make runs of
# one and two processes differ. At VidTok's learning rate rounding does not grow into other codes
# within 20 steps.
COMPARABLE = ["loss.discriminator=none", "optimizer.lr=1e-5", "run.steps=20",
              "run.checkpoint_every=20", "run.validate_every=20"]  # fmt: skip
ADVERSARIAL = ["run.accumulate=2", "run.batch_size=1", "run.steps=4"]
DIVIDED = ["run.accumulate=2", "run.batch_size=1", "run.steps=3", "run.checkpoint_every=1",
           "run.validate_every=9", "model.overrides.num_res_blocks=1"]  # fmt: skip


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for free in sockets:
        free.bind(("127.0.0.1", 0))
    ports = [free.getsockname()[1] for free in sockets]
    for free in sockets:
        free.close()
    return ports


def run_two(*calls, codes=(0, 0)):
    """Returns (stdout, stderr) of two processes that make all calls of `vtok` together.

    Both must end, with these exit codes.
    """
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
    done = [process.communicate(timeout=600) for process in processes]
    assert [process.returncode for process in processes] == list(codes), done
    return done


def call(out, recipe, *overrides):
    options = ["-o", out, "--device", "cpu", "--resume", "auto"]
    return ["train", recipe, *OVERRIDES, *overrides, *options]


def losses(out):
    return [line["loss"] for line in read_log(out / "log.jsonl") if line["kind"] == "train"]


def test_two_processes(tmp_path):
    """The losses of one process with both batches together, also after it; resumed bit by bit; one
    of them talks.

    The adversarial run has every loss term, accumulation, and checkpoints of two processes.
    """
    equal, whole, parts = (tmp_path / name for name in ("equal", "whole", "parts"))
    noisy, taken_over = tmp_path / "noisy", tmp_path / "taken over"
    one = tiny(*COMPARABLE, "run.batch_size=4", "run.checkpoint_every=10", base="smoke_fsq")
    train(one, tmp_path / "one")
    expected = losses(tmp_path / "one")
    half = Path("checkpoints", "step-00000010")
    shutil.copytree(tmp_path / "one" / half, taken_over / half)
    done = run_two(
        call(equal, "smoke_fsq", *COMPARABLE, "run.batch_size=2"),
        call(taken_over, "smoke_fsq", *COMPARABLE, "run.batch_size=2"),
        call(noisy, "smoke_kl", *COMPARABLE, "run.batch_size=2", "run.steps=3"),
        call(whole, "smoke_kl", *ADVERSARIAL),
        call(parts, "smoke_kl", *ADVERSARIAL, "run.steps=2"),
        call(parts, "smoke_kl", *ADVERSARIAL),
    )
    assert len(expected) == 20
    assert losses(equal) == pytest.approx(expected, rel=1e-6)
    assert losses(taken_over) == pytest.approx(expected[10:], rel=1e-6)
    # The noise of a latent belongs to its clip.
    one = tiny(*COMPARABLE, "run.batch_size=4", "run.steps=3")
    train(one, tmp_path / "one noisy")
    assert losses(noisy) == pytest.approx(losses(tmp_path / "one noisy"), rel=1e-6)

    assert len(losses(whole)) == 4 and losses(parts) == losses(whole)
    assert "4 steps, model in" in done[0][0] and done[1][0] == ""
    assert "run.steps was 2, is 4" in done[0][1] and "warning" not in done[1][1]
    warnings = []
    train(tiny(*ADVERSARIAL, "run.steps=4"), parts, resume="auto", warn=warnings.append)
    assert any("the checkpoint is of 2 processes and these are 1" in line for line in warnings)


def test_divided_parameters(tmp_path):
    """FSDP2 has the losses of DDP, adversarial step included; one process goes on with its state.

    The last of its three steps is adversarial; the process that goes on after the first one has the
    same samples in the second. The entropy of FSQ is that of a micro-batch of all processes: there
    the one process takes micro-batches of twice the size.
    """
    copied, divided, discrete = (tmp_path / name for name in ("ddp", "fsdp", "fsq"))
    run_two(
        call(copied, "smoke_kl", *DIVIDED),
        call(divided, "smoke_kl", *DIVIDED, "run.parallel=fsdp"),
        call(discrete, "smoke_fsq", *DIVIDED, "run.steps=2", "run.parallel=fsdp"),
    )
    expected = losses(copied)
    assert len(expected) == 3 and losses(divided) == pytest.approx(expected, rel=1e-5)
    # The held-out clips pass without gradients, where a model may take other paths.
    ends = [read_log(out / "log.jsonl")[-2] for out in (divided, copied)]
    assert ends[0]["kind"] == ends[1]["kind"] == "validation"
    assert ends[0]["rec_loss"] == pytest.approx(ends[1]["rec_loss"], rel=1e-4)
    ours, theirs = (load_file(out / "model" / "model.safetensors") for out in (divided, copied))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-5)

    alone = tmp_path / "alone"
    shutil.copytree(divided / "checkpoints" / "step-00000001", alone / "checkpoints/step-00000001")
    warnings = []
    recipe = tiny(*DIVIDED, "run.accumulate=4", "run.steps=2")
    result = train(recipe, alone, resume="auto", warn=warnings.append)
    assert result.resumed_from == 1
    assert losses(alone)[0] == pytest.approx(expected[1], rel=1e-5)
    assert not any("a step had" in line for line in warnings)
    # Its state is whole again: as many numbers as in a checkpoint of copies.
    shapes = read_shapes(verify_checkpoint(divided / "checkpoints" / "step-00000003"))
    assert shapes == read_shapes(verify_checkpoint(copied / "checkpoints" / "step-00000003"))

    recipe = tiny(*DIVIDED, "run.batch_size=2", "run.steps=2", base="smoke_fsq")
    more_parts = tiny(*DIVIDED, "run.accumulate=4", "run.steps=2", base="smoke_fsq")
    second = losses(discrete)[1]
    shutil.rmtree(discrete / "checkpoints" / "step-00000002")
    shutil.copytree(discrete, tmp_path / "more parts")
    assert train(recipe, discrete, resume="auto", warn=warnings.append).resumed_from == 1
    assert losses(discrete)[1] == pytest.approx(second, rel=1e-6)
    assert not any("averages over the clips of a micro-batch" in line for line in warnings)
    train(more_parts, tmp_path / "more parts", resume="auto", warn=warnings.append)
    assert losses(tmp_path / "more parts")[1] != pytest.approx(second, rel=1e-6)
    assert any("run.accumulate was 2 and is 4: the quantizer" in line for line in warnings)


def test_steps_of_another_size_go_on_in_the_row_of_samples(tmp_path):
    recipe = ["run.batch_size=2", "run.checkpoint_every=1", "loss.discriminator=none"]
    train(tiny(*recipe, "run.steps=1"), tmp_path)
    warnings = []
    changed = tiny(*recipe, "run.steps=2", "run.batch_size=1")
    train(changed, tmp_path, resume="auto", warn=warnings.append)
    assert any("a step had 2 samples and has 1 now" in line for line in warnings)
    found = verify_checkpoint(tmp_path / "checkpoints" / "step-00000002")
    assert read_numbers(found)["samples"] == 3


@pytest.mark.parametrize("taken", ["recipe.yaml", "log.jsonl", "model"])
def test_what_only_one_process_writes_fails_on_both(taken, tmp_path):
    """Neither waits for the other when a folder or file is in the way."""
    place = tmp_path / taken
    if taken == "model":
        place.write_text("a file")
    else:
        place.mkdir()
    done = run_two(call(tmp_path, "smoke_kl", "run.steps=1", "run.validate_every=9"), codes=(2, 2))
    assert taken in done[0][1] and "Traceback" not in done[0][1] + done[1][1]
