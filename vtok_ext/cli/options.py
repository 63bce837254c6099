"""Options that several commands of `vtok` share."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

ModelOption = Annotated[
    str, typer.Option(help="Folder of a saved model, a released checkpoint, or a preset name.")
]
NameOption = Annotated[
    str | None,
    typer.Option(help="Preset, or released YAML file, that a released checkpoint belongs to."),
]
EmaOption = Annotated[
    bool, typer.Option("--ema", help="Take a checkpoint's moving averages of the weights.")
]
TrustOption = Annotated[
    bool,
    typer.Option(
        "--trust-checkpoint", help="Read a pickled checkpoint with torch < 2.6, which is unsafe."
    ),
]
OverrideOption = Annotated[
    list[str] | None,
    typer.Option(
        "--override",
        help="FIELD=VALUE by which a released checkpoint deviates from its preset, such as "
        "num_classes=10; may be given several times.",
    ),
]
StatisticsOption = Annotated[
    Path | None,
    typer.Option(help="Statistics of a SiT's latents: a released training log, or a .json file."),
]
StatisticsOrderOption = Annotated[
    str | None,
    typer.Option(
        help="Of the vectors of a log: alternating, means_first [default: what signs tell]."
    ),
]
DeviceOption = Annotated[
    str, typer.Option(help="cpu, cuda, cuda:1; auto takes CUDA where it works.")
]
OutputOption = Annotated[
    str | None, typer.Option(help="tokens or latent [default: tokens where the model has them].")
]
StreamingOption = Annotated[
    str,
    typer.Option(help="exact, or reference for the published chunks of VidTok 1.1."),
]
AnyWeightsOption = Annotated[
    bool, typer.Option("--any-weights", help="Accept tokens that other weights made.")
]
SlicesOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="CoordTok: calls of the decoder that a clip is cut into; less memory, and patches see "
        "only those of their slice [default: 1].",
    ),
]
TileOption = Annotated[
    str | None,
    typer.Option(
        help="Compute pictures in tiles of SIZE or HEIGHTxWIDTH, with the result of the whole one; "
        "auto: as large as memory allows."
    ),
]
MemoryOption = Annotated[
    str | None,
    typer.Option(help="Limit of the process such as 4GB; chooses chunk length and tile by it."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]


def parsed_overrides(command: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Returns the values of `OverrideOption` by field: JSON, or else text.

    Raises:
        ValueError: one without a field or a value.
    """
    values: dict[str, Any] = {}
    for override in overrides:
        name, _, text = override.partition("=")
        if not name or not text:
            raise ValueError(f"{command}: --override must be FIELD=VALUE, got {override!r}")
        try:
            values[name] = json.loads(text)
        except ValueError:
            values[name] = text
    return values


def refuse_options(command: str, where: str, options: Mapping[str, Any]) -> None:
    """Raises ValueError naming the options that were given, where they would have no effect.

    Args:
        command: of `vtok`.
        where: they have none, such as "with a text".
        options: values by option; None, False and [] are those of one that was not given.
    """
    given = [
        n for n, value in options.items() if not (value is None or value is False or value == [])
    ]
    if given:
        raise ValueError(f"{command}: {', '.join(given)} must be absent {where}, got a value")
