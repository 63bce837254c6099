"""`vtok models`: a table of what `create_model` can build."""

from __future__ import annotations

import math
from typing import Any

import torch

from .console import Console


def run_models(*, as_json: bool) -> None:
    """Returns None after printing the table."""
    rows = model_rows()
    console = Console(as_json)
    if as_json:
        console.result(rows, [])
        return
    from rich.console import Console as RichConsole
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    titles = ("name", "version", "causal", "latent", "codebook", "t x h x w", "parameters")
    for title in titles:
        table.add_column(title, no_wrap=True, justify="right" if title == "parameters" else "left")
    for row in rows:
        codebook = "-"
        if row["levels"]:
            levels = "x".join(map(str, row["levels"]))
            codebook = f"{row['codebook_size']:,} = {levels}"
        table.add_row(
            row["name"],
            row["version"],
            "yes" if row["causal"] else "no",
            f"{row['regularizer']} {row['latent_channels']}",
            codebook,
            "x".join(map(str, row["compression"])),
            f"{row['parameters'] / 1e6:.1f} M",
        )
    # Wide enough for every column: names must never be cut, whatever the terminal or the pipe.
    RichConsole(width=max(140, RichConsole().width), soft_wrap=True).print(table)


def model_rows() -> list[dict[str, Any]]:
    """Returns one dict of plain values per model; nothing is allocated to count parameters."""
    import vtok_ext as vt

    rows = []
    for name in vt.list_models():
        with torch.device("meta"):
            model = vt.create_model(name)
        config = model.config
        levels = list(getattr(config, "levels", ())) if model.is_discrete else []
        spatial = model.spatial_factor
        rows.append(
            {
                "name": name,
                "version": model.reference_version,
                "causal": model.is_causal,
                "discrete": model.is_discrete,
                "regularizer": getattr(config, "regularizer", type(model).__name__),
                "latent_channels": getattr(model, "latent_channels", None),
                "levels": levels,
                "codebook_size": math.prod(levels) if levels else None,
                "compression": [model.temporal_factor, spatial, spatial],
                "parameters": sum(p.numel() for p in model.parameters()),
            }
        )
    return rows
