"""The seam between loop and task: what is no tokenizer trains, resumes and is exported too."""

from dataclasses import dataclass, field

import pytest
import torch
from safetensors.torch import load_file, save_file

from vtok_ext.training import tasks
from vtok_ext.training.loop import train
from vtok_ext.training.recipe import ModelRecipe, Recipe
from vtok_ext.training.recipe_file import recipe_from_dict
from vtok_ext.training.run_log import read_log
from vtok_ext.training.task import MicroBatch, Task


class Pairs:
    """Items that are dicts of tuples, as latents of planes are."""

    def __len__(self):
        return 5

    def __getitem__(self, place):
        generator = torch.Generator().manual_seed(place[1])
        a, b = torch.randn(3, generator=generator), torch.randn(2, generator=generator)
        return {"planes": (a, b)}


@dataclass(frozen=True)
class Target:
    scale: float = 1.0


@dataclass(frozen=True)
class PairRecipe(Recipe):
    task: str = "pairs"
    target: Target = field(default_factory=Target)


class PairTask(Task):
    """Two networks, an optimiser each, noise of every sample, memory in a buffer."""

    recipe_class = PairRecipe
    metric = "error"
    exported = "left"

    def __init__(self, recipe, device):
        super().__init__(recipe, device)
        self.networks = {"left": torch.nn.Linear(3, 2), "right": torch.nn.Linear(2, 2)}
        memory = torch.nn.Module()
        memory.register_buffer("seen", torch.zeros(()))
        self.modules = {**self.networks, "memory": memory}

    def data(self, warn):
        return Pairs(), [Pairs()[0, 0]]

    def optimizers(self):
        lr = self.recipe.optimizer.lr
        return {name: torch.optim.SGD(self.trained(name), lr) for name in ("left", "right")}

    def accumulate(self, batch, backward):
        a, b = batch.data["planes"]
        noise = torch.stack([torch.randn(3, generator=g) for g in batch.generators()])
        left = (self.call["left"](a + 0.1 * noise) - self.recipe.target.scale).square().mean()
        backward(left)
        right = self.call["right"](b).square().mean()
        backward(right)
        self.modules["memory"].seen += len(a)
        return {"loss": (left + right).detach(), "right": right.detach()}

    def validate(self, samples):
        a, _ = samples[0]["planes"]
        error = (self.networks["left"](a) - self.recipe.target.scale).square().mean()
        return {"error": error.item()}

    def export(self, folder, weights):
        folder.mkdir(exist_ok=True)
        save_file(weights, folder / "left.safetensors")


@pytest.fixture(autouse=True)
def table(monkeypatch):
    monkeypatch.setitem(tasks.TASKS, "pairs", PairTask)


def recipe(steps):
    return recipe_from_dict(
        {
            "task": "pairs",
            "model": {"name": "none"},
            "target": {"scale": 0.5},
            "optimizer": {"lr": 0.1, "ema_decay": 0.9},
            "run": {"steps": steps, "checkpoint_every": 2, "accumulate": 2},
        }
    )


def test_another_task_trains_and_resumes(tmp_path):
    whole = train(recipe(6), tmp_path / "whole")
    train(recipe(2), tmp_path / "parts")
    parts = train(recipe(6), tmp_path / "parts", resume="auto", warn=lambda line: None)
    assert parts.resumed_from == 2 and parts.validation == whole.validation
    curves = [
        [line for line in read_log(tmp_path / name / "log.jsonl") if line["kind"] == "train"]
        for name in ("whole", "parts")
    ]
    keys = ("loss", "right", "grad_norm", "right_grad_norm")
    assert [[line[k] for k in keys] for line in curves[0]] == [
        [line[k] for k in keys] for line in curves[1]
    ]
    assert curves[0][-1]["loss"] < curves[0][0]["loss"]
    weights = [load_file(r.model / "left.safetensors") for r in (whole, parts)]
    assert weights[0].keys() == {"weight", "bias"}
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_noise_belongs_to_the_sample():
    draw = [
        [
            float(torch.randn((), generator=g))
            for g in MicroBatch(None, step, numbers, 3).generators()
        ]
        for step, numbers in ((0, range(4)), (1, range(2, 4)))
    ]
    assert draw[1] == draw[0][2:] and len(set(draw[0])) == 4


def test_sections_of_a_task_are_checked():
    with pytest.raises(ValueError, match=r"target.scal'; did you mean 'scale'"):
        recipe_from_dict({"task": "pairs", "model": {"name": "x"}, "target": {"scal": 1}})
    with pytest.raises(ValueError, match=r"key must be one of .*, got 'loss'"):
        recipe_from_dict({"task": "pairs", "model": {"name": "x"}, "loss": {}})
    assert isinstance(recipe(1).model, ModelRecipe)
