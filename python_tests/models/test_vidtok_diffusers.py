"""Both ways to diffusers' AutoencoderVidTok. Equality of videos is tested where it is installed."""

import json
import os

import pytest
import torch
from helpers import import_or_skip
from safetensors.torch import load_file, save_file

import vtok_ext as vt
from vtok_ext.models import VidTok
from vtok_ext.models.vidtok_diffusers import (
    config_from_diffusers,
    config_to_diffusers,
    from_diffusers,
    load_diffusers,
    save_diffusers,
    to_diffusers,
)

KL, FSQ = "vidtok_kl_causal_488_4chn_v1_1", "vidtok_fsq_causal_888_32768_v1_1"
SMALL = {"ch": 8, "num_res_blocks": 1}
CENTRED, DEEP = "vidtok_fsq_noncausal_488_262144", "vidtok_kl_causal_41616_16chn_v1_1"
MODELS = [KL, FSQ, CENTRED, DEEP, "vidtok_kl_causal_288_8chn_v1_1", "vidtok_kl_noncausal_488_4chn"]


@pytest.fixture(scope="module", params=MODELS)
def model(request, build):
    return build(request.param)


@pytest.fixture(scope="module")
def vae(model):
    import_or_skip("diffusers")
    return to_diffusers(model)


def test_every_released_configuration_comes_back_or_is_refused():
    for name, config in VidTok.presets.items():
        if config.causal and config.version == "1.0":
            with pytest.raises(ValueError, match="version must be '1.1', all that AutoencoderVidT"):
                config_to_diffusers(config)
        else:
            fields = json.loads(json.dumps(config_to_diffusers(config)))
            assert config_from_diffusers(fields) == config, name


def test_folder_round_trip(model, tmp_path, clip):
    save_diffusers(model, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "diffusion_pytorch_model.safetensors"]
    for loaded in (load_diffusers(tmp_path), vt.load_model(tmp_path)):
        assert not loaded.training and loaded.reference_version == model.reference_version
        state = loaded.state_dict()
        assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
        assert state.keys() == model.state_dict().keys()
    video = clip(1, 6, 16, 16)
    with torch.no_grad():
        assert torch.equal(loaded(video).reconstruction, model(video).reconstruction)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        (KL, {"interpolation": "nearest"}, "interpolation must be 'linear', all that"),
        (KL, {"norm_type": "groupnorm", "ch": 32}, "norm_type must be 'layernorm', all that"),
        (FSQ, {"levels": (8, 8, 5)}, r"fsq with 8 levels per channel, got fsq \(8, 8, 5\)"),
        (f"{KL[:-5]}_full_3d", {}, "version must be '1.1'"),
    ],
)
def test_models_that_diffusers_does_not_compute_are_refused(build, tmp_path, name, fields, message):
    with pytest.raises(ValueError, match=message):
        save_diffusers(build(name, **fields), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"chanels": 8}, "field must be one of in_channels, .*, got 'chanels'"),
        ({"dropout": 0.1}, "dropout must be 0.0, got 0.1"),
        ({"double_z": False}, "double_z must be True, got False"),
        ({"regularizer": "fsq", "double_z": False, "z_channels": 5}, "size must be 32768, got 262"),
        ({"regularizer": "vae"}, "regularizer must be one of 'kl'"),
        ({"tempo_ds": [3]}, "VidTokConfig: tempo_us must be as many levels as tempo_ds"),
    ],
)
def test_bad_arguments(fields, message):
    if fields.get("regularizer") == "vae":
        fields = {**fields, "double_z": False}
    with pytest.raises(ValueError, match=message):
        config_from_diffusers(fields)


def test_weights_beside_a_configuration_of_diffusers_know_their_version(build, tmp_path):
    """diffusers writes no header, and has version 1.1 alone of causal models."""
    save_diffusers(build(KL), tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file(load_file(path), path, {"format": "pt"})
    assert vt.load_model(path, name=KL, **SMALL).reference_version == "1.1"
    with pytest.raises(ValueError, match="name must be that of a version 1.1 model"):
        vt.load_model(path, name="vidtok_kl_causal_488_4chn", **SMALL)


def test_bad_folders(build, tmp_path):
    with pytest.raises(ValueError, match="folder must hold a saved AutoencoderVidTok"):
        load_diffusers(tmp_path)
    save_diffusers(build(KL), tmp_path)
    path = tmp_path / "config.json"
    text = path.read_text()
    path.write_text(text.replace('"ch": 8', '"ch": 16'))
    with pytest.raises(ValueError, match=r"load_diffusers: weights must be .* of another shape"):
        vt.load_model(tmp_path)
    path.write_text(text.replace("AutoencoderVidTok", "AutoencoderKL"))
    with pytest.raises(ValueError, match="got one of diffusers' AutoencoderKL; vt.wrap_diff"):
        vt.load_model(tmp_path)
    path.write_text(text)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="diffusion_pytorch_model.safetensors' must be a"):
        vt.load_model(tmp_path)
    with pytest.raises(TypeError, match="vae must be AutoencoderVidTok, got Linear"):
        from_diffusers(torch.nn.Linear(1, 1))


def frames_of(vae) -> list[int]:
    """Clip lengths that both systems extend alike: without causality diffusers takes 16 frames at a
    time, and with it multiples of f get a latent more than they need."""
    factor = vae.temporal_compression_ratio
    return [t for t in (1, 6, 9, 17) if t % factor] if vae.is_causal else [16]


@torch.no_grad()
def test_videos_are_those_of_diffusers(model, vae, clip):
    for num_frames in frames_of(vae):
        video = clip(1, num_frames, 16, 32)
        ours, theirs = model(video), vae(video, sample_posterior=False).sample
        assert torch.allclose(ours.reconstruction, theirs, atol=1e-4 * float(theirs.abs().max()))
        encoded = vae(video, sample_posterior=False, encoder_mode=True)
        if model.is_discrete:
            codes, indices = encoded
            assert torch.equal(codes, ours.encoding.latent)
            assert torch.equal(indices, ours.encoding.indices)
        else:
            scale = float(encoded.abs().max())
            assert torch.allclose(encoded, ours.encoding.latent, atol=1e-4 * scale)


@torch.no_grad()
def test_from_diffusers_and_folders_written_by_it(model, vae, tmp_path, clip):
    video = clip(1, frames_of(vae)[-1], 16, 16)
    expected = model(video).reconstruction
    assert torch.equal(from_diffusers(vae)(video).reconstruction, expected)
    vae.save_pretrained(tmp_path / "theirs")
    assert torch.equal(vt.load_model(tmp_path / "theirs")(video).reconstruction, expected)
    save_diffusers(model, tmp_path / "ours")
    loaded = type(vae).from_pretrained(tmp_path / "ours")
    assert {k: v for k, v in loaded.config.items() if k[0] != "_"} == {
        k: v for k, v in vae.config.items() if k[0] != "_"
    }
    theirs = vae(video, sample_posterior=False).sample
    assert torch.equal(loaded(video, sample_posterior=False).sample, theirs)


def test_absent_diffusers_is_named(build, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    with pytest.raises(ImportError, match="to_diffusers: diffusers must be installed"):
        to_diffusers(build(KL))
