"""Task "points": CoordTok trained by the engine."""

import pytest
import torch
from safetensors.torch import load_file

import vtok_ext as vt
from vtok_ext.data.procedural import procedural_clip
from vtok_ext.data.video import VideoWriter
from vtok_ext.training.loop import train
from vtok_ext.training.point_clips import PointClips
from vtok_ext.training.recipe_file import load_recipe
from vtok_ext.training.run_log import read_log
from vtok_ext.training.setup import build_training
from vtok_ext.training.step import Stepper

TINY = [
    "model.overrides.video_shape=[8,16,16]",
    "model.overrides.enc_embed_dim=16",
    "model.overrides.dec_embed_dim=16",
    "model.overrides.enc_patch_size=[4,8,8]",
    "model.overrides.latent_resolution=[4,4,4]",
    "model.overrides.latent_patch_size=[2,2,2]",
    "data.num_frames=8",
    "data.min_frames=3",
    "data.height=16",
    "data.width=16",
    "data.num_clips=6",
    "data.validation_clips=1",
    "loss.num_points=20",
    "run.steps=4",
    "run.checkpoint_every=2",
    "run.validate_every=4",
]
FRAMES = ["loss.sampling=frames", "loss.num_points=32", "loss.perceptual_weight=1.0"]
FRAMES += ["loss.perceptual_network=random"]

PAIRS = "model.overrides.dec_patch_size=[2,8,8]"


def tiny(*overrides):
    return load_recipe("smoke_coordtok", [*TINY, *overrides])


def test_a_run_leaves_a_model_that_loads(tmp_path):
    result = train(tiny(), tmp_path)
    assert result.step == 4 and result.validation["psnr"] > 0
    model = vt.load_model(result.model)
    assert model.config.video_shape == (8, 16, 16)
    clip = torch.zeros(1, 3, 5, 16, 16)
    assert model(clip).reconstruction.shape == clip.shape


def test_second_step_goes_on_from_the_first(tmp_path, monkeypatch):
    """The smoke recipes, shortened: the weights of the folder, a new optimizer, whole frames."""
    monkeypatch.setattr("vtok_ext.training.tokenizer_task._RANDOM_LPIPS_CHANNELS", (4,) * 5)
    short = ["run.steps=3", "run.validate_every=3", "data.validation_clips=1"]
    first = train(load_recipe("smoke_coordtok", short), tmp_path / "step1")
    recipe = load_recipe("smoke_coordtok_frames", [*short, f"model.weights={first.model}"])
    start = build_training(recipe, torch.device("cpu"))
    weights = load_file(first.model / "model.safetensors")
    assert all(torch.equal(v, weights[k]) for k, v in start.task.model.state_dict().items())
    assert not start.optimizers["model"].state
    second = train(recipe, tmp_path / "step2")
    line = next(line for line in read_log(tmp_path / "step2" / "log.jsonl") if "loss" in line)
    assert line["perceptual_loss"] > 0 and second.validation["psnr"] > 0
    trained = load_file(second.model / "model.safetensors")
    assert all(not torch.equal(v, weights[k]) for k, v in trained.items() if v.is_floating_point())
    assert vt.load_model(second.model).config == start.task.model.config


@pytest.mark.parametrize(
    "extra",
    [[], [*FRAMES, "loss.perceptual_dropout=0.5"]],
    ids=["patches", "frames"],
)
def test_a_resumed_run_gives_the_very_numbers_of_one_that_was_not(extra, tmp_path, monkeypatch):
    monkeypatch.setattr("vtok_ext.training.tokenizer_task._RANDOM_LPIPS_CHANNELS", (4,) * 5)
    settings = [*extra, "run.log_every=1", "optimizer.ema_decay=0.9"]
    whole = train(tiny(*settings), tmp_path / "whole")
    train(tiny(*settings, "run.steps=2"), tmp_path / "parts")
    parts = train(tiny(*settings), tmp_path / "parts", resume="auto", warn=lambda line: None)
    assert parts.resumed_from == 2 and parts.validation == whole.validation
    courses = [
        [(line["step"], line["loss"]) for line in read_log(run / "log.jsonl") if "loss" in line]
        for run in (tmp_path / "parts", tmp_path / "whole")
    ]
    assert len(courses[0]) == 4 and courses[0] == courses[1]
    for folder, file in ((parts.model, "model"), (parts.checkpoint, "part-0")):
        ours = load_file(folder / f"{file}.safetensors")
        twin = tmp_path / "whole" / folder.relative_to(tmp_path / "parts")
        theirs = load_file(twin / f"{file}.safetensors")
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize(
    "extra", [[], FRAMES, ["optimizer.muon_lr=0.02"]], ids=["patches", "frames", "muon"]
)
def test_the_loss_falls_on_one_batch(extra, monkeypatch):
    overrides = ["run.batch_size=2", "optimizer.lr=3e-3", "optimizer.warmup=0", "data.min_frames=8"]
    if extra is FRAMES:  # LPIPS wants pictures of 16 pixels or more
        monkeypatch.setattr("vtok_ext.training.tokenizer_task._RANDOM_LPIPS_CHANNELS", (4,) * 5)
    training = build_training(tiny(*overrides, "run.steps=60", *extra), torch.device("cpu"))
    clips, _ = training.task.data(print)
    items = [clips[0, i] for i in range(2)]
    batch = {name: torch.stack([item[name] for item in items]) for name in items[0]}
    step = Stepper(training)
    losses = [step([batch])["loss"] for _ in range(60)]
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


@pytest.mark.parametrize(
    "extra",
    [[], [*FRAMES, "loss.perceptual_dropout=0.5"]],
    ids=["patches", "frames"],
)
def test_points_and_dropout_depend_on_the_sample_alone(extra, monkeypatch):
    """Two clips, one of a single frame, at once, and one after the other: the same points, hence
    the same gradient."""
    monkeypatch.setattr("vtok_ext.training.tokenizer_task._RANDOM_LPIPS_CHANNELS", (4,) * 5)
    found = []
    for accumulate in (1, 2):
        torch.manual_seed(accumulate)
        recipe = tiny(*extra, f"run.accumulate={accumulate}", f"run.batch_size={2 // accumulate}")
        training = build_training(recipe, torch.device("cpu"))
        clips, _ = training.task.data(print)
        items = [clips[0, i] for i in range(2)]
        items[1]["num_frames"] = torch.tensor(1)
        parts = [items] if accumulate == 1 else [[item] for item in items]
        batches = [{k: torch.stack([i[k] for i in part]) for k in items[0]} for part in parts]
        found.append(Stepper(training)(batches))
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-5)
    assert found[0]["grad_norm"] == pytest.approx(found[1]["grad_norm"], rel=1e-4)


def test_lengths_are_a_function_of_the_place():
    class Zeros:
        def __len__(self):
            return 50

        def __getitem__(self, place):
            return torch.zeros(3, 8, 4, 4, dtype=torch.uint8)

    clips = PointClips(Zeros(), 3, 8, seed=1)
    lengths = [[int(clips[e, i]["num_frames"]) for i in range(50)] for e in range(2)]
    again = [int(clips[1, i]["num_frames"]) for i in range(50)]
    assert set(lengths[0]) == set(range(3, 9)) and lengths[1] == again and lengths[0] != again


def test_short_files_are_padding_that_the_model_knows_about(tmp_path):
    for name, length in (("a.mp4", 12), ("b.mp4", 4), ("c.mp4", 2)):
        with VideoWriter(tmp_path / name, height=16, width=16) as writer:
            writer.write(procedural_clip(length, 16, 16, seed=length))
    folder = [f"data.folder={tmp_path}", "data.validation_clips=0", "data.shortest_video=3"]
    recipe = tiny(*folder, "data.min_frames=null")
    clips, _ = build_training(recipe, torch.device("cpu")).task.data(lambda line: None)
    assert [int(clips[0, i]["num_frames"]) for i in range(len(clips))] == [8, 4]
    shorter, _ = build_training(tiny(*folder), torch.device("cpu")).task.data(lambda line: None)
    lengths = {tuple(int(shorter[e, i]["num_frames"]) for i in (0, 1)) for e in range(30)}
    assert {a for a, _ in lengths} == set(range(3, 9)) and {b for _, b in lengths} == {3, 4}
    result = train(recipe, tmp_path / "run", warn=lambda line: None)
    assert result.step == 4


@pytest.mark.parametrize("mask", ["additive", "true"])
def test_padding_frames_do_not_matter(mask):
    """What lies after the real frames changes neither loss nor gradient."""
    found = []
    for fill in (0, 200):
        recipe = tiny(f"model.overrides.padding_mask={mask}")  # YAML reads a boolean
        training = build_training(recipe, torch.device("cpu"))
        clips, _ = training.task.data(print)
        item = {**clips[0, 0], "num_frames": torch.tensor(5)}
        item["video"] = item["video"].clone()
        item["video"][:, 5:] = fill
        found.append(Stepper(training)([{name: value[None] for name, value in item.items()}]))
    assert found[0] == found[1]


def test_validation_runs_outside_autocast():
    found = []
    for precision in ("float32", "bfloat16"):
        training = build_training(tiny(f"run.precision={precision}"), torch.device("cpu"))
        _, held_out = training.task.data(print)
        with torch.no_grad():
            found.append(training.task.validate(held_out))
    assert found[0] == found[1]


def test_recomputed_encoder_gives_the_same_step():
    found = []
    for flag in ("false", "true"):
        recipe = tiny(f"model.recompute_encoder={flag}")
        training = build_training(recipe, torch.device("cpu"))
        clips, _ = training.task.data(print)
        item = clips[0, 0]
        found.append(Stepper(training)([{name: value[None] for name, value in item.items()}]))
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_published_recipes_are_readable():
    first, second = load_recipe("coordtok_patches"), load_recipe("coordtok_frames")
    assert (first.loss.num_points, second.loss.num_points) == (1024, 4096)
    assert second.loss.perceptual_weight == 1.0 and second.model.weights == "step1/model"
    assert (first.data.shortest_video, second.data.shortest_video) == (1, 16)
    for recipe in (first, second):
        run = recipe.run
        assert run.batch_size * run.accumulate * 8 == 256
        assert recipe.data.resize == "bicubic"
        assert recipe.optimizer.weight_decay == 1e-3 and recipe.optimizer.lr == 1e-4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.name=vidtok_kl_causal_488_4chn", "model must be a CoordTok"),
        ("data.height=32", "data must have clips of 16x16 and at most 8 frames"),
        ("data.min_frames=9", r"data.min_frames must be null or in 1..8, got 9"),
        ("data.shortest_video=3", "data.shortest_video must be null without data.folder, got 3"),
        ("loss.perceptual_network=random", 'loss.perceptual_network must be "published" with loss'),
        ("loss.perceptual_heads=vgg.pth", "loss.perceptual_heads must be null with loss.perceptu"),
        ("optimizer.discriminator_lr=1", "optimizer.discriminator_lr must be null for task 'po"),
        ("data.shortest_video=9", r"data.shortest_video must be null or in 1..8, got 9"),
        (
            ["data.folder=x", "data.buckets=[[8,16,16]]"],
            r"data.buckets must be \[\] for task 'points'",
        ),
        ("model.freeze=[encoder]", "model.freeze must be empty for task 'points'"),
        ("loss.validation_slices=0", "loss.validation_slices must be >= 1, got 0"),
        (
            "loss.validation_slices=129",
            "loss.validation_slices must be <= 128, the patches of",
        ),
        ([PAIRS, "data.min_frames=1"], "data.min_frames must be >= 2, the frames of a decoded pa"),
        (
            [PAIRS, "data.folder=x", "data.shortest_video=1"],
            "data.shortest_video must be >= 2, .* got 1",
        ),
        ([PAIRS, "data.min_frames=null", "data.num_frames=1"], "data.num_frames must be >= 2"),
        ("loss.num_point=3", "did you mean 'num_points'"),
    ],
)
def test_recipes_that_do_not_fit(override, message):
    with pytest.raises(ValueError, match=message):
        extra = ["model.overrides={}"] if "vidtok" in override else []
        overrides = [override] if isinstance(override, str) else override
        build_training(tiny(*overrides, *extra), torch.device("cpu"))
