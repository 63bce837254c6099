"""One table of all systems on the same clips of 128 frames: what they cost and how good they are.

    python bench/systems.py vidtok=FOLDER coordtok=FOLDER vtok=FOLDER windows=FOLDER@16

NAME=FOLDER is a saved model; @16 codes windows of 16 frames each by itself, the baseline whose
seams `boundary_jump` shows (every system is measured at the borders of windows of 16 frames). Every
system runs in a process of its own. Results go to bench/results/<device>/systems.json; the table is
printed as Markdown.

tokens: positions of the latent; bits: log2 of the codebook per token, or 32 per number of a
continuous latent; LPIPS is left out where its published weights are not at hand. Row "mean colour":
what the mean colour of each clip alone gives.
peak_mb: the most resident memory of the process from before its model is loaded until all clips are
encoded and decoded, less what was resident before: imports are not part of it; weights, one float
clip, the latents of a clip and the uint8 videos decoded so far are. Quality is measured afterwards,
on these videos. It is left out where Linux does not let a process start a new peak.
"""

import argparse
import json
import math
import multiprocessing
import os
import time
from pathlib import Path

import torch
from harness import (
    RESULTS,
    device_name,
    environment,
    forget_process_peak,
    process_peak_mb,
)
from report import systems_rows

import vtok_ext as vt
from vtok_ext.data.procedural import procedural_clip
from vtok_ext.models._video_input import to_uint8

# Beyond any training seed, as in training and studies.
FIRST_SEED = 1_000_000_000
WINDOW = 16
_LATENT_BITS = 32


def clip_of(index: int, frames: int, size: int) -> torch.Tensor:
    """Returns clip `index` [1, 3, T, H, W] in [-1, 1]."""
    clip = procedural_clip(frames, size, size, seed=FIRST_SEED + index, dtype=torch.float32)
    return clip[None]


def numbers_in(encoding, model) -> tuple[int, float]:
    """Returns the tokens and bits of one clip."""
    if model.is_discrete:
        tokens = encoding.indices[0].numel()
        return tokens, tokens * math.log2(model.codebook_size)
    latent = encoding.latent
    planes = list(latent.values()) if isinstance(latent, dict) else [latent]
    # [1, C, t, h, w] of a grid; [1, rows, columns, C] of a plane; [1, L, D] of a sequence.
    tokens = sum(p[0].numel() // (p.shape[1] if p.dim() == 5 else p.shape[-1]) for p in planes)
    return tokens, float(_LATENT_BITS * sum(p[0].numel() for p in planes))


@torch.no_grad()
def code_clip(model, video: torch.Tensor, window: int) -> tuple[torch.Tensor, dict[str, float]]:
    """Returns a clip as it comes back, uint8, and what that costs."""
    parts = video.split(window, dim=2) if window else [video]
    start = time.perf_counter()
    encodings = [model.encode(part) for part in parts]
    middle = time.perf_counter()
    decoded = torch.cat([model.decode(e, output="uint8") for e in encodings], dim=2)
    end = time.perf_counter()
    costs = [numbers_in(encoding, model) for encoding in encodings]
    return decoded, {
        "tokens": float(sum(tokens for tokens, _ in costs)),
        "bits": sum(bits for _, bits in costs),
        "encode_s": middle - start,
        "decode_s": end - middle,
    }


def quality_of(decoded: torch.Tensor, video: torch.Tensor) -> dict[str, float]:
    """Returns how near a decoded clip, uint8, is to the original in [-1, 1]."""
    decoded = decoded.float() / 127.5 - 1
    values = {
        "psnr": float(vt.metrics.psnr(decoded, video)),
        "ssim": float(vt.metrics.ssim(decoded, video)),
        "boundary_jump": float(vt.metrics.boundary_jump(decoded, video, WINDOW)),
    }
    try:
        values["lpips"] = float(vt.metrics.lpips(decoded, video))
    except FileNotFoundError:
        pass  # the column stays empty
    return values


def mean_colour_row(frames: int, size: int, clips: int) -> dict:
    """Returns the row of a system that says the mean colour of each clip and nothing else."""
    rows = []
    for index in range(clips):
        clip = clip_of(index, frames, size)
        colour = to_uint8(clip.mean((2, 3, 4), keepdim=True))
        rows.append(quality_of(colour.expand_as(clip), clip))
    return {"system": "mean colour", **means_of(rows)}


def means_of(rows: list[dict[str, float]]) -> dict[str, float]:
    """Returns the means over clips."""
    return {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}


def measure_system(name: str, source: str, options: dict, queue) -> None:
    """Puts the means over clips of one system into a queue; runs in a process of its own."""
    torch.set_num_threads(options["threads"])
    folder, _, window = source.partition("@")

    def clip(index: int) -> torch.Tensor:
        return clip_of(index, options["frames"], options["size"])

    before = forget_process_peak()
    model = vt.load_model(folder).eval()
    coded = [code_clip(model, clip(i), int(window or 0)) for i in range(options["clips"])]
    peak_mb = process_peak_mb()
    rows = [{**costs, **quality_of(video, clip(i))} for i, (video, costs) in enumerate(coded)]
    means = means_of(rows)
    if before is not None:
        means["peak_mb"] = peak_mb - before
    means["million_parameters"] = sum(p.numel() for p in model.parameters()) / 1e6
    queue.put({"system": name, "model": model.name, "window": int(window or 0), **means})


def main(arguments: list[str] | None = None) -> list[dict]:
    """Returns the rows, after measuring and writing them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("systems", nargs="+", metavar="NAME=FOLDER[@16]")
    parser.add_argument("--frames", type=int, default=128)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--out", type=Path, default=None, help="JSON file")
    options = parser.parse_args(arguments)
    settings = {
        "frames": options.frames,
        "size": options.size,
        "clips": options.clips,
        "threads": torch.get_num_threads(),
    }
    context, rows = multiprocessing.get_context("spawn"), []
    for system in options.systems:
        name, _, source = system.partition("=")
        queue = context.Queue()
        process = context.Process(target=measure_system, args=(name, source, settings, queue))
        process.start()
        while process.is_alive() and queue.empty():
            time.sleep(0.05)
        if queue.empty():
            process.join()
            raise RuntimeError(f"systems: {name} must finish, got exit code {process.exitcode}")
        rows.append(queue.get())
        process.join()
    rows.append(mean_colour_row(options.frames, options.size, options.clips))
    path = options.out or RESULTS / device_name("cpu") / "systems.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".json.partial")
    text = json.dumps({"environment": environment("cpu"), **settings, "rows": rows}, indent=1)
    partial.write_text(text + "\n")
    os.replace(partial, path)
    print(systems_rows(rows))
    return rows


if __name__ == "__main__":
    main()
