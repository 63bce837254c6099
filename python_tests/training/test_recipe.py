"""Recipes: built-in ones load, wrong keys and values are named."""

import math

import pytest

from vtok_ext.training.recipe import OptimizerRecipe
from vtok_ext.training.recipe_file import list_recipes, load_recipe, load_stages, recipe_from_dict


@pytest.mark.parametrize("name", list_recipes())
def test_built_in_recipes_survive_being_written(name):
    missing = ["latent.tokenizer=folder"] if name in ("gpt", "sit") else []
    for recipe in load_stages(name, missing):
        assert recipe_from_dict(recipe.to_dict()) == recipe


def test_smoke_recipes_are_there():
    assert {"smoke_fsq", "smoke_kl", "smoke_two_stage", "vidtok", "vidtok_two_stage"} <= set(
        list_recipes()
    )


def test_file_and_overrides(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("model: {name: vidtok_kl_causal_488_4chn}\noptimizer: {lr: 2e-5}\n")
    recipe = load_recipe(path, ["run.steps=12", "model.overrides.ch=8", "optimizer.clip=1"])
    assert (recipe.optimizer.lr, recipe.run.steps) == (2e-5, 12)
    assert recipe.model.overrides == {"ch": 8}
    assert isinstance(recipe.optimizer.clip, float)
    assert recipe.loss.discriminator_start == 10001  # VidTok's settings are the defaults


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.step=3", r"key must be one of run.steps, .*, got 'run.step'; did you mean 'steps'"),
        ("losses.pixel=l1", r"got 'losses'; did you mean 'loss'"),
        ("run.steps=many", r"run.steps must be an integer, got 'many'"),
        ("run.steps=0", r"run.steps must be >= 1, got 0"),
        ("run.seed=-1", r"run.seed must be >= 0, got -1"),
        ("run.seed=9223372036854775808", r"run.seed must be < 2\*\*63, got 9223372036854775808"),
        ("run.compile=1", r"run.compile must be true or false, got 1"),
        ("loss.pixel=l3", r"loss: pixel must be one of .*, got 'l3'"),
        ("model.freeze=[decoder]", r"model.freeze must be among \('encoder',\), got 'decoder'"),
        ("model.weights=folder", r"one of model.name and model.weights must be given"),
        ("optimizer.betas=[0.9]", r"optimizer.betas must be two numbers in \[0, 1\), got \[0.9\]"),
        ("optimizer.ema_decay=1.0", r"optimizer.ema_decay must be null or in \[0, 1\), got 1.0"),
        ("run.precision=float8", r"run.precision must be one of .*, got 'float8'"),
        ("run.parallel=fsdp2", r"run.parallel must be one of .*, got 'fsdp2'"),
        ("task=tokeniser", r"task must be one of .*, got 'tokeniser'; did you mean 'tokenizer'"),
        ("run", r"an override must be section.key=value, got 'run'"),
        ("run=3", r"run must be a section, got 3"),
        ("data.validation_size=[8]", r"data.validation_size must be \[\] without .*, got \[8\]"),
        ("data.fps=[3]", r"data.fps must be \[\] without data.folder, got \[3.0\]"),
        ("data.flip=true", r"data.flip must be false without data.folder, got True"),
        ("data.crop=nonsense", r'data.crop must be "center" without data.folder, got'),
        ("data.validation_folder=x", r"data.validation_folder must be null without data.folder"),
    ],
)
def test_errors(override, message):
    with pytest.raises(ValueError, match=message):
        load_recipe("smoke_fsq", [override])


def test_files_that_are_no_recipes(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="smoke_kl, .*got 'smoke_fsk'; did you mean 'smoke_"
    ):
        load_recipe("smoke_fsk")
    for text, message in (
        ("- 1", "must be a mapping, got list"),
        ("run: {steps: 3}", "key must be|model must be given"),
        ("a: &x 1\nb: *x", "must have no YAML aliases"),
        ("a: [", "must be YAML"),
    ):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_recipe(tmp_path / "bad.yaml")


def test_schedules():
    constant = OptimizerRecipe(warmup=3)
    assert [constant.scale(step, 10) for step in (0, 1, 2, 3, 9)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    linear = OptimizerRecipe(schedule="linear", final=0.5)
    assert [linear.scale(step, 10) for step in (0, 5)] == [1.0, 0.75]
    cosine = OptimizerRecipe(schedule="cosine", warmup=2)
    assert cosine.scale(7, 12) == pytest.approx(0.5)
    assert cosine.scale(11, 12) == pytest.approx(0.5 * (1 + math.cos(0.9 * math.pi)))
