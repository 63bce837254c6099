"""`vtok grow` from a saved model to the grown one, its numbers and its picture."""

import json

import pytest
import torch

import vtok_ext as vt

SMALL = [
    "data.num_frames=9",
    "data.height=16",
    "data.width=16",
    "data.num_clips=4",
    "data.validation_clips=2",
    "run.steps=2",
    "run.batch_size=2",
    "run.validate_every=1",
]


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("promag") / "base"
    small = {"ch": 4, "ch_mult": (1, 2), "num_res_blocks": 1, "time_levels": 1, "z_channels": 2}
    vt.create_model("promag_base_4x8x8", **small).save_pretrained(folder)
    return folder


def test_a_model_is_grown_and_its_base_unchanged(vtok, base_folder, tmp_path):
    out = tmp_path / "run"
    done = vtok("grow", base_folder, *SMALL, "--out", out, "--json", "--device", "cpu")
    assert done.code == 0, done.err
    assert done.json["temporal_factor"] == 4 and done.json["base_unchanged"]
    assert set(done.json["psnr"]) == {"base 2x", "interpolated", "start", "grown 4x"}
    assert json.loads((out / "growth.json").read_text()) == done.json
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    base, grown = vt.load_model(base_folder), vt.load_model(out / "model")
    assert grown.config.base_id == base.model_id == done.json["base"]
    for name, weight in base.state_dict().items():
        assert torch.equal(weight, grown.base.state_dict()[name])
    again = vtok("grow", out / "model", *SMALL, "--out", tmp_path / "again", "--device", "cpu")
    assert again.code == 0 and "8x in time" in again.out, again.err


def test_bad_input(vtok, base_folder, tmp_path):
    done = vtok("grow", tmp_path / "none", "--out", tmp_path / "run")
    assert done.code == 2 and "none" in done.err
    done = vtok("grow", base_folder, "--recipe", "promag_decoder", "--out", tmp_path / "run")
    assert done.code == 2 and "grow: recipe must be of task 'grow'" in done.err
    done = vtok("grow", base_folder, "--mixing", "locally", "--out", tmp_path / "run")
    assert done.code == 2 and "grow.mixing must be one of" in done.err
