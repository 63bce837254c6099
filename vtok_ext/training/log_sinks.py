"""TensorBoard and Weights & Biases beside the JSONL log of a run; both are optional packages."""

from __future__ import annotations

import importlib
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

LOGGERS = ("tensorboard", "wandb")


class LogSink(Protocol):
    """Where numbers and pictures of a run go to."""

    def numbers(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Takes scalars of a kind, such as "train", after a step."""

    def picture(self, name: str, step: int, image: Tensor) -> None:
        """Takes a picture [3, H, W] uint8."""

    def close(self) -> None:
        """Ends the log."""


def open_sinks(
    names: Sequence[str], out: Path, first_step: int, recipe: Mapping[str, Any]
) -> list[LogSink]:
    """Returns the sinks of a run.

    Args:
        names: among `LOGGERS`.
        out: folder of the run.
        first_step: steps that were done before; TensorBoard drops what it has of later ones, W&B
            keeps that and takes no second value of a step.
        recipe: the settings, shown beside the curves.

    Raises:
        ImportError: a package is absent; the message names what to install.
    """
    kinds: dict[str, Any] = {"tensorboard": TensorBoardSink, "wandb": WandbSink}
    return [kinds[name](out, first_step, recipe) for name in names]


def check_sinks(names: Sequence[str]) -> None:
    """Returns None if the packages of the sinks are there; asked before a run writes anything.

    Raises:
        ImportError: a package is absent; the message names what to install.
    """
    for name in names:
        try:
            importlib.import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
        except ImportError as error:
            raise _absent(name) from error


class TensorBoardSink:
    """Writes event files to `out`/tensorboard."""

    def __init__(self, out: Path, first_step: int, recipe: Mapping[str, Any]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise _absent("tensorboard") from error
        self._writer = SummaryWriter(str(out / "tensorboard"), purge_step=first_step + 1)

    def numbers(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Writes scalars kind/name."""
        for name, value in values.items():
            self._writer.add_scalar(f"{kind}/{name}", value, step)

    def picture(self, name: str, step: int, image: Tensor) -> None:
        """Writes an image."""
        self._writer.add_image(f"samples/{name}", image, step)

    def close(self) -> None:
        """Writes what is waiting."""
        self._writer.close()


class WandbSink:
    """Sends to Weights & Biases, or with WANDB_MODE=offline writes to `out`/wandb.

    A resumed run goes on under the identifier in `out`/wandb-run-id.
    """

    def __init__(self, out: Path, first_step: int, recipe: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise _absent("wandb") from error
        path = out / "wandb-run-id"
        if not path.is_file():
            path.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
        self._wandb = wandb
        self._run = wandb.init(
            project="vtok",
            name=out.name,
            id=path.read_text(encoding="utf-8").strip(),
            resume="allow",
            dir=str(out),
            config=dict(recipe),
        )

    def numbers(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Sends scalars kind/name."""
        self._run.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)

    def picture(self, name: str, step: int, image: Tensor) -> None:
        """Sends an image."""
        shown = self._wandb.Image(image.permute(1, 2, 0).cpu().numpy())
        self._run.log({f"samples/{name}": shown}, step=step)

    def close(self) -> None:
        """Sends what is waiting."""
        self._run.finish()


def _absent(package: str) -> ImportError:
    return ImportError(
        f"train: run.loggers must name installed packages, got {package!r}, which is absent; "
        'pip install "vtok_ext[train]"'
    )
