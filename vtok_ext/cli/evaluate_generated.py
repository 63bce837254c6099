"""`vtok eval REAL --generated FOLDER`: distances of generated videos to real ones, without a model.

FVD with the caller's I3D weights, KVD, and what the videos of both sets are like: dynamics and
detail.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from vtok_ext.data.video import VideoReader
from vtok_ext.metrics import sobel_frequency, video_dynamics

from .console import Console
from .eval_frames import frames_of, video_files
from .eval_means import means_of, spread_of
from .eval_measures import ClipSets, lines_of_sets
from .evaluate import EvalOptions
from .model_source import resolve_device

_READ_FRAMES = 64
_DIGITS = {"dynamics": 8, "frequency": 6}


def run_eval_generated(options: EvalOptions, generated: list[Path], *, as_json: bool) -> None:
    """Returns None after printing the distances of two sets of videos."""
    if options.measures.fvd_weights is None and not options.measures.kvd:
        raise ValueError("eval: --fvd-weights or --kvd must be given with --generated, got neither")
    console = Console(as_json)
    files = {"generated": video_files(generated), "real": video_files(options.videos)}
    if options.measures.kvd and options.size is None:
        _check_sizes(files)
    sets = ClipSets(options.measures, resolve_device(options.device), paired=False)
    start, done = time.monotonic(), 0
    content: dict[str, Any] = {}
    with console.progress("evaluating", sum(map(len, files.values()))) as progress:
        for kind, paths in files.items():
            rows = []
            for path in paths:
                rows.append(_content(path, kind, options, sets))
                sets.end_video()
                done += 1
                progress.update(done)
            content[kind] = {"videos": len(rows), **means_of(rows, _DIGITS)}
            content[kind] |= spread_of([[row] for row in rows], _DIGITS)
    report = {**sets.result(), **content, "size": options.size}
    report["seconds"] = round(time.monotonic() - start, 3)
    lines = lines_of_sets(sets.result())
    for kind, row in content.items():
        values = [
            f"{name} n/a" if row[name] is None else f"{name} {row[name]:.4g}" + _ends(row, name)
            for name in _DIGITS
        ]
        lines.append(f"{kind}: {row['videos']} videos, {', '.join(values)}")
    console.result(report, lines)


def _check_sizes(files: dict[str, list[Path]]) -> None:
    """Raises ValueError unless both sets have the same sizes: features of KVD depend on them."""
    sizes: dict[str, set[str]] = {}
    for kind, paths in files.items():
        sizes[kind] = set()
        for path in paths:
            with VideoReader(path) as reader:
                sizes[kind].add(f"{reader.info.height}x{reader.info.width}")
    if sizes["generated"] != sizes["real"]:
        got = " and ".join(", ".join(sorted(sizes[kind])) for kind in ("generated", "real"))
        raise ValueError(
            f"eval: generated and real videos must have the same sizes for --kvd, got {got}; "
            "--size scales and crops them"
        )


def _ends(row: dict[str, Any], name: str) -> str:
    """Returns the 95 % interval of a mean as text, nothing where there is none."""
    ends = row["intervals"][name]
    return "" if ends is None else f" ({ends[0]:.4g} to {ends[1]:.4g})"


def _content(
    path: Path, kind: str, options: EvalOptions, sets: ClipSets
) -> dict[str, float | None]:
    """Returns dynamics and detail of a video, whose frames go to the sets as well."""
    frequency, changes, frames = 0.0, 0.0, 0
    last = None
    with VideoReader(path) as reader:
        for part in frames_of(reader, options, _READ_FRAMES):
            sets.add(kind, part)
            joined = part if last is None else torch.cat([last, part], 2)
            if joined.shape[2] > 1:
                changes += video_dynamics(joined).item() * (joined.shape[2] - 1)
            frequency += sobel_frequency(part).item() * part.shape[2]
            frames += part.shape[2]
            last = part[:, :, -1:]
    return {
        "dynamics": changes / (frames - 1) if frames > 1 else None,
        "frequency": frequency / frames if frames else None,
    }
