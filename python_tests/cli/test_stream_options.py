"""`vtok encode`, `decode`, `stream`: options that do something or are refused, plans that are kept,
and ids of nothing that are never written."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import vtok_ext as vt
from vtok_ext.cli import encode as encode_module
from vtok_ext.models import planning
from vtok_ext.models.planning import MemoryPlan

pytestmark = pytest.mark.usefixtures("short_portions")
TINY = {"ch": 8, "ch_mult": (1, 1, 1, 1), "num_res_blocks": 1}
V1_1 = "vidtok_fsq_causal_488_32768_v1_1"
FSQ = "vidtok_fsq_causal_488_262144"


@pytest.fixture
def save_model(tmp_path):
    def save(name, folder="model", **overrides):
        torch.manual_seed(0)
        vt.create_model(name, **{**TINY, **overrides}).save_pretrained(tmp_path / folder)
        return tmp_path / folder

    return save


def refused(result, words) -> None:
    assert result.code == 2 and words in result.err, (result.code, result.err)


def test_streaming_of_a_file_is_what_it_was_encoded_with(vtok, make_video, save_model, tmp_path):
    model, video, mp4 = save_model(V1_1), make_video("in.mp4", 12), tmp_path / "out.mp4"
    files = {mode: tmp_path / mode for mode in ("exact", "reference")}
    for mode, file in files.items():
        options = ("--model", model, "--streaming", mode, "--json")
        result = vtok("stream", video, file, *options)
        assert result.code == 0 and result.json["streaming"] == mode, result.err
        for options in (("--streaming", mode), ()):
            result = vtok("stream", file, mp4, "--model", model, "--json", *options)
            assert result.code == 0 and result.json["streaming"] == mode, result.err
        assert vtok("decode", file, mp4, "--model", model, "--json").json["streaming"] == mode
    mp4.unlink()
    for mode, other in (("exact", "reference"), ("reference", "exact")):
        result = vtok("stream", files[mode], mp4, "--model", model, "--streaming", other)
        refused(result, f"decode: --streaming must be {mode}, as {files[mode]} was encoded, got")
    assert not mp4.exists()


def test_options_without_a_use_are_refused(vtok, make_video, save_model, tmp_path):
    model, video, tokens = save_model(V1_1), make_video("in.mp4", 5), tmp_path / "tokens"
    assert vtok("encode", video, tokens, "--model", model).code == 0
    before = sorted(tmp_path.rglob("*"))
    mp4 = tmp_path / "out.mp4"
    for source in (video, tokens):
        call = ("stream", source, mp4, "--model", model)
        refused(vtok(*call, "--streaming", "fast"), "--streaming must be one of exact, reference")
        refused(vtok(*call, "--output", "tokens"), "--output must come with a token or latent")
        refused(vtok(*call, "--output", "latent"), "got latent and the video")
        refused(vtok(*call, "--save-every", -1), "--save-every must be at least 0, got -1")
        refused(vtok(*call, "--save-every", "nan"), "--save-every must be at least 0, got nan")
    result = vtok("stream", video, mp4, "--model", model, "--streaming", "reference")
    refused(result, "--streaming reference must have a token or latent file on one side")
    assert sorted(tmp_path.rglob("*")) == before
    result = vtok("stream", video, mp4, "--model", model, "--streaming", "exact", "--json")
    assert result.code == 0 and result.json["frames"] == 5


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("vidtok_fsq_noncausal_488_262144", {}),
        (FSQ, {}),
        ("promag_base_4x8x8", {"z_channels": 4}),
    ],
)
@torch.no_grad()
def test_models_without_published_chunks(vtok, make_video, save_model, tmp_path, name, overrides):
    folder, video, out = save_model(name, **overrides), make_video("in.mp4", 5), tmp_path / "out"
    words = f"must be given a causal VidTok of version 1.1, got {name}"
    options = ("--model", folder, "--streaming", "reference")
    for command in ("encode", "stream"):
        refused(vtok(command, video, out, *options), f"encode: --streaming reference {words}")
    assert not out.exists()
    model = vt.load_model(folder)
    latent = torch.zeros(1, model.latent_channels, 2, 2, 2)
    chunked = vt.Encoding(latent, 5, (16, 16), frame_rule="reference", chunk_frames=16)
    chunked.save(out)
    refused(vtok("decode", out, tmp_path / "out.mp4", "--model", folder), words)
    with pytest.raises(ValueError, match="decode_published: model must be of version 1.1"):
        model.decode(chunked)


def test_nearest_interpolation_of_1_1_keeps_its_published_chunks(
    vtok, make_video, save_model, tmp_path
):
    folder = save_model(V1_1, interpolation="nearest")
    out = tmp_path / "out"
    options = ("--model", folder, "--streaming", "reference", "--json")
    result = vtok("encode", make_video("in.mp4", 12), out, *options)
    assert result.code == 0 and result.json["streaming"] == "reference", result.err
    result = vtok("decode", out, tmp_path / "out.mp4", "--model", folder, "--json")
    assert result.code == 0 and result.json["frames"] == 12, result.err


@pytest.mark.parametrize("name", ["out.mp4", "out.WEBM"])
def test_tokens_never_take_the_name_of_a_video(vtok, make_video, model_folder, tmp_path, name):
    result = vtok("encode", make_video("in.mp4", 5), tmp_path / name, "--model", model_folder)
    refused(result, "encode: output must end in no suffix of videos")
    refused(result, "`vtok reconstruct` writes a video")
    assert not (tmp_path / name).exists()


class Killed(BaseException):
    """An interruption at a place of our choice."""


@pytest.mark.parametrize(
    ("first", "later"),
    [
        (MemoryPlan(4, (16, 16), 1), MemoryPlan(8, None, 1)),
        (MemoryPlan(8, None, 1), MemoryPlan(4, (16, 16), 1)),
        (MemoryPlan(4, (16, 24), 1), None),
    ],
)
@pytest.mark.parametrize("again", [("--tile", "auto"), ("--memory", 1), ("--tile", "96"), ()])
def test_resumed_stream_keeps_its_plan(
    vtok, make_video, model_folder, tmp_path, monkeypatch, first, later, again
):
    """Memory is another one by then: what would be planned now must not matter."""
    video, out = make_video("in.mp4", 19, 40, 56), tmp_path / "out"
    call = ("stream", video, out, "--model", model_folder, "--resume", "--save-every", 0)
    append = encode_module._Job._append

    def append_or_die(job, portions):
        append(job, portions)
        if job.encoder.num_frames > 8:
            raise Killed

    def plan(*arguments, **options):
        if later is None:
            raise ValueError("plan: memory must be larger")
        return later

    monkeypatch.setattr(planning, "plan_stream", lambda *_, **__: first)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(encode_module._Job, "_append", append_or_die)
        vtok(*call, "--tile", "auto")
    monkeypatch.setattr(planning, "plan_stream", plan)
    result = vtok(*call, *again, "--json")
    assert result.code == 0 and result.json["resumed_at_frame"] == 8, result.err
    tile = None if first.tile is None else list(first.tile)
    assert (result.json["tile"], result.json["chunk_frames"]) == (tile, first.chunk_frames)
    assert ("predicted_peak_bytes" in result.json) == bool({"auto", 1} & {*again})
    assert ("--memory 1 is less than" in result.err) == ("--memory" in again)
    assert ("comes too late" in result.err) == ("96" in again)
    monkeypatch.setattr(planning, "plan_stream", lambda *_, **__: first)
    one_go = tmp_path / "one go"
    assert vtok("encode", video, one_go, "--model", model_folder, "--tile", "auto").code == 0
    assert out.read_bytes() == one_go.read_bytes()


def damage(folder, value: float) -> None:
    """Makes `value` of a channel of every latent of a saved model."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    (name,) = (name for name in weights if name.startswith("encoder.conv_out.") and "bias" in name)
    weights[name][0] = value
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(weights, path, metadata=metadata)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        (FSQ, {}),
        (V1_1, {}),
        (FSQ, {"regularizer": "lfq", "levels": (), "z_channels": 4}),
        (FSQ, {"regularizer": "vq", "levels": (), "z_channels": 4, "codebook_size": 16}),
    ],
)
def test_ids_of_nan_are_not_written(vtok, make_video, save_model, tmp_path, name, overrides, value):
    folder, video, out = save_model(name, **overrides), make_video("in.mp4", 5), tmp_path / "out"
    damage(folder, value)
    before = sorted(tmp_path.rglob("*"))
    result = vtok("encode", video, out, "--model", folder)
    refused(result, "must give finite latents, got NaN or infinity within")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("output", ["tokens", "latent"])
def test_whole_clips_of_nan_are_not_written(vtok, make_video, save_model, tmp_path, output):
    kind = "fsq_noncausal_488_262144" if output == "tokens" else "kl_noncausal_488_4chn"
    folder, video = save_model(f"vidtok_{kind}"), make_video("in.mp4", 8)
    damage(folder, float("nan"))
    result = vtok("encode", video, tmp_path / "out", "--model", folder, "--output", output)
    refused(result, "must give finite latents, got NaN or infinity within 8 frames")
    assert not (tmp_path / "out").exists()
