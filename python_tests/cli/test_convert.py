"""`vtok convert`: the same weights in another form, complete or not at all."""

import json

import pytest
import torch

import vtok_ext as vt
from vtok_ext.models.latent_statistics import LatentStatistics
from vtok_ext.models.vidtok_diffusers import is_diffusers_folder

KL_1_1 = "vidtok_kl_causal_488_4chn_v1_1"
TINY = {"ch": 8, "ch_mult": (1, 1, 1, 1), "num_res_blocks": 1}


def same(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    model = vt.create_model(KL_1_1, **TINY)
    mean, std = torch.randn(4), 1 + torch.rand(4)
    model.latent_statistics = LatentStatistics({"grid": mean}, {"grid": std})
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_to_diffusers_and_back(vtok, saved, tmp_path):
    result = vtok("convert", saved, tmp_path / "theirs", "--to", "diffusers", "--json")
    assert result.code == 0, result.err
    assert is_diffusers_folder(tmp_path / "theirs") and result.json["version"] == "1.1"
    for _ in range(2):  # the second time it replaces its own output
        result = vtok("convert", tmp_path / "theirs", tmp_path / "back", "--json")
        assert result.code == 0, result.err
    back, first = vt.load_model(tmp_path / "back"), vt.load_model(saved)
    assert same(back, first)
    assert back.latent_statistics.to_dict() == first.latent_statistics.to_dict()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "model", "theirs"]


YAML = """\
model:
  target: vidtok.models.autoencoder.AutoencodingEngine
  params:
    encoder_config:
      target: vidtok.modules.model_3dcausal.EncoderCausal3DPadding
      params: {double_z: true, z_channels: 4, ch: 8, ch_mult: [1, 1, 1, 1], num_res_blocks: 1}
    decoder_config:
      target: vidtok.modules.model_3dcausal.DecoderCausal3DPadding
      params: ${model.params.encoder_config.params}
    regularizer_config:
      target: vidtok.modules.regularizers.DiagonalGaussianRegularizer
"""


def test_released_checkpoint_by_its_yaml_file(vtok, tmp_path):
    (tmp_path / "small.yaml").write_text(YAML)
    model = vt.create_model(tmp_path / "small.yaml")
    state = {f"model_ema.{k.replace('.', '')}": v for k, v in model.state_dict().items()}
    state |= {k: torch.zeros_like(v) for k, v in model.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "last.ckpt")
    options = ("--name", tmp_path / "small.yaml", "--ema", "--trust-checkpoint")
    result = vtok("convert", tmp_path / "last.ckpt", tmp_path / "model", *options)
    assert result.code == 0, result.err
    assert result.out.startswith("small, version 1.0, ")
    assert same(vt.load_model(tmp_path / "model"), model)


def test_a_released_generator(vtok, tmp_path):
    torch.manual_seed(0)
    thin = {"hidden_size": 16, "depth": 1, "num_heads": 2, "num_classes": 3, "class_dropout": 0.1}
    model = vt.create_generator("sit_s_2", input_size=(8, 4, 4), **thin)
    last = {k: torch.zeros_like(v) for k, v in model.state_dict().items()}
    torch.save({"ema": model.state_dict(), "model": last}, tmp_path / "released.pt")
    parts = model.config.parts()
    statistics = LatentStatistics(
        {part: torch.zeros(8) for part in parts}, {part: torch.ones(8) for part in parts}
    )
    (tmp_path / "statistics.json").write_text(json.dumps(statistics.to_dict()))
    options = ["--name", "sit_s_2", "--trust-checkpoint"]
    options += ["--statistics", tmp_path / "statistics.json"]
    for key, value in thin.items():
        options += ["--override", f"{key}={value}"]
    result = vtok("convert", tmp_path / "released.pt", tmp_path / "sit", *options, "--json")
    assert result.code == 0, result.err
    found = vt.load_generator(tmp_path / "sit")
    assert same(found, model) and found.config == model.config
    assert found.statistics.to_dict() == statistics.to_dict()
    refused = vtok(
        "convert", tmp_path / "released.pt", tmp_path / "x", *options, "--to", "diffusers"
    )
    assert refused.code == 2 and "must be a VidTok, got sit_s_2" in refused.err


def test_refusals_leave_nothing(vtok, saved, saved_models, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    for arguments, words in (
        (
            (saved, tmp_path / "out", "--to", "onnx"),
            "--to must be one of vtok, diffusers, got onnx",
        ),
        ((saved_models["kl"], tmp_path / "out", "--to", "diffusers"), "version must be '1.1'"),
        ((KL_1_1, tmp_path / "out"), "source must have weights, got the name of a preset"),
        ((saved, tmp_path), "must be a new or empty folder"),
        ((saved, tmp_path / "out", "--ema"), "ema must be False for a saved model"),
        ((saved, tmp_path / "out", "--override", "ch=4"), "overrides must be absent for a saved"),
        (
            (saved, tmp_path / "out", "--statistics", "log.txt"),
            "--statistics must be absent for a tokenizer",
        ),
        ((tmp_path / "absent", tmp_path / "out"), "must be a folder of save_pretrained"),
    ):
        result = vtok("convert", *arguments)
        assert result.code == 2 and words in result.err, result.err
    assert sorted(tmp_path.rglob("*")) == before
