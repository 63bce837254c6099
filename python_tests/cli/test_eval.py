"""`vtok eval`: what it says is what the library computes, under the protocol that it names."""

import pytest
import torch
from tiny_vtok import tiny_fsq

import vtok_ext as vt
from vtok_ext.cli import reconstruct as reconstruct_module
from vtok_ext.cli.eval_frames import frames_of
from vtok_ext.cli.eval_means import means_of, spread_of
from vtok_ext.cli.evaluate import EvalOptions
from vtok_ext.data.video import VideoReader, read_clip
from vtok_ext.models.vidtok_published import decode_published, encode_published

TINY = {"ch": 8, "ch_mult": (1, 1, 1, 1), "num_res_blocks": 1}


@pytest.fixture
def make_model(tmp_path):
    def make(name):
        torch.manual_seed(0)
        vt.create_model(name, **TINY).save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


def source_of(video) -> torch.Tensor:
    return read_clip(video)[0][None]


def check(row, decoded, source) -> None:
    target = source.float() / 127.5 - 1
    assert row["frames"] == source.shape[2]
    assert row["psnr"] == pytest.approx(vt.metrics.psnr(decoded, target).item(), abs=2e-3)
    assert row["ssim"] == pytest.approx(vt.metrics.ssim(decoded, target).item(), abs=2e-4)
    if source.shape[2] > 17:
        jump = vt.metrics.boundary_jump(
            decoded, target, chunk_frames=16, first_chunk_frames=1
        ).item()
        assert row["boundary_jump"] == pytest.approx(jump, abs=2e-3)


@pytest.mark.parametrize("kind", ["fsq", "kl"])
@torch.no_grad()
def test_default_is_the_whole_video_and_the_mode(vtok, make_video, saved_models, monkeypatch, kind):
    monkeypatch.setattr(reconstruct_module, "_FEATURE_MAP_BYTES", 1)
    videos = [make_video("a.mp4", 21, 37, 43), make_video("b.mp4", 6, 32, 32)]
    result = vtok("eval", *videos, "--model", saved_models[kind], "--json")
    assert result.code == 0, result.err
    model, report = vt.load_model(saved_models[kind]), result.json
    ids = []
    for video, row in zip(videos, report["videos"], strict=True):
        out = model(source_of(video))
        check(row, out.reconstruction, source_of(video))
        ids.append(out.encoding.indices)
    assert report["psnr"] == pytest.approx(sum(r["psnr"] for r in report["videos"]) / 2, abs=2e-3)
    assert report["frames"] == 27 and report["averaged_over"] == "videos"
    named = [report[n] for n in ("protocol", "latents", "frame_rule", "passes", "seed")]
    latents = "codes" if kind == "fsq" else "mode"
    assert named == ["default", latents, "preserve", "exact stream", None]
    if kind == "kl":
        assert report["codebook_usage"] is None
        return
    usage = vt.metrics.codebook_usage(torch.cat([i.flatten() for i in ids]), model.codebook_size)
    assert report["codebook_usage"]["num_used"] == usage.num_used
    assert report["codebook_usage"]["num_tokens"] == usage.num_tokens


@torch.no_grad()
def test_reference_samples_and_takes_published_chunks(vtok, make_video, make_model):
    folder = make_model("vidtok_kl_causal_488_4chn_v1_1")
    video, short = make_video("a.mp4", 40, 35, 32), make_video("b.mp4", 16)
    options = ("--model", folder, "--protocol", "reference", "--json")
    result = vtok("eval", video, short, *options)
    assert result.code == 0 and "b.mp4 is too short for this protocol" in result.err
    model, source = vt.load_model(folder), source_of(video)[:, :, :33, :32]
    generator = torch.Generator().manual_seed(42)
    encoding = encode_published(model, source, sample=True, generator=generator)
    check(result.json["videos"][0], decode_published(model, encoding), source)
    named = [result.json[n] for n in ("latents", "frame_rule", "passes", "averaged_over", "seed")]
    chunks = "overlapping chunks of 16 frames"
    assert named == ["sample", "reference", chunks, "clips", 42]
    mode = decode_published(model, encode_published(model, source))
    assert vt.metrics.psnr(mode, source.float() / 127.5 - 1) != result.json["psnr"]
    other = vtok("eval", video, *options, "--seed", 7).json
    assert other["psnr"] != result.json["psnr"] and other["seed"] == 7


@pytest.mark.parametrize(
    ("name", "clip_frames"),
    [("vidtok_kl_causal_488_4chn", 17), ("vidtok_fsq_noncausal_488_262144", 16)],
)
@torch.no_grad()
def test_reference_of_1_0_takes_clips(vtok, make_video, make_model, name, clip_frames):
    folder, video = make_model(name), make_video("a.mp4", 20)
    result = vtok("eval", video, "--model", folder, "--protocol", "reference", "--json")
    assert result.code == 0, result.err
    assert result.json["passes"] == f"clips of {clip_frames} frames"
    model, source = vt.load_model(folder), source_of(video)
    generator, values = torch.Generator().manual_seed(42), []
    missing = 2 * clip_frames - 20
    source = torch.cat([source, source[:, :, -1:].expand(-1, -1, missing, -1, -1)], dim=2)
    for clip in source.split(clip_frames, dim=2):
        encoding = model.encode(clip, frames="reference", sample=True, generator=generator)
        target = clip.float() / 127.5 - 1
        values.append(vt.metrics.psnr(model.decode(encoding), target).item())
    assert result.json["psnr"] == pytest.approx(sum(values) / 2, abs=2e-3)
    assert result.json["frames"] == 2 * clip_frames
    # Each clip is coded whole, and two clips of one video are one sample.
    assert result.json["boundary_jump"] is None and result.json["counts"]["psnr"] == 1
    assert result.json["intervals"]["psnr"] is None


@pytest.mark.parametrize(
    ("fps", "interval"), [(60, 2), (50, 2), (40, 1), (30, 1), (24, 1), (12, 1), (100, 3)]
)
@torch.no_grad()
def test_reference_reads_at_the_published_rate(vtok, make_video, make_model, fps, interval):
    """Every round(fps / 30)-th frame, across the portions in which a video is read."""
    folder = make_model("vidtok_fsq_causal_488_262144")
    stamps = [t * 600 // fps for t in range(70)]
    video = make_video("a.mp4", 70, 16, 16, timestamps=stamps)
    options = ("--model", folder, "--protocol", "reference", "--max-frames", 34, "--json")
    result = vtok("eval", video, *options)
    assert result.code == 0, result.err
    assert result.json["videos"][0]["interval"] == interval and result.json["sample_fps"] == 30
    source, model = source_of(video)[:, :, ::interval][:, :, :34], vt.load_model(folder)
    missing = -source.shape[2] % 17
    source = torch.cat([source, source[:, :, -1:].expand(-1, -1, missing, -1, -1)], dim=2)
    values = [
        vt.metrics.psnr(model(clip, frames="reference").reconstruction, clip / 127.5 - 1).item()
        for clip in source.split(17, dim=2)
    ]
    assert result.json["psnr"] == pytest.approx(sum(values) / len(values), abs=2e-3)
    if fps == 60:
        result = vtok("eval", video, "--model", folder, "--json").json
        assert result["frames"] == 70 and result["sample_fps"] is None
        assert result["videos"][0]["interval"] == 1


def test_reference_does_not_round_what_it_resizes(make_video):
    video, found = make_video("a.mp4", 5, 40, 64), {}
    for protocol in ("default", "reference"):
        options = EvalOptions([video], "", protocol=protocol, size=16)
        with VideoReader(video) as reader:
            found[protocol] = torch.cat(list(frames_of(reader, options, 2)), dim=2)
    images = source_of(video)[0].transpose(0, 1).float() / 255
    resized = torch.nn.functional.interpolate(images, (16, 26), mode="bilinear", antialias=True)
    expected = ((resized[..., 5:21] - 0.5) / 0.5).transpose(0, 1)[None]
    assert torch.allclose(found["reference"], expected, atol=1e-6)
    rounded = found["default"]
    assert rounded.dtype == torch.uint8
    assert not torch.allclose(rounded / 127.5 - 1, expected, atol=1e-4)
    assert torch.allclose(rounded / 127.5 - 1, expected, atol=1.001 / 255)


@torch.no_grad()
def test_reference_measures_what_it_does_not_round(vtok, make_video, make_model):
    folder = make_model("vidtok_fsq_causal_488_262144")
    video = make_video("a.mp4", 17, 24, 40)
    options = ("--model", folder, "--protocol", "reference", "--size", 16, "--json")
    result = vtok("eval", video, *options)
    assert result.code == 0, result.err
    with VideoReader(video) as reader:
        wanted = EvalOptions([video], "", protocol="reference", size=16)
        source = torch.cat(list(frames_of(reader, wanted, 17)), dim=2)
    decoded = vt.load_model(folder)(source, frames="reference").reconstruction
    assert result.json["psnr"] == pytest.approx(vt.metrics.psnr(decoded, source).item(), abs=2e-3)
    frequency = vt.metrics.sobel_frequency(source).item()
    assert result.json["frequency"] == pytest.approx(frequency, abs=1e-4)


@torch.no_grad()
def test_models_without_causality_take_whole_clips(vtok, make_video, make_model):
    folder, video = make_model("vidtok_fsq_noncausal_488_262144"), make_video("a.mp4", 7)
    result = vtok("eval", video, "--model", folder, "--json")
    assert result.code == 0 and result.json["passes"] == "whole clip"
    source = source_of(video)
    check(result.json["videos"][0], vt.load_model(folder)(source).reconstruction, source)
    assert result.json["boundary_jump"] is None


def test_size_and_folders_and_frames(vtok, make_video, model_folder, tmp_path):
    make_video("a.mp4", 9, 40, 64)
    make_video("b.mp4", 5, 24, 24)
    options = ("--model", model_folder, "--size", 32, "--max-frames", 6)
    result = vtok("eval", tmp_path, *options, "--json")
    assert result.code == 0, result.err
    assert [row["frames"] for row in result.json["videos"]] == [6, 5]
    assert result.json["size"] == 32 and result.json["codebook_usage"]["num_tokens"] == 5 * 16
    out = vtok("eval", tmp_path / "a.mp4", *options).out
    assert "mean over videos: PSNR" in out and "codes used, perplexity" in out
    assert "protocol default: codes, exact stream, frames preserve" in out


def test_intervals_over_videos(vtok, make_video, model_folder):
    """Student's over three videos, of which one is too small for SSIM, and none over one video."""
    videos = [make_video(f"{i}.mp4", 5, 8 if i == 2 else 32, 32) for i in range(3)]
    report = vtok("eval", *videos, "--model", model_folder, "--json").json
    assert report["counts"]["psnr"] == 3 and report["counts"]["ssim"] == 2
    assert report["counts"]["lpips"] == 0 and report["intervals"]["lpips"] is None
    values = torch.tensor([row["psnr"] for row in report["videos"]])
    half = 4.303 * values.std().item() / 3**0.5
    low, high = report["intervals"]["psnr"]
    assert (low + high) / 2 == pytest.approx(report["psnr"], abs=2e-3)
    assert (high - low) / 2 == pytest.approx(half, abs=4e-3)
    out = vtok("eval", *videos, "--model", model_folder).out
    assert f"95 % over videos: PSNR {low:.2f} to {high:.2f} (n=3), SSIM " in out
    one = vtok("eval", videos[0], "--model", model_folder)
    assert "95 % over videos: PSNR n/a (n=1), SSIM n/a (n=1)" in one.out


def test_clips_of_one_video_are_one_sample():
    """Two videos with two clips and one: Student's over both, about the mean over clips."""
    videos = [[{"psnr": 20.0}, {"psnr": 22.0}], [{"psnr": 27.0}], [{"psnr": None}]]
    results = [result for of_video in videos for result in of_video]
    assert means_of(results, {"psnr": 3}) == {"psnr": 23.0}
    found = spread_of(videos, {"psnr": 3})
    assert found["counts"] == {"psnr": 2}
    # 42 - 2 * 23 and 27 - 23, by 3 / 2 clips per video: 23 -+ 8 / 3.
    half = 12.706 * (2**0.5 * 8 / 3) / 2**0.5
    assert found["intervals"]["psnr"] == pytest.approx([23 - half, 23 + half], abs=1e-3)


def test_refusals(vtok, make_video, model_folder, tmp_path):
    video = make_video("a.mp4", 5)
    (tmp_path / "empty").mkdir()
    for arguments, words in (
        ((video, "--model", model_folder, "--protocol", "paper"), "--protocol must be one of"),
        ((tmp_path / "empty", "--model", model_folder), "a folder must hold videos, got none"),
        ((tmp_path / "absent.mp4", "--model", model_folder), "must be an existing file"),
        ((video, "--model", tmp_path / "empty"), "config.json"),
        (
            (video, "--model", "x", "--lpips-heads", "y", "--lpips-backbone", "z"),
            "eval: --lpips-backbone, --lpips-heads must be absent without --lpips",
        ),
        ((video, "--model", "x", "--seed", 1), "--seed must be absent without --protocol ref"),
        ((video, "--model", "x", "--chunks", "all"), "--chunks must be absent without --fvd-weigh"),
    ):
        result = vtok("eval", *arguments)
        assert result.code == 2 and words in result.err, result.err


def test_vtok_is_told_the_frame_rate(vtok, make_video, tmp_path):
    """Which decides how many tokens it makes: 12 frames at 10 per second are 1.2 seconds."""
    model = tiny_fsq()
    model.save_pretrained(tmp_path / "model")
    video = make_video("slow.mp4", num_frames=12, timestamps=[60 * t for t in range(12)])
    report = vtok("eval", video, "--model", tmp_path / "model", "--json").json
    with torch.no_grad():
        ids = model.tokenize(source_of(video), fps=float(read_clip(video)[2].fps)).ids
        assert ids.shape[1] > model.tokenize(source_of(video)).ids.shape[1]
    assert report["codebook_usage"]["num_tokens"] == ids.numel()


def test_coordtok_takes_windows_of_its_length(vtok, make_video, tmp_path):
    """A video longer than the model's clips is measured to its last frame."""
    sizes = {"video_shape": (4, 32, 40), "enc_patch_size": (4, 8, 8), "dec_patch_size": (1, 8, 8)}
    sizes |= {"latent_resolution": (4, 4, 5), "latent_patch_size": (2, 4, 5)}
    thin = {"enc_num_layers": 1, "enc_patch_num_layers": 1, "dec_num_layers": 1}
    model = vt.create_model("coordtok_small_128", **sizes, **thin).eval()
    model.save_pretrained(tmp_path / "model")
    video = make_video(num_frames=10)
    arguments = ["--model", tmp_path / "model", "--device", "cpu", "--json"]
    found = vtok("eval", video, *arguments)
    assert found.code == 0, found.err
    assert found.json["frames"] == 10 and found.json["passes"] == "windows of 4 frames"
    source = source_of(video)
    with torch.no_grad():
        decoded = torch.cat([model(part).reconstruction for part in source.split(4, 2)], 2)
    target = source / 127.5 - 1
    expected = vt.metrics.psnr(decoded, target).item()
    assert found.json["psnr"] == pytest.approx(expected, abs=2e-3)
    jump = vt.metrics.boundary_jump(decoded, target, 4).item()
    assert found.json["boundary_jump"] == pytest.approx(jump, abs=2e-3)
    with torch.no_grad():
        parts = source.split(4, 2)
        sliced = torch.cat([model(part, num_slices=3).reconstruction for part in parts], 2)
    found = vtok("eval", video, *arguments, "--slices", 3).json
    assert found["psnr"] == pytest.approx(vt.metrics.psnr(sliced, target).item(), abs=2e-3)
    assert found["passes"] == "windows of 4 frames, decoded in 3 slices"
    assert found["psnr"] != pytest.approx(expected, abs=2e-3)
    one_window = vtok("eval", video, *arguments, "--max-frames", 4).json
    assert one_window["boundary_jump"] is None and one_window["counts"]["boundary_jump"] == 0
    refused = vtok("eval", video, "--model", "vtok_small", "--slices", 3)
    assert refused.code == 2 and "--slices must be given for a CoordTok, got vtok_sm" in refused.err
    wide = vtok("eval", make_video("wide.mp4", width=48), *arguments)
    assert wide.code == 2 and "wide.mp4 must be at most 32x40 for coordtok_small_128" in wide.err
