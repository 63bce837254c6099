"""`vtok bench max-batch`: the largest training batch within a memory budget, by clip length.

The table of CoordTok's figure 1a (arXiv 2411.14762) for the tokenizers of this package. A step is
the forward and backward pass of the pixel loss, without perceptual and adversarial networks:
CoordTok encodes the clip and decodes 1,024 points, the others encode and decode all of it; its
encoder can be recomputed in the backward pass, as by `model.recompute_encoder` of a recipe.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from vtok_ext.training.blocks import recompute_activations
from vtok_ext.training.training_memory import predict_training_memory

from .console import Console

GIB = 2**30
# As published: the points of the first training step.
NUM_POINTS = 1024
# How to build a model, its step of (model, batch), and the frames of its clips.
TrainingStep = tuple[Callable[[], torch.nn.Module], Callable[[Any, int], torch.Tensor], int]
# Of every architecture; continuous latents, whose training step is the simplest.
SYSTEMS = (
    *("coordtok_large_128", "coordtok_small_128"),
    *("vidtok_kl_causal_488_4chn", "promag_base_4x8x8", "vtok_base"),
)


def run_max_batch(
    *,
    systems: list[str],
    lengths: list[int],
    size: int,
    memory_gib: float,
    precision: str,
    recompute_encoder: bool,
    check: bool,
    as_json: bool,
) -> None:
    """Returns None after printing the table; with `recompute_encoder` CoordTok has two rows for
    each length.

    Raises:
        ValueError: an unknown model, a length, size or budget that is not positive or that a model
            cannot have, `check` without a GPU, or `recompute_encoder` without a CoordTok.
    """
    for name, values in (("frames", lengths), ("size", [size]), ("memory", [memory_gib])):
        if not 0 < min(values) < math.inf:
            raise ValueError(f"bench max-batch: {name} must be positive, got {min(values)}")
    if check and not torch.cuda.is_available():
        raise ValueError("bench max-batch: --check must have a CUDA GPU, got none")
    if recompute_encoder and not any(map(_has_points, systems)):
        raise ValueError(
            "bench max-batch: --recompute-encoder must have a CoordTok among the models, "
            f"got {', '.join(systems)}"
        )
    console = Console(as_json)
    jobs = [
        (name, again, training_step(name, length, size, recompute_encoder=again))
        for name in systems
        for again in ((False, True) if recompute_encoder and _has_points(name) else (False,))
        for length in lengths
    ]
    rows = []
    with console.progress("counting", len(jobs)) as progress:
        for done, (name, again, step) in enumerate(jobs, 1):
            row = _row(step, memory_gib, precision, check)
            rows.append({"model": name, "recompute_encoder": again, **row})
            progress.update(done, name)
    report = {
        "memory_gib": memory_gib,
        "precision": precision,
        "size": size,
        "num_points": NUM_POINTS,
        "torch": torch.__version__,
        "rows": rows,
    }
    console.result(report, _table(report))


def _row(job: TrainingStep, memory_gib: float, precision: str, check: bool) -> dict[str, Any]:
    build, step, frames = job
    memory = predict_training_memory(build, step, precision=precision)
    row = {
        "frames": frames,
        "state_gib": memory.state / GIB,
        "constant_gib": memory.constant / GIB,
        "per_clip_gib": memory.per_clip / GIB,
        "largest_batch": memory.largest_batch(int(memory_gib * GIB)),
    }
    if not check:
        return row
    try:
        measured = measured_per_clip(build, step, precision)
    except torch.cuda.OutOfMemoryError:
        measured = None
    torch.cuda.empty_cache()
    return row | {
        "measured_per_clip_gib": None if measured is None else measured / GIB,
        "measured_to_predicted": None if measured is None else measured / memory.per_clip,
    }


def _has_points(name: str) -> bool:
    return name.startswith("coordtok")


def training_step(
    name: str, length: int, size: int, *, recompute_encoder: bool = False
) -> TrainingStep:
    """Returns how to build a model, its step of (model, batch), and the frames of its clips.

    Args:
        name: of `vt.list_models()`.
        length: frames wanted; a causal model takes one more than a multiple of its factor.
        size: height and width.
        recompute_encoder: of a CoordTok, in the backward pass.

    Raises:
        ValueError: an unknown model, or one that makes nothing of such clips.
    """
    import vtok_ext as vt

    with torch.device("meta"):
        model = vt.create_model(name)
    if _has_points(name):
        _check_patches(name, model.config, length, size)
        overrides = {"video_shape": (length, size, size)}

        def build() -> torch.nn.Module:
            built: Any = vt.create_model(name, **overrides)
            if recompute_encoder:
                recompute_activations(built.encoder)
            return built

        def points_step(model: Any, batch: int) -> torch.Tensor:
            device = next(model.parameters()).device
            shape = model.config.video_shape
            video = torch.zeros(batch, 3, *shape, dtype=torch.uint8, device=device)
            points = torch.zeros(batch, NUM_POINTS, 3, dtype=torch.int64, device=device)
            return model(video, points=points).reconstruction.float().square().mean()

        return build, points_step, length
    f = model.temporal_factor or 1
    frames = length // f * f + 1 if model.is_causal else length // f * f
    if frames == 0:
        raise ValueError(f"bench max-batch: frames must be >= {f} for {name}, got {length}")

    def step(model: Any, batch: int) -> torch.Tensor:
        device = next(model.parameters()).device
        video = torch.zeros(batch, 3, frames, size, size, dtype=torch.uint8, device=device)
        return model(video).reconstruction.float().square().mean()

    return lambda: vt.create_model(name), step, frames


def _check_patches(name: str, config: Any, length: int, size: int) -> None:
    """Raises ValueError for clips that are no whole patches of a CoordTok."""
    wanted = (length, size, size)
    for option, value, *patches in zip(
        ("frames", "size", "size"),
        wanted,
        config.enc_patch_size,
        config.dec_patch_size,
        strict=True,
    ):
        factor = math.lcm(*patches)
        if value % factor:
            raise ValueError(
                f"bench max-batch: {option} must be a multiple of {factor} for {name}, got {value}"
            )


def measured_per_clip(
    build: Callable[[], torch.nn.Module],
    step: Callable[[Any, int], torch.Tensor],
    precision: str,
) -> int:
    """Returns by how much CUDA's peak grows from one clip to two, in bytes."""
    model = build().train().cuda()
    peaks = []
    for batch in (1, 1, 2):  # the first one also makes the gradients
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", getattr(torch, precision), enabled=precision != "float32"):
            loss = step(model, batch)
        loss.backward()
        peaks.append(torch.cuda.max_memory_allocated())
    return peaks[2] - peaks[1]


def _table(report: dict[str, Any]) -> list[str]:
    checked = any("measured_per_clip_gib" in row for row in report["rows"])
    titles = ["model", "frames", "batch", "per clip", "kept once", "weights, Adam"]
    lines = [titles + (["measured per clip"] if checked else [])]
    for row in report["rows"]:
        again = ", encoder recomputed" if row["recompute_encoder"] else ""
        line = [row["model"] + again, str(row["frames"]), str(row["largest_batch"])]
        line += [f"{row[key]:.2f} GiB" for key in ("per_clip_gib", "constant_gib", "state_gib")]
        if checked:
            line.append(_measured(row))
        lines.append(line)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["  ".join(c.ljust(w) for c, w in zip(ln, widths, strict=True)).rstrip() for ln in lines]
    points = any(_has_points(row["model"]) for row in report["rows"])
    text.append(
        f"{report['memory_gib']:g} GiB, {report['size']}x{report['size']}, {report['precision']}; "
        "predicted from what autograd saves"
        + (f"; CoordTok decodes {report['num_points']} points" if points else "")
    )
    return text


def _measured(row: dict[str, Any]) -> str:
    if row["measured_per_clip_gib"] is None:
        return "out of memory"
    ratio = row["measured_to_predicted"]
    return f"{row['measured_per_clip_gib']:.2f} GiB, {ratio:.2f}x predicted"
