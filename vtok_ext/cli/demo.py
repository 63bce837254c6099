"""`vtok demo`: a clip, a tokenizer trained on it, the clip's token file, and what it decodes to."""

from __future__ import annotations

import json
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from vtok_ext.data.atomic_output import (
    check_output_folder,
    output_folder,
    refuse_foreign_files,
)

from .console import Console
from .demo_clip import DemoClip, clip_from_video, default_clip
from .freed_memory import keep_freed_memory

# 4x8x8 compression at a width that two CPU cores can train in a minute. The second level is as
# narrow as the first: its upsampling convolutions run at full resolution and would otherwise take
# most of the time.
PRESET = "vidtok_fsq_causal_488_262144"
OVERRIDES: dict[str, Any] = {"ch": 16, "ch_mult": (1, 1, 2, 4), "num_res_blocks": 1}
DEFAULT_STEPS = 150
# Bounds the training on slow machines, so that the whole command stays under 150 seconds.
DEFAULT_SECONDS = 85.0
# What a presentable result takes; a machine too busy for that in time gets more time.
MIN_STEPS = 80
_MADE_BY = "vtok demo"
_FILES = (
    *("reconstruction.mp4", "comparison.png", "metrics.json", "tokens.safetensors"),
    *("model/config.json", "model/model.safetensors"),
)


@dataclass(frozen=True)
class _Outcome:
    """What the trained model makes of the clip, and how long each part took."""

    reconstruction: torch.Tensor  # [1, 3, T, H, W]
    tokens: Any
    model: Any
    training: dict[str, Any]
    seconds: dict[str, float]


def run_demo(
    *,
    video: Path | None,
    out: Path,
    seconds: float | None,
    steps: int | None,
    seed: int,
    as_json: bool,
) -> None:
    """Returns None after writing the folder `out` and printing where and how good the result is."""
    if seconds is not None and steps is not None:
        raise ValueError("demo: give one of --seconds and --steps, got both")
    if seconds is not None and not seconds > 0:
        raise ValueError(f"demo: --seconds must be positive, got {seconds}")
    if steps is not None and steps < 1:
        raise ValueError(f"demo: --steps must be at least 1, got {steps}")
    start = time.monotonic()
    console = Console(as_json)
    check_output_folder(out, _is_previous_demo, "demo")
    clip = default_clip(seed) if video is None else clip_from_video(video)
    console.say(f"clip: {clip.description}")
    with output_folder(out, replaceable=_is_previous_demo, op="demo") as folder:
        outcome = _train_and_reconstruct(clip, folder, seconds, steps, seed, console)
        metrics = _measure(clip, outcome, seed)
        _write_pictures(clip, outcome, folder)
        metrics["seconds"]["total"] = round(time.monotonic() - start, 2)
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    console.result({**metrics, "folder": str(out)}, _summary(metrics, out))


def _is_previous_demo(folder: Path) -> bool:
    """Returns True if `folder` was written by this command and may therefore be replaced.

    Raises:
        ValueError: it was, but someone has put other files into it.
    """
    try:
        metrics = json.loads((folder / "metrics.json").read_text())
    except (OSError, ValueError):
        return False
    if not isinstance(metrics, dict) or metrics.get("made_by") != _MADE_BY:
        return False
    refuse_foreign_files(folder, _FILES, "demo")
    return True


def _train_and_reconstruct(
    clip: DemoClip,
    folder: Path,
    seconds: float | None,
    steps: int | None,
    seed: int,
    console: Console,
) -> _Outcome:
    """Returns the outcome; writes model/ and tokens.safetensors, and decodes from these files."""
    import vtok_ext as vt

    video = clip.frames[None].float() / 127.5 - 1  # [1, 3, T, H, W]
    torch.manual_seed(seed)
    model = vt.create_model(PRESET, **OVERRIDES)
    training = _train(model, video, seconds, steps, console)
    model.save_pretrained(folder / "model")
    model = vt.load_model(folder / "model")
    with torch.no_grad():
        start = time.monotonic()
        model.tokenize(video, fps=clip.fps).save(folder / "tokens.safetensors")
        encoded = time.monotonic()
        tokens = vt.Tokens.load(folder / "tokens.safetensors")
        reconstruction = model.detokenize(tokens)
        decoded = time.monotonic()
    times = {
        "training": training["seconds"],
        "encode": round(encoded - start, 3),
        "decode": round(decoded - encoded, 3),
    }
    return _Outcome(reconstruction, tokens, model, training, times)


def _train(
    model: Any, video: torch.Tensor, seconds: float | None, steps: int | None, console: Console
) -> dict[str, Any]:
    """Returns steps, seconds, precision and final loss of the training."""
    from vtok_ext.training.cpu_precision import faster_training_dtype
    from vtok_ext.training.overfit import OverfitProgress, overfit_clip

    keep_freed_memory()
    dtype = faster_training_dtype()
    precision = "float32" if dtype is None else "bfloat16 autocast"
    parameters = sum(p.numel() for p in model.parameters())
    console.say(
        f"model: {model.name} with {parameters / 1e6:.1f} M parameters, "
        f"{torch.get_num_threads()} threads, {precision}"
    )
    limits: dict[str, Any] = {
        "max_steps": DEFAULT_STEPS,
        "max_seconds": DEFAULT_SECONDS,
        "min_steps": MIN_STEPS,
    }
    if seconds is not None or steps is not None:
        limits = {"max_steps": steps, "max_seconds": seconds}
    with console.progress("training", 1.0) as progress:

        def show(state: OverfitProgress) -> None:
            progress.update(state.fraction, f"step {state.step}, {state.psnr:.1f} dB")

        result = overfit_clip(model, video, autocast_dtype=dtype, on_step=show, **limits)
    return {
        "steps": result.steps,
        "seconds": round(result.seconds, 2),
        "precision": precision,
        "loss": result.loss,
    }


def _measure(clip: DemoClip, outcome: _Outcome, seed: int) -> dict[str, Any]:
    """Returns the content of metrics.json but for the total time."""
    import math

    import numpy

    import vtok_ext as vt

    video = clip.frames[None].float() / 127.5 - 1
    num_tokens = outcome.tokens.ids.numel()
    codebook_size = outcome.model.codebook_size
    bits = num_tokens * math.log2(codebook_size)
    usage = vt.metrics.codebook_usage(outcome.tokens.ids, codebook_size)
    pixels = clip.frames[0].numel()
    return {
        "made_by": _MADE_BY,
        "psnr": round(vt.metrics.psnr(outcome.reconstruction, video).item(), 3),
        "ssim": _ssim_or_none(outcome.reconstruction, video),
        "tokens": num_tokens,
        "token_grid": list(outcome.tokens.grid),
        "bits_per_pixel": round(bits / pixels, 5),
        "compression_ratio": round(24 * pixels / bits, 1),
        "codebook_usage": {"codebook_size": codebook_size, **asdict(usage)},
        "seconds": outcome.seconds,
        "training": outcome.training,
        "clip": {
            "source": clip.source,
            "description": clip.description,
            "frames": clip.frames.shape[1],
            "height": clip.frames.shape[2],
            "width": clip.frames.shape[3],
            "fps": clip.fps,
        },
        "model": {
            "preset": PRESET,
            "id": outcome.model.model_id,
            "config": outcome.model.config.to_dict(),
            "parameters": sum(p.numel() for p in outcome.model.parameters()),
        },
        "seed": seed,
        "threads": torch.get_num_threads(),
        "versions": {
            "vtok_ext": vt.__version__,
            "torch": torch.__version__,
            "numpy": numpy.__version__,
            "python": platform.python_version(),
        },
    }


def _ssim_or_none(reconstruction: torch.Tensor, video: torch.Tensor) -> float | None:
    """Returns the SSIM, None for frames smaller than its window."""
    import vtok_ext as vt

    if min(video.shape[3:]) < 11:
        return None
    return round(vt.metrics.ssim(reconstruction, video).item(), 4)


def _write_pictures(clip: DemoClip, outcome: _Outcome, folder: Path) -> None:
    """Returns None after writing reconstruction.mp4 and comparison.png."""
    from vtok_ext.data.picture import write_png
    from vtok_ext.data.video import VideoWriter

    from .comparison import comparison_picture, enlarged

    output = ((outcome.reconstruction[0].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    write_png(folder / "comparison.png", comparison_picture(clip.frames, output, clip.seconds))
    pair = enlarged(torch.cat([clip.frames, output], dim=3))
    with VideoWriter(
        folder / "reconstruction.mp4",
        height=pair.shape[2],
        width=pair.shape[3],
        fps=clip.fps,
        time_base=clip.time_base,
    ) as writer:
        writer.write(pair, clip.timestamps)


def _summary(metrics: dict[str, Any], out: Path) -> list[str]:
    clip, usage = metrics["clip"], metrics["codebook_usage"]
    ssim = "n/a" if metrics["ssim"] is None else f"{metrics['ssim']:.3f}"
    return [
        f"PSNR {metrics['psnr']:.2f} dB, SSIM {ssim} on {clip['frames']} frames of "
        f"{clip['width']}x{clip['height']}",
        f"{metrics['tokens']} tokens ({'x'.join(map(str, metrics['token_grid']))}), "
        f"{metrics['bits_per_pixel']:.4f} bits per pixel, {metrics['compression_ratio']:.0f} times "
        f"smaller than raw; {usage['num_used']} distinct codes, perplexity "
        f"{usage['perplexity']:.0f}",
        f"{metrics['training']['steps']} steps in {metrics['seconds']['training']:.0f} s, "
        f"{metrics['seconds']['total']:.0f} s in all",
        f"{out}/: reconstruction.mp4 (input left, output right), comparison.png, metrics.json, "
        f"tokens.safetensors, model/",
        f"this model knows one clip; `vtok demo --video YOURS.mp4` trains on yours, and "
        f"`vtok reconstruct VIDEO --model {out}/model` runs it on any",
    ]
