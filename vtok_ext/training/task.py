"""Task: what the training loop asks of anything that is trained with it.

Note [The seam between loop and task]

The loop knows nothing of videos, losses or adversaries. A task brings the networks, their
optimisers and the gradients of one micro-batch; everything else is the engine's:

    order of samples, workers, accumulation    clip_order, loop
    several processes: DDP or FSDP2            parallel; tasks call `self.call[name]`
    autocast, float16's loss scale             `autocast()`, and the `backward` that is handed in
    clipping, schedules, EMA, NaN sentinel     step
    checkpoints, resharding, resume, SIGTERM   checkpoint, loop

A new task is a subclass of `Task` and of `Recipe`, and a line in the table of `tasks`:

    class PointTask(Task):
        recipe_class = PointRecipe                # its sections of the YAML file

        def __init__(self, recipe, device):
            super().__init__(recipe, device)
            model = create_model(recipe.model.name).to(device)
            self.modules = self.networks = {"model": model}

        def optimizers(self):                     # after DDP or FSDP2 took hold of the parameters
            return {"model": torch.optim.AdamW(self.trained("model"), self.recipe.optimizer.lr)}

        def accumulate(self, batch, backward):
            points = draw_points(batch.data, batch.generators())
            with self.autocast():
                loss = point_loss(self.call["model"](batch.data, points), points)
            backward(loss)                        # as often as there are losses
            return {"loss": loss.detach()}

        def validate(self, samples): ...          # {"rec_loss": ..., ...}

Random numbers of a step come from `batch.generators()`, one generator per sample: then a run has
the same losses with any number of processes and micro-batches, and after a restart.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vtok_ext.training.parallel import plain_class
from vtok_ext.training.recipe import Recipe

AUTOCAST_DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class MicroBatch:
    """The samples of one forward pass of one process.

    Attributes:
        data: what the data set's items collate to, on the device of the task.
        step: steps done before this one.
        numbers: the place of each sample in the endless row of all samples of the run.
        seed: of the run.
        loss_scale: of float16, by which `backward` multiplies losses; for those who take gradients
            themselves.
    """

    data: Any
    step: int
    numbers: range
    seed: int
    loss_scale: float = 1.0

    def generators(self) -> list[torch.Generator]:
        """Returns a CPU generator per sample, a function of the run's seed and its number alone."""
        return [
            torch.Generator().manual_seed((self.seed * 1_000_003 + number * 7_919 + 1) % 2**63)
            for number in self.numbers
        ]


class Task(ABC):
    """Networks, optimisers and losses of one kind of training; see Note [The seam ...] above.

    Attributes:
        recipe, device: as given.
        modules: everything that has a state, by the first part of its names in checkpoints.
        networks: what is called, and wrapped for several processes; each is part of `modules`.
        call: the networks as they must be called while training; set by the engine.

    Class attributes:
        recipe_class: its recipe.
        metric: value of `validate` that decides which checkpoint is best, lower is better.
        exported: network whose weights are averaged, sharded and exported; others are small.
        gradient_terms: values of `accumulate` that are made of gradients and enter the loss: where
            one is not finite with float16, the step is left out as for any overflow of gradients.
    """

    recipe_class: ClassVar[type[Recipe]]
    metric: ClassVar[str] = "rec_loss"
    exported: ClassVar[str] = "model"
    gradient_terms: ClassVar[tuple[str, ...]] = ()

    modules: dict[str, nn.Module]
    networks: dict[str, nn.Module]

    def __init__(self, recipe: Any, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        self.call: dict[str, Callable[..., Any]] = {}

    # What a task must have.

    @abstractmethod
    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Returns new optimisers at the top learning rates, the main one first."""

    @abstractmethod
    def accumulate(
        self, batch: MicroBatch, backward: Callable[[Tensor], None]
    ) -> dict[str, Tensor]:
        """Returns detached scalars for the log, "loss" first, after adding gradients.

        Args:
            batch: of this process.
            backward: called with each loss, a mean over the samples of the batch.
        """

    @abstractmethod
    def validate(self, samples: list[Any]) -> dict[str, float]:
        """Returns means over held-out samples, `metric` among them.

        Called in evaluation mode without gradients, with averaged weights if there are any. No
        global random generator may be used.
        """

    # What a task may have.

    def data(self, warn: Callable[[str], None]) -> tuple[Any, list[Any]]:
        """Returns the data set, a `Clips` or alike, and the held-out samples."""
        from vtok_ext.training.setup import build_clips

        return build_clips(self.recipe.data, self.recipe.run.seed, warn)

    def begin(self) -> None:
        """Takes over what a new run goes on from; a resumed one has it in its checkpoint.

        Called once, by all processes, before the first step.
        """
        return

    def prepare(self) -> None:
        """Computes what must last though the step be left out; called before every step."""
        return

    def facts(self) -> dict[str, Any]:
        """Returns what a checkpoint says beside tensors, as JSON can hold it."""
        return {}

    def check_facts(self, facts: dict[str, Any]) -> None:
        """Raises ValueError unless a run whose checkpoint has these `facts` can go on here.

        Checkpoints of before there were any have none.
        """
        return

    def frozen(self) -> list[nn.Module]:
        """Returns parts that neither train nor leave evaluation mode."""
        return []

    def notes(self) -> list[str]:
        """Returns lines that the user should read before a run."""
        return []

    def probe(self, batch: MicroBatch) -> None:
        """Runs the networks as `accumulate` does, alone and without gradients.

        Called to find the first layer whose output is not finite. Nothing that is remembered may
        change; networks are called directly, not by `call`.
        """
        self.networks[self.exported](batch.data)

    def overfit_loss(self, batch: MicroBatch) -> Tensor:
        """Returns a loss of clips [B, 3, T, H, W] in [-1, 1] by which a tokenizer learns them; only
        tasks that train one from the start have it."""
        raise NotImplementedError

    def pictures(self, samples: list[Any]) -> dict[str, Tensor]:
        """Returns videos [3, T, H, W] uint8 that show how far the training is, by name.

        Called as `validate`, by all processes.
        """
        return {}

    def export(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Writes the trained model, whose whole state is `weights`, so that `load_model` reads it.

        Called by one process. The default is that of a `VideoTokenizer`.
        """
        model: Any = self.networks[self.exported]
        # Another instance: with FSDP2 this one holds a part of the weights only.
        plain = plain_class(model)(model.config, model.name)
        plain.load_state_dict(weights, strict=True)
        plain.eval().save_pretrained(folder)

    # What a task can use.

    def trained(self, *names: str) -> list[nn.Parameter]:
        """Returns the parameters of modules that require gradients."""
        return [p for n in names for p in self.modules[n].parameters() if p.requires_grad]

    def autocast(self) -> torch.autocast:
        """Returns the context of the recipe's precision."""
        dtype = AUTOCAST_DTYPES[self.recipe.run.precision]
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    def train_mode(self) -> None:
        """Puts everything into training mode but what is frozen."""
        for module in self.modules.values():
            module.train()
        for part in self.frozen():
            part.eval()

    def eval_mode(self) -> None:
        """Puts everything into evaluation mode."""
        for module in self.modules.values():
            module.eval()
