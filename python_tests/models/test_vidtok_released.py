"""Released VidTok files: YAML as published, checkpoints by YAML, moving averages, versions."""

import gzip
import json
import os

import pytest
import torch
from safetensors.torch import save_file

import vtok_ext as vt
from vtok_ext.models import VidTok
from vtok_ext.models._checkpoint import read_checkpoint
from vtok_ext.models._registry import _version_in_name
from vtok_ext.models.vidtok_released import released_config

KL, KL_1_1 = "vidtok_kl_causal_488_4chn", "vidtok_kl_causal_488_4chn_v1_1"
FSQ = "vidtok_fsq_causal_488_262144"
SMALL = {"ch": 8, "num_res_blocks": 1}
# The layout of the released files, whose comments and other sections do not matter here.
RELEASED = """\
model:
  base_learning_rate: 1e-5
  target: vidtok.models.autoencoder{suffix}.AutoencodingEngine
  params:
    monitor: val/rec_loss
    # ckpt_path: checkpoints/model.ckpt
    ignore_keys: []
    {engine}

    encoder_config:
      target: vidtok.modules.{module}.{encoder}
      params:
{net}
    decoder_config:
      target: vidtok.modules.{module}.{decoder}
      params: ${{model.params.encoder_config.params}}

    regularizer_config:
      target: vidtok.modules.regularizers.{regularizer}
{options}
    loss_config:
      target: vidtok.modules.losses.GeneralLPIPSWithDiscriminator
      params:
        dims: 3  # video - [t,h,w]
        regularization_weights: {{'aux_loss': 1.0, 'kl_loss': 0.000001}}

data:
  target: vidtok.data.datamodule.DataModuleFromConfig
"""


def yaml_of(cfg: dict) -> str:
    """The text of a released file with the recorded parameters of one configuration."""
    causal, suffix = cfg["causal"], "_v1_1" if cfg["version"] == "1.1" else ""
    kind = {"kl": "DiagonalGaussianRegularizer", "fsq": "FSQRegularizer"}[cfg["reg"]]
    options = [f"        {k}: {json.dumps(v)}" for k, v in cfg["reg_params"].items()]
    return RELEASED.format(
        suffix=suffix,
        engine="use_tiling: False" if suffix else f"is_causal: {causal}",
        module=f"model_3d{'' if causal else 'non'}causal{suffix}",
        encoder="EncoderCausal3DPadding" if causal else "Encoder3D",
        decoder="DecoderCausal3DPadding" if causal else "Decoder3D",
        net="".join(f"        {k}: {json.dumps(v)}\n" for k, v in cfg["net"].items()),
        regularizer=kind,
        options="\n".join(["      params:", *options, ""]) if options else "",
    )


@pytest.fixture(scope="module")
def published(parity_dir):
    """{name: parameters} of the 23 released files."""
    with gzip.open(parity_dir / "vidtok" / "keys.json.gz") as file:
        return json.load(file)


def test_all_released_files_give_the_presets(published, tmp_path):
    assert len(published) == 23
    for name, cfg in published.items():
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml_of(cfg))
        config, preset = released_config(path), VidTok.presets[name]
        steps = {s: config.steps(s) for s in ("spatial_ds", "spatial_us", "tempo_ds", "tempo_us")}
        assert steps == {s: preset.steps(s) for s in steps}, name
        lists = dict.fromkeys(steps)
        assert config.replace(**lists) == preset.replace(
            **lists, z_channels=preset.latent_channels
        ), name


# A file of a causal KL model, and one of an FSQ model, without the recorded parameters at hand.
NET = {"double_z": True, "z_channels": 4, "ch": 8, "num_res_blocks": 1, "dropout": 0.0}
CFG = {"causal": True, "version": "1.0", "reg": "kl", "net": NET, "reg_params": {}}
FSQ_CFG = {
    **CFG,
    "reg": "fsq",
    "net": {**NET, "double_z": False, "z_channels": 6},
    "reg_params": {"levels": [8] * 6, "entropy_loss_weight": 1e-1, "commitment_loss_weight": 0.25},
}


def changed(old: str, new: str, cfg: dict = CFG) -> str:
    text = yaml_of(cfg)
    assert old in text
    return text.replace(old, new)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (changed("model_3dcausal.Enc", "os.Enc"), "encoder_config.target must be one of vidtok.mo"),
        (changed("models.autoencoder.Auto", "evil.Auto"), "model.target must be one of vidtok.mod"),
        (changed("regularizers.Diag", "Diag"), "regularizer_config.target must be one of"),
        (changed("models.autoencoder.", "models.autoencoder_v1_1."), "a network of version 1.1"),
        (changed("causal.DecoderCausal3D", "causal_v1_1.DecoderCausal3D"), "that of the encoder"),
        (changed("is_causal: True", "is_causal: False"), "is_causal must be True"),
        (changed("double_z: true", "double_z: false"), "double_z must be True with this regular"),
        (changed("dropout: 0.0", "dropout: 0.1"), "dropout must be 0.0, got 0.1"),
        (changed("ch: 8", "chh: 8"), r"params.chh must be one of .*, got 'chh'; did you mean 'ch'"),
        (changed("z_channels: 4", "dim: 4"), "params.dim must be one of"),
        (changed("        z_channels: 4\n", ""), "params.z_channels must be given, got none"),
        (
            changed("ch: 8", "ch: 8\n        time_downsample_factor: 8"),
            "factor must be 4, what the",
        ),
        (changed("ch: 8", "ch: 8\n        init_pad_mode: reflect"), "pad_mode must be 'replicate'"),
        (changed("ch: 8", "ch: [8]"), r"VidTokConfig: ch must be an integer >= 1, got \(8,\)"),
        (changed("[8, 8, ", "[1, 8, ", FSQ_CFG), "VidTokConfig: levels must be a non-empty"),
        (changed("levels", "scale: 2\n        levels", FSQ_CFG), "params.scale must be one of lev"),
        (changed("${model", "${oc.env:HOME} ${model"), "reference .* to one in the same file"),
        (changed("${model.params.encoder", "${model.params.absent"), "reference .* the same file"),
        (changed("${model.params.encoder_config.params}", "{ch: 16}"), "equal to the encoder's"),
        (changed("model:", "network:"), "model must be given, got none"),
        (changed("model:", "model: 3\nrest:"), "model must be a mapping, got int"),
        ("- 1\n- 2\n", "the content must be a mapping, got list"),
        ("a: &x 1\nb: *x\n", "must have no YAML aliases"),
        ("a: [1\n", "must be YAML, got"),
        ("a: !!python/object/apply:os.system [x]\n", "must be YAML, got"),
    ],
)
def test_bad_files(tmp_path, text, message):
    path = tmp_path / "model.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        released_config(path)


def test_absent_and_huge_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="model.yaml' must be a file, got none"):
        vt.create_model(tmp_path / "model.yaml")
    (tmp_path / "model.yaml").write_bytes(b"#" * (1 << 20) + b"\n")
    with pytest.raises(ValueError, match="must be <= 1 MiB"):
        vt.create_model(tmp_path / "model.yaml")


def test_environment_is_never_read(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "8")
    path = tmp_path / "model.yaml"
    path.write_text(changed("ch: 8", "ch: ${oc.env:SECRET}"))
    with pytest.raises(ValueError, match=r"ch must be .*got '\$\{oc.env:SECRET\}'"):
        released_config(path)


def test_left_out_weights_are_those_of_the_release(tmp_path):
    path = tmp_path / "model.yaml"
    path.write_text(yaml_of({**FSQ_CFG, "reg_params": {"levels": [8] * 6}}))
    config = released_config(path)
    assert (config.entropy_weight, config.commitment_weight) == (0.0, 0.0)
    path.write_text(changed("0.1", "1e-1", FSQ_CFG))
    assert released_config(path).entropy_weight == 0.1


def test_checkpoint_by_its_yaml_file(build, tmp_path, clip):
    model = build(KL)
    (tmp_path / f"{KL}.yaml").write_text(yaml_of(CFG))
    torch.save({"state_dict": model.state_dict()}, tmp_path / f"{KL}.ckpt")
    loaded = vt.load_model(
        tmp_path / f"{KL}.ckpt", name=tmp_path / f"{KL}.yaml", trust_checkpoint=True
    )
    assert loaded.name == KL and not loaded.training
    video = clip(1, 5, 8, 8)
    with torch.no_grad():
        assert torch.equal(loaded(video).reconstruction, model(video).reconstruction)
    v1_1 = tmp_path / "other.yaml"
    v1_1.write_text(yaml_of({**CFG, "version": "1.1"}))
    with pytest.raises(ValueError, match="version 1.0 model for the checkpoint .*got other"):
        vt.load_model(tmp_path / f"{KL}.ckpt", name=v1_1, trust_checkpoint=True)


def training_checkpoint(model, compiled: bool) -> dict[str, torch.Tensor]:
    """What a training run of the release leaves: last weights, their averages, loss networks."""
    level = "_orig_mod." if compiled else ""
    raw = {k.replace(".", f".{level}", 1): v for k, v in model.state_dict().items()}
    averages = {f"model_ema.{k.replace('.', '')}": v + 1 for k, v in raw.items()}
    rest = {"model_ema.decay": torch.tensor(0.999), "model_ema.num_updates": torch.tensor(3)}
    return {**raw, **averages, **rest, "loss.logvar": torch.zeros(1)}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("ema", [False, True])
def test_moving_averages(fsq_model, tmp_path, compiled, ema):
    path = tmp_path / "last.safetensors"
    save_file(training_checkpoint(fsq_model, compiled), path)
    loaded = vt.load_model(path, name=FSQ, ema=ema, **SMALL)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, fsq_model.state_dict()[name] + ema), name


def test_averages_of_a_decoder_that_trained_alone(fsq_model, tmp_path):
    """Averages are of what trains: a frozen encoder has none, and keeps its weights."""
    state = training_checkpoint(fsq_model, False)
    save_file(
        {k: v for k, v in state.items() if not k.startswith("model_ema.encoder")},
        tmp_path / "a.safetensors",
    )
    loaded = vt.load_model(tmp_path / "a.safetensors", name=FSQ, ema=True, **SMALL)
    for name, value in loaded.state_dict().items():
        expected = fsq_model.state_dict()[name] + name.startswith("decoder.")
        assert torch.equal(value, expected), name


def test_averages_named_before_the_model_was_compiled(fsq_model, tmp_path):
    plain, compiled = (training_checkpoint(fsq_model, flag) for flag in (False, True))
    state = {k: v for k, v in compiled.items() if not k.startswith("model_ema.")}
    state |= {k: v for k, v in plain.items() if k.startswith("model_ema.")}
    save_file(state, tmp_path / "a.safetensors")
    loaded = vt.load_model(tmp_path / "a.safetensors", name=FSQ, ema=True, **SMALL)
    assert all(
        torch.equal(v, fsq_model.state_dict()[k] + 1) for k, v in loaded.state_dict().items()
    )


def test_incomplete_averages_and_ambiguous_names_are_refused(fsq_model, tmp_path):
    path = tmp_path / "last.safetensors"
    save_file(fsq_model.state_dict(), path)
    with pytest.raises(ValueError, match="must have a moving average for ema=True, got none for"):
        vt.load_model(path, name=FSQ, ema=True, **SMALL)
    state = training_checkpoint(fsq_model, True)
    del state["model_ema.encoder_orig_modconv_inconvweight"]
    save_file(state, path)
    with pytest.raises(ValueError, match=r"got none for 1 of .*_orig_mod.conv_in.conv.weight\)"):
        vt.load_model(path, name=FSQ, ema=True, **SMALL)
    save_file({**state, **{k: v.clone() for k, v in fsq_model.state_dict().items()}}, path)
    with pytest.raises(ValueError, match="must occur once, got it twice"):
        read_checkpoint(str(path))
    fsq_model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="ema must be False for a saved model, got True"):
        vt.load_model(tmp_path / "model", ema=True)


def test_weights_of_a_saved_model_know_their_version(build, tmp_path):
    """The names of the files say nothing here; the header of the weights does."""
    build(KL_1_1).save_pretrained(tmp_path)
    weights = os.path.join(tmp_path, "model.safetensors")
    assert vt.load_model(weights, name=KL_1_1, **SMALL).reference_version == "1.1"
    with pytest.raises(ValueError, match="name must be that of a version 1.1 model"):
        vt.load_model(weights, name=KL, **SMALL)


@pytest.mark.parametrize(
    ("stem", "version"),
    [
        (KL, "1.0"),
        (KL_1_1, "1.1"),
        (f"{KL}_ema", "1.0"),
        (f"{KL} (1)", "1.0"),
        (f"{KL}-last.step=100", "1.0"),
        (f"my.{KL.upper()}", "1.0"),
        (KL.replace("_", "-"), "1.0"),
        (f"{KL}_v1.1", "1.1"),
        (f"{KL}_v1-1_ema", "1.1"),
        (f"{KL_1_1} (1)", "1.1"),
        ("vidtok_v1.1", "1.1"),
        ("vidtok_v1_0", "1.0"),
        # These say nothing.
        ("last", None),
        ("model_v1 (1)", None),
        ("model_v1_12", None),
        ("conv1_1", None),
        (f"{KL}s", None),
        ("vidtok_kl_causal_488_5chn", None),
    ],
)
def test_version_in_the_name_of_a_file(stem, version):
    assert _version_in_name(stem) == version


def test_renamed_checkpoints_of_another_version_are_refused(build, tmp_path):
    weights = {name: value.contiguous() for name, value in build(KL).state_dict().items()}
    for stem, name, version in (
        (f"{KL}_ema", KL_1_1, "1.0"),
        (f"{KL} (1)", KL_1_1, "1.0"),
        (f"{KL}_v1.1", KL, "1.1"),
    ):
        path = tmp_path / f"{stem}.safetensors"
        save_file(weights, path)
        message = f"of a version {version} model for .*{name}, .*; a file .* must be renamed"
        with pytest.raises(ValueError, match=message):
            vt.load_model(path, name=name, **SMALL)
        assert vt.load_model(path, name=KL if version == "1.0" else KL_1_1, **SMALL)
