"""Configurations and the registry: a typo or a bad value is one clear error."""

import json

import pytest

import vtok_ext as vt
from vtok_ext.models import VidTok, VidTokConfig

FSQ = "vidtok_fsq_causal_488_262144"
KL = "vidtok_kl_causal_488_4chn"


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        (FSQ, {"chh": 16}, r"field must be one of .*, got 'chh'; did you mean 'ch'\?"),
        (FSQ, {"level": [8, 8]}, r"got 'level'; did you mean 'levels'\?"),
        (FSQ, {"levels": (1, 8)}, r"levels must be a non-empty sequence of integers in 2\.\.256"),
        (FSQ, {"levels": ()}, r"levels must be a non-empty sequence of integers .*, got \(\)"),
        (FSQ, {"levels": (8, 8.0)}, r"levels must be .*, got \(8, 8.0\)"),
        (FSQ, {"levels": 8}, "levels must be .*, got 8"),
        (FSQ, {"z_channels": 4}, "z_channels must be 6, the number of levels, got 4"),
        (FSQ, {"regularizer": "fsqq"}, r"regularizer must be .*, got 'fsqq'; did you mean 'fsq'\?"),
        (FSQ, {"entropy_weight": float("nan")}, "entropy_weight must be a number >= 0.0, got nan"),
        (FSQ, {"commitment_weight": -1}, "commitment_weight must be a number >= 0.0, got -1"),
        (FSQ, {"entropy_annealing_steps": 1.5}, "entropy_annealing_steps must be an integer >= 0"),
        (KL, {"levels": (8,)}, r"levels must be empty for kl, got \(8,\)"),
        (
            KL,
            {"regularizer": "lfq", "z_channels": 31},
            r"z_channels must be in 1\.\.20 for lfq, got",
        ),
        (KL, {"regularizer": "lfq", "levels": (2,)}, r"levels must be empty for lfq, got \(2,\)"),
        (KL, {"regularizer": "vq"}, "codebook_size must be an integer >= 1, got None"),
        (KL, {"codebook_size": 8}, "codebook_size must be None for kl, got 8"),
        (KL, {"codebook": "mean"}, "codebook must be one of 'gradient', 'ema', got 'mean'"),
        (KL, {"restart_dead": 1.5}, "restart_dead must be one of True, False, got 1.5"),
        (KL, {"z_channels": None}, "z_channels must be an integer >= 1, got None"),
        (KL, {"ch": 0}, "ch must be an integer >= 1, got 0"),
        (KL, {"ch": "16"}, "ch must be an integer >= 1, got '16'"),
        (KL, {"num_res_blocks": True}, "num_res_blocks must be an integer >= 1, got True"),
        (KL, {"ch_mult": ()}, r"ch_mult must be a non-empty sequence of integers .*, got \(\)"),
        (KL, {"ch_mult": (1, -2)}, r"ch_mult must be .*, got \(1, -2\)"),
        (KL, {"norm_type": "batchnorm"}, "norm_type must be one of 'layernorm', 'groupnorm'"),
        (KL, {"norm_type": "groupnorm", "ch": 16}, "channels must be a multiple of 32 .*, got 16"),
        (KL, {"spatial_ds": (0, 7)}, r"spatial_ds must be .* integers in 0\.\.3, got \(0, 7\)"),
        (KL, {"spatial_ds": (0,)}, "spatial_us must be as many levels as spatial_ds .*, got None"),
        (KL, {"tempo_ds": (1, 3)}, r"tempo_ds must be among spatial_ds \(0, 1, 2\), got \(1, 3\)"),
        (KL, {"causal": "no"}, "causal must be one of True, False, got 'no'"),
        (KL, {"version": "1.2"}, "version must be one of '1.0', '1.1', got '1.2'"),
        (KL, {"version": "1.1", "causal": False}, "version must be one of '1.0', got '1.1'"),
        (KL, {"interpolation": "linear"}, "interpolation must be one of 'nearest', got 'linear'"),
        (KL, {"tempo_us": (0, 1)}, r"tempo_us must be among spatial_us \(1, 2, 3\), got \(0, 1\)"),
    ],
)
def test_rejected_overrides(name, fields, message):
    with pytest.raises(ValueError, match=message):
        vt.create_model(name, **fields)


def test_config_round_trips_through_json():
    for config in VidTok.presets.values():
        assert VidTokConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_config_of_another_class_is_refused():
    with pytest.raises(TypeError, match="VidTok: config must be VidTokConfig, got dict"):
        VidTok({"regularizer": "kl"})


def test_unknown_model_names_what_exists():
    with pytest.raises(
        ValueError, match=r"vidtok_kl_noncausal_488_4chn.*got 'vidtok_kl_noncausal_288"
    ):
        vt.create_model("vidtok_kl_noncausal_288_8chn")
    with pytest.raises(ValueError, match=r"did you mean 'vidtok_kl_causal_488_4chn'\?"):
        vt.create_model("vidtok_kl_causal_488_4ch")


def test_initialisation():
    """Temporal blocks start as the identity, blends at 2, norms at one and zero."""
    model = vt.create_model(KL, ch=8, num_res_blocks=1)
    state = model.state_dict()
    for name, value in state.items():
        if "temporal" in name and "block" in name and ".conv2." in name:
            assert not value.any(), name
        elif name.endswith("mix_factor"):
            assert value.tolist() == [2.0], name
        elif "norm" in name:
            assert (value == float(name.endswith("weight"))).all(), name
        else:
            assert value.std() > 0, name


def test_model_id_covers_the_configuration():
    a, b = (vt.create_model(FSQ, ch=ch, num_res_blocks=1) for ch in (8, 8))
    c = vt.create_model(FSQ, ch=16, num_res_blocks=1)
    of_a, of_b, of_c = (model.model_id.partition("+")[0] for model in (a, b, c))
    assert of_a == of_b != of_c
    assert a.model_id.startswith(FSQ + "@")
    assert repr(a).startswith(f"VidTok(\n  {FSQ}: ")
