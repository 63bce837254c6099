"""Mean and standard deviation per channel of latents, and normalisation by them.

    x = (latent - mean) / std,  for each plane or the grid by itself; the variance is the biased one

Latents are as tokenizers give them: a grid [B, C, t, h, w], or planes [B, rows, columns, C] by
name. Normalised ones are channels first, a dict of parts.
Source: CoordTok (arXiv 2411.14762), specification section 9.2.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vtok_ext.models import _persistence
from vtok_ext.models.coordtok_config import PLANE_AXES
from vtok_ext.models.sit_config import GRID

Latent = Tensor | dict[str, Tensor]
_MAX_LOG_BYTES = 1 << 22
_VECTOR = re.compile(r"(tensor\()?\[([^\[\]]*)\]")
_LEAST_VARIATION = 1e-6
LOG_ORDERS = ("alternating", "means_first")
# Beside the weights in a folder of diffusers, whose config.json has no place for it.
STATISTICS_NAME = "latent_statistics.json"


@dataclass(frozen=True)
class LatentStatistics:
    """Mean and std [C] float32 of every part: {"grid": ...}, or {"xy": ..., "yt": ..., ...}."""

    mean: dict[str, Tensor]
    std: dict[str, Tensor]

    def __post_init__(self) -> None:
        """Checks names, shapes and values."""
        names = set(self.mean)
        if names not in ({GRID}, set(PLANE_AXES)) or names != set(self.std):
            raise ValueError(
                f"LatentStatistics: parts must be {GRID}, or {', '.join(PLANE_AXES)}, "
                f"got {sorted(names)} and {sorted(self.std)}"
            )
        for name, mean in self.mean.items():
            std = self.std[name]
            ok = mean.dim() == 1 and mean.shape == std.shape
            if not ok or not bool(
                mean.isfinite().all() and std.isfinite().all() and (std > 0).all()
            ):
                raise ValueError(
                    f"LatentStatistics: mean and std of {name} must be finite [C], std > 0, "
                    f"got {mean.tolist()} and {std.tolist()}"
                )

    def normalize(self, latent: Latent) -> dict[str, Tensor]:
        """Returns {part: [B, C, ...]} of mean 0 and std 1.

        Raises:
            TypeError: ids instead of latents.
            ValueError: other parts, or another number of channels.
        """
        parts = {GRID: latent} if isinstance(latent, Tensor) else latent
        self._check(parts)
        return {
            name: (first - self._shaped(self.mean, name, first))
            / self._shaped(self.std, name, first)
            for name, value in parts.items()
            for first in (value if name == GRID else value.movedim(-1, 1),)
        }

    def denormalize(self, parts: Mapping[str, Tensor]) -> Latent:
        """Returns the latent, in the tokenizer's layout, of normalised parts.

        Raises:
            ValueError: other parts, or another number of channels.
        """
        self._check(parts)
        latent = {
            name: x * self._shaped(self.std, name, x) + self._shaped(self.mean, name, x)
            for name, x in parts.items()
        }
        if set(latent) == {GRID}:
            return latent[GRID]
        return {name: latent[name].movedim(1, -1).contiguous() for name in PLANE_AXES}

    def normalize_as_given(self, latent: Latent) -> Latent:
        """Returns the latent with mean 0 and std 1, in the tokenizer's layout."""
        parts = self.normalize(latent)
        if isinstance(latent, Tensor):
            return parts[GRID]
        return {name: parts[name].movedim(1, -1).contiguous() for name in latent}

    def restore(self, latent: Latent) -> Latent:
        """Returns the latent that `normalize_as_given` was given."""
        if isinstance(latent, Tensor):
            return self.denormalize({GRID: latent})
        return self.denormalize({name: plane.movedim(-1, 1) for name, plane in latent.items()})

    def _check(self, parts: Mapping[str, Any]) -> None:
        if set(parts) != set(self.mean):
            raise ValueError(
                f"LatentStatistics: latent must have the parts {sorted(self.mean)}, "
                f"got {sorted(parts)}"
            )

    @staticmethod
    def _shaped(values: dict[str, Tensor], name: str, like: Tensor) -> Tensor:
        value = values[name]
        if not like.is_floating_point():
            raise TypeError(
                f"LatentStatistics: {name} must be of floating point, got {like.dtype}; ids have "
                "no statistics"
            )
        if like.shape[1] != len(value):
            raise ValueError(
                f"LatentStatistics: {name} must have {len(value)} channels, got {like.shape[1]}"
            )
        return value.to(like.device, like.dtype).view(1, -1, *(1,) * (like.dim() - 2))

    def to_dict(self) -> dict[str, Any]:
        """Returns plain numbers for JSON, which give the same float32 back."""
        return {
            "mean": {name: value.tolist() for name, value in self.mean.items()},
            "std": {name: value.tolist() for name, value in self.std.items()},
        }

    @classmethod
    def from_dict(cls, values: Any) -> LatentStatistics:
        """Returns the statistics of `to_dict`. Raises ValueError for anything else."""
        try:
            tables = [
                {str(k): torch.tensor(v, dtype=torch.float32) for k, v in values[kind].items()}
                for kind in ("mean", "std")
            ]
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise ValueError(
                f"LatentStatistics: must be an object of mean and std, got {error!r}"
            ) from error
        return cls(*tables)


class StatisticsCounter:
    """Gathers statistics over any number of latents, in float64."""

    def __init__(self) -> None:
        self.num_samples = 0
        self._sums: dict[str, Tensor] = {}  # [3, C]: count, sum, sum of squares

    @torch.no_grad()
    def update(self, latent: Latent) -> None:
        """Returns None after counting the latents of a batch.

        Raises:
            TypeError: ids instead of latents.
            ValueError: other parts or channels than before.
        """
        parts = {GRID: latent} if isinstance(latent, Tensor) else latent
        sums: dict[str, Tensor] = {}
        for name, value in parts.items():
            if not value.is_floating_point():
                raise TypeError(
                    f"StatisticsCounter: {name} must be of floating point, got {value.dtype}"
                )
            channels = value.movedim(1 if name == GRID else -1, 0).flatten(1).double()  # [C, N]
            count = torch.full_like(channels[:, 0], channels.shape[1])
            sums[name] = torch.stack([count, channels.sum(1), channels.square().sum(1)]).cpu()
        known, found = (
            {name: counted.shape[1] for name, counted in table.items()}
            for table in (self._sums or sums, sums)
        )
        if found != known:
            raise ValueError(f"StatisticsCounter: channels must be {known}, got {found}")
        self._sums = {name: self._sums.get(name, 0) + counted for name, counted in sums.items()}
        self.num_samples += next(iter(parts.values())).shape[0]

    def result(self) -> LatentStatistics:
        """Returns the statistics so far. Raises ValueError without latents, or of a constant.

        Constant is a deviation below 1e-6 of the mean: the rounding of the sums has 1e-8 and more.
        """
        mean = {name: s[1] / s[0] for name, s in self._sums.items()}
        std = {
            name: (s[2] / s[0] - mean[name].square()).clamp(min=0).sqrt()
            for name, s in self._sums.items()
        }
        for name, deviations in std.items():
            constant = (deviations <= _LEAST_VARIATION * mean[name].abs()).nonzero()
            if len(constant):
                channel = int(constant[0])
                raise ValueError(
                    f"StatisticsCounter: channel {channel} of {name} must vary, "
                    f"got {mean[name][channel]:g} in all latents"
                )
        single = [{k: v.float() for k, v in values.items()} for values in (mean, std)]
        return LatentStatistics(*single)


def write_statistics_file(statistics: LatentStatistics | None, folder: str | os.PathLike) -> None:
    """Returns None after writing `STATISTICS_NAME` in `folder`, or, without any, removing it."""
    path = Path(folder) / STATISTICS_NAME
    if statistics is None:
        path.unlink(missing_ok=True)  # of another model, that was saved here before
        return
    with _persistence.atomic_path(path) as temporary:
        Path(temporary).write_text(json.dumps(statistics.to_dict()) + "\n", encoding="utf-8")


def read_statistics_file(folder: str | os.PathLike, op: str) -> LatentStatistics | None:
    """Returns what `write_statistics_file` wrote, None without a file.

    Raises:
        ValueError: a damaged file.
    """
    path = Path(folder) / STATISTICS_NAME
    if not path.is_file():
        return None
    return _from_json(path, op)


def _from_json(path: Path, op: str) -> LatentStatistics:
    if path.stat().st_size > _persistence.MAX_CONFIG_BYTES:
        raise ValueError(f"{op}: {str(path)!r} must be <= 1 MiB, got a larger file")
    try:
        return LatentStatistics.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{op}: {str(path)!r} must be JSON, got {error}") from error


def read_statistics(path: str | os.PathLike, order: str | None = None) -> LatentStatistics:
    """Returns the statistics of a `.json` file of `to_dict`, or of a log; see
    `read_reference_log`.

    Raises:
        FileNotFoundError, ValueError: no such file, a damaged one, or an order for JSON.
    """
    file = Path(path)
    if file.suffix.lower() != ".json" or not file.is_file():
        return read_reference_log(file, order)
    if order is not None:
        raise ValueError(f"read_statistics: order must be None for {str(path)!r}, got {order!r}")
    return _from_json(file, "read_statistics")


def read_reference_log(path: str | os.PathLike, order: str | None = None) -> LatentStatistics:
    """Returns the statistics that the reference printed into its training log.

    The log holds six bracketed vectors of one length, one after the other, of planes xy, yt and xt,
    with four decimals; vectors that were wrapped over lines are read too. Other lists are passed
    over: those of another length, and all that are no tensor(...) where vectors are. Standard
    deviations are positive, which tells the order of means and deviations when some mean is
    negative.

    Args:
        path: the file, `log.txt` beside the released weights.
        order: "alternating" (mean, std, mean, ...) or "means_first"; default what the signs say.

    Raises:
        FileNotFoundError, ValueError: no such file or JSON, no six vectors of one length in it,
            other lists that cannot be told from them, or signs that allow both orders.
    """
    if order not in (None, *LOG_ORDERS):
        raise ValueError(f"read_reference_log: order must be one of {LOG_ORDERS}, got {order!r}")
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"read_reference_log: {str(path)!r} must be a file, got none")
    if file.suffix.lower() == ".json":  # whose lists have names, in any order
        raise ValueError(
            f"read_reference_log: {str(path)!r} must be a log, got JSON; read_statistics takes both"
        )
    with file.open(encoding="utf-8", errors="replace") as stream:
        text = stream.read(_MAX_LOG_BYTES)
    lists = [(prefix, _numbers(inside)) for prefix, inside in _VECTOR.findall(text)]
    tensors = [values for prefix, values in lists if prefix and values]
    found = tensors or [values for _, values in lists if values]
    runs = [list(run) for _, run in itertools.groupby(found, key=len)]
    # A run that was resumed prints them again.
    vectors = next((run[:6] for run in runs if len(run) % 6 == 0), None)
    if vectors is None:
        raise ValueError(
            f"read_reference_log: {str(path)!r} must hold six vectors of one length in a row, "
            f"got lengths {[len(v) for v in found]}"
        )
    places = {"alternating": ((0, 2, 4), (1, 3, 5)), "means_first": ((0, 1, 2), (3, 4, 5))}
    possible = [
        name
        for name in ([order] if order else LOG_ORDERS)
        if all(number > 0 for place in places[name][1] for number in vectors[place])
    ]
    if len(possible) != 1:
        raise ValueError(
            f"read_reference_log: order must be given as one of {LOG_ORDERS} for {str(path)!r}, "
            f"whose signs allow {possible or 'neither'}, got {order}"
        )
    mean, std = (
        {
            plane: torch.tensor(vectors[place])
            for plane, place in zip(PLANE_AXES, chosen, strict=True)
        }
        for chosen in places[possible[0]]
    )
    return LatentStatistics(mean, std)


def _numbers(text: str) -> list[float] | None:
    """Returns the numbers between two brackets, None if it is not a list of several."""
    try:
        values = [float(word) for word in text.replace(",", " ").split()]
    except ValueError:
        return None
    return values if len(values) > 1 and all(map(math.isfinite, values)) else None
