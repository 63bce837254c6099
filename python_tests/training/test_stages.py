"""Trainings in stages, and VidTok's released files as recipes."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny_recipe import OVERRIDES

from vtok_ext.data.procedural import procedural_clip
from vtok_ext.data.video import VideoWriter
from vtok_ext.training.checkpoint import read_tensors, verify_checkpoint
from vtok_ext.training.loop import train
from vtok_ext.training.recipe import DataRecipe
from vtok_ext.training.recipe_file import load_recipe, load_stages
from vtok_ext.training.setup import held_out_clips
from vtok_ext.training.stages import stage_recipes, stages_done

# What the released files say, in their layout.
RELEASED = """\
model:
  base_learning_rate: 2e-5
  target: vidtok.models.autoencoder.AutoencodingEngine
  params:
    monitor: val/rec_loss
    ema_decay: 0.99
    is_causal: true
    encoder_config:
      target: vidtok.modules.model_3dcausal.EncoderCausal3DPadding
      params: {double_z: true, z_channels: 4, in_channels: 3, out_ch: 3, ch: 4,
               ch_mult: [1, 1, 1, 1], time_downsample_factor: 4, num_res_blocks: 1, dropout: 0.0,
               use_checkpoint: true, init_pad_mode: replicate, norm_type: layernorm,
               fix_encoder: false, fix_decoder: false}
    decoder_config:
      target: vidtok.modules.model_3dcausal.DecoderCausal3DPadding
      params: ${model.params.encoder_config.params}
    regularizer_config:
      target: vidtok.modules.regularizers.DiagonalGaussianRegularizer
    loss_config:
      target: vidtok.modules.losses.GeneralLPIPSWithDiscriminator
      params:
        dims: 3
        perceptual_weight: 0.0
        disc_start: 21
        disc_weight: 0.3
        disc_type: 3d
        learn_logvar: true
        gen_loss_cross_entropy: true
        lecam_loss_weight: 0.01
        regularization_weights: {'aux_loss': 2.0, 'kl_loss': 0.00001}
data:
  target: vidtok.data.datamodule.DataModuleFromConfig
  params:
    batch_size: 3
    num_workers: 0
    train:
      target: vidtok.data.vidtok.VidTokDataset
      params:
        data_dir: DATA_DIR_1
        video_params: {input_height: INPUT_HEIGHT_1, input_width: INPUT_WIDTH_1,
                       sample_num_frames: 5, sample_fps: 3}
    validation:
      params: {data_dir: DATA_DIR_2, start_index: 0}
lightning:
  modelcheckpoint: {params: {every_n_train_steps: 5000}}
  callbacks: {image_logger: {params: {disabled: false, batch_frequency: 5000, max_samples: 2}}}
  trainer: {precision: bf16-mixed, val_check_interval: 2000, max_epochs: 1000}
"""
PATHS = ["data.folder=null", "data.validation_folder=null", "data.fps=[]",
         "data.sampling=timestamps", "data.height=16", "data.width=16"]  # fmt: skip


@pytest.fixture
def released(tmp_path):
    path = tmp_path / "released.yaml"
    path.write_text(RELEASED)
    return path


def test_released_files_are_recipes(released):
    recipe = load_recipe(released, PATHS)
    assert recipe.model.name == str(released) and recipe.model.freeze == []
    loss, run, optimizer = recipe.loss, recipe.run, recipe.optimizer
    assert (loss.discriminator, loss.discriminator_start) == ("3d", 11)  # steps of two optimisers
    assert (loss.discriminator_weight, loss.lecam_weight) == (0.3, 0.01)
    assert (loss.aux_weight, loss.kl_weight, loss.perceptual_weight) == (2.0, 1e-5, 0.0)
    assert (optimizer.lr, optimizer.ema_decay, optimizer.clip) == (2e-5, 0.99, 20.0)
    assert (run.precision, run.batch_size, run.checkpoint_activations) == ("bfloat16", 3, True)
    assert (run.checkpoint_every, run.validate_every, run.sample_every) == (2500, 2000, 5000)
    assert recipe.data.num_frames == 5 and run.accumulate == 1
    released.write_text(RELEASED.replace("max_epochs", "accumulate_grad_batches: 2, max_epochs"))
    assert load_recipe(released, PATHS).run.accumulate == 2


def test_released_clips_follow_the_published_rule(released):
    released.write_text(
        RELEASED.replace("data_dir: DATA_DIR_1", "data_dir: A\n        meta_path: B")
    )
    data = load_recipe(released, PATHS[4:]).data
    assert (data.folder, data.root, data.fps, data.sampling) == ("B", "A", [3.0], "reference")
    assert (data.validation_folder, data.validation_fps) == ("DATA_DIR_2", None)


def test_released_files_without_a_list_have_a_folder_or_say_that_they_have_no_clips(released):
    """Procedural clips are never taken for a data set that is not named."""
    for nothing in ("null", '""'):
        own = f"data_dir: A\n        meta_path: {nothing}"
        text = RELEASED.replace("data_dir: DATA_DIR_1", own)
        released.write_text(text.replace("DATA_DIR_2,", "DATA_DIR_2, meta_path: null,"))
        data = load_recipe(released, PATHS[4:]).data
        assert (data.folder, data.root, data.validation_folder) == ("A", None, "DATA_DIR_2")
    released.write_text(RELEASED.replace("data_dir: DATA_DIR_1", "meta_path: null"))
    with pytest.raises(ValueError, match="meta_path or data_dir, .* got neither"):
        load_recipe(released, PATHS[4:])
    assert load_recipe(released, ["data.folder=mine", *PATHS[4:]]).data.folder == "mine"


def test_released_files_train(released, tmp_path):
    small = ["run.steps=1", "run.precision=float32", "data.num_clips=3", "data.validation_clips=0",
             "loss.discriminator_width=4", "run.batch_size=1"]  # fmt: skip
    result = train(load_recipe(released, [*PATHS, *small]), tmp_path / "run")
    assert result.step == 1 and result.model.is_dir()


def test_released_files_train_with_nothing_but_their_paths_and_sizes_filled_in(tmp_path):
    """Lists of videos below other roots, the published rule of sampling, bfloat16."""
    text = RELEASED.replace("disc_type: 3d", "disc_type: 2d")  # as in all released files
    for i, count in ((1, 4), (2, 8)):
        root = tmp_path / f"root {i}"
        root.mkdir()
        names = [f"{n}.mp4" for n in range(count)]
        for n, name in enumerate(names):
            with VideoWriter(root / name, height=32, width=40, fps=30) as writer:
                writer.write(procedural_clip(9, 32, 40, seed=n))
        (tmp_path / f"list {i}.csv").write_text("\n".join(["videos", *names]))
        own = f"data_dir: {root}, meta_path: {tmp_path / f'list {i}.csv'}"
        text = text.replace(
            f"data_dir: DATA_DIR_{i}", own if i == 2 else own.replace(", ", "\n        ")
        )
    text = text.replace("INPUT_HEIGHT_1", "32").replace("INPUT_WIDTH_1", "32")
    text = text.replace(
        "start_index: 0", "video_params: {input_height: 16, input_width: 24, sample_fps: 8}"
    )
    (tmp_path / "released.yaml").write_text(text.replace("max_epochs: 1000", "max_steps: 2"))
    recipe = load_recipe(tmp_path / "released.yaml")
    held_out = held_out_clips(recipe.data, pytest.fail)
    assert len(held_out) == 8 and held_out[0, 0].shape == (3, 5, 16, 24)
    result = train(recipe, tmp_path / "run", warn=pytest.fail)
    assert result.step == 1 and result.model.is_dir() and result.validation["psnr"] > 0


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("x: 0", "x: 0", r"data.height must be an integer, got 'INPUT_HEIGHT_1'"),
        ("fix_decoder: false", "fix_decoder: true", "fix_decoder must be false"),
        ("disc_type", "disc_typ", r"got 'disc_typ'; did you mean 'disc_type'"),
        ("dims: 3", "dims: 2", r"loss_config.params.dims must be 3, got 2"),
        ("ema_decay: 0.99", "ckpt_path: a.ckpt", r"ckpt_path must be absent: .*, got 'a.ckpt'"),
        ("bf16-mixed", "bf16-true", r"precision must be one of .*, got 'bf16-true'"),
    ],
)
def test_released_files_with_other_options(released, old, new, message):
    released.write_text(RELEASED.replace(old, new))
    with pytest.raises(ValueError, match=message):
        load_recipe(released, PATHS[:4])


@pytest.mark.parametrize("name", ["vidtok_two_stage", "smoke_two_stage"])
def test_two_stages(name):
    first, second = load_stages(name, ["optimizer.clip=7", "stages.1.run.steps=11"])
    assert first.model.freeze == [] and second.model.freeze == ["encoder"]
    assert second.data.height == 2 * first.data.height
    assert (first.optimizer.clip, second.optimizer.clip, second.run.steps) == (7.0, 7.0, 11)
    assert first.run.steps != 11
    with pytest.raises(ValueError, match="must have one stage for this, got 2"):
        load_recipe(name)
    for override in ("stages.2.x=1", "stages.2={}", "stages.one={}"):
        with pytest.raises(ValueError, match=f"stages must be numbered 0..1, got {override!r}"):
            load_stages(name, [override])
    with pytest.raises(ValueError, match="stages must be a list of sections, got "):
        load_stages(name, ["stages.0=3"])
    third, _ = load_stages(name, ["stages.0={run: {steps: 5}}"])
    assert third.run.steps == 5 and third.data.height == DataRecipe().height


def test_a_stage_begins_where_the_one_before_ended(tmp_path):
    """With its model and its discriminator; the frozen encoder stays as it is."""
    tiny = [o for o in OVERRIDES if "height" not in o and "width=16" not in o]
    short = ["run.steps=2", "loss.discriminator_start=0", "stages.0.data.height=16",
             "stages.0.data.width=16", "stages.1.data.height=32", "stages.1.data.width=32",
             "optimizer.discriminator_lr=0", "run.sample_every=0"]  # fmt: skip
    pairs = stage_recipes(load_stages("smoke_two_stage", [*tiny, *short]), tmp_path)
    notes = []
    for recipe, folder in pairs:
        train(recipe, folder, warn=notes.append)
    assert sum("the encoder is frozen" in note for note in notes) == 1
    before, after = (load_file(folder / "model/model.safetensors") for _, folder in pairs)
    same = {name.split(".")[0] for name, v in after.items() if torch.equal(v, before[name])}
    changed = {name.split(".")[0] for name, v in after.items() if not torch.equal(v, before[name])}
    assert "encoder" in same and changed == {"decoder"}

    weights = []
    for _, folder in pairs:
        into = {"loss.discriminator.main.0.weight": torch.zeros(4, 3, 3, 3, 3)}
        read_tensors(verify_checkpoint(folder / "checkpoints" / "step-00000002"), into)
        weights.append(into.popitem()[1])
    # With a learning rate of 0 it is the one that went on.
    assert weights[0].abs().sum() > 0 and torch.equal(*weights)


def test_a_scaled_start_is_that_of_the_first_stage(tmp_path):
    stages = load_stages("smoke_two_stage", ["model.start=scaled"])
    (first, _), (second, folder) = stage_recipes(stages, tmp_path)
    assert (first.model.start, second.model.start) == ("scaled", "published")
    assert second.model.weights == str(tmp_path / "stage-1" / "model")
    assert folder == tmp_path / "stage-2"


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        ("model.overrides={ch: 64}", "model.overrides"),
        ("model.name=vidtok_kl_causal_488_4chn", "model.name"),
        ("model.start=scaled", "model.start"),
        ("loss.continue_from=elsewhere", "loss.continue_from"),
        ("loss.discriminator=none", "loss.discriminator"),
        ("data.folder=absent", "data.folder"),
    ],
)
def test_a_later_stage_cannot_have_what_it_takes_from_the_first(setting, name, tmp_path):
    stages = load_stages("smoke_two_stage", [f"stages.1.{setting}"])
    with pytest.raises(ValueError, match=f"{name} of stage 2 must"):
        stage_recipes(stages, tmp_path)


def test_a_later_stage_may_have_a_pattern_of_tars(tmp_path):
    stages = load_stages("smoke_two_stage", ["data.folder=shards/*.tar", "data.validation_clips=0"])
    assert stage_recipes(stages, tmp_path)[1][0].data.folder == "shards/*.tar"


def test_a_resumed_stage_needs_no_checkpoints_of_the_one_before(tmp_path):
    """What it took over is in its own: log variance, LeCam averages and discriminator."""
    recipes = load_stages("smoke_two_stage", [*OVERRIDES, "run.steps=1", "run.sample_every=0"])
    pairs = stage_recipes(recipes, tmp_path)
    assert stages_done([folder for _, folder in pairs]) == 0
    for recipe, folder in pairs:
        train(recipe, folder, warn=lambda line: None)
    assert stages_done([folder for _, folder in pairs]) == 1
    shutil.rmtree(tmp_path / "stage-1" / "checkpoints")
    warnings = []
    assert train(*pairs[1], resume="auto", warn=warnings.append).resumed_from == 1
    assert not any("another recipe" in line for line in warnings)
    with pytest.raises(ValueError, match="loss.continue_from must hold a checkpoint"):
        train(pairs[1][0], tmp_path / "new", warn=warnings.append)


def test_nothing_to_go_on_from(tmp_path):
    _, (second, _) = stage_recipes(load_stages("smoke_two_stage"), tmp_path)
    with pytest.raises((ValueError, OSError), match="stage-1"):
        train(second, tmp_path / "stage-2")
