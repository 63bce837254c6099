"""`--tile` and `--memory`: how a command fits a video into memory, said before it runs."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from typing import Any

from .console import Console
from .freed_memory import keep_freed_memory, return_freed_memory

_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True)
class MemoryOptions:
    """What a command is asked for.

    Attributes:
        tile: "256", "256x384" (height first), "auto", or None: the whole picture, or what `memory`
            asks for.
        memory: "4GB" and the like, for the whole process; None: no limit, and with "auto" 80 % of
            what is free.
    """

    tile: str | None = None
    memory: str | None = None


NO_LIMIT = MemoryOptions()


@dataclass(frozen=True)
class Prepared:
    """A model ready for a video.

    Attributes:
        model: the model, or its view in tiles.
        chunk_frames: frames to push at once, a multiple of f.
        facts: for the report.
        tile: (height, width) of the view, None: the whole picture.
    """

    model: Any
    chunk_frames: int
    facts: dict[str, Any]
    tile: tuple[int, int] | None = None


def arrange_freed_memory(options: MemoryOptions) -> None:
    """Returns None; freed memory stays for speed, or goes back where a limit counts."""
    (keep_freed_memory if options.memory is None else return_freed_memory)()


def prepare(
    model: Any,
    direction: str,
    height: int,
    width: int,
    num_frames: int | None,
    options: MemoryOptions,
    chunk_frames: int,
    console: Console,
) -> Prepared:
    """Returns the model and the chunk length for a video, after saying what was planned.

    Args:
        model: any VideoTokenizer.
        direction: "encode", "decode" or "reconstruct".
        height, width, num_frames: of the video; frames None where unknown.
        options: what was asked for.
        chunk_frames: frames to push at once where no memory is asked for.
        console: gets the plan.

    Raises:
        ValueError: a bad option, a model without exact tiles, or no plan within the limit.
    """
    side, limit = _asked(options)
    if side is None and limit is None:
        return Prepared(model, chunk_frames, {})
    if model.spatial_factor is None:
        raise ValueError(f"--tile and --memory must be given a model of grids, got {model.name}")
    if side != "auto" and limit is None:
        return Prepared(model.tiled(side), chunk_frames, {"tile": side}, side)
    from vtok_ext.models.planning import plan_stream

    present = _present_before(model)
    budget = None if limit is None else max(0, limit - present)
    size = {"height": height, "width": width}
    plan = plan_stream(model, direction, memory=budget, num_frames=num_frames, **size)
    facts = _say(plan, present, console)
    return Prepared(plan.view(model), plan.chunk_frames, facts, plan.tile)


def prepare_as_before(
    model: Any,
    direction: str,
    height: int,
    width: int,
    options: MemoryOptions,
    chunk_frames: int,
    tile: tuple[int, int] | None,
    console: Console,
) -> Prepared:
    """Returns what `prepare` returned for a stream that now goes on, whatever is asked for now.

    The tile is part of the stream's state, and chunks of another length would change the order of
    sums. Says what memory that takes where some is asked for, and warns where an option comes late.

    Args:
        model, direction, height, width, options, console: as for `prepare`.
        chunk_frames, tile: of the stream.

    Raises:
        ValueError: a bad option, or a model without exact tiles.
    """
    side, limit = _asked(options)
    view = model if tile is None else model.tiled(tile)
    facts: dict[str, Any] = {"tile": tile, "chunk_frames": chunk_frames}
    if limit is not None or side == "auto":
        from vtok_ext.models.planning import MemoryPlan, predict_stream

        present = _present_before(model)
        needed = predict_stream(model, direction, (1, chunk_frames, height, width), tile)
        facts = _say(MemoryPlan(chunk_frames, tile, needed), present, console)
        if limit is not None and present + needed > limit:
            console.warn(f"--memory {options.memory} is less than the stream that goes on takes")
    elif side not in (None, tile):
        console.warn(
            f"--tile {options.tile} comes too late: the stream goes on with {tile or 'none'}"
        )
    return Prepared(view, chunk_frames, facts, tile)


def _asked(options: MemoryOptions) -> tuple[Any, int | None]:
    """Returns the tile, as `parse_tile`, and the limit in bytes."""
    side = parse_tile(options.tile)
    limit = None if options.memory is None else parse_bytes(options.memory)
    if limit is not None and side not in (None, "auto"):
        raise ValueError("--tile must be auto together with --memory, got a size")
    return side, limit


def _present_before(model: Any) -> int:
    """Returns the bytes that the process takes before its stream begins."""
    from vtok_ext.models.memory_rehearsal import predicted_bytes

    predicted_bytes(model, lambda: None)  # loads parts of torch that stay, and count
    return present_bytes(model)


def _say(plan: Any, present: int, console: Console) -> dict[str, Any]:
    """Returns a MemoryPlan for the report after saying it."""
    total = present + plan.predicted_bytes
    tile_text = "the whole picture" if plan.tile is None else f"tiles of {plan.tile[0]}"
    console.say(
        f"plan: chunks of {plan.chunk_frames} frames, {tile_text}, peak {total / 1e9:.2f} GB "
        f"({plan.predicted_bytes / 1e9:.2f} GB more than now)"
    )
    return {
        "tile": plan.tile,
        "chunk_frames": plan.chunk_frames,
        "predicted_peak_bytes": total,
    }


def parse_tile(text: str | None) -> Any:
    """Returns None, "auto" or (height, width)."""
    if text is None or text == "auto":
        return text
    found = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not found or not int(found[1]) or not int(found[2] or 1):
        raise ValueError(f"--tile must be auto, SIZE or HEIGHTxWIDTH, got {text!r}")
    return int(found[1]), int(found[2] or found[1])


def parse_bytes(text: str) -> int:
    """Returns the bytes of "500MB", "4GB" (powers of ten), "4GiB" (of two) or plain "4000000"."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if not found or found[2] not in _UNITS:
        raise ValueError(f"--memory must be a size such as 4GB or 500MB, got {text!r}")
    return int(float(found[1]) * _UNITS[found[2]])


def present_bytes(model: Any) -> int:
    """Returns what the process takes now: resident memory, or allocated memory of the GPU."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        import torch

        return torch.cuda.memory_allocated(device)
    try:
        with open("/proc/self/statm") as file:
            import resource

            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return peak_bytes(model)


def peak_bytes(model: Any) -> int:
    """Returns the most that the process has taken so far, in the unit of `present_bytes`."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
