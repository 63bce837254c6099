"""`vtok reconstruct`: every frame comes out, at its time, at its size, as from the whole clip."""

import math
from fractions import Fraction

import pytest
import torch

import vtok_ext as vt
from vtok_ext.cli import reconstruct as reconstruct_module
from vtok_ext.data.video import read_clip


@pytest.mark.parametrize("num_frames", [1, 2, 5, 8, 30])
@pytest.mark.parametrize("size", [(32, 40), (37, 43)])
def test_all_frames_at_their_size(vtok, make_video, model_folder, tmp_path, num_frames, size):
    video = make_video("in.mp4", num_frames, *size)
    out = tmp_path / "out.mp4"
    result = vtok("reconstruct", video, "--model", model_folder, "-o", out, "--json")
    assert result.code == 0, result.err
    frames, timestamps, info = read_clip(out)
    source, source_timestamps, source_info = read_clip(video)
    assert frames.shape == source.shape == (3, num_frames, *size)
    assert [t * info.time_base for t in timestamps] == [
        t * source_info.time_base for t in source_timestamps
    ]
    assert result.json["frames"] == num_frames


@pytest.mark.parametrize("kind", ["fsq", "kl"])
def test_quality_is_that_of_the_whole_clip(
    vtok, make_video, saved_models, tmp_path, monkeypatch, kind
):
    """Streamed in chunks of four frames, whose borders must leave no trace."""
    monkeypatch.setattr(reconstruct_module, "_FEATURE_MAP_BYTES", 1)
    video = make_video("in.mp4", 21, 37, 43)
    result = vtok(
        "reconstruct", video, "--model", saved_models[kind], "-o", tmp_path / "out.mp4", "--json"
    )
    assert result.code == 0, result.err
    model = vt.load_model(saved_models[kind])
    source = read_clip(video)[0][None]
    with torch.no_grad():
        encoding = model.encode(source)
        whole = model.decode(encoding)
    target = source.float() / 127.5 - 1
    assert result.json["psnr"] == pytest.approx(vt.metrics.psnr(whole, target).item(), abs=2e-3)
    assert result.json["ssim"] == pytest.approx(vt.metrics.ssim(whole, target).item(), abs=2e-4)
    pixels = 21 * 37 * 43
    if kind == "kl":
        assert result.json["latent_values"] == encoding.latent.numel()
        assert "tokens" not in result.json
        return
    num_tokens = math.prod(model.token_grid(21, 37, 43))
    assert result.json["tokens"] == num_tokens == 6 * 5 * 6
    assert result.json["bits_per_pixel"] == pytest.approx(18 * num_tokens / pixels, abs=1e-6)
    usage = vt.metrics.codebook_usage(encoding.indices, model.codebook_size)
    assert result.json["codebook_usage"]["num_used"] == usage.num_used


def test_output_shows_the_model_s_picture(vtok, make_video, model_folder, tmp_path):
    video = make_video("in.mp4", 5, 37, 43)  # an odd size: colour at full resolution
    out = tmp_path / "out.mp4"
    assert vtok("reconstruct", video, "--model", model_folder, "-o", out).code == 0
    model = vt.load_model(model_folder)
    with torch.no_grad():
        expected = model.decode(model.encode(read_clip(video)[0][None]), output="uint8")[0]
    difference = (read_clip(out)[0].float() - expected.float()).abs().mean()
    assert difference < 8  # H.264 on a busy, untrained picture
    assert difference < (expected.float() - read_clip(video)[0].float()).abs().mean() / 2


@pytest.mark.slow
def test_the_real_clip(vtok, parity_dir, tmp_path):
    """All 136 frames at 256x256, streamed by a model that looks ahead."""
    path = parity_dir.parent / "data" / "example.mp4"
    if not path.is_file():
        pytest.skip(f"no clip at {path}")
    torch.manual_seed(0)
    model = vt.create_model("vidtok_kl_causal_488_4chn_v1_1", ch=8, num_res_blocks=1)
    model.save_pretrained(tmp_path / "model")
    out = tmp_path / "out.mp4"
    result = vtok("reconstruct", path, "--model", tmp_path / "model", "-o", out, "--json")
    assert result.code == 0 and result.json["frames"] == 136, result.err
    frames, timestamps, info = read_clip(out)
    _, expected, source = read_clip(path)
    assert frames.shape == (3, 136, 256, 256)
    assert [t * info.time_base for t in timestamps] == [t * source.time_base for t in expected]


def test_variable_frame_rate(vtok, make_video, model_folder, tmp_path):
    timestamps = [0, 20, 25, 100, 103, 400, 401, 700]
    video = make_video("in.mp4", 8, timestamps=timestamps)
    out = tmp_path / "out.mp4"
    assert vtok("reconstruct", video, "--model", model_folder, "-o", out).code == 0
    _, read, info = read_clip(out)
    assert [t * info.time_base for t in read] == [Fraction(t, 600) for t in timestamps]


def test_side_by_side_has_the_input_on_the_left(vtok, make_video, model_folder, tmp_path):
    video = make_video("in.mp4", 3)
    out = tmp_path / "pair.mp4"
    options = ("--model", model_folder, "-o", out, "--side-by-side")
    assert vtok("reconstruct", video, *options).code == 0
    pair, source = read_clip(out)[0], read_clip(video)[0]
    assert pair.shape == (3, 3, 32, 80)
    left, right = pair.float().split(40, dim=3)
    assert (left - source.float()).abs().mean() < 8
    assert (right - source.float()).abs().mean() > 16


def test_max_frames(vtok, make_video, model_folder, tmp_path):
    video = make_video("in.mp4", 12)
    out = tmp_path / "out.mp4"
    options = ("--model", model_folder, "-o", out, "--max-frames", 7, "--json")
    assert vtok("reconstruct", video, *options).json["frames"] == 7
    assert read_clip(out)[0].shape[1] == 7


def test_frames_too_small_for_ssim(vtok, make_video, model_folder, tmp_path):
    video = make_video("in.mp4", 3, 8, 8)
    result = vtok(
        "reconstruct", video, "--model", model_folder, "-o", tmp_path / "out.mp4", "--json"
    )
    assert result.json["ssim"] is None
    assert math.isfinite(result.json["psnr"])


def test_default_output_and_plain_summary(vtok, make_video, model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = vtok("reconstruct", make_video("walk.mp4"), "--model", model_folder)
    assert result.code == 0
    assert (tmp_path / "walk.vtok.mp4").is_file()
    assert "PSNR" in result.out and "bits per pixel" in result.out
    assert "wrote walk.vtok.mp4" in result.out
    assert "reconstructing" in result.err


def test_preset_name_gives_random_weights_and_says_so(
    vtok, make_video, tmp_path, monkeypatch, saved_models
):
    original = vt.create_model
    monkeypatch.setattr(vt, "create_model", lambda name: original(name, ch=8, ch_mult=(1, 1, 1, 1)))
    name = "vidtok_fsq_causal_488_4096"
    options = ("--model", name, "-o", tmp_path / "out.mp4", "--json")
    result = vtok("reconstruct", make_video(), *options)
    assert result.code == 0
    assert result.json["random_weights"] is True
    assert "weights are random" in result.err
