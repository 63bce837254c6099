"""Tasks "sit" and "gpt": what is trained, kept, resumed and exported."""

import json

import pytest
import torch
from tiny_coordtok import tiny_coordtok

import vtok_ext as vt
from vtok_ext.data.procedural import procedural_clip
from vtok_ext.data.video import VideoWriter
from vtok_ext.models.latent_statistics import StatisticsCounter
from vtok_ext.models.transport import noise_like
from vtok_ext.training.checkpoint import read_shapes, read_tensors, verify_checkpoint
from vtok_ext.training.generator_task import _lasting
from vtok_ext.training.loop import train
from vtok_ext.training.recipe_file import load_recipe
from vtok_ext.training.state import Training
from vtok_ext.training.step import Stepper

TINY = {"ch": 4, "ch_mult": (1, 1, 1, 1), "num_res_blocks": 1}
PRESETS = {"sit": "vidtok_kl_causal_488_4chn", "gpt": "vidtok_fsq_causal_488_262144"}
OVERRIDES = [
    "model.overrides.hidden_size=16",
    "model.overrides.depth=1",
    "model.overrides.num_heads=2",
    "data.num_clips=6",
    "data.num_frames=5",
    "data.height=16",
    "data.width=16",
    "data.validation_clips=2",
    "latent.statistics_clips=6",
    "optimizer.lr=1e-3",
    "optimizer.ema_decay=0.9",
    "run.steps=4",
    "run.batch_size=2",
    "run.log_every=1",
    "run.validate_every=2",
    "run.checkpoint_every=2",
]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """{"sit": folder, "gpt": folder} of a continuous and a discrete tokenizer."""
    folders = {}
    for task, preset in PRESETS.items():
        torch.manual_seed(0)
        folders[task] = tmp_path_factory.mktemp("tokenizers") / task
        vt.create_model(preset, **TINY).save_pretrained(folders[task])
    return folders


@pytest.fixture
def recipe(tokenizers):
    def build(task, *overrides):
        tokenizer = f"latent.tokenizer={tokenizers[task]}"
        return load_recipe(task, [*OVERRIDES, tokenizer, *overrides])

    return build


def losses(out):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


@pytest.mark.parametrize("task", ["sit", "gpt"])
def test_training_exports_a_generator_that_makes_videos(task, recipe, tokenizers, tmp_path):
    pictures = ["run.sample_every=4", "run.sample_clips=1"]
    result = train(recipe(task, *pictures), tmp_path / "run")
    assert [path for path in (tmp_path / "run").rglob("*") if "sample-0" in path.name]
    assert result.step == 4 and set(result.validation) == {"val_loss"}
    model = vt.load_generator(result.model)
    tokenizer = vt.load_model(tokenizers[task])
    assert model.origin.tokenizer_id == tokenizer.model_id and model.origin.num_frames == 5
    options = {"sampler": "ode", "method": "euler", "num_steps": 2} if task == "sit" else {}
    latent = model.sample(2, generator=torch.Generator().manual_seed(0), **options)
    with torch.no_grad():
        assert model.decode(tokenizer, latent).shape == (2, 3, 5, 16, 16)
    if task == "gpt":
        assert model.config.digits == (512, 512) and model.config.grid == (2, 2, 2)
        return
    counter = StatisticsCounter()
    for seed in range(6):
        clip = procedural_clip(5, 16, 16, seed=seed)[None]
        with torch.no_grad():
            counter.update(tokenizer.encode(clip).latent)
    for name in ("mean", "std"):
        expected = getattr(counter.result(), name)["grid"]
        torch.testing.assert_close(getattr(model.statistics, name)["grid"], expected)
    assert model.config.input_size == (2, 2, 2) and model.config.in_channels == 4


@pytest.mark.parametrize("task", ["sit", "gpt"])
def test_a_resumed_run_and_cached_latents_give_the_same(task, recipe, tmp_path):
    whole = train(recipe(task), tmp_path / "whole")
    train(recipe(task, "run.steps=2"), tmp_path / "parts", warn=lambda line: None)
    parts = train(recipe(task), tmp_path / "parts", resume="auto", warn=lambda line: None)
    assert parts.resumed_from == 2 and losses(tmp_path / "parts") == losses(tmp_path / "whole")
    # Encoded one by one instead of two by two, and blocks run twice.
    other = ["latent.cache=true", "run.checkpoint_activations=true"]
    cached = train(recipe(task, *other), tmp_path / "cached")
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)
    states = [vt.load_generator(r.model).state_dict() for r in (whole, parts)]
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())
    assert cached.validation == pytest.approx(whole.validation, rel=1e-3)


@pytest.mark.parametrize("task", ["sit", "gpt"])
def test_a_run_goes_on_with_the_tokenizer_it_began_with(task, tmp_path, monkeypatch):
    folder = tmp_path / "tokenizer"
    torch.manual_seed(0)
    vt.create_model(PRESETS[task], **TINY).save_pretrained(folder)
    settings = [*OVERRIDES, f"latent.tokenizer={folder}"]
    quiet = {"warn": lambda line: None}
    train(load_recipe(task, [*settings, "run.steps=2"]), tmp_path / "run", **quiet)
    numbers = Training.numbers
    with monkeypatch.context() as before_there_were_facts:
        before_there_were_facts.setattr(
            Training,
            "numbers",
            lambda self: {k: v for k, v in numbers(self).items() if k != "facts"},
        )
        train(load_recipe(task, [*settings, "run.steps=2"]), tmp_path / "old", **quiet)
    torch.manual_seed(1)
    vt.create_model(PRESETS[task], **TINY).save_pretrained(folder)
    with pytest.raises(ValueError, match="latent.tokenizer must be .* with which the run began"):
        train(load_recipe(task, settings), tmp_path / "run", resume="auto", **quiet)
    assert train(load_recipe(task, settings), tmp_path / "old", resume="auto", **quiet).step == 4


def test_a_first_step_that_is_left_out_keeps_the_statistics(recipe, tmp_path, monkeypatch):
    norms = Stepper._clip_gradients

    def overflow_in_first_step(stepper):
        found = norms(stepper)
        return found if stepper.training.step else {"grad_norm": torch.tensor(torch.inf)}

    monkeypatch.setattr(Stepper, "_clip_gradients", overflow_in_first_step)
    settings = ["run.precision=float16", "run.steps=2", "run.checkpoint_every=1"]
    result = train(recipe("sit", *settings), tmp_path)
    assert "left_out" in (tmp_path / "log.jsonl").read_text()
    expected = vt.load_generator(result.model).statistics
    for step in (1, 2):
        found = verify_checkpoint(tmp_path / "checkpoints" / f"step-0000000{step}")
        saved = {name: torch.zeros(shape) for name, shape in read_shapes(found).items()}
        read_tensors(found, saved)
        assert saved["statistics.known"] == 1
        assert torch.equal(saved["statistics.std_grid"], expected.std["grid"])


def test_the_tokenizer_is_noted_down_as_path_or_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "model").mkdir(parents=True)
    assert _lasting("runs/model") == str(tmp_path / "runs" / "model")
    assert _lasting("owner/name") == "owner/name"


def test_a_trained_generator_can_be_trained_on(recipe, tmp_path):
    first = train(recipe("sit"), tmp_path / "first")
    values = recipe("sit").to_dict()
    values["model"] = {"weights": str(first.model)}
    from vtok_ext.training.recipe_file import recipe_from_dict

    second = train(recipe_from_dict(values), tmp_path / "second")
    old, new = vt.load_generator(first.model), vt.load_generator(second.model)
    assert torch.equal(old.statistics.mean["grid"], new.statistics.mean["grid"])
    assert not torch.equal(old.blocks[0].mlp.fc1.weight, new.blocks[0].mlp.fc1.weight)


@pytest.mark.parametrize("cache", ["false", "true"])
def test_planes_of_coordtok(cache, recipe, tmp_path):
    tiny_coordtok().save_pretrained(tmp_path / "tokenizer")
    folder = [f"latent.tokenizer={tmp_path / 'tokenizer'}", f"latent.cache={cache}"]
    result = train(recipe("sit", *folder, "data.num_frames=8", "run.steps=2"), tmp_path / "run")
    model = vt.load_generator(result.model)
    assert set(model.statistics.mean) == {"xy", "yt", "xt"} and model.config.latent == "triplane"
    made = model.sample(1, num_steps=2)
    with torch.no_grad():
        video = model.decode(vt.load_model(tmp_path / "tokenizer"), made)
    assert video.shape == (1, 3, 8, 16, 16)


def test_classes_are_folders(recipe, tmp_path, monkeypatch):
    for name, seed in (("boats/a.mp4", 1), ("cats/b.mp4", 2), ("cats/c.mp4", 3)):
        path = tmp_path / "clips" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with VideoWriter(path, height=16, width=16) as writer:
            writer.write(procedural_clip(6, 16, 16, seed=seed))
    clips = [
        f"data.folder={tmp_path / 'clips'}",
        f"data.validation_folder={tmp_path / 'clips'}",
        "latent.labels=folders",
        "model.overrides.class_dropout=0.2",
    ]
    two = ["model.overrides.num_classes=2", "data.fps=[24]", "run.sample_every=4"]
    shown = []
    with monkeypatch.context() as patched:
        sample = vt.models.SiT.sample
        patched.setattr(
            vt.models.SiT, "sample", lambda *a, **k: shown.append(k["labels"]) or sample(*a, **k)
        )
        result = train(recipe("sit", *clips, *two), tmp_path / "run")
    assert torch.cat(shown).tolist() == [0, 1], "pictures are of every class"
    model = vt.load_generator(result.model)
    assert model.origin.fps == 24
    made = model.sample(2, labels=torch.tensor([0, 1]), guidance=2.0, num_steps=2)
    assert made.shape[0] == 2
    with pytest.raises(ValueError, match="num_classes must be 2, the number of folders"):
        train(recipe("sit", *clips), tmp_path / "other")
    (tmp_path / "clips" / "boats" / "a.mp4").rename(tmp_path / "clips" / "a.mp4")
    with pytest.raises(ValueError, match="every file must lie in the folder of its class"):
        train(recipe("sit", *clips, "model.overrides.num_classes=2"), tmp_path / "third")


def test_losses_do_not_depend_on_how_a_step_is_divided(recipe, tmp_path):
    dropout = "model.overrides.class_dropout=0.5"
    train(recipe("sit", dropout), tmp_path / "a")
    train(recipe("sit", dropout, "run.batch_size=1", "run.accumulate=2"), tmp_path / "b")
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), rel=1e-4)


def test_a_sit_learns_more_than_the_mean(recipe, tmp_path):
    """A network that gives the mean velocity, -x0 + 0 on average, has a loss near 2 - 1 = 1 at
    best for latents of variance 1; what is learned of eight clips shows below it."""
    faster = ["run.steps=120", "optimizer.lr=3e-3", "run.batch_size=6", "latent.cache=true"]
    faster += ["model.overrides.hidden_size=32", "run.checkpoint_every=200"]
    train(recipe("sit", *faster, "data.validation_clips=0"), tmp_path / "run")
    course = losses(tmp_path / "run")
    assert sum(course[:5]) / 5 > 1.5 and sum(course[-20:]) / 20 < 0.9


@pytest.mark.parametrize(
    ("task", "overrides", "message"),
    [
        ("sit", ["latent.tokenizer=''"], "latent.tokenizer must be the folder of a tokenizer"),
        ("sit", ["latent.labels=folders"], "latent.labels must be none without files"),
        ("sit", ["latent.label=none"], "did you mean 'labels'"),
        ("sit", ["model.freeze=[encoder]"], "model.freeze must be empty for a generator"),
        ("sit", ["model.name=gpt_small"], "GPTConfig: field must be one of .* got 'latent'"),
        (
            "sit",
            ["model={weights: a.pt}"],
            "model.weights must be a folder, got a.pt; `vtok convert",
        ),
        ("sit", ["model.overrides.num_classes=2"], "num_classes must be 1 without latent.labels"),
        ("gpt", ["latent.cache=true", "data.num_workers=1"], "num_workers must be 0"),
        ("sit", ["model.overrides.num_heads=3"], "hidden_size must be a multiple"),
        ("gpt", ["optimizer.muon_lr=0.1"], "muon_lr must be null for a generator"),
    ],
)
def test_bad_recipes(task, overrides, message, recipe, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(recipe(task, *overrides), tmp_path / "run")


def test_tokenizers_of_the_wrong_kind(tokenizers, tmp_path):
    for task, other, message in (("sit", "gpt", "must be continuous"), ("gpt", "sit", "discrete")):
        wrong = load_recipe(task, [*OVERRIDES, f"latent.tokenizer={tokenizers[other]}"])
        with pytest.raises(ValueError, match=message):
            train(wrong, tmp_path / "run")


def test_noise_of_each_sample_is_its_own():
    sources = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    both = noise_like({"a": torch.zeros(2, 3)}, sources)["a"]
    one = noise_like({"a": torch.zeros(1, 3)}, [torch.Generator().manual_seed(4)])["a"]
    assert torch.equal(both[1:], one)
    with pytest.raises(ValueError, match="generator: must be one per sample of 3, got 2"):
        noise_like(torch.zeros(3, 1), sources)


@pytest.mark.slow
def test_a_small_generator_beats_latents_without_a_learned_prior(tmp_path):
    """The chain of bench/generation_study.py in small: a tokenizer, a generator on its latents,
    and KVD of 160 clips of each set."""
    from generation_study import main

    common = ["data.num_clips=640", "data.num_frames=5", "data.height=32", "data.width=32"]
    common += ["data.validation_clips=0", "run.log_every=100", "run.checkpoint_every=1000"]
    tokenizer = ["loss.perceptual_weight=0", "loss.discriminator=none", "loss.pixel=l2"]
    tokenizer += ["loss.learn_logvar=false", "optimizer.lr=1e-3", "run.steps=400"]
    tokenizer += ["run.batch_size=4", "model.overrides.ch_mult=[1,1,2,2]"]
    first = train(load_recipe("smoke_kl", [*common, *tokenizer]), tmp_path / "tokenizer")
    settings = [f"latent.tokenizer={first.model}", "latent.cache=true"]
    settings += ["model.overrides.hidden_size=128", "model.overrides.depth=3"]
    settings += ["model.overrides.num_heads=4", "optimizer.lr=1e-3", "optimizer.schedule=cosine"]
    settings += ["optimizer.warmup=30", "optimizer.clip=1.0", "optimizer.ema_decay=0.99"]
    settings += ["run.steps=700", "run.batch_size=32"]
    second = train(load_recipe("sit", [*common, *settings]), tmp_path / "generator")
    counts = ["--count", "160", "--training-clips", "640", "--steps", "40"]
    result = main([str(second.model), "--out", str(tmp_path / "study"), *counts])
    # Against the clips themselves the blur of such a tokenizer is all that KVD sees.
    against = "kvd to their reconstructions"
    kvd = {name: row[against][0] for name, row in result["sets"].items()}
    for prior in ("gaussian", "standard_normal", "untrained"):
        assert kvd["generator"] < kvd[prior], kvd
    near = result["nearest_training_clip"]
    # Copies of training clips would be nearer than what the tokenizer makes of unseen ones.
    assert near["generator"]["mean"] > 0.5 * near["reconstruction"]["mean"]
