"""`vtok demo` in a few steps: its files exist, agree with each other, and replace no others."""

import json
import os
import shutil

import pytest
import torch

import vtok_ext as vt
from vtok_ext.cli.demo_clip import clip_from_video, default_clip
from vtok_ext.data.video import read_clip

FILES = {"reconstruction.mp4", "comparison.png", "metrics.json", "tokens.safetensors", "model"}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Returns the folder of one short demo."""
    from vtok_ext.cli.app import run

    folder = tmp_path_factory.mktemp("demo")
    assert run(["demo", "--steps", "3", "--out", str(folder / "out"), "--seed", "4"]) == 0
    assert [entry.name for entry in folder.iterdir()] == ["out"]
    return folder / "out"


def test_files(demo):
    assert {entry.name for entry in demo.iterdir()} == FILES
    assert {entry.name for entry in (demo / "model").iterdir()} == {
        "config.json",
        "model.safetensors",
    }


def test_metrics(demo):
    metrics = json.loads((demo / "metrics.json").read_text())
    assert 5 < metrics["psnr"] < 40 and -1 <= metrics["ssim"] <= 1
    assert metrics["training"]["steps"] == 3
    assert metrics["tokens"] == 5 * 12 * 16
    assert metrics["bits_per_pixel"] == pytest.approx(18 * 5 * 12 * 16 / (17 * 96 * 128), abs=1e-5)
    assert 1 <= metrics["codebook_usage"]["perplexity"] <= metrics["codebook_usage"]["num_used"]
    assert metrics["seconds"]["total"] > metrics["seconds"]["training"] > 0
    assert metrics["seed"] == 4
    assert metrics["versions"]["vtok_ext"] == vt.__version__


def test_token_file_decodes_to_the_reported_quality(demo):
    """What is on the disk is enough: model and tokens give the picture that was measured."""
    metrics = json.loads((demo / "metrics.json").read_text())
    model = vt.load_model(demo / "model")
    tokens = vt.Tokens.load(demo / "tokens.safetensors")
    assert tokens.fps == 12
    with torch.no_grad():
        video = model.detokenize(tokens)
    source = default_clip(4).frames[None].float() / 127.5 - 1
    assert vt.metrics.psnr(video, source).item() == pytest.approx(metrics["psnr"], abs=2e-3)


def test_video_shows_input_and_output(demo):
    frames, timestamps, info = read_clip(demo / "reconstruction.mp4")
    assert frames.shape == (3, 17, 192, 512)
    assert [float(t * info.time_base) for t in timestamps] == pytest.approx(
        [t / 12 for t in range(17)]
    )
    source = default_clip(4).frames.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert (frames[:, :, :, :256].float() - source.float()).abs().mean() < 4
    assert (frames[:, :, :, 256:].float() - source.float()).abs().mean() > 8


def test_comparison_shows_three_rows(demo):
    import av

    with av.open(str(demo / "comparison.png")) as container:
        picture = next(container.decode(video=0)).to_ndarray(format="rgb24")
    assert picture.shape == (12 + 3 * (192 + 4), 44 + 5 * (256 + 4), 3)
    first = default_clip(4).frames[:, 0].permute(1, 2, 0).numpy()
    assert (picture[12 : 12 + 192 : 2, 44 : 44 + 256 : 2] == first).all()


def test_previous_demo_is_replaced_and_reproduced(demo, vtok, tmp_path):
    out = tmp_path / "out"
    first = vtok("demo", "--steps", 2, "--out", out, "--json")
    assert first.code == 0, first.err
    (out / "model" / "model.safetensors").write_bytes(b"from before")
    second = vtok("demo", "--steps", 2, "--out", out, "--json")
    assert second.code == 0, second.err
    assert {entry.name for entry in out.iterdir()} == FILES
    assert list(tmp_path.iterdir()) == [out]
    if first.json["training"]["precision"] == second.json["training"]["precision"]:
        assert first.json["psnr"] == second.json["psnr"]


@pytest.mark.parametrize("name", ["notes.txt", "model/notes.txt"])
def test_a_previous_demo_with_foreign_files_stays(demo, vtok, tmp_path, name):
    out = tmp_path / "out"
    shutil.copytree(demo, out)
    (out / name).write_text("precious")
    before = sorted(out.rglob("*"))
    refused = vtok("demo", "--steps", 1, "--out", out)
    assert refused.code == 2 and f"got {out} with {name}" in refused.err
    assert sorted(out.rglob("*")) == before and (out / name).read_text() == "precious"


def test_own_video(vtok, make_video, tmp_path, monkeypatch):
    timestamps = [20 * t + t % 2 for t in range(30)]
    video = make_video("wide.mp4", 30, 200, 500, timestamps=timestamps)
    monkeypatch.chdir(tmp_path)
    result = vtok("demo", "--video", video, "--steps", 1, "--json")
    assert result.code == 0, result.err
    clip = result.json["clip"]
    assert (clip["frames"], clip["height"], clip["width"]) == (17, 96, 128)
    assert clip["description"] == (
        "first 17 frames of wide.mp4 (500x200), scaled to 240x96, centre cut, 17 frames of 128x96"
    )
    _, read, info = read_clip(tmp_path / "vtok-demo" / "reconstruction.mp4")
    assert [t * info.time_base * 600 for t in read] == timestamps[:17]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((96, 128), (96, 128)),
        ((256, 256), (96, 96)),
        ((31, 45), (24, 40)),
        ((400, 96), (128, 96)),
        ((1080, 1920), (96, 128)),
    ],
)
def test_clip_sizes(make_video, size, expected):
    clip = clip_from_video(make_video("any.mp4", 2, *size))
    assert tuple(clip.frames.shape) == (3, 2, *expected)
    assert clip.fps == pytest.approx(30)


def test_clip_too_small(vtok, make_video, tmp_path):
    video = make_video("small.mp4", 2, 6, 40)
    result = vtok("demo", "--video", video, "--out", tmp_path / "out", "--steps", 1)
    assert result.code == 2
    assert "video must be at least 8x8 pixels, got 40x6" in result.err
    assert list(tmp_path.iterdir()) == [video]


@pytest.mark.slow
def test_default_demo_reaches_its_promise(vtok, tmp_path):
    """The README's claim: under 150 seconds on two cores, PSNR of 26 dB or more."""
    result = vtok("demo", "--out", tmp_path / "out", "--json")
    assert result.code == 0, result.err
    assert result.json["psnr"] >= 26
    # Alone on the machine, as .ci/run has it; not beside another worker of pytest-xdist.
    if "PYTEST_XDIST_WORKER" not in os.environ:
        assert result.json["seconds"]["total"] < 150
