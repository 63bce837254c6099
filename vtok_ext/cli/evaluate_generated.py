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
from .eval_measures import ClipSets, lines_of_sets
from .evaluate import EvalOptions
from .model_source import resolve_device

_READ_FRAMES = 64


def run_eval_generated(options: EvalOptions, generated: list[Path], *, as_json: bool) -> None:
    """Returns None after printing the distances of two sets of videos."""
    if options.measures.fvd_weights is None and not options.measures.kvd:
        raise ValueError("eval: --fvd-weights or --kvd must be given with --generated, got neither")
    console = Console(as_json)
    files = {"generated": video_files(generated), "real": video_files(options.videos)}
    sets = ClipSets(options.measures, resolve_device(options.device))
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
            content[kind] = {"videos": len(rows), **_means(rows)}
    report = {**sets.result(), **content, "size": options.size}
    report["seconds"] = round(time.monotonic() - start, 3)
    lines = lines_of_sets(sets.result())
    for kind, row in content.items():
        values = [
            f"{name} n/a" if row[name] is None else f"{name} {row[name]:.4g}"
            for name in ("dynamics", "frequency")
        ]
        lines.append(f"{kind}: {row['videos']} videos, {', '.join(values)}")
    console.result(report, lines)


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


def _means(rows: list[dict[str, float | None]]) -> dict[str, float | None]:
    means: dict[str, float | None] = {}
    for name in ("dynamics", "frequency"):
        values = [value for row in rows if (value := row[name]) is not None]
        means[name] = sum(values) / len(values) if values else None
    return means
