"""Saved models and released checkpoints: strict, safe, atomic."""

import argparse
import json
import os
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file, save_file

import vtok_ext as vt
from vtok_ext.models import VidTok, _checkpoint

SMALL = {"ch": 8, "num_res_blocks": 1}
NAME = "vidtok_fsq_causal_488_262144"


@pytest.fixture
def saved(fsq_model, tmp_path):
    folder = tmp_path / "model"
    fsq_model.save_pretrained(folder)
    return folder


def edit(folder, **changes):
    path = folder / "config.json"
    description = json.loads(path.read_text())
    config = changes.pop("config", {})
    description.update(changes)
    description["config"].update(config)
    path.write_text(json.dumps(description))


def test_round_trip(fsq_model, saved, clip):
    video = clip(1, 5, 16, 16)
    assert sorted(os.listdir(saved)) == ["config.json", "model.safetensors"]
    for loaded in (vt.load_model(saved), VidTok.from_pretrained(str(saved))):
        assert not loaded.training
        assert loaded.config == fsq_model.config and loaded.model_id == fsq_model.model_id
        with torch.no_grad():
            a, b = fsq_model(video), loaded(video)
        assert torch.equal(a.reconstruction, b.reconstruction)
        assert torch.equal(a.encoding.indices, b.encoding.indices)


def test_config_records_versions(saved):
    description = json.loads((saved / "config.json").read_text())
    assert description["model"] == "VidTok" and description["name"] == NAME
    assert description["reference_version"] == "1.0"
    assert description["vtok_ext_version"] and description["config"]["levels"] == [8] * 6


def test_saving_again_replaces_and_failure_leaves_the_old(fsq_model, kl_model, saved, monkeypatch):
    kl_model.save_pretrained(saved)
    assert not vt.load_model(saved).is_discrete

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        fsq_model.save_pretrained(saved)
    with pytest.raises(OSError, match="No space left"):
        fsq_model.save_pretrained(saved.parent / "new")
    assert os.listdir(saved.parent) == ["model"]
    monkeypatch.undo()
    assert sorted(os.listdir(saved)) == ["config.json", "model.safetensors"]
    assert not vt.load_model(saved).is_discrete


def test_damaged_folders(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match="must be a folder of save_pretrained or a hub id"):
        vt.load_model(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="must hold config.json"):
        vt.load_model(tmp_path)
    edit(saved, config={"chh": 8})
    with pytest.raises(ValueError, match=r"got 'chh'; did you mean 'ch'\?"):
        vt.load_model(saved)
    (saved / "config.json").write_text("{")
    with pytest.raises(ValueError, match="must be JSON"):
        vt.load_model(saved)
    (saved / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="must be an object with `config`"):
        vt.load_model(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "os.system"}, "model must be one of CoordTok, .*VidTok, .* got 'os.system'"),
        ({"format_version": 2}, "format_version must be 1, got 2"),
        ({"reference_version": "1.1"}, "reference_version must be '1.0', got '1.1'"),
        ({"config": {"levels": [1, 8]}}, "levels must be a non-empty sequence"),
        (
            {"config": {"ch": 16}},
            r"weights must be .* of another shape .*\[8, 3, 3, 3, 3\] instead",
        ),
        ({"config": {"num_res_blocks": 2}}, r"got \d+ missing \(encoder"),
    ],
)
def test_edited_configs_are_refused(saved, changes, message):
    edit(saved, **changes)
    with pytest.raises(ValueError, match=message):
        vt.load_model(saved)


def test_wrong_weights_are_refused(saved):
    path = saved / "model.safetensors"
    weights = load_file(path)
    extra = {**weights, "encoder.extra": torch.zeros(1)}
    del extra["encoder.conv_in.conv.bias"]
    save_file(extra, path)
    message = r"1 missing \(encoder.conv_in.conv.bias\); 1 unexpected \(encoder.extra\)"
    with pytest.raises(ValueError, match=message):
        vt.load_model(saved)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="must be a safetensors file"):
        vt.load_model(saved)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"model.safetensors' must be a file, got none"):
        vt.load_model(saved)


def test_failed_load_names_another_class(saved):
    edit(saved, model="CoordTok")
    with pytest.raises(ValueError, match="model must be VidTok, got 'CoordTok'"):
        VidTok.from_pretrained(saved)


@pytest.mark.parametrize("suffix", [".ckpt", ".pth", ".safetensors"])
def test_released_checkpoints(fsq_model, tmp_path, clip, suffix):
    """Training state is ignored, compiled prefixes are stripped, half weights are converted."""
    state = {}
    for key, value in fsq_model.state_dict().items():
        part, rest = key.split(".", 1)
        state[f"{part}._orig_mod.{rest}"] = value.half().float()
    extra = {"loss.logvar": torch.zeros(1), "model_ema.decay": torch.zeros(1)}
    path = tmp_path / f"model{suffix}"
    if suffix == ".safetensors":
        save_file({k: v.half() for k, v in {**state, **extra}.items()}, path)
    else:
        torch.save({"state_dict": {**state, **extra}, "global_step": 7}, path)
    model = vt.load_model(path, name=NAME, trust_checkpoint=True, **SMALL)
    for key, value in model.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, fsq_model.state_dict()[key].half().float()), key


def test_bad_checkpoints(fsq_model, tmp_path):
    path = tmp_path / "model.ckpt"
    with pytest.raises(FileNotFoundError, match="model.ckpt' must be a file, got none"):
        vt.load_model(path, name=NAME)
    torch.save(fsq_model.state_dict(), path)
    with pytest.raises(ValueError, match="name must say which model the checkpoint"):
        vt.load_model(path)
    with pytest.raises(ValueError, match="weights must be those of vidtok_kl_causal_488_4chn, got"):
        vt.load_model(path, name="vidtok_kl_causal_488_4chn", trust_checkpoint=True, **SMALL)
    torch.save({**fsq_model.state_dict(), "optimizer.state": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"1 unexpected \(optimizer.state\)"):
        vt.load_model(path, name=NAME, trust_checkpoint=True, **SMALL)
    torch.save({"state_dict": {"encoder.x": 3}}, path)
    with pytest.raises(ValueError, match="encoder.x must be a tensor, got int"):
        vt.load_model(path, name=NAME, trust_checkpoint=True)
    torch.save([1], path)
    with pytest.raises(ValueError, match="must hold a state_dict, got list"):
        vt.load_model(path, name=NAME, trust_checkpoint=True)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="must be a checkpoint of tensors, got"):
        vt.load_model(path, name=NAME, trust_checkpoint=True)


class Payload:
    """A pickle that would create a file when loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_checkpoints_execute_nothing(tmp_path):
    path, proof = tmp_path / "model.pth", tmp_path / "executed"
    torch.save({"state_dict": {"encoder.x": Payload(proof)}}, path)
    with pytest.raises(ValueError, match="must be a checkpoint of tensors"):
        vt.load_model(path, name=NAME, trust_checkpoint=True)
    assert not proof.exists()


def test_old_torch_needs_trust(fsq_model, tmp_path, monkeypatch):
    path = tmp_path / "model.ckpt"
    torch.save(fsq_model.state_dict(), path)
    monkeypatch.setattr(torch, "__version__", "2.4.1")
    with pytest.raises(ValueError, match="torch must be >= 2.6 .*trust_checkpoint=True"):
        vt.load_model(path, name=NAME, **SMALL)
    assert _checkpoint.read_checkpoint(str(path), trust_checkpoint=True).keys()


def test_two_threads_may_read_pickles_at_once(tmp_path, monkeypatch):
    """The first to end took the harmless types out of torch's list while the other one read."""
    content = {"ema": {"weight": torch.zeros(1)}, "args": argparse.Namespace(size=1)}
    torch.save(content, tmp_path / "model.pt")
    before = torch.serialization.get_safe_globals()
    load, waits = torch.load, [0.1, 0.4]

    def slow(*arguments, **options):
        time.sleep(waits.pop(0))
        return load(*arguments, **options)

    monkeypatch.setattr(torch, "load", slow)
    with ThreadPoolExecutor(2) as pool:
        read = _checkpoint.read_generator_checkpoint
        both = [pool.submit(read, str(tmp_path / "model.pt"), True) for _ in range(2)]
        assert [list(one.result()) for one in both] == [["weight"], ["weight"]]
    assert set(torch.serialization.get_safe_globals()) == set(before)  # torch keeps a set


@pytest.mark.parametrize("is_zip", [True, False])
def test_pickles_are_mapped_where_their_format_allows(tmp_path, monkeypatch, is_zip):
    content = {"ema": {"weight": torch.arange(3.0)}, "opt": {"state": torch.zeros(9)}}
    path = tmp_path / "model.pt"
    torch.save(content, path, _use_new_zipfile_serialization=is_zip)
    load, mapped = torch.load, []
    monkeypatch.setattr(torch, "load", lambda *a, **k: mapped.append(k["mmap"]) or load(*a, **k))
    read = _checkpoint.read_generator_checkpoint(str(path), True)
    assert read["weight"].tolist() == [0, 1, 2] and mapped == [is_zip]


def test_name_belongs_to_checkpoints_only(saved):
    with pytest.raises(ValueError, match="name and overrides must be absent for a saved model"):
        vt.load_model(saved, name=NAME)


def fake_hub(folder, calls):
    hub = types.ModuleType("huggingface_hub")

    class HfApi:
        def create_repo(self, repo_id, private, exist_ok):
            calls.append(("create", repo_id, private))

        def upload_folder(self, repo_id, folder_path):
            calls.append(("upload", repo_id, sorted(os.listdir(folder_path))))
            return "https://hub/commit"

    hub.HfApi = HfApi
    hub.snapshot_download = lambda repo_id, allow_patterns: str(folder)
    return hub


def test_hub(fsq_model, saved, monkeypatch):
    calls = []
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake_hub(saved, calls))
    assert fsq_model.push_to_hub("me/model", private=True) == "https://hub/commit"
    assert calls == [
        ("create", "me/model", True),
        ("upload", "me/model", ["config.json", "model.safetensors"]),
    ]
    assert vt.load_model("me/model").config == fsq_model.config


def test_hub_absent(fsq_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="push_to_hub: huggingface_hub must be installed"):
        fsq_model.push_to_hub("me/model")
    # A folder that is not there is likelier than a model of the hub.
    with pytest.raises(FileNotFoundError, match="got 'me/model'; as a hub id it needs hugging"):
        vt.load_model("me/model")
