"""`vtok eval`: LPIPS, FVD and KVD on request, and generated videos against real ones."""

import pytest
import torch

import vtok_ext as vt
from vtok_ext.cli import eval_measures
from vtok_ext.data.procedural import procedural_clip
from vtok_ext.data.video import VideoReader, VideoWriter
from vtok_ext.metrics.lpips_network import random_lpips


@pytest.fixture
def folders(tmp_path):
    """{"real": folder, "same": folder, "other": folder} of 3 videos of 20 frames each."""
    made = {}
    noise = torch.Generator().manual_seed(0)
    for kind, first in (("real", 0), ("same", 10), ("other", 20)):
        made[kind] = tmp_path / kind
        made[kind].mkdir()
        for i in range(3):
            with VideoWriter(made[kind] / f"{i}.mp4", height=32, width=32, crf=4) as writer:
                clip = procedural_clip(20, 32, 32, seed=first + i)
                if kind == "other":
                    clip = torch.randint(256, clip.shape, generator=noise).to(torch.uint8)
                writer.write(clip)
    return made


class Corners(torch.nn.Module):
    """Stands for I3D, whose weights nobody ships."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, video):
        return torch.nn.functional.adaptive_avg_pool3d(video, (2, 2, 2)).flatten(1) * self.scale


def test_generated_against_real(vtok, folders, monkeypatch):
    trusted = []
    monkeypatch.setattr(
        eval_measures,
        "load_i3d",
        lambda path, trust_checkpoint: trusted.append(trust_checkpoint) or Corners(),
    )
    results = {}
    for kind in ("same", "other"):
        arguments = ["--generated", folders[kind], "--kvd", "--fvd-weights", "any.pt"]
        done = vtok("eval", folders["real"], *arguments, "--json", "--device", "cpu")
        assert done.code == 0, done.err
        results[kind] = done.json
    same, other = results["same"], results["other"]
    assert same["kvd"]["value"] < other["kvd"]["value"]
    assert same["kvd"]["num_real"] == same["fvd"]["num_generated"] == 3
    assert same["kvd"]["features"] == "random-conv3d-2"
    assert same["kvd"]["clip_sizes"] == [[16, 32, 32]]
    assert same["fvd"]["interval_over"] == "videos" and same["fvd"]["real_videos"] == 3
    assert same["real"]["videos"] == 3 and same["real"]["frequency"] > 0
    assert same["real"]["counts"] == {"dynamics": 3, "frequency": 3}
    low, high = same["real"]["intervals"]["frequency"]
    assert low < same["real"]["frequency"] < high
    assert other["generated"]["dynamics"] > 5 * other["real"]["dynamics"]
    assert trusted == [False, False]
    text = vtok("eval", folders["real"], "--generated", folders["same"], "--kvd")
    assert text.code == 0 and "KVD" in text.out and "3 and 3 clips of 16 frames" in text.out
    text = vtok("eval", folders["real"], "--generated", folders["same"], "--fvd-weights", "any.pt")
    assert "far too large with fewer than 401" in text.out


def test_measures_of_a_model(vtok, folders, model_folder, monkeypatch):
    network = random_lpips(0, (4, 8, 8, 8, 8))
    trusted = []
    monkeypatch.setattr(
        eval_measures,
        "published_lpips",
        lambda *files, trust_checkpoint: trusted.append(trust_checkpoint) or network,
    )
    monkeypatch.setattr(
        eval_measures,
        "load_i3d",
        lambda path, trust_checkpoint: trusted.append(trust_checkpoint) or Corners(),
    )
    arguments = ["--model", model_folder, "--max-frames", 17, "--device", "cpu", "--json"]
    done = vtok("eval", folders["real"], *arguments, "--kvd", "--lpips")
    assert done.code == 0, done.err
    with VideoReader(folders["real"] / "0.mp4") as reader:
        frames = torch.cat([chunk.frames for chunk in reader.chunks(32)], 1)
    video = frames[None, :, :17]
    assert done.json["videos"][0]["dynamics"] == pytest.approx(
        vt.metrics.video_dynamics(video).item(), abs=2e-6
    )
    model = vt.load_model(model_folder)
    with torch.no_grad():
        error = model(video).reconstruction.clamp(-1, 1) - (video / 127.5 - 1)
    assert done.json["videos"][0]["psnr_video"] == pytest.approx(
        -10 * (error / 2).square().mean().log10().item(), abs=0.02
    )
    assert done.json["videos"][0]["frequency"] == pytest.approx(
        vt.metrics.sobel_frequency(video).item(), abs=2e-4
    )
    assert 0 < done.json["lpips"] and done.json["kvd"]["num_generated"] == 3
    assert "fvd" not in done.json and trusted == [False]
    one = (folders["real"] / "0.mp4", *arguments, "--lpips", "--fvd-weights", "i3d.pt")
    assert vtok("eval", *one, "--trust-checkpoint").code == 0 and trusted == [False, True, True]
    plain = vtok("eval", folders["real"] / "0.mp4", *arguments)
    assert plain.json["lpips"] is None and "kvd" not in plain.json
    few = vtok("eval", folders["real"] / "0.mp4", *arguments, "--kvd")
    assert few.json["kvd"]["value"] is None and "needs 3 clips" in few.json["kvd"]["reason"]


def test_kvd_of_other_sizes_is_refused(vtok, folders, tmp_path):
    with VideoWriter(tmp_path / "small.mp4", height=16, width=24, crf=4) as writer:
        writer.write(procedural_clip(20, 16, 24, seed=0))
    arguments = [folders["real"], "--generated", tmp_path / "small.mp4", "--kvd"]
    refused = vtok("eval", *arguments)
    message = "must have the same sizes for --kvd, got 16x24 and 32x32; --size scales"
    assert refused.code == 2 and message in refused.err
    assert vtok("eval", *arguments, "--size", 16).code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of --model and --generated must be given, got neither"),
        (["--generated", "real", "--model", "x"], "got both"),
        (["--generated", "real"], "--fvd-weights or --kvd must be given"),
        (["--generated", "real", "--kvd", "--lpips"], "--lpips must be absent with --generated"),
        (["--generated", "real", "--kvd", "--protocol", "reference"], "--protocol must be absent"),
        (
            ["--generated", "real", "--kvd", "--name", "x", "--ema", "--seed", "42"],
            "--name, --ema, --seed must be absent with --generated",
        ),
        (["--generated", "real", "--kvd", "--chunks", "x"], "--chunks must be one of all, first"),
        (["--generated", "real", "--fvd-weights", "none.pt"], "i3d_pretrained_400.pt"),
    ],
)
def test_bad_input_is_one_line(vtok, folders, arguments, message):
    given = [folders["real"] if word == "real" else word for word in arguments]
    failed = vtok("eval", folders["real"], *given)
    assert failed.code == 2 and message in failed.err and failed.err.count("\n") <= 2
