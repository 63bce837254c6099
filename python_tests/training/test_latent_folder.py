"""Generators trained on what `vtok tokenize` wrote."""

import json

import numpy as np
import pytest
import torch
from helpers import torchrun, write_video
from safetensors.torch import load_file
from tiny_coordtok import tiny_coordtok

import vtok_ext as vt
from vtok_ext.cli.app import run
from vtok_ext.data.latent_shards import LatentDataset
from vtok_ext.training.loop import train
from vtok_ext.training.recipe_file import load_recipe
from vtok_ext.training.tasks import task_class

TINY = {"ch": 4, "ch_mult": (1, 1, 1, 1), "num_res_blocks": 1}
PRESETS = {"sit": "vidtok_kl_causal_488_4chn", "gpt": "vidtok_fsq_causal_488_262144"}
OVERRIDES = [
    "model.overrides.hidden_size=16",
    "model.overrides.depth=1",
    "model.overrides.num_heads=2",
    "data.validation_clips=0",
    "latent.statistics_clips=6",
    "optimizer.lr=1e-3",
    "run.steps=4",
    "run.batch_size=2",
    "run.log_every=1",
    "run.validate_every=2",
    "run.checkpoint_every=2",
]
CLIPS = ["data.num_clips=6", "data.num_frames=5", "data.height=16", "data.width=16"]
CLIPS += ["data.motion=erratic"]  # as the procedural clips of vtok tokenize


def tokenize(source, out, model, *options):
    call = ["tokenize", source, out, "--model", model, "--device", "cpu", *options]
    assert run([str(argument) for argument in call]) == 0


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a tokenizer per task, and six latents of each in two shards."""
    root = tmp_path_factory.mktemp("made")
    for task, preset in PRESETS.items():
        torch.manual_seed(0)
        vt.create_model(preset, **TINY).save_pretrained(root / task)
        options = ("--frames", 5, "--size", 16, "--videos-per-shard", 4)
        tokenize("procedural:6", root / f"{task}-latents", root / task, *options)
    return root


def recipe(made, task, *overrides, stored=True):
    folder = [f"latent.folder={made / task}-latents"] if stored else CLIPS
    return load_recipe(task, [*OVERRIDES, f"latent.tokenizer={made / task}", *folder, *overrides])


def losses(out):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


@pytest.mark.parametrize("task", ["sit", "gpt"])
def test_losses_are_those_of_the_videos_themselves(task, made, tmp_path):
    """The folder decides T, H and W: the recipe's are others."""
    from_videos = train(recipe(made, task, stored=False), tmp_path / "videos")
    result = train(recipe(made, task), tmp_path / "stored")
    assert losses(tmp_path / "stored") == pytest.approx(losses(tmp_path / "videos"), rel=1e-4)
    ours, theirs = (vt.load_generator(r.model) for r in (result, from_videos))
    assert ours.config == theirs.config
    assert (ours.origin.num_frames, ours.origin.height, ours.origin.width) == (5, 16, 16)
    assert ours.origin.fps == 30 and ours.origin.tokenizer_id == theirs.origin.tokenizer_id
    if task == "sit":
        statistics = ours.statistics, theirs.statistics
        torch.testing.assert_close(statistics[0].mean, statistics[1].mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("task", ["sit", "gpt"])
def test_no_video_is_encoded_with_workers_and_a_restart(task, made, tmp_path, monkeypatch):
    """The last two latents are held out; the same losses with a worker and in two parts."""
    held_out = ["data.validation_clips=2"]
    whole = train(recipe(made, task, *held_out), tmp_path / "whole")
    monkeypatch.setattr(task_class(task), "encode", None)
    changed = [*held_out, "data.num_workers=1"]
    train(recipe(made, task, *changed, "run.steps=2"), tmp_path / "parts", warn=lambda line: None)
    parts = train(recipe(made, task, *changed), tmp_path / "parts", resume="auto", warn=print)
    assert parts.resumed_from == 2 and losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert parts.validation == whole.validation and set(whole.validation) == {"val_loss"}
    states = [load_file(r.model / "model.safetensors") for r in (whole, parts)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_two_processes_see_the_samples_of_one(made, tmp_path):
    train(recipe(made, "sit"), tmp_path / "one")
    overrides = [*OVERRIDES, f"latent.tokenizer={made / 'sit'}"]
    overrides += [f"latent.folder={made / 'sit-latents'}", "run.batch_size=1"]
    call = ["train", "sit", *overrides, "-o", tmp_path / "two", "--device", "cpu"]
    done = torchrun("-m", "vtok_ext.cli", *call)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def test_indices_of_any_integer_type(made):
    latents = LatentDataset(made / "sit-latents")
    for index in (np.int64(3), torch.tensor(3), (0, 3), [0, np.int32(3)], (1, torch.tensor(3)), -3):
        assert torch.equal(latents[index], latents[3])
    with pytest.raises(TypeError, match="'float' object cannot be interpreted as an integer"):
        latents[3.0]


def test_held_out_latents_are_of_other_videos(made, tmp_path):
    (tmp_path / "videos").mkdir()
    for name, count in (("a", 10), ("b", 15), ("c", 5)):
        write_video(tmp_path / "videos" / f"{name}.mp4", count, 16, 16)
    out = tmp_path / "latents"
    tokenize(tmp_path / "videos", out, made / "sit", "--frames", 5)

    def split(*overrides):
        settings = recipe(made, "sit", f"latent.folder={out}", *overrides)
        clips, held_out = task_class("sit")(settings, torch.device("cpu")).data(pytest.fail)
        return clips.chosen, held_out

    latents = LatentDataset(out)
    assert [entry["video"][0] for entry in latents.entries] == list("aabbbc")
    chosen, held_out = split("data.validation_clips=2")  # one of b, and c
    assert chosen == [0, 1] and [torch.equal(held_out[i], latents[2 + i]) for i in (0, 1)]
    assert split("data.validation_clips=1")[0] == [0, 1, 2, 3, 4]
    chosen, held_out = split("data.validation_clips=3", f"latent.validation_folder={out}")
    assert chosen == list(range(6)) and torch.equal(held_out[2], latents[2])
    with pytest.raises(ValueError, match="must be 5 held-out latents"):
        split("data.validation_clips=5")


@pytest.mark.parametrize("kind", ["number", "name", "folders"])
def test_labels(kind, made, tmp_path):
    names, values = ["boats/a", "cats/b", "cats/c"], {"number": [0, "2", 2], "name": "xzz"}
    rows = []
    for i, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_video(tmp_path / f"{name}.mp4", 5, 16, 16)
        rows.append({"video": f"{name}.mp4", "class": values.get(kind, names)[i]})
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "latents"
    tokenize(tmp_path / "list.jsonl", out, made / "sit", "--frames", 5)
    field = "latent.labels=folders" if kind == "folders" else "latent.label_field=class"
    options = [f"latent.folder={out}", field, "model.overrides.class_dropout=0.2"]
    count, needed = (3, "3 or more") if kind == "number" else (2, "2, as the labels")
    classes = f"model.overrides.num_classes={count}"
    train(recipe(made, "sit", *options, classes), tmp_path / "run")
    task = task_class("sit")(recipe(made, "sit", *options, classes), torch.device("cpu"))
    clips, _ = task.data(pytest.fail)
    assert [clips[0, i][1] for i in range(3)] == ([0, 2, 2] if kind == "number" else [0, 1, 1])
    with pytest.raises(ValueError, match=f"num_classes must be {needed}"):
        train(recipe(made, "sit", *options, "model.overrides.num_classes=1"), tmp_path / "other")
    with pytest.raises(ValueError, match="every video of the latents must have 'nowhere'"):
        wrong = ["latent.label_field=nowhere", classes]
        train(recipe(made, "sit", f"latent.folder={out}", *wrong), tmp_path / "third")


def test_planes_and_latents_of_16_bits(made, tmp_path):
    tiny_coordtok().save_pretrained(tmp_path / "tokenizer")
    out = tmp_path / "latents"
    options = ("--frames", 8, "--size", 16, "--dtype", "bfloat16")
    tokenize("procedural:5", out, tmp_path / "tokenizer", *options)
    folder = [f"latent.tokenizer={tmp_path / 'tokenizer'}", f"latent.folder={out}"]
    held_out = ["data.validation_clips=1", "data.num_workers=1", "run.steps=2"]
    result = train(recipe(made, "sit", *folder, *held_out), tmp_path / "run")
    model = vt.load_generator(result.model)
    assert model.config.latent == "triplane" and set(model.statistics.mean) == {"xy", "yt", "xt"}
    assert result.validation["val_loss"] > 0 and model.origin.num_frames == 8


def test_what_does_not_fit_is_refused(made, tmp_path):
    torch.manual_seed(1)
    vt.create_model(PRESETS["sit"], **TINY).save_pretrained(tmp_path / "other")
    other = vt.load_model(tmp_path / "other").model_id
    first = vt.load_model(made / "sit").model_id
    write_video(tmp_path / "a.mp4", 5, 16, 16)
    write_video(tmp_path / "b.mp4", 9, 16, 16)
    tokenize(tmp_path, tmp_path / "latents", made / "sit")
    tokenize("procedural:2", tmp_path / "ids", made / "gpt", "--output", "latent", "--frames", 5,
             "--size", 16)  # fmt: skip
    cases = (
        ("sit", [f"latent.tokenizer={tmp_path / 'other'}"], f"be of latent.tokenizer, {other}"),
        ("sit", [f"latent.tokenizer={tmp_path / 'other'}"], f"got latents of {first} in"),
        ("sit", [f"latent.folder={tmp_path / 'latents'}"], "one T, H, W"),
        ("gpt", [f"latent.folder={tmp_path / 'ids'}"], "made with --output tokens"),
        ("sit", [f"latent.folder={tmp_path}"], "a finished one of vtok tokenize"),
        ("sit", ["latent.cache=true"], "latent.cache must be false with latent.folder"),
        ("sit", [f"data.folder={tmp_path}"], "data.folder must be null with latent.folder"),
    )
    for task, overrides, message in cases:
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            train(recipe(made, task, *overrides), tmp_path / "run")
        assert message in str(caught.value)
    for key in ("validation_folder", "label_field"):
        with pytest.raises(ValueError, match=f"latent.{key} must be null without latent.folder"):
            recipe(made, "sit", f"latent.{key}=x", stored=False)
