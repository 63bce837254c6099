"""A recipe small enough for tests, with every loss term from its third step on."""

from vtok_ext.training.recipe import TokenizerRecipe
from vtok_ext.training.recipe_file import load_recipe

OVERRIDES = [
    "model.overrides.ch=4",
    "model.overrides.ch_mult=[1,1,1,1]",
    "data.num_clips=7",
    "data.num_frames=5",
    "data.height=16",
    "data.width=16",
    "data.validation_clips=1",
    "loss.discriminator=3d",
    "loss.discriminator_width=4",
    "loss.discriminator_start=2",
    "optimizer.warmup=2",
    "run.steps=6",
    "run.checkpoint_every=2",
    "run.validate_every=3",
]


def tiny(*overrides: str, base: str = "smoke_kl") -> TokenizerRecipe:
    return load_recipe(base, [*OVERRIDES, *overrides])
