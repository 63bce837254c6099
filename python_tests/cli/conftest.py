"""Running `vtok` in this process, a small saved model, and small videos."""

import json
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch

import vtok_ext as vt
from vtok_ext.cli import reconstruct as reconstruct_module
from vtok_ext.cli.app import run
from vtok_ext.data.procedural import procedural_clip
from vtok_ext.data.video import VideoWriter

PRESET = "vidtok_fsq_causal_488_262144"
TINY = {"ch": 8, "ch_mult": (1, 1, 1, 1), "num_res_blocks": 1}


@pytest.fixture
def vtok(capsys):
    """Returns a function (*arguments) -> code, out, err, and json (of out) of one `vtok` call."""

    def call(*arguments):
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        result = SimpleNamespace(code=code, out=out, err=err)
        if code == 0 and "--json" in arguments:
            result.json = json.loads(out)
        return result

    return call


@pytest.fixture
def short_portions(monkeypatch):
    """Portions of one temporal factor, so that small clips are long streams."""
    monkeypatch.setattr(reconstruct_module, "_FEATURE_MAP_BYTES", 1)


@pytest.fixture(scope="session")
def saved_models(tmp_path_factory):
    """Returns {"fsq": folder, "kl": folder} of tiny models with random weights."""
    folders = {}
    for kind, name in (("fsq", PRESET), ("kl", "vidtok_kl_causal_488_4chn")):
        torch.manual_seed(0)
        folders[kind] = tmp_path_factory.mktemp("models") / kind
        vt.create_model(name, **TINY).save_pretrained(folders[kind])
    return folders


@pytest.fixture
def model_folder(saved_models):
    return saved_models["fsq"]


@pytest.fixture
def make_video(tmp_path):
    """Returns a function that writes a small procedural video and returns its path."""

    def make(name="clip.mp4", num_frames=9, height=32, width=40, timestamps=None):
        path = tmp_path / name
        frames = procedural_clip(num_frames, height, width, seed=5, num_shapes=2)
        with VideoWriter(path, height=height, width=width, time_base=Fraction(1, 600)) as writer:
            writer.write(frames, timestamps or [20 * t for t in range(num_frames)])
        return path

    return make


@pytest.fixture
def written(monkeypatch):
    """The frames [1, 3, t, H, W] that reach the video writer, which loses colour."""
    portions, write = [], VideoWriter.write

    def record(writer, frames, timestamps=None):
        portions.append(frames.clone()[None])
        write(writer, frames, timestamps)

    monkeypatch.setattr(VideoWriter, "write", record)
    return portions
