"""`vtok tokenize`, `vtok stats`, normalised latents, and the data set of them."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers import digests
from tiny_vtok import tiny as tiny_vtok

import vtok_ext as vt
from vtok_ext.data.clips import fit
from vtok_ext.data.latent_shards import LatentDataset
from vtok_ext.data.procedural import procedural_clip
from vtok_ext.data.tokenizing import warmup_latents
from vtok_ext.data.video import read_clip
from vtok_ext.training.clip_order import ClipOrder, step_batches

CPU = ("--device", "cpu")


@pytest.fixture
def videos(tmp_path, make_video):
    (tmp_path / "videos").mkdir()
    for name, count in (("a", 9), ("b", 12), ("c", 5), ("d", 3)):
        make_video(f"videos/{name}.mp4", num_frames=count)
    (tmp_path / "videos" / "e.mp4").write_bytes(b"damaged")
    return tmp_path / "videos"


def test_clips_of_videos(vtok, videos, saved_models, tmp_path):
    out = tmp_path / "latents"
    options = ("--frames", 5, "--size", 16, "--videos-per-shard", 2, "--model", saved_models["kl"])
    done = vtok("tokenize", videos, out, *options, *CPU, "--json")
    assert done.code == 0, done.err
    assert done.json["items"] == 4 and done.json["shards"] == 3 and done.json["left_out"] == 2
    assert "e.mp4" in done.err and "d.mp4: has 3 of 5 frames" in done.err
    latents = LatentDataset(out)
    assert [entry["video"] for entry in latents.entries] == ["a.mp4", "b.mp4", "b.mp4", "c.mp4"]
    model = vt.load_model(saved_models["kl"])
    assert latents.manifest["model_id"] == model.model_id and latents[0].shape == (4, 2, 2, 2)
    entry = latents.entries[2]
    assert entry["timestamps"] == read_clip(videos / "b.mp4")[1][5:10]
    assert entry["fps"] == 30.0 == LatentDataset(out).entries[0]["fps"]
    assert entry["original_size"] == [32, 40] and entry["size"] == entry["padded_size"] == [16, 16]
    window = fit(read_clip(videos / "b.mp4")[0][:, 5:10], 16, 16)
    with torch.no_grad():
        expected = model.encode(window[None]).latent[0]
    torch.testing.assert_close(latents[2], expected, atol=1e-5, rtol=1e-5)
    again = vtok("tokenize", videos, out, *options, *CPU)
    assert again.code == 2 and "--resume goes on" in again.err
    other = vtok("tokenize", videos, out, *options[:-1], saved_models["fsq"], *CPU, "--resume")
    assert other.code == 2 and "the same model, videos and settings" in other.err


def test_going_on_refuses_what_would_make_other_latents(vtok, videos, saved_models, tmp_path):
    """Names alone do not tell: other files, and other captions, would be mixed in."""
    rows = [{"video": f"{name}.mp4", "caption": name} for name in "abc"]
    listed = tmp_path / "list.jsonl"

    def call(*options, root=videos):
        listed.write_text("\n".join(map(json.dumps, rows)))
        options = ("--frames", 5, "--size", 16, "--model", saved_models["kl"], *CPU, *options)
        return vtok("tokenize", listed, tmp_path / "out", "--root", root, "--resume", *options)

    assert call().code == 0
    videos.rename(tmp_path / "moved")
    assert call(root=tmp_path / "moved").code == 0

    def refusal(*options):
        failed = call(*options, root=tmp_path / "moved")
        assert failed.code == 2 and "the same model, videos and settings to go on" in failed.err
        return failed.err.partition("to go on, got ")[2]

    there, other = (vt.load_model(saved_models[kind]).model_id for kind in ("kl", "fsq"))
    changed = refusal("--frames", 6, "--dtype", "float16")
    assert changed.startswith("dtype float32, not float16; num_frames 5, not 6\n")
    model = refusal("--model", saved_models["fsq"], "--output", "latent")
    assert model.startswith(f"model {there}, not {other}\n")
    rows[1]["caption"] = "another"
    assert refusal().startswith("videos of the same names with other fields, such as captions\n")
    rows[1]["caption"] = "b"
    (tmp_path / "moved" / "b.mp4").write_bytes((tmp_path / "moved" / "a.mp4").read_bytes())
    assert refusal().startswith("videos of the same names with files of other sizes\n")
    del rows[2]
    assert refusal().startswith("a list of 3 other videos, not these 2\n")
    (tmp_path / "out" / "settings.json").unlink()
    assert refusal().startswith("no settings.json\n")


def test_whole_videos_as_tokens_with_several_workers(vtok, videos, model_folder, tmp_path):
    (videos / "e.mp4").unlink()
    options = ("--model", model_folder, *CPU, "--videos-per-shard", 3)
    assert vtok("tokenize", videos, tmp_path / "one", *options).code == 0
    assert vtok("tokenize", videos, tmp_path / "two", *options, "--workers", 2).code == 0
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    tokens = LatentDataset(tmp_path / "one")
    model = vt.load_model(model_folder)
    with torch.no_grad():
        ids = model.tokenize(read_clip(videos / "b.mp4")[0][None]).ids[0]
    assert torch.equal(tokens[1], ids) and tokens.entries[1]["latent_frames"] == 4
    entry = tokens.entries[1]
    assert entry["num_frames"] == 12 and entry["padded_frames"] == 13


def test_the_frame_rate_decides_which_frames_a_vtok_samples(vtok, videos, make_video, tmp_path):
    """As `vtok encode` has it, also where videos of two rates have one shape and one length."""
    (videos / "e.mp4").unlink()
    make_video("videos/bb.mp4", num_frames=12, timestamps=[60 * t for t in range(12)])
    tiny_vtok(levels=(4, 4, 4)).save_pretrained(tmp_path / "model")
    options = ("--model", tmp_path / "model", *CPU)
    assert vtok("tokenize", videos, tmp_path / "data", *options).code == 0
    tokens = LatentDataset(tmp_path / "data")
    counts = {}
    for i, entry in enumerate(tokens.entries):
        done = vtok("encode", videos / entry["video"], tmp_path / "tokens", *options)
        assert done.code == 0, done.err
        expected = vt.Tokens.load(tmp_path / "tokens")
        assert torch.equal(tokens[i], expected.ids[0]) and entry["fps"] == expected.fps
        counts[entry["video"]] = len(tokens[i])
    assert counts["bb.mp4"] > counts["b.mp4"]  # 12 frames take three times as long


def start(folder, *arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "vtok_ext.cli", "tokenize", *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
    )


def test_killed_and_resumed_gives_the_same_bytes(vtok, saved_models, tmp_path):
    options = ("--frames", 9, "--size", 16, "--videos-per-shard", 4, "--model", saved_models["kl"])
    source = "procedural:160"
    assert vtok("tokenize", source, tmp_path / "whole", *options, *CPU).code == 0
    process = start(tmp_path, source, tmp_path / "killed", *options, *CPU)
    shards = tmp_path / "killed" / "shards"
    deadline = time.monotonic() + 120
    while len(list(shards.glob("*.json"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = len(list(shards.glob("*.json")))
    assert 3 <= before < 40 and not (tmp_path / "killed" / "manifest.json").exists()
    (shards / "00001.safetensors").write_bytes(b"cut off")
    done = vtok("tokenize", source, tmp_path / "killed", *options, *CPU, "--resume", "--json")
    assert done.code == 0 and done.json["shards_found"] == before - 1
    for partial in shards.glob(".*"):
        partial.unlink()
    assert digests(tmp_path / "whole") == digests(tmp_path / "killed")


def test_statistics_and_normalised_latents(vtok, saved_models, tmp_path):
    model = vt.load_model(saved_models["kl"])
    model.save_pretrained(tmp_path / "model")
    weights = (tmp_path / "model" / "model.safetensors").read_bytes()
    clip = procedural_clip(9, 16, 16, seed=0)[None]
    with pytest.raises(ValueError, match="must know its statistics of latents"):
        model.encode(clip, normalize=True)
    options = ("--frames", 9, "--size", 16, "--model", tmp_path / "model", *CPU)
    assert vtok("tokenize", "procedural:6", tmp_path / "data", *options).code == 0
    assert vtok("stats", tmp_path / "model", tmp_path / "data").code == 0
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == weights
    known = vt.load_model(tmp_path / "model")
    assert known.model_id == model.model_id
    latents = LatentDataset(tmp_path / "data", statistics=known.latent_statistics)
    values = torch.stack([latents[i] for i in range(6)]).movedim(1, 0).flatten(1)
    torch.testing.assert_close(values.mean(1), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(values.std(1, False), torch.ones(4), atol=1e-3, rtol=0)
    with torch.no_grad():
        plain, normalised = known.encode(clip), known.encode(clip, normalize=True)
        video = known.decode(plain)
        torch.testing.assert_close(known.decode(normalised), video, atol=1e-4, rtol=1e-4)
        bare = known.decode(normalised.latent, normalize=True)
        torch.testing.assert_close(bare, video, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(normalised.latent, plain.latent)
    normalised.save(tmp_path / "one.latent")
    assert type(normalised).load(tmp_path / "one.latent").normalized
    refused = vtok("stats", saved_models["fsq"], tmp_path / "data")
    assert refused.code == 2 and "must come from" in refused.err


def test_windows_of_latents_decode_as_the_whole(vtok, make_video, saved_models, tmp_path):
    make_video("long.mp4", num_frames=93, height=16, width=16)
    model = vt.load_model(saved_models["kl"])
    out = tmp_path / "data"
    options = ("--model", saved_models["kl"], *CPU)
    assert vtok("tokenize", tmp_path / "long.mp4", out, *options).code == 0
    latents = LatentDataset(out)
    warmup = latents.manifest["warmup_latents"]
    assert warmup == warmup_latents(model) and 0 < warmup < 20
    assert latents.manifest["warmup_frames"] == 4 * warmup
    start = warmup + 1
    window, before = latents.window(0, start, 2)
    assert before == warmup and window.shape[1] == warmup + 2
    with torch.no_grad():
        whole = model.decode(latents[0][None])
        frames = model.decode(window[None])[:, :, -8:]
    first = 1 + 4 * (start - 1)
    torch.testing.assert_close(frames, whole[:, :, first : first + 8], atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match="a window must lie in"):
        latents.window(0, 20, 9)


def test_planes_and_labels(vtok, make_video, tmp_path):
    tiny = {"enc_embed_dim": 32, "enc_num_layers": 1, "enc_patch_num_layers": 1, "enc_num_heads": 2}
    tiny |= {"dec_embed_dim": 32, "dec_num_layers": 1, "dec_num_heads": 2}
    torch.manual_seed(0)
    model = vt.create_model("coordtok_large_128", **tiny).eval()
    model.save_pretrained(tmp_path / "model")
    rows = [{"video": make_video(f"{i}.mp4").name, "label": i} for i in range(2)]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "data"
    options = ("--frames", 8, "--model", tmp_path / "model", *CPU)
    assert vtok("tokenize", tmp_path / "list.jsonl", out, *options).code == 0
    assert vtok("stats", tmp_path / "model", out).code == 0
    model = vt.load_model(tmp_path / "model")
    data = LatentDataset(out, label="label", statistics=model.latent_statistics)
    planes, label = data[1]
    assert label == 1 and set(planes) == {"xy", "yt", "xt"}
    clip = read_clip(tmp_path / "1.mp4", max_frames=8)[0][None]
    with torch.no_grad():
        expected = model.encode(clip, normalize=True)
    for name, plane in planes.items():
        torch.testing.assert_close(plane, expected.latent[name][0], atol=1e-3, rtol=1e-3)
    batches = list(step_batches(data, ClipOrder(2, 2), 0, 1))
    assert batches[0][0][0]["xy"].shape[0] == 2 and batches[0][0][1].sort()[0].tolist() == [0, 1]
    with pytest.raises(ValueError, match="every video must have the field 'caption'"):
        LatentDataset(out, label="caption")


def test_bad_input(vtok, model_folder, saved_models, tmp_path):
    for arguments, message in (
        (("procedural:x",), "source must be procedural:N"),
        (("procedural:2",), "num_frames and size (--frames, --size) must be given"),
        ((tmp_path / "none",), "source must exist"),
    ):
        failed = vtok("tokenize", *arguments, tmp_path / "out", "--model", model_folder, *CPU)
        assert failed.code == 2 and message in failed.err
    options = ("--model", saved_models["kl"], "--output", "tokens", *CPU)
    failed = vtok("tokenize", "procedural:2", tmp_path / "other", *options)
    assert failed.code == 2 and "--output must be latent" in failed.err
    failed = vtok("stats", model_folder, tmp_path)
    assert failed.code == 2 and "a finished one of vtok tokenize" in failed.err
    tiny_vtok().save_pretrained(tmp_path / "sequences")
    failed = vtok("stats", tmp_path / "sequences", tmp_path)
    assert failed.code == 2 and "stats: MODEL must have latents that are grids" in failed.err


def test_damaged_shards_are_found(vtok, saved_models, tmp_path):
    """By statistics, which they would spoil, and by --resume, which makes them again."""
    out = tmp_path / "latents"
    call = ["tokenize", "procedural:4", out, "--frames", 5, "--size", 16, "--videos-per-shard", 2]
    call += ["--model", saved_models["kl"], *CPU]
    assert vtok(*call).code == 0
    before = digests(out)
    shard = out / "shards" / "00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-5:] = b"\xff" * 5
    shard.write_bytes(content)
    config = (saved_models["kl"] / "config.json").read_bytes()
    refused = vtok("stats", saved_models["kl"], out)
    assert refused.code == 2 and "shard 1 of" in refused.err and "--resume" in refused.err
    assert (saved_models["kl"] / "config.json").read_bytes() == config
    assert vtok(*call, "--resume").code == 0 and digests(out) == before
    entries = json.loads((out / "shards" / "00000.json").read_text())
    del entries["sha256"]
    (out / "shards" / "00000.json").write_text(json.dumps(entries))
    with pytest.raises(ValueError, match="shard 0 of .* must be complete and as it was written"):
        LatentDataset(out)
    (out / "settings.json").write_text("{")
    cut = vtok(*call, "--resume")
    assert cut.code == 2 and "settings.json must be JSON" in cut.err


def test_rates_that_mean_nothing_and_sets_without_latents(vtok, saved_models, tmp_path):
    model = ("--model", saved_models["kl"], *CPU)
    for source, rate, message in (
        ("procedural:2", 5, "fps (--fps) must be None for procedural clips, got 5"),
        (tmp_path, "inf", "fps must be positive and finite, got inf"),
    ):
        (tmp_path / "x.mp4").write_bytes(b"none")
        options = ("--frames", 5, "--size", 16, "--fps", rate)
        refused = vtok("tokenize", source, tmp_path / "out", *options, *model)
        assert refused.code == 2 and message in refused.err, refused.err
        assert not (tmp_path / "out").exists()
    assert vtok("tokenize", tmp_path, tmp_path / "none", *model).code == 0
    refused = vtok("stats", saved_models["kl"], tmp_path / "none")
    assert refused.code == 2 and "DATA must hold latents, got none in" in refused.err
