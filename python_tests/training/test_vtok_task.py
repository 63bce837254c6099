"""VTok's trainings on the common loop: recipes, what they export, resuming, bad recipes."""

import json

import pytest
import torch
from helpers import import_or_skip
from safetensors.torch import load_file
from test_several_processes import run_two

import vtok_ext as vt
from vtok_ext.layers.transformer import TransformerBlock
from vtok_ext.models.vtok_decoder import DecoderBlock
from vtok_ext.models.vtok_lm import VTokLM
from vtok_ext.training.blocks import blocks
from vtok_ext.training.loop import train
from vtok_ext.training.recipe_file import load_recipe
from vtok_ext.training.vtok_task import build_vtok

SMALL = [
    "model.overrides.image_size=16",
    "model.overrides.encoder_depth=1",
    "model.overrides.decoder_depth=1",
    "data.num_clips=8",
    "data.height=16",
    "data.width=16",
    "data.validation_clips=1",
    "run.batch_size=2",
    "run.steps=4",
    "run.checkpoint_every=2",
    "run.validate_every=4",
    "optimizer.warmup=0",
]


def run(name, folder, *overrides, **options):
    return train(load_recipe(name, [*SMALL, *overrides]), folder, warn=lambda line: None, **options)


def losses(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}


def validation(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    found = [line for line in lines if line["kind"] == "validation"][-1]
    return {name: found[name] for name in ("rec_loss", "psnr", "under_loss") if name in found}


def test_encoder_then_tokenizer_then_unified_model(tmp_path):
    """The three trainings hand their results on."""
    first = run("smoke_vtok_encoder", tmp_path / "encoder")
    assert first.validation["mae_loss"] > 0
    trained = vt.load_model(first.model)
    second = run("smoke_vtok", tmp_path / "vtok", f"encoder={first.model}")
    tokenizer = vt.load_model(second.model)
    for ours, theirs in zip(
        tokenizer.encoder.parameters(), trained.encoder.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs)
    assert {"psnr", "rec_loss"} <= set(second.validation)
    # Features are standardised before the tokens are trained, and never again.
    assert (trained.feature_deviation == 1).all() and (tokenizer.feature_deviation != 1).all()
    import_or_skip("transformers")
    third = run(
        "smoke_vtok_lm",
        tmp_path / "lm",
        "model.name=null",
        "model.overrides={}",
        f"model.weights={second.model}",
    )
    assert 0 <= third.validation["accuracy"] <= 1
    model = VTokLM.from_pretrained(str(third.model))
    assert torch.equal(model.tokenizer.encoder.embed.weight, trained.encoder.embed.weight)
    assert (model.token_deviation != 1).any()
    assert torch.equal(model.tokenizer.feature_deviation, tokenizer.feature_deviation)
    assert model.config.fps == 8
    # What comes without statistics gets them, and another encoder its own.
    bare = ("model.name=null", "model.overrides={}", f"model.weights={first.model}")
    for settings in (bare, (*bare[:2], f"model.weights={second.model}", f"encoder={first.model}")):
        again = vt.load_model(run("smoke_vtok", tmp_path / str(len(settings)), *settings).model)
        assert torch.equal(again.feature_deviation, tokenizer.feature_deviation)


@pytest.mark.parametrize("name", ["smoke_vtok", "smoke_vtok_lm"])
def test_resumed_run_has_the_numbers_of_a_whole_one(tmp_path, name):
    if name == "smoke_vtok_lm":
        import_or_skip("transformers")
    run(name, tmp_path / "whole")
    # A constant learning rate: that of a shorter run must not end earlier.
    run(name, tmp_path / "whole2", "optimizer.schedule=constant")
    run(name, tmp_path / "cut", "optimizer.schedule=constant", "run.steps=2")
    run(name, tmp_path / "cut", "optimizer.schedule=constant", resume="auto")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole2")


@pytest.mark.parametrize("name", ["smoke_vtok", "smoke_vtok_encoder", "smoke_vtok_lm"])
def test_muon_is_not_ignored(tmp_path, name):
    if name == "smoke_vtok_lm":
        import_or_skip("transformers")
    steps = ["run.steps=2", "optimizer.schedule=constant"]
    run(name, tmp_path / "adam", *steps)
    run(name, tmp_path / "muon", *steps, "optimizer.muon_lr=0.02")
    adam, muon = losses(tmp_path / "adam"), losses(tmp_path / "muon")
    assert adam[1] == muon[1] and adam[2] != muon[2]


@pytest.mark.parametrize("name", ["smoke_vtok", "smoke_vtok_encoder"])
def test_loss_does_not_depend_on_micro_batches(tmp_path, name):
    """All hidden patches of a micro-batch were drawn from its first sample's generator."""
    run(name, tmp_path / "one", "run.steps=1")
    run(name, tmp_path / "two", "run.steps=1", "run.batch_size=1", "run.accumulate=2")
    one, two = losses(tmp_path / "one")[1], losses(tmp_path / "two")[1]
    assert one == pytest.approx(two, rel=1e-4)


def test_blocks_of_the_decoder_are_recomputed(tmp_path):
    """They keep most of what a step keeps; only the frozen encoder's were found."""
    model = build_vtok(load_recipe("smoke_vtok", SMALL))
    found = blocks(model)
    assert [type(block) for block in found] == [TransformerBlock, DecoderBlock]
    run("smoke_vtok", tmp_path / "kept", "run.steps=2")
    run("smoke_vtok", tmp_path / "again", "run.steps=2", "run.checkpoint_activations=true")
    assert losses(tmp_path / "again") == pytest.approx(losses(tmp_path / "kept"), rel=1e-5)


@pytest.mark.parametrize("name", ["vtok_encoder", "vtok", "vtok_lm"])
def test_recipes_for_use_are_valid(name):
    recipe = load_recipe(name)
    assert recipe.task == name and recipe.model.name == "vtok_small"


@pytest.mark.parametrize(
    "name, override, message",
    [
        ("smoke_vtok", "clips=films", "clips must be one of"),
        ("smoke_vtok", "model.name=vidtok_kl_causal_488_4chn", "model must be a VTok|field must"),
        ("smoke_vtok_lm", "unified.questions=[taste]", "unified.questions must be among"),
        ("smoke_vtok_lm", "unified.head=gmm", "unified.head must be one of"),
        ("smoke_vtok_lm", "clips=clips", "clips must be 'captioned' for vtok_lm"),
        ("smoke_vtok", "run.parallel=fsdp optimizer.muon_lr=0.02", "null with run.parallel fsdp"),
        ("smoke_vtok_encoder", "fps=0", "fps must be null or positive"),
        ("smoke_vtok", "data.num_frames=9", "num_frames must be >= 24"),
        ("smoke_vtok", "data.folder=x", "data.folder must be null, or clips 'clips', got 'x'"),
        ("smoke_vtok_lm", "data.motion=erratic", "data.motion must be its default, or clips"),
        ("smoke_vtok", "model.freeze=[encoder]", r"model.freeze must be \[\] for VTok"),
        ("smoke_vtok_lm", "unified.questions=[blink,reversal]", "a kind that clips of one shape"),
        ("smoke_vtok_lm", "model.overrides.key_frame=auto", "the first frame as key and no cuts"),
    ],
)
def test_bad_recipes(tmp_path, name, override, message):
    with pytest.raises(ValueError, match=message):
        run(name, tmp_path / "run", *override.split())


def test_divided_parameters(tmp_path):
    """FSDP2 has the losses of DDP and the same held-out clips: what was validated called the
    network's methods, past the hooks that gather its weights. With one clip each, often only one
    of two processes makes a video with the unified model."""
    import_or_skip("transformers")
    names, ways = ("smoke_vtok", "smoke_vtok_lm"), ("ddp", "fsdp")
    small = [*SMALL, "optimizer.schedule=constant", "run.batch_size=1", "--device", "cpu"]
    run_two(
        *(
            ["train", name, *small, f"run.parallel={way}", "-o", tmp_path / way / name]
            for name in names
            for way in ways
        )
    )
    for name in names:
        copied, divided = (tmp_path / way / name for way in ways)
        expected = losses(copied)
        assert len(expected) == 4 and losses(divided) == pytest.approx(expected, rel=1e-3)
        measured = [validation(folder) for folder in (divided, copied)]
        assert measured[0] == pytest.approx(measured[1], rel=1e-3)
        ours, theirs = (load_file(f / "model" / "model.safetensors") for f in (divided, copied))
        for key, value in theirs.items():
            torch.testing.assert_close(ours[key], value, rtol=1e-2, atol=1e-4)


def test_two_processes(tmp_path):
    """With one clip each, so that a process often has a single task of the unified model."""
    import_or_skip("transformers")
    overrides = [*SMALL, "optimizer.schedule=constant", "run.steps=6"]
    names = ("smoke_vtok", "smoke_vtok_lm")
    calls = [
        ["train", name, *overrides, "run.batch_size=1", "-o", tmp_path / name, "--device", "cpu"]
        for name in names
    ]
    run_two(*calls)
    run("smoke_vtok", tmp_path / "one", "optimizer.schedule=constant", "run.steps=6")
    assert losses(tmp_path / "smoke_vtok") == pytest.approx(losses(tmp_path / "one"), rel=2e-3)
    assert len(losses(tmp_path / "smoke_vtok_lm")) == 6
    assert VTokLM.from_pretrained(str(tmp_path / "smoke_vtok_lm" / "model"))
