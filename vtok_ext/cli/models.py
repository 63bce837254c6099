"""`vtok models`: a table of what `create_model` can build."""

from __future__ import annotations

from typing import Any

import torch

from .console import Console

# The clip of published numbers: frames by causality, height and width in pixels; for models that
# take clips of one shape, that one.
CLIP_FRAMES = {True: 17, False: 16}
CLIP_SIZE = 256


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
    titles = ("name", "version", "causal", "latent", "codebook", "t x h x w")
    numbers = ("parameters", "MACs", "FLOPs")
    for title in (*titles, *numbers):
        table.add_column(title, no_wrap=True, justify="right" if title in numbers else "left")
    for row in rows:
        codebook = f"{row['codebook_size']:,}" if row["discrete"] else "-"
        if row["levels"]:
            codebook += " = " + "x".join(map(str, row["levels"]))
        table.add_row(
            row["name"],
            row["version"],
            "yes" if row["causal"] else "no",
            f"{row['regularizer']} {row['latent_channels']}",
            codebook,
            "x".join(map(str, row["compression"])) if row["compression"] else "-",
            f"{row['parameters'] / 1e6:.1f} M",
            f"{row['multiply_adds'] / 1e12:.2f} T",
            f"{row['flops'] / 1e12:.2f} T",
        )
    table.caption = (
        f"MACs: multiply-adds to encode and decode one clip of {CLIP_FRAMES[True]} frames "
        f"({CLIP_FRAMES[False]} without causality) of {CLIP_SIZE}x{CLIP_SIZE}, CoordTok its own "
        "clip; FLOPs: twice that. coordtok_base_128 and coordtok_small_128 are sizes of our own."
    )
    table.caption_justify = "left"
    # Wide enough for every column: names must never be cut, whatever the terminal or the pipe.
    RichConsole(width=max(160, RichConsole().width), soft_wrap=True).print(table)


def model_rows() -> list[dict[str, Any]]:
    """Returns one dict of plain values per model; nothing is allocated to count."""
    import vtok_ext as vt
    from vtok_ext.models.multiply_adds import count_multiply_adds

    rows = []
    for name in vt.list_models():
        with torch.device("meta"):
            model = vt.create_model(name)
        config = model.config
        levels = list(getattr(config, "levels", ())) if model.is_discrete else []
        factors = [model.temporal_factor, model.spatial_factor, model.spatial_factor]
        clip = [CLIP_FRAMES[model.is_causal], CLIP_SIZE, CLIP_SIZE]
        clip = list(getattr(config, "video_shape", clip))
        work = count_multiply_adds(type(model), config, *clip)
        rows.append(
            {
                "name": name,
                "version": model.reference_version,
                "causal": model.is_causal,
                "discrete": model.is_discrete,
                "regularizer": getattr(config, "regularizer", "planes"),
                "latent_channels": getattr(model, "latent_channels", None),
                "levels": levels,
                "codebook_size": model.codebook_size,
                "compression": None if None in factors else factors,
                "parameters": sum(p.numel() for p in model.parameters()),
                "clip": clip,
                "multiply_adds": work,
                "flops": 2 * work,
            }
        )
    return rows
