"""What is looked at before and beside a training: batches, dry runs, overfitting, samples."""

import sys
import types

import pytest
import torch
from tiny_recipe import tiny

from vtok_ext.data.clips import ProceduralClips
from vtok_ext.data.procedural import procedural_clip
from vtok_ext.training.clip_checks import check_clips, check_first_step, clips_of, frame_order
from vtok_ext.training.dry_run import dry_run
from vtok_ext.training.log_sinks import WandbSink
from vtok_ext.training.loop import train
from vtok_ext.training.overfit_check import OverfitCheck, four_clips, overfit_check
from vtok_ext.training.recipe_file import load_recipe
from vtok_ext.training.setup import build_task, build_training
from vtok_ext.training.task import MicroBatch
from vtok_ext.training.training_memory import saved_bytes

CPU = torch.device("cpu")


def batch(seeds=(0, 1), num_frames=9):
    return torch.stack([procedural_clip(num_frames, 32, 32, seed=seed) for seed in seeds])


def test_batches_of_video_pass():
    clips = batch()
    assert check_clips(clips) == [] and frame_order(clips) < 0.7
    nested = {"a": (clips, torch.zeros(2)), "b": [clips.float()]}
    assert [found is clips for found in clips_of(nested)] == [True]


def test_batches_that_are_wrong():
    clips = batch()
    with pytest.raises(
        ValueError, match=r"clips must be \[B, 3, T, H, W\], got \[2, 9, 3, 32, 32\]"
    ):
        check_clips(clips.transpose(1, 2))
    with pytest.raises(TypeError, match="clips must be uint8, got torch.float32"):
        check_clips(clips.float())
    order = torch.tensor([4, 0, 7, 2, 8, 3, 6, 1, 5])
    assert "out of order" in check_clips(clips[:, :, order])[0]
    clips[1] = 7
    assert "clips [1] of the first batch have a single colour" in check_clips(clips)[0]


def test_the_range_is_that_of_a_whole_first_step():
    """A black clip is part of many videos; clips in [0, 1] are black all over."""
    clips = batch()
    small, black = (clips.float() / 255).round().to(torch.uint8), torch.zeros_like(clips)
    for parts, largest in (([small], 1), ([black, small], 1), ([[black], [black]], 0)):
        with pytest.raises(ValueError, match=rf"values in 0..255, got 0..{largest} in the whole"):
            check_first_step(parts)
        check_first_step(parts, resumed=True)
    for parts in ([black, clips], [small, clips]):
        check_first_step(parts)
    assert "clips [0, 1] of the first batch" in check_first_step([black, clips])[0]
    assert check_first_step([torch.zeros(2, 3)]) == []  # latents have a range of their own


def test_a_black_first_clip_ends_no_run(tmp_path, monkeypatch):
    """The first of two micro-batches, and, resumed, the whole step."""
    monkeypatch.setattr(ProceduralClips, "__getitem__", black_until(1))
    plain = ["loss.discriminator=none", "loss.perceptual_weight=0", "run.batch_size=1"]
    recipe = tiny(*plain, "run.accumulate=2", "run.steps=1")
    warnings = []
    assert train(recipe, tmp_path, warn=warnings.append).step == 1
    assert any("a single colour everywhere" in line for line in warnings)
    monkeypatch.setattr(ProceduralClips, "__getitem__", black_until(99))
    with pytest.raises(ValueError, match="got 0..0 in the whole first step"):
        train(recipe, tmp_path / "other", warn=warnings.append)
    recipe = tiny(*plain, "run.accumulate=2", "run.steps=2")
    assert train(recipe, tmp_path, resume="auto", warn=warnings.append).step == 2


def black_until(count):
    """Returns a `__getitem__` whose first `count` clips of training data are black."""
    get, calls = ProceduralClips.__getitem__, []

    def changed(clips, place):
        clip = get(clips, place)
        if len(clips) == 1:  # held out
            return clip
        calls.append(place)
        return clip if len(calls) > count else torch.zeros_like(clip)

    return changed


def test_dry_run_counts():
    small = ["loss.discriminator_start=0", "loss.perceptual_weight=0"]
    recipe = tiny("run.batch_size=2", *small)
    found = dry_run(recipe, CPU)
    parts = {name: (count, trained) for name, count, trained in found.parameters}
    assert (
        parts["loss"] == (1, 1) and parts["loss.discriminator"][0] == parts["loss.discriminator"][1]
    )
    assert found.memory["gradients"] == 4 * sum(trained for _, trained in parts.values())
    assert found.memory["optimizer"] == 2 * found.memory["gradients"]
    assert found.picture.shape == (3, 2 * 16, 5 * 16) and found.samples_per_step == 2
    muon = dry_run(tiny("run.batch_size=2", "optimizer.muon_lr=0.01", *small), CPU)
    assert 1 < muon.memory["optimizer"] / found.memory["gradients"] < 1.9  # most are matrices
    larger = dry_run(tiny("run.batch_size=4", *small), CPU)
    growth = larger.memory["activations"] / found.memory["activations"]
    assert 1.8 < growth <= 2.01


def test_dry_run_counts_what_autograd_keeps():
    """Without LPIPS and discriminator, as a real step saves it."""
    recipe = tiny("loss.discriminator=none", "loss.perceptual_weight=0")
    training = build_training(recipe, CPU)
    data = batch(num_frames=5)[:, :, :, :16, :16].contiguous()
    seen = []
    with saved_bytes(training.task.modules["model"]) as count:
        training.task.accumulate(
            MicroBatch(data, 0, range(2), 0), lambda loss: seen.append(count.total)
        )
    assert dry_run(recipe, CPU).memory["activations"] == pytest.approx(seen[0], rel=0.02)


def test_frozen_parts_have_no_gradients_and_say_so():
    found = dry_run(tiny("model.freeze=[encoder]"), CPU)
    parts = {name: trained for name, _, trained in found.parameters}
    assert parts["model.encoder"] == 0 < parts["model.decoder"]
    assert found.notes == [
        "the encoder is frozen: of the loss stay pixel loss, LPIPS, log variance, adversarial "
        "terms from batch 2 on; kl_loss is a constant and not computed"
    ]


def test_the_rule_of_overfitting():
    def check(psnr):
        return OverfitCheck(psnr, 1, 1.0, torch.zeros(0), torch.zeros(0))

    good = check([[30.0 if a == b else 15.0 for b in range(4)] for a in range(4)])
    assert good.passed and (good.least_psnr, good.least_margin) == (30, 15)
    one_picture = check([[18.0, 17.0, 16.0, 15.0]] * 4)
    assert not one_picture.passed
    with pytest.raises(ValueError, match=r"got 80.0 dB between clips 1 and 0"):
        four_clips(_Same())


class _Same:
    def __len__(self):
        return 1

    def __getitem__(self, place):
        return procedural_clip(1, 8, 8)


def waves(frames, size):
    """Four clips that any tokenizer can learn: waves of other phases and directions."""
    t, y, x = torch.meshgrid(*map(torch.arange, (frames, size, size)), indexing="ij")
    phase = torch.arange(4.0).view(4, 1, 1, 1, 1) * 1.6 + torch.arange(3.0).view(3, 1, 1, 1)
    slope = torch.tensor([1.0, -1.0, 1.0, -1.0]).view(4, 1, 1, 1, 1) * y / size
    waves = torch.sin(phase + 4 * slope + 3.2 * x / size + 1.6 * t / frames)
    return ((waves + 1) * 127.5).to(torch.uint8)


SIZE_16 = ["data.num_frames=5", "data.height=16", "data.width=16"]
VTOK = ["clips=clips", "model.overrides.image_size=16", "model.overrides.stride=1"]


@pytest.mark.parametrize(
    "recipe, overrides, steps",
    [
        ("promag_base", [*SIZE_16, "model.overrides.ch=8", "loss.discriminator=none"], 80),
        pytest.param("smoke_coordtok", [], 800, marks=pytest.mark.slow),
        pytest.param("smoke_vtok", [*SIZE_16, *VTOK], 1500, marks=pytest.mark.slow),
    ],
)
def test_every_kind_of_tokenizer_learns_four_clips(recipe, overrides, steps):
    torch.manual_seed(0)
    task = build_task(load_recipe(recipe, overrides), CPU)
    data = task.recipe.data
    check = overfit_check(task, waves(data.num_frames, data.height), steps)
    assert check.steps == steps and check.passed, check.psnr


def test_samples_and_logs_on_schedule(tmp_path, monkeypatch):
    """TensorBoard really, Weights & Biases as far as its interface is called."""
    pytest.importorskip("tensorboard")
    calls = []
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append((step, sorted(values))),
        finish=lambda: calls.append("finish"),
    )
    fake = types.SimpleNamespace(
        init=lambda **options: calls.append(options) or run, Image=lambda array: array.shape
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    plain = ["loss.discriminator=none", "loss.perceptual_weight=0", "run.steps=2"]
    loggers = ["run.loggers=[tensorboard,wandb]", "run.sample_every=2", "run.sample_clips=1"]
    train(tiny(*plain, *loggers), tmp_path)
    names = sorted(p.name for p in (tmp_path / "samples" / "step-00000002").iterdir())
    assert names == ["clip-0.mp4", "clip-0.png"]
    assert calls[0]["resume"] == "allow" and calls[0]["config"]["run"]["steps"] == 2
    assert (1, calls[1][1]) == calls[1] and "train/loss" in calls[1][1]
    assert (2, ["samples/clip-0"]) in calls and calls[-1] == "finish"
    WandbSink(tmp_path, 0, {})
    assert calls[-1]["id"] == calls[0]["id"]

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/loss")] == [1, 2]
    assert [e.step for e in events.Images("samples/clip-0")] == [2]


def test_samples_of_no_held_out_clips_are_missed_aloud(tmp_path):
    warnings = []
    plain = ["loss.discriminator=none", "loss.perceptual_weight=0", "run.steps=2"]
    recipe = tiny(*plain, "run.sample_every=1", "data.validation_clips=0")
    train(recipe, tmp_path, warn=warnings.append)
    expected = ["run.sample_every is 1, but there are no held-out clips to show"]
    assert [line for line in warnings if "sample_every" in line] == expected


def test_an_absent_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"'wandb', which is absent; pip install"):
        WandbSink(tmp_path, 0, {})
