"""`--tile` and `--memory`, and memory that does not grow with the length of a video."""

import json
import subprocess
import sys

import pytest
import torch

import vtok_ext as vt
from vtok_ext.cli.memory_plan import parse_bytes, parse_tile
from vtok_ext.data.procedural import procedural_clip
from vtok_ext.data.video import VideoWriter

MEASURED = """
import json, sys
from vtok_ext.cli.app import run
code = run(sys.argv[1:])
with open("/proc/self/status") as file:
    peak = next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
print(json.dumps({"code": code, "peak_kb": peak}), file=sys.stderr)
"""


def test_tiles_on_the_command_line(vtok, make_video, model_folder, written, tmp_path):
    video, ids, tiled = make_video("in.mp4", 9, 40, 56), tmp_path / "ids", tmp_path / "tiled"
    options = ("--model", model_folder)
    assert vtok("encode", video, ids, *options).code == 0
    result = vtok("encode", video, tiled, *options, "--tile", "24x32", "--json")
    assert result.code == 0 and result.json["tile"] == [24, 32], result.err
    assert torch.equal(vt.Tokens.load(tiled).ids, vt.Tokens.load(ids).ids)
    found = []
    for extra in ((), ("--tile", "16")):
        written.clear()
        assert vtok("decode", ids, tmp_path / "out.mp4", *options, *extra).code == 0
        found.append(torch.cat(written, dim=2).float())
    assert (found[0] - found[1]).abs().max() <= 1  # next to a rounding boundary: a grey level
    result = vtok("stream", video, tmp_path / "b.mp4", *options, "--tile", "16", "--json")
    assert result.code == 0 and result.json["tile"] == [16, 16] and result.json["frames"] == 9


def test_memory_limit_is_planned_and_said(vtok, make_video, model_folder, tmp_path):
    video, out = make_video("in.mp4", 9, 64, 80), tmp_path / "out"
    options = ("--model", model_folder, "--memory")
    result = vtok("encode", video, out, *options, "100GB", "--json")
    assert result.code == 0 and result.json["tile"] is None, result.err
    assert result.json["chunk_frames"] == 16
    assert 0 < result.json["predicted_peak_bytes"] < 100e9 and result.json["peak_bytes"] > 0
    result = vtok("encode", video, tmp_path / "again", *options, "100GB")
    assert "plan: chunks of 16 frames, the whole picture, peak" in result.err
    result = vtok("decode", out, tmp_path / "out.mp4", *options, "1MB")
    assert result.code == 2 and "plan: memory must be at least" in result.err
    assert not (tmp_path / "out.mp4").exists()
    for extra, words in (
        (("--memory", "much"), "--memory must be a size such as 4GB"),
        (("--tile", "0x4"), "--tile must be auto, SIZE or HEIGHTxWIDTH"),
        (("--tile", "16", "--memory", "4GB"), "--tile must be auto together with --memory"),
    ):
        result = vtok("encode", video, tmp_path / "none", "--model", model_folder, *extra)
        assert result.code == 2 and words in result.err


def test_sizes_and_tiles_are_read():
    assert [parse_bytes(text) for text in ("4GB", "1.5 MiB", "300", "2kb")] == [
        4 * 10**9,
        3 * 2**19,
        300,
        2000,
    ]
    assert [parse_tile(text) for text in (None, "auto", "64", "48x96")] == [
        None,
        "auto",
        (64, 64),
        (48, 96),
    ]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", ["vidtok_kl_causal_488_4chn", "vidtok_kl_causal_488_4chn_v1_1"])
def test_peak_memory_does_not_depend_on_the_length(tmp_path, name):
    """2,000 frames like 64, both ways, in processes of their own."""
    torch.manual_seed(0)
    model = vt.create_model(name, ch=32, num_res_blocks=1)
    model.save_pretrained(tmp_path / "model")
    peaks = {}
    for num_frames in (64, 2000):
        video, latents = tmp_path / f"{num_frames}.mp4", tmp_path / f"{num_frames}.latents"
        with VideoWriter(video, height=64, width=64, fps=30) as writer:
            frames = procedural_clip(64, 64, 64, seed=5, num_shapes=2)
            for start in range(0, num_frames, 64):
                writer.write(frames[:, : num_frames - start])
        for command in (("encode", video, latents), ("decode", latents, tmp_path / "out.mp4")):
            arguments = [*map(str, command), "--model", str(tmp_path / "model"), "--device", "cpu"]
            done = subprocess.run(
                [sys.executable, "-c", MEASURED, *arguments], capture_output=True, text=True
            )
            result = json.loads(done.stderr.splitlines()[-1])
            assert result["code"] == 0, done.stderr
            peaks[command[0], num_frames] = result["peak_kb"]
    for command in ("encode", "decode"):
        assert peaks[command, 2000] == pytest.approx(peaks[command, 64], rel=0.05), peaks
