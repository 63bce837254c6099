"""Checkpoints: what is written is what is read, and nothing damaged or partial is ever used."""

import json
import random

import numpy as np
import pytest
import torch

from vtok_ext.training import checkpoint_storage
from vtok_ext.training.checkpoint import (
    CheckpointWriter,
    has_checkpoints,
    latest_checkpoint,
    read_numbers,
    read_shapes,
    read_tensors,
    restore_generators,
    verify_checkpoint,
)
from vtok_ext.training.tensor_tree import read_tree, write_tree

CPU = torch.device("cpu")


def save(root, step, **options):
    tensors = {"weight": torch.full((3,), float(step)), "count": torch.tensor(step)}
    return CheckpointWriter(root, CPU).save(step, tensors, {"samples": 2 * step}, **options)


def weight(found):
    into = {"weight": torch.zeros(3), "count": torch.tensor(0)}
    assert read_shapes(found) == {name: tensor.shape for name, tensor in into.items()}
    read_tensors(found, into)
    assert into["count"] == found.step and read_numbers(found) == {"samples": 2 * found.step}
    return into["weight"]


def test_trees_come_back_as_they_were(tmp_path):
    shared = torch.arange(6.0)
    tree = {
        "state": {0: {"step": torch.tensor(3.0)}, 1: {}},
        "view": [shared.view(2, 3).T, shared],
        "mixed": (1, 0.1, None, True, "text"),
        "odd": {"__tuple__": 1},
        "empty": torch.zeros(0, 2, dtype=torch.bfloat16),
        "double": torch.tensor(0.1, dtype=torch.float64),
    }
    write_tree(tree, tmp_path / "tree")
    back = read_tree(tmp_path / "tree")
    assert back["state"].keys() == {0, 1} and back["mixed"] == tree["mixed"]
    assert back["odd"] == {"__tuple__": 1} and back["empty"].dtype == torch.bfloat16
    assert torch.equal(back["view"][0], tree["view"][0]) and back["double"] == tree["double"]
    with pytest.raises(TypeError, match="a value must be a tensor or JSON, got set"):
        write_tree({1, 2}, tmp_path / "set")


def test_newest_is_found_and_read(tmp_path):
    assert latest_checkpoint(tmp_path / "nowhere", pytest.fail) is None
    save(tmp_path, 5)
    save(tmp_path, 10, metric=0.5)
    found = latest_checkpoint(tmp_path, pytest.fail)
    assert (found.step, found.metric, found.world_size) == (10, 0.5, 1)
    assert torch.equal(weight(found), torch.full((3,), 10.0))


def test_random_generators_continue(tmp_path):
    def draw():
        return random.random(), float(np.random.normal()), float(torch.randn(()))

    draw()
    save(tmp_path, 1)
    expected = [draw() for _ in range(3)]
    assert restore_generators(latest_checkpoint(tmp_path, pytest.fail), CPU)
    assert [draw() for _ in range(3)] == expected


def test_last_and_best_are_kept(tmp_path):
    for step, metric in ((1, 0.9), (2, 0.1), (3, 0.5), (4, None), (5, 0.7)):
        save(tmp_path, step, metric=metric, keep_last=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        f"step-{n:08d}" for n in (2, 4, 5)
    ]  # fmt: skip


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def change_manifest(folder, **values):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def replace_by_folder(path):
    path.unlink()
    path.mkdir()


DAMAGE = {
    "one bit": (lambda folder: flip(folder / "part-0.safetensors"), "must have SHA-256"),
    "cut off": (
        lambda folder: (folder / "part-0.safetensors").write_bytes(b"x"),
        r"must have \d+ bytes, got 1 bytes",
    ),
    "a file less": (lambda folder: (folder / "rank-0.json").unlink(), "bytes, got none"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "must hold manifest.json"),
    "half a manifest": (
        lambda folder: (folder / "manifest.json").write_text('{"format": 2, "st'),
        "must be JSON",
    ),
    "another manifest": (
        lambda folder: (folder / "manifest.json").write_text(json.dumps({"format": 2})),
        "must be a manifest of step-00000002",
    ),
    "no step": (lambda folder: change_manifest(folder, step=None), "must be a manifest of"),
    "files without a hash": (
        lambda folder: change_manifest(folder, files={"state.json": {"bytes": 3}}),
        "must be a manifest of",
    ),
    "files in a list": (
        lambda folder: change_manifest(folder, files=["state.json"]),
        "must be a manifest of",
    ),
    "unreadable": (
        lambda folder: replace_by_folder(folder / "manifest.json"),
        "must be readable, got .*directory",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_is_set_aside_loudly_and_the_one_before_used(tmp_path, damage):
    save(tmp_path, 1)
    folder = save(tmp_path, 2)
    hurt, message = DAMAGE[damage]
    hurt(folder)
    with pytest.raises(ValueError, match=message):
        verify_checkpoint(folder)
    warnings = []
    assert latest_checkpoint(tmp_path, warnings.append).step == 1
    assert len(warnings) == 1 and warnings[0].endswith("trying step 1")
    assert (tmp_path / "damaged-step-00000002").is_dir() and not folder.exists()
    save(tmp_path, 2)  # its name is free again
    assert latest_checkpoint(tmp_path, pytest.fail).step == 2


def test_nothing_but_damage_is_an_error_not_a_fresh_start(tmp_path):
    flip(save(tmp_path, 1) / "state.json")
    for _ in range(2):  # torchrun starts a failed job again
        with pytest.raises(ValueError, match="at least one must be undamaged, got 1 damaged"):
            latest_checkpoint(tmp_path, lambda line: None)
    assert has_checkpoints(tmp_path)
    save(tmp_path, 2)
    assert latest_checkpoint(tmp_path, pytest.fail).step == 2


def test_failing_to_write_leaves_the_earlier_ones(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_storage, "write_part", full)
        with pytest.raises(OSError, match="No space left"):
            save(tmp_path, 2)
    assert latest_checkpoint(tmp_path, pytest.fail).step == 1
    save(tmp_path, 3)  # clears the partial one away
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]


def test_states_that_are_not_finite_are_refused(tmp_path):
    state = {"model.a": torch.ones(2), "model.b.weight": torch.tensor([1.0, float("nan")])}
    with pytest.raises(ValueError, match=r"got NaN or inf in model\.b\.weight"):
        CheckpointWriter(tmp_path / "root", CPU).save(1, state, {})
    assert not (tmp_path / "root").exists()


def test_in_the_background_a_copy_is_written(tmp_path):
    """What changes afterwards is not in it, and the next one waits for it."""
    writer, weights = CheckpointWriter(tmp_path, CPU), torch.arange(5.0)
    for step in (1, 2):
        writer.save(step, {"weight": weights}, {}, background=True)
        weights += 100
    writer.wait()
    for step in (1, 2):
        into = {"weight": torch.zeros(5)}
        read_tensors(verify_checkpoint(tmp_path / f"step-{step:08d}"), into)
        assert torch.equal(into["weight"], torch.arange(5.0) + 100 * (step - 1))


def test_failing_in_the_background_is_told(tmp_path, monkeypatch):
    def full(tensors, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_storage, "write_part", full)
    writer = CheckpointWriter(tmp_path, CPU)
    writer.save(1, {"weight": torch.ones(2)}, {}, background=True)
    with pytest.raises(OSError, match="No space left"):
        writer.wait()
    writer.wait()  # told once
