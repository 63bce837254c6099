"""`vtok tokenize` on videos that are longer than a portion: the same bytes, in bounded memory."""

import json
import os
import resource
import subprocess
import sys

import pytest
import torch
from helpers import digests, write_video
from tiny_vtok import tiny as tiny_vtok

import vtok_ext as vt
from vtok_ext.data import tokenizing, video_portions
from vtok_ext.data.latent_shards import LatentDataset
from vtok_ext.data.tokenize_settings import TokenizeSettings
from vtok_ext.data.video_list import list_videos
from vtok_ext.data.video_portions import portions_of_videos

CPU = ("--device", "cpu")
FRAME_BYTES = 3 * 16 * 16


@pytest.fixture
def small_portions(monkeypatch):
    """Returns a function that makes portions so many frames of 16x16."""
    return lambda n: monkeypatch.setattr(video_portions, "PORTION_BYTES", n * FRAME_BYTES)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("num_frames", [None, 5])
def test_what_is_handed_over_is_bounded(num_frames, num_workers, small_portions, tmp_path):
    small_portions(64)
    for name, count in (("a", 2000), ("b", 33), ("c", 1100)):
        write_video(tmp_path / f"{name}.mp4", count, 16, 16)
    settings = TokenizeSettings("latent", num_frames)
    stamps, videos = {}, list_videos(tmp_path)
    sources = portions_of_videos(videos, settings, num_workers=num_workers)
    for video, portions in zip(videos, sources, strict=True):
        for portion in portions:
            storage = portion.clips.untyped_storage()
            assert portion.clips.nbytes == storage.nbytes() <= 64 * FRAME_BYTES
            assert portion.clips.shape[2] == 5 if num_frames else portion.clips.shape[0] == 1
            stamps[video.name] = stamps.get(video.name, []) + sum(portion.timestamps, [])
    counts = {name: len(found) for name, found in stamps.items()}
    assert counts == {"a.mp4": 2000, "b.mp4": 30 if num_frames else 33, "c.mp4": 1100}
    assert all(found == sorted(set(found)) for found in stamps.values())


def save_models(folder):
    tiny = {"ch": 8, "ch_mult": (1, 1, 1, 1), "num_res_blocks": 1}
    torch.manual_seed(0)
    vt.create_model("vidtok_kl_causal_488_4chn", **tiny).save_pretrained(folder / "grid")
    vt.create_model("vidtok_kl_noncausal_488_4chn", **tiny).save_pretrained(folder / "noncausal")
    tiny_vtok(levels=(4, 4, 4)).save_pretrained(folder / "sequence")


@pytest.mark.parametrize("model", ["grid", "noncausal", "sequence"])
@pytest.mark.parametrize("frames", [(), ("--frames", 5)])
def test_portions_do_not_change_a_byte(model, frames, vtok, small_portions, tmp_path):
    """Videos that are longer and shorter than a portion, one of them damaged in its middle."""
    save_models(tmp_path)
    (tmp_path / "videos").mkdir()
    for name, count in (("a", 9), ("b", 9), ("c", 90), ("e", 9), ("f", 70)):
        write_video(tmp_path / "videos" / f"{name}.mp4", count, 40, 48)
    write_video(tmp_path / "videos" / "d.mkv", 200, 40, 48)
    content = (tmp_path / "videos" / "d.mkv").read_bytes()
    (tmp_path / "videos" / "d.mkv").write_bytes(content[: len(content) * 2 // 3])
    call = ("tokenize", tmp_path / "videos")
    options = ("--size", 16, *frames, "--model", tmp_path / model, *CPU)
    assert vtok(*call, tmp_path / "whole", *options).code == 0
    small_portions(20)
    assert vtok(*call, tmp_path / "parts", *options).code == 0
    assert vtok(*call, tmp_path / "workers", *options, "--workers", 2).code == 0
    assert digests(tmp_path / "whole") == digests(tmp_path / "parts")
    assert digests(tmp_path / "whole") == digests(tmp_path / "workers")
    entries = LatentDataset(tmp_path / "parts").entries
    counts = [entry["num_frames"] for entry in entries if entry["video"] == "c.mp4"]
    assert counts == ([5] * 18 if frames else [90])


@pytest.mark.parametrize("num_frames", [None, 5])
def test_a_video_that_ends_early_leaves_nothing(num_frames, small_portions, tmp_path, monkeypatch):
    """Clips of the videos before it were encoded with its own: they are encoded once more."""
    for name, count in (("a", 7), ("b", 300), ("c", 8)):
        write_video(tmp_path / f"{name}.mp4", count, 16, 16)
    small_portions(20)
    run_through = video_portions.frames_in_order

    def cut(path, stamps, content):
        for number, frame in enumerate(run_through(path, stamps, content)):
            if path.name == "b.mp4" and number == 250:
                raise OSError("gone")
            yield frame

    monkeypatch.setattr(video_portions, "frames_in_order", cut)
    torch.manual_seed(0)
    tiny = {"ch": 8, "ch_mult": (1, 1, 1, 1), "num_res_blocks": 1}
    model = vt.create_model("vidtok_kl_causal_488_4chn", **tiny).eval()
    settings = TokenizeSettings("latent", num_frames, batch_size=4)
    results = []
    for names in ("abc", "ac"):
        work = tokenizing._ShardWork(model, settings)
        videos = [v for v in list_videos(tmp_path) if v.name[0] in names]
        for video, portions in zip(videos, portions_of_videos(videos, settings), strict=True):
            try:
                work.add(video, video.name[0], portions)
            except video_portions.UnreadableVideoError as error:
                assert str(error) == "gone" and video.name == "b.mp4"
        work.encode()
        results.append(work)
    assert results[0].entries == results[1].entries and len(results[0].entries) == 2
    assert set(results[0].tensors) == set(results[1].tensors) == {"a-00000", "c-00000"}
    for name, tensor in results[0].tensors.items():
        assert torch.equal(tensor, results[1].tensors[name])


def test_more_clips_than_file_descriptors(saved_models, tmp_path):
    write_video(tmp_path / "long.mp4", 1000, 16, 16)
    call = ["tokenize", tmp_path / "long.mp4", tmp_path / "out", "--frames", "2", "--workers", "1"]
    call += ["--batch-size", "16", "--model", saved_models["kl"], *CPU, "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "vtok_ext.cli", *map(str, call)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["items"] == 500
