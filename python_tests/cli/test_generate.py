"""`vtok generate`: videos, pictures, reproducible numbers, and bad input in one line."""

import dataclasses
import json

import pytest
import torch

import vtok_ext as vt
from vtok_ext.data.video import VideoReader
from vtok_ext.models import GPT, SiT
from vtok_ext.models.generator import LatentOrigin
from vtok_ext.models.latent_statistics import LatentStatistics


@pytest.fixture
def generators(saved_models, tmp_path):
    """{"sit": folder, "gpt": folder} for the tiny saved models, with random weights."""
    thin = {"hidden_size": 16, "depth": 1, "num_heads": 2, "num_classes": 2, "class_dropout": 0.1}
    folders = {}
    for kind, tokenizer in (("sit", "kl"), ("gpt", "fsq")):
        model = vt.load_model(saved_models[tokenizer])
        torch.manual_seed(0)
        if kind == "sit":
            made = vt.create_generator(
                "sit_s_2", latent="grid", input_size=(2, 2, 4), in_channels=4, **thin
            )
            made.statistics = LatentStatistics({"grid": torch.zeros(4)}, {"grid": torch.ones(4)})
        else:
            made = vt.create_generator(
                "gpt_small", grid=(2, 2, 4), codebook_size=2**18, factors=(512, 512), **thin
            )
        source = str(saved_models[tokenizer])
        made.origin = LatentOrigin(5, 16, 28, None, model.model_id, source)
        folders[kind] = tmp_path / kind
        made.save_pretrained(folders[kind])
    return folders


def frames(path):
    with VideoReader(path) as reader:
        return torch.cat([chunk.frames for chunk in reader.chunks(8)], 1)


@pytest.mark.parametrize("kind", ["sit", "gpt"])
def test_videos(vtok, generators, tmp_path, kind):
    out = tmp_path / "out"
    fast = ["--steps", 2] if kind == "sit" else ["--top-k", 5]
    arguments = ["--seed", 7, "--label", 1, "--guidance", 1.5, *fast, "--device", "cpu"]
    done = vtok("generate", generators[kind], "-o", out, "-n", 3, "--json", *arguments)
    assert done.code == 0, done.err
    names = ["0000.mp4", "0001.mp4", "0002.mp4", "generate.json", "samples.png"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert done.json["videos"] == 3 and done.json == json.loads((out / names[3]).read_text())
    first, second = frames(out / "0000.mp4"), frames(out / "0001.mp4")
    assert first.shape == (3, 5, 16, 28) and not torch.equal(first, second)
    # Video 1 of seed 7 is video 0 of seed 8, alone as in a batch.
    arguments[1] = 8
    again = vtok("generate", generators[kind], "-o", out, "-n", 1, *arguments)
    assert again.code == 0, again.err
    difference = (frames(out / "0000.mp4").int() - second.int()).abs()
    assert float(difference.float().mean()) < 1
    assert not (out / "0001.mp4").exists()
    # A file that the command did not write, even one named like a video of it, is never deleted.
    (out / "0001.mp4").write_bytes(b"precious")
    refused = vtok("generate", generators[kind], "-o", out, "-n", 1, *arguments)
    assert refused.code == 2 and f"got {out} with 0001.mp4" in refused.err
    assert (out / "0001.mp4").read_bytes() == b"precious" and (out / "0000.mp4").exists()


def test_the_report_tells_how_the_videos_were_made(vtok, generators, tmp_path):
    options = ["-n", 1, "--steps", 3, "--diffusion", "linear", "--norm", 0.5, "--last-step", "none"]
    arguments = [*options, "--device", "cpu", "--json"]
    done = vtok("generate", generators["sit"], "-o", tmp_path / "a", *arguments)
    assert done.code == 0, done.err
    assert done.json["sampling"] == {
        "sampler": "sde",
        "method": "euler",
        "num_steps": 3,
        "diffusion": "linear",
        "norm": 0.5,
        "last_step": None,
    }
    assert done.json["model"] == str(generators["sit"]) and done.json["last"] is False
    assert done.json["statistics"] == "generator"
    for arguments, expected in (
        (["--last-step", "tweedie", "--last-step-size", 0.1, "--steps", 2], {"norm": 1.0}),
        (["--sampler", "ode", "--rtol", 0.1, "--atol", 0.01], {"method": "dopri5", "rtol": 0.1}),
        (["--sampler", "ode", "--method", "heun", "--steps", 2], {"num_steps": 2}),
    ):
        arguments += ["-n", 1, "--device", "cpu", "--json"]
        done = vtok("generate", generators["sit"], "-o", tmp_path / "a", *arguments)
        assert done.code == 0, done.err
        assert done.json["sampling"].items() >= expected.items()
        assert ("rtol" in expected) == ("rtol" in done.json["sampling"])
    arguments = ["-n", 1, "--top-k", 5, "--device", "cpu", "--json"]
    done = vtok("generate", generators["gpt"], "-o", tmp_path / "a", *arguments)
    assert done.json["sampling"] == {"temperature": 1.0, "top_k": 5, "top_p": 1.0}
    assert done.json["statistics"] is None


def test_statistics_of_a_file_or_of_the_tokenizer(vtok, generators, saved_models, tmp_path):
    generator = vt.load_generator(generators["sit"])
    generator.statistics = None
    generator.save_pretrained(tmp_path / "bare")
    arguments = ["-n", 1, "--steps", 2, "--device", "cpu", "--json"]
    refused = vtok("generate", tmp_path / "bare", "-o", tmp_path / "out", *arguments)
    assert refused.code == 2 and "must know the statistics of its latents" in refused.err
    statistics = LatentStatistics({"grid": torch.ones(4)}, {"grid": torch.full((4,), 2.0)})
    (tmp_path / "statistics.json").write_text(json.dumps(statistics.to_dict()))
    by_file = ["--statistics", tmp_path / "statistics.json"]
    done = vtok("generate", tmp_path / "bare", "-o", tmp_path / "file", *by_file, *arguments)
    assert done.code == 0 and done.json["statistics"] == str(tmp_path / "statistics.json")
    tokenizer = vt.load_model(saved_models["kl"])
    tokenizer.latent_statistics = statistics
    tokenizer.save_pretrained(tmp_path / "kl")
    measured = ["--tokenizer", tmp_path / "kl"]
    done = vtok("generate", tmp_path / "bare", "-o", tmp_path / "own", *measured, *arguments)
    assert done.code == 0 and done.json["statistics"] == "tokenizer"
    assert (tmp_path / "own" / "0000.mp4").read_bytes() == (
        tmp_path / "file" / "0000.mp4"
    ).read_bytes()


def test_bad_input_is_found_before_the_first_batch(vtok, generators, tmp_path, monkeypatch):
    sampled = []
    for kind in (SiT, GPT):
        monkeypatch.setattr(kind, "sample", lambda *_, **__: sampled.append(1))
    many = ["-n", 5, *(word for label in (0, 1, 0, 1, 9) for word in ("--label", label))]
    for arguments, message in (
        (many, "--label must be in 0..1, got 9"),
        (["--label", -1], "--label must be in 0..1, got -1"),
        (["--fps", "inf"], "--fps must be finite and > 0, got inf"),
        (["--seed", 99999999999999999999], "--seed must be in 0..4611686018427387903, got 9"),
        (["--seed", -1], "--seed must be in 0..4611686018427387903, got -1"),
        (["--override", "depth"], "--override must be FIELD=VALUE, got 'depth'"),
    ):
        refused = vtok("generate", generators["sit"], "-o", tmp_path / "out", *arguments)
        assert refused.code == 2 and message in refused.err
    assert not sampled


def test_the_tokenizer_it_was_trained_on(vtok, generators, saved_models, tmp_path):
    other = tmp_path / "other"
    torch.manual_seed(5)
    model = vt.load_model(saved_models["kl"])
    with torch.no_grad():
        next(model.parameters()).add_(1)
    model.save_pretrained(other)
    refused = vtok("generate", generators["sit"], "--tokenizer", other, "-o", tmp_path / "out")
    assert refused.code == 2 and "another training run" in refused.err
    assert not (tmp_path / "out").exists()
    options = ["--any-weights", "--steps", 2, "-n", 1, "--device", "cpu"]
    taken = vtok(
        "generate", generators["sit"], "--tokenizer", other, "-o", tmp_path / "o", *options
    )
    assert taken.code == 0, taken.err


def test_videos_of_planes(vtok, tmp_path):
    """A SiT of triplanes and its CoordTok: the model's clips, and shorter, smaller ones."""
    torch.manual_seed(0)
    grid = {"latent_resolution": (8, 4, 4), "latent_patch_size": (4, 2, 2)}
    thin = {"dec_num_layers": 1, "enc_num_layers": 1, "enc_patch_num_layers": 0}
    tokenizer = vt.create_model(
        "coordtok_small_128", video_shape=(8, 16, 16), enc_patch_size=(4, 8, 8), **grid, **thin
    )
    tokenizer.save_pretrained(tmp_path / "planes")
    sit = vt.create_generator("sit_s_2", input_size=(8, 4, 4), hidden_size=16, depth=1, num_heads=2)
    parts = sit.config.parts()
    sit.statistics = LatentStatistics(
        {part: torch.zeros(8) for part in parts}, {part: torch.ones(8) for part in parts}
    )
    for number, shape in enumerate([(8, 16, 16), (5, 12, 16)]):
        sit.origin = LatentOrigin(*shape, None, tokenizer.model_id, str(tmp_path / "planes"))
        sit.save_pretrained(tmp_path / f"sit{number}")
        out = tmp_path / f"out{number}"
        done = vtok("generate", tmp_path / f"sit{number}", "-o", out, "-n", 2, "--steps", 2)
        assert done.code == 0, done.err
        first, second = frames(out / "0000.mp4"), frames(out / "0001.mp4")
        assert first.shape == (3, *shape) and not torch.equal(first, second)


@pytest.mark.parametrize(
    ("source", "message"), [("/gone", "/gone, which is not there"), ("owner/name", "hub id")]
)
def test_a_tokenizer_that_is_not_there(vtok, generators, tmp_path, monkeypatch, source, message):
    monkeypatch.setattr("vtok_ext.models._persistence.require_hub", _no_hub)
    model = vt.load_generator(generators["sit"])
    model.origin = dataclasses.replace(model.origin, tokenizer=source)
    model.save_pretrained(tmp_path / "model")
    refused = vtok("generate", tmp_path / "model", "-o", tmp_path / "out", "--device", "cpu")
    assert refused.code == 2 and message in refused.err and source in refused.err


def _no_hub(op):
    raise ImportError(op)


def test_planes_of_another_tokenizer_are_refused_before_sampling(vtok, generators, tmp_path):
    sizes = {
        "video_shape": (8, 16, 16),
        "enc_patch_size": (4, 8, 8),
        "latent_resolution": (8, 4, 4),
    }
    sizes |= {"latent_patch_size": (4, 2, 2), "dec_num_layers": 1, "enc_num_layers": 1}
    tokenizer = vt.create_model("coordtok_small_128", **sizes, enc_patch_num_layers=0)
    tokenizer.save_pretrained(tmp_path / "planes")
    wide = vt.create_generator(
        "sit_s_2", input_size=(8, 4, 8), hidden_size=16, depth=1, num_heads=2
    )
    wide.origin = LatentOrigin(8, 16, 16)
    wide.save_pretrained(tmp_path / "wide")
    long = vt.create_generator(
        "sit_s_2", input_size=(8, 4, 4), hidden_size=16, depth=1, num_heads=2
    )
    long.origin = LatentOrigin(20, 16, 16)
    long.save_pretrained(tmp_path / "long")
    for model, message in (
        (tmp_path / "long", "at most (frames, height, width) (8, 16, 16), got (20, 16, 16)"),
        (
            tmp_path / "wide",
            "must have cells (t, x, y) and channels (8, 4, 8, 8), got (8, 4, 4, 8)",
        ),
        (generators["sit"], "must not be a CoordTok, got coordtok_small_128"),
    ):
        arguments = ["--tokenizer", tmp_path / "planes", "--device", "cpu"]
        refused = vtok("generate", model, "-o", tmp_path / "out", *arguments)
        assert refused.code == 2 and message in refused.err


@pytest.mark.parametrize("order", [None, "means_first"])
def test_statistics_of_a_log_whose_signs_do_not_tell_the_order(vtok, tmp_path, order):
    """Read first, so that the weights of a released file need not be there."""
    (tmp_path / "log.txt").write_text("[0.1 0.2]\n" * 6)
    arguments = ["--statistics", tmp_path / "log.txt", "--name", "sit_l_2"]
    arguments += ["--statistics-order", order] if order else []
    done = vtok("generate", tmp_path / "none.pt", "-o", tmp_path / "out", *arguments)
    message = "order must be given as one of" if order is None else "none.pt' must be a file"
    assert done.code == 2 and message in done.err


def test_statistics_of_a_gpt_are_refused(vtok, generators, tmp_path):
    (tmp_path / "log.txt").write_text("[0.1 0.2]\n" * 6)
    arguments = ["--statistics", tmp_path / "log.txt", "--statistics-order", "means_first"]
    refused = vtok("generate", generators["gpt"], "-o", tmp_path / "out", *arguments)
    assert refused.code == 2 and "statistics must be absent for a GPT" in refused.err


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("sit", ["-n", 0], "-n and --batch-size must be >= 1"),
        ("sit", ["--temperature", 0.5], "options of sde must be among"),
        ("gpt", ["--sampler", "ode"], "GPT must be given no"),
        ("sit", ["--sampler", "odd"], "sampler must be one of sde, ode"),
        ("sit", ["--sampler", "ode", "--steps", 9], "--steps must be absent for dopri5"),
        ("sit", ["--steps", 1], "num_steps must be >= 2"),
        ("sit", ["--guidance", "nan"], "guidance must be finite"),
        ("sit", ["--statistics-order", "x"], "--statistics must be given with an order"),
        ("sit", ["--rtol", 0.1], "options of sde must be among"),
        ("sit", ["--sampler", "ode", "--norm", 2], "options of ode must be among"),
        ("sit", ["--sampler", "ode", "--method", "heun", "--rtol", 0.1], "must be left at 0.001"),
        ("sit", ["--last-step", "none", "--last-step-size", 0.1], "must be left at 0.04"),
        ("sit", ["--override", "depth=2"], "must be absent for a saved generator"),
        ("gpt", ["--diffusion", "sigma"], "GPT must be given no"),
        ("sit", ["--name", "sit_l_2"], "must be absent for a saved generator"),
        ("gpt", ["--last"], "(--last) must be absent for a saved generator"),
        ("sit", ["--statistics", "none.txt"], "must be a file, got none"),
    ],
)
def test_bad_input_is_one_line(vtok, generators, tmp_path, kind, arguments, message):
    failed = vtok("generate", generators[kind], "-o", tmp_path / "out", *arguments)
    assert failed.code == 2 and message in failed.err and failed.err.count("\n") <= 2
    assert not (tmp_path / "out").exists()
