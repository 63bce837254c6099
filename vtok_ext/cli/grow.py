"""`vtok grow`: trains a tokenizer of twice the temporal compression on top of a given one.

    OUT/                  the run of `vtok train`: recipe, log, checkpoints, model/
    OUT/growth.json       PSNR of held-out clips: base, interpolation, start, grown
    OUT/comparison.png    the same on one clip

"interpolated" is what the grown model must beat: the base on every second frame, with the frames
between by linear interpolation, which has as many latents.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vtok_ext.data.atomic_output import output_file
from vtok_ext.data.picture import write_png
from vtok_ext.metrics import psnr
from vtok_ext.models import Grown, grow, load_model
from vtok_ext.training.distributed import process_group, rank
from vtok_ext.training.recipe_file import load_recipe
from vtok_ext.training.setup import build_clips, index_kept_in

from .comparison import labelled_rows
from .console import Console
from .model_source import resolve_device
from .train import INDEX, train_visibly, where_to_go_on

_COLUMNS = 7


def run_grow(
    *,
    model: str,
    recipe: str,
    overrides: Sequence[str],
    out: Path,
    mixing: str | None,
    resume: str,
    device: str,
    as_json: bool,
) -> str | None:
    """Returns None after growing, or where the state is if a signal ended it early.

    Raises:
        ValueError: the recipe's task is not "grow"; the model cannot grow; as `vtok train`.
    """
    given = [*overrides, f"model.weights={json.dumps(str(model))}"]
    given += [] if mixing is None else [f"grow.mixing={mixing}"]
    settings = load_recipe(recipe, given)
    if settings.task != "grow":
        raise ValueError(f"grow: recipe must be of task 'grow', got {settings.task!r}")
    start = time.monotonic()
    with process_group(resolve_device(device)) as place:
        leads = rank() == 0
        console = Console(as_json or not leads)
        with index_kept_in(out / INDEX):
            result = train_visibly(settings, out, place, resume, console)
    if result.stopped_by is not None:
        return where_to_go_on(result)
    if leads:
        assert result.model is not None  # it was not stopped
        grown: Any = load_model(result.model)  # which verifies the base
        values = {**_compare(settings, grown.to(place), out), "model": str(result.model)}
        values["seconds"] = round(time.monotonic() - start, 1)
        with output_file(out / "growth.json", "grow") as partial:
            partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        console.result(values, _summary(values, out))
    return None


@torch.no_grad()
def _compare(settings: Any, grown: Grown, out: Path) -> dict[str, Any]:
    """Returns PSNR of the held-out clips by four methods; writes the picture of the first one."""
    base = grown.base
    start = grow(base, mixing=grown.config.mixing).eval()
    methods: dict[str, Callable[[Tensor], Tensor]] = {
        f"base {base.temporal_factor}x": lambda video: base(video).reconstruction,
        "interpolated": lambda video: interpolated(base, video),
        "start": lambda video: start(video).reconstruction,
        f"grown {grown.temporal_factor}x": lambda video: grown(video).reconstruction,
    }
    _, clips = build_clips(settings.data, settings.run.seed, lambda line: None)
    values: dict[str, Any] = {
        "base": grown.config.base_id,
        "base_sha256": list(grown.config.base_sha256),
        "base_unchanged": True,
        "temporal_factor": grown.temporal_factor,
        "held_out_clips": len(clips),
        "psnr": {name: 0.0 for name in methods} if clips else {},
    }
    rows: dict[str, Tensor] = {}
    for i, clip in enumerate(clips):
        video = clip[None].to(next(grown.parameters()).device).float() / 127.5 - 1
        for name, method in methods.items():
            output = method(video).clamp(-1, 1)
            values["psnr"][name] += psnr(output, video).item() / len(clips)
            if i == 0:
                shown = ((output[0] + 1) * 127.5).round().to(torch.uint8).cpu()
                rows = {"input": clip, **rows, name: shown}
    values["psnr"] = {name: round(value, 3) for name, value in values["psnr"].items()}
    if rows:
        # Neighbouring frames, kept and dropped ones: over a whole clip one would miss the latter.
        count = min(_COLUMNS, next(iter(rows.values())).shape[1])
        shown_rows = {name: row[:, :count] for name, row in rows.items()}
        picture = labelled_rows(shown_rows, [f"frame {t}" for t in range(count)])
        write_png(out / "comparison.png", picture)
    return values


def interpolated(base: Any, video: Tensor, step: int = 2) -> Tensor:
    """Returns the base's reconstruction of every `step`-th frame, linearly interpolated.

    Args:
        base: a tokenizer.
        video: [B, 3, T, H, W] in [-1, 1].
        step: frames per kept one; where T - 1 is no multiple, the last frame is kept as well.
    """
    frames = video.shape[2]
    padded = torch.cat([video, video[:, :, -1:].expand(-1, -1, (1 - frames) % step, -1, -1)], 2)
    kept = base(padded[:, :, ::step]).reconstruction
    size = [padded.shape[2], *kept.shape[3:]]
    return F.interpolate(kept, size=size, mode="trilinear", align_corners=True)[:, :, :frames]


def _summary(values: dict[str, Any], out: Path) -> list[str]:
    quality = ", ".join(f"{name} {value:.2f}" for name, value in values["psnr"].items())
    lines = [
        f"{values['model']}: {values['temporal_factor']}x in time, on {values['base']}, whose "
        "weights are unchanged"
    ]
    if quality:
        lines.append(f"held-out PSNR in dB: {quality}")
        lines.append(f"{out}/: comparison.png, growth.json, log.jsonl, model/")
    return lines
