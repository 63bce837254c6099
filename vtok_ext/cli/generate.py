"""`vtok generate`: new videos from a generator and the tokenizer that it was trained on.

OUT/0000.mp4 ...     the videos; number i depends on --seed + i and its label only, not on its batch
                     (with dopri5, whose steps a batch shares, up to its tolerance)
OUT/samples.png      a few frames of each
OUT/generate.json    how they were made, defaults included
"""

from __future__ import annotations

import inspect
import json
import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vtok_ext.data.atomic_output import output_folder, refuse_foreign_files
from vtok_ext.data.picture import write_png
from vtok_ext.data.video import VideoWriter
from vtok_ext.models.coordtok import CoordTok
from vtok_ext.models.generator import LatentGenerator, LatentOrigin
from vtok_ext.models.ode import sample_ode
from vtok_ext.models.sde import sample_sde
from vtok_ext.models.sit import SAMPLERS, SiT

from .console import Console
from .model_source import given_statistics, load_model_for, resolve_device

_REPORT, _SHEET = "generate.json", "samples.png"
_COLUMNS, _GAP, _MAX_ROWS = 6, 2, 16


@dataclass(frozen=True)
class GenerateOptions:
    """What `vtok generate` is asked for; see its options."""

    model: str
    out: Path
    name: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    last: bool = False
    statistics: Path | None = None
    statistics_order: str | None = None
    tokenizer: str | None = None
    tokenizer_name: str | None = None
    trust_checkpoint: bool = False
    any_weights: bool = False
    num_samples: int = 4
    batch_size: int = 4
    seed: int = 0
    labels: tuple[int, ...] = ()
    guidance: float = 1.0
    sampling: dict[str, Any] = field(default_factory=dict)
    fps: float | None = None
    device: str = "auto"


def run_generate(options: GenerateOptions, *, as_json: bool) -> None:
    """Returns None after writing the folder; it appears complete or not at all."""
    if options.num_samples < 1 or options.batch_size < 1:
        raise ValueError(
            f"generate: -n and --batch-size must be >= 1, got {options.num_samples} and "
            f"{options.batch_size}"
        )
    if options.fps is not None and not 0 < options.fps < math.inf:
        raise ValueError(f"generate: --fps must be finite and > 0, got {options.fps}")
    _check_sampling(options.sampling)
    console, target = Console(as_json), resolve_device(options.device)
    with output_folder(options.out, replaceable=_is_ours, op="generate") as folder:
        generator, tokenizer = _models(options, target, console)
        statistics = _statistics_source(options, generator, tokenizer)
        _check_labels(options.labels, generator.config.num_classes)
        origin = generator.origin
        assert origin is not None  # _models has seen to it
        fps = options.fps or origin.fps or 25.0
        start, count = time.monotonic(), 0
        rows: list[torch.Tensor] = []
        with console.progress("generating", options.num_samples) as progress:
            for first in range(0, options.num_samples, options.batch_size):
                numbers = range(first, min(first + options.batch_size, options.num_samples))
                for video in _batch(options, generator, tokenizer, numbers):
                    path = folder / _video_name(count)
                    height, width = origin.height, origin.width
                    with VideoWriter(path, fps=fps, height=height, width=width) as writer:
                        writer.write(video)
                    if len(rows) < _MAX_ROWS:
                        rows.append(video)
                    count += 1
                progress.update(count)
        write_png(folder / _SHEET, contact_sheet(rows))
        report = _report(options, generator, tokenizer, target, count, fps)
        report["statistics"] = statistics
        report["seconds"] = round(time.monotonic() - start, 3)
        (folder / _REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    frames = f"{origin.num_frames} frames of {origin.width}x{origin.height}"
    lines = [f"{count} videos of {frames} in {report['seconds']:.1f} s on {target}"]
    console.result(report, [*lines, f"wrote {options.out}"])


def _video_name(number: int) -> str:
    return f"{number:04d}.mp4"


def _is_ours(folder: Path) -> bool:
    """Returns whether this command wrote a folder, which may be replaced then.

    Raises:
        ValueError: it did, but someone has put other files into it.
    """
    try:
        count = json.loads((folder / _REPORT).read_text(encoding="utf-8"))["videos"]
        own = {_REPORT, _SHEET, *map(_video_name, range(count))}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    refuse_foreign_files(folder, own, "generate")
    return True


def _models(
    options: GenerateOptions, target: torch.device, console: Console
) -> tuple[LatentGenerator, Any]:
    """Returns generator and tokenizer, in eval mode."""
    import vtok_ext as vt

    statistics = given_statistics("generate", options.statistics, options.statistics_order)
    generator = vt.load_generator(
        options.model,
        options.name,
        ema=not options.last,
        statistics=statistics,
        trust_checkpoint=options.trust_checkpoint,
        **options.overrides,
    ).to(target)
    known = generator.origin.tokenizer if generator.origin else None
    source = options.tokenizer or known
    # A path was made absolute when it was noted down; anything else is a hub id.
    lost = source is not None and os.path.isabs(source) and not Path(source).exists()
    if source is None or (lost and options.tokenizer is None):
        raise ValueError(
            f"generate: --tokenizer must name the tokenizer of {options.model}, got none"
            + (f"; it was trained with {source}, which is not there" if source else "")
        )
    tokenizer, _ = load_model_for(
        source,
        options.tokenizer_name,
        target,
        console,
        trust_checkpoint=options.trust_checkpoint,
    )
    if generator.origin is None:
        shape = getattr(tokenizer.config, "video_shape", None)
        if shape is None:
            raise ValueError(
                f"generate: {options.model} must say which clips it makes, got a checkpoint that "
                f"does not, and {tokenizer.name}, whose clips have any length"
            )
        generator.origin = LatentOrigin(*shape)
    # Before the time is spent, not after.
    _check_latents(generator, tokenizer)
    tokenizer.check_origin("generate", generator.origin.tokenizer_id, options.any_weights)
    return generator, tokenizer


def _statistics_source(
    options: GenerateOptions, generator: LatentGenerator, tokenizer: Any
) -> str | None:
    """Returns where the statistics of the latents are from: those of the tokenizer, which
    `vtok stats` has measured, are taken over where there are no others."""
    if options.statistics is not None:
        return str(options.statistics)
    if generator.statistics is not None:
        return "generator"
    measured = getattr(tokenizer, "latent_statistics", None)
    if measured is None or not isinstance(generator, SiT):
        return None
    generator.set_statistics(measured, "generate")
    return "tokenizer"


def _check_labels(labels: tuple[int, ...], num_classes: int) -> None:
    for label in labels:
        if not 0 <= label < num_classes:
            raise ValueError(f"generate: --label must be in 0..{num_classes - 1}, got {label}")


def _check_sampling(sampling: dict[str, Any]) -> None:
    adaptive = sampling.get("sampler") == "ode" and sampling.get("method", "dopri5") == "dopri5"
    if adaptive and "num_steps" in sampling:
        raise ValueError(
            "generate: --steps must be absent for dopri5, the default of ode, which chooses its "
            f"own; --method heun takes {sampling['num_steps']}"
        )


def _check_latents(generator: LatentGenerator, tokenizer: Any) -> None:
    """Raises ValueError unless the generator's planes are those of the tokenizer."""
    makes_planes = getattr(generator.config, "latent", None) == "triplane"
    if makes_planes != isinstance(tokenizer, CoordTok):
        raise ValueError(
            f"generate: the tokenizer of {generator.name} must "
            f"{'' if makes_planes else 'not '}be a CoordTok, got {tokenizer.name}"
        )
    if not makes_planes:
        return
    config = generator.config
    ours = (*config.input_size, config.in_channels)
    theirs = (*tokenizer.config.latent_resolution, tokenizer.config.latent_channels)
    if ours != theirs:
        raise ValueError(
            f"generate: the tokenizer of {generator.name} must have cells (t, x, y) and channels "
            f"{ours}, got {theirs} of {tokenizer.name}"
        )
    origin = generator.origin
    assert origin is not None  # `_models` has seen to it
    shape = (origin.num_frames, origin.height, origin.width)
    tokenizer.check_clip(f"generate: clips of {generator.name}", shape)


@torch.no_grad()
def _batch(
    options: GenerateOptions, generator: LatentGenerator, tokenizer: Any, numbers: range
) -> torch.Tensor:
    """Returns the videos [B, 3, T, H, W] uint8 of some numbers, on the CPU."""
    sources = [torch.Generator().manual_seed(options.seed + number) for number in numbers]
    labels = None
    if options.labels:
        labels = torch.tensor([options.labels[n % len(options.labels)] for n in numbers])
    latent = generator.sample(
        len(numbers),
        labels=labels,
        guidance=options.guidance,
        generator=sources,
        **options.sampling,
    )
    return generator.decode(tokenizer, latent, any_weights=options.any_weights).cpu()


def contact_sheet(
    videos: list[torch.Tensor],  # [3, T, H, W] uint8 each
) -> torch.Tensor:
    """Returns [3, H', W'] uint8: a video per row, moments from first to last in columns."""
    rows = []
    for video in videos:
        count = min(_COLUMNS, video.shape[1])
        moments = torch.linspace(0, video.shape[1] - 1, count).round().long()
        factor = max(1, 96 // video.shape[2])
        frames = video[:, moments].repeat_interleave(factor, 2).repeat_interleave(factor, 3)
        frames = torch.nn.functional.pad(frames, (0, _GAP, 0, _GAP), value=24)
        rows.append(frames.permute(0, 2, 1, 3).flatten(2))
    return torch.cat(rows, 1)


def _effective_sampling(generator: LatentGenerator, given: dict[str, Any]) -> dict[str, Any]:
    """Returns the options of sampling that counted, given or by default."""
    names: tuple[str, ...] = ("temperature", "top_k", "top_p")
    function: Any = generator.sample
    chosen = dict(given)
    if isinstance(generator, SiT):
        sampler = chosen.setdefault("sampler", "sde")
        names, function = SAMPLERS[sampler], {"sde": sample_sde, "ode": sample_ode}[sampler]
    for name, parameter in inspect.signature(function).parameters.items():
        if name in names:
            chosen.setdefault(name, parameter.default)
    adaptive = chosen.get("method") == "dopri5"
    unused = ("num_steps",) if adaptive else ("rtol", "atol", "max_steps")
    if "last_step" in chosen and chosen["last_step"] is None:
        unused = (*unused, "last_step_size")
    # The last three are no options of the command.
    return {k: v for k, v in chosen.items() if k not in (*unused, "start", "stop", "noise")}


def _report(
    options: GenerateOptions,
    generator: LatentGenerator,
    tokenizer: Any,
    target: torch.device,
    count: int,
    fps: float,
) -> dict[str, Any]:
    origin = generator.origin
    assert origin is not None
    return {
        "model": options.model,
        "generator": generator.name,
        "last": options.last,
        "tokenizer": tokenizer.model_id,
        "videos": count,
        "frames": origin.num_frames,
        "height": origin.height,
        "width": origin.width,
        "fps": fps,
        "seed": options.seed,
        "labels": list(options.labels),
        "guidance": options.guidance,
        "sampling": _effective_sampling(generator, options.sampling),
        "device": str(target),
    }
