"""`vtok stats`: mean and deviation of a model's latents, written into its config.json."""

from __future__ import annotations

import json
import os
from pathlib import Path

from vtok_ext.data.atomic_output import output_file
from vtok_ext.data.latent_shards import LatentDataset
from vtok_ext.models import _persistence
from vtok_ext.models._registry import load_model
from vtok_ext.models.base import STATISTICS_KEY
from vtok_ext.models.latent_statistics import StatisticsCounter
from vtok_ext.models.vidtok_diffusers import is_diffusers_folder
from vtok_ext.models.vtok import VTok

from .console import Console


def run_stats(*, model: str, data: Path, max_items: int | None, as_json: bool) -> None:
    """Returns None when config.json has the statistics.

    Raises:
        FileNotFoundError, ValueError: no folder of a saved model, no tokenized data set, a damaged
            or empty one or one of another model, a folder of diffusers, or a model whose latents
            are sequences.
    """
    console = Console(as_json)
    path = Path(model) / _persistence.CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"stats: MODEL must be the folder of a saved model, got {model}")
    if is_diffusers_folder(model):
        raise ValueError(
            f"stats: MODEL must be a folder of this package, got one of diffusers, {model}, which "
            "has no place for statistics; `vtok convert` makes it one of this package"
        )
    tokenizer = load_model(model)
    if isinstance(tokenizer, VTok):
        raise ValueError(
            f"stats: MODEL must have latents that are grids or planes, got {tokenizer.name}, whose "
            "sequences are not normalised"
        )
    latents = LatentDataset(data, verify=True)
    tokenizer.check_origin("stats", latents.manifest["model_id"])
    counter = StatisticsCounter()
    count = len(latents) if max_items is None else min(max_items, len(latents))
    if count == 0:
        raise ValueError(f"stats: DATA must hold latents, got none in {data}")
    with console.progress("measuring", count) as progress:
        for index in range(count):
            latent = latents[index]
            if isinstance(latent, dict):
                counter.update({name: plane[None] for name, plane in latent.items()})
            elif latents.manifest["kind"] == "tokens":
                counter.update(tokenizer.indices_to_latent(latent[None]))
            else:
                counter.update(latent[None])
            progress.update(index + 1)
    statistics = counter.result().to_dict()
    description = _persistence.read_description(os.fspath(model))
    description[STATISTICS_KEY] = statistics
    with output_file(path, "stats") as partial:
        partial.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    lines = [f"{count} latents, statistics in {path}"]
    for part, mean in statistics["mean"].items():
        pairs = zip(mean, statistics["std"][part], strict=True)
        shown = ", ".join(f"{m:.3f} ± {s:.3f}" for m, s in pairs)
        lines.append(f"{part}: {shown}")
    console.result({"config": str(path), "items": count, **statistics}, lines)
