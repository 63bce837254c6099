"""`vtok ask` and `vtok generate MODEL "text"`: the unified model of VTok on one video or text."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vtok_ext.data.video import VideoReader, VideoWriter

from .console import Console
from .model_source import resolve_device

_CHUNK_FRAMES = 16
# Of videos from text, if the model does not say at which rate it was trained.
_FPS = 8.0


@dataclass(frozen=True)
class TextVideoOptions:
    """What `vtok generate MODEL "text"` is asked for; see its options."""

    model: str
    text: str
    out: Path
    num_frames: int = 32
    height: int | None = None
    width: int | None = None
    fps: float | None = None
    temperature: float = 1.0
    guidance: float = 1.0
    num_steps: int | None = None
    seed: int = 0
    device: str = "auto"


def load_unified(source: str, target: torch.device) -> Any:
    """Returns the VTokLM in a folder, on a device. Raises ValueError, OSError if it is none."""
    from vtok_ext.models.vtok_lm import VTokLM

    return VTokLM.from_pretrained(source).to(target)


def read_frames(path: Path, max_frames: int) -> tuple[torch.Tensor, float]:
    """Returns the first frames [3, T, H, W] uint8 of a video, and its frames per second."""
    parts, left = [], max_frames
    with VideoReader(path) as reader:
        for chunk in reader.chunks(_CHUNK_FRAMES):
            parts.append(chunk.frames[:, :left])
            left -= parts[-1].shape[1]
            if left <= 0:
                break
        return torch.cat(parts, dim=1), float(reader.info.fps or 24)


def run_ask(
    *,
    model: str,
    video: Path,
    question: str,
    max_frames: int,
    fps: float | None,
    device: str,
    as_json: bool,
) -> None:
    """Returns None after printing the answer."""
    console, target = Console(as_json), resolve_device(device)
    unified = load_unified(model, target)
    frames, recorded = read_frames(video, max_frames)
    rate = recorded if fps is None else fps
    start = time.monotonic()
    (text,) = unified.answer(frames[None].to(target), [question], fps=rate)
    report = {
        "video": str(video),
        "question": question,
        "answer": text,
        "frames": frames.shape[1],
        "fps": rate,
        "tokens": len(unified.tokenizer.default_positions(frames.shape[1], rate)),
        "seconds": round(time.monotonic() - start, 3),
        "device": str(target),
    }
    console.result(report, [text])


def run_generate_text(options: TextVideoOptions, *, as_json: bool) -> None:
    """Returns None after writing a video of a text; the file appears complete or not at all."""
    from vtok_ext.models.vtok_generation import check_guidance

    if options.num_frames < 1 or not (options.fps is None or options.fps > 0):
        raise ValueError(
            f"generate: --frames and --fps must be positive, got {options.num_frames} and "
            f"{options.fps}"
        )
    if not 0 <= options.temperature < float("inf"):
        raise ValueError(f"generate: --temperature must be >= 0, got {options.temperature}")
    console, target = Console(as_json), resolve_device(options.device)
    unified = load_unified(options.model, target)
    check_guidance(unified, options.guidance)
    side = unified.tokenizer.config.image_size
    size = (options.height or side, options.width or side)
    fps = unified.rate(options.fps) or _FPS
    with VideoWriter(options.out, height=size[0], width=size[1], fps=fps) as writer:
        start = time.monotonic()
        console.say(f"{options.num_frames} frames of {size[1]}x{size[0]}, on {target}")
        video = unified.generate(
            [options.text],
            num_frames=options.num_frames,
            size=size,
            fps=fps,
            temperature=options.temperature,
            guidance=options.guidance,
            num_steps=options.num_steps,
            seed=options.seed,
            output="uint8",
        )
        writer.write(video[0].cpu())
    report = {
        "text": options.text,
        "output": str(options.out),
        "frames": options.num_frames,
        "height": size[0],
        "width": size[1],
        "fps": fps,
        "tokens": len(unified.tokenizer.default_positions(options.num_frames, fps)),
        "temperature": options.temperature,
        "guidance": options.guidance,
        "steps": options.num_steps or unified.tokenizer.config.sampling_steps,
        "seed": options.seed,
        "seconds": round(time.monotonic() - start, 3),
        "device": str(target),
    }
    lines = [f"{report['tokens']} tokens in {report['seconds']} s", f"wrote {options.out}"]
    console.result(report, lines)
