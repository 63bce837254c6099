"""One table of all systems on the same clips of 128 frames: what they cost and how good they are.

    python bench/systems.py vidtok=FOLDER coordtok=FOLDER vtok=FOLDER windows=FOLDER@16

NAME=FOLDER is a saved model; @16 codes windows of 16 frames each by itself, the baseline whose
seams `boundary_jump` shows (every system is measured at the borders of windows of 16 frames). Every
system runs in a process of its own, whose peak memory is reported. Results go to
bench/results/<device>/systems.json; the table is printed as Markdown.

tokens: positions of the latent; bits: log2 of the codebook per token, or 32 per number of a
continuous latent; LPIPS is left out where its published weights are not at hand.
"""

import argparse
import json
import math
import multiprocessing
import os
import resource
import time
from pathlib import Path

import torch
from harness import RESULTS, device_name, environment

import vtok_ext as vt
from vtok_ext.data.procedural import procedural_clip

# Beyond any training seed, as in training and studies.
FIRST_SEED = 1_000_000_000
WINDOW = 16
_LATENT_BITS = 32
COLUMNS = {
    "tokens": "tokens",
    "bits": "bits",
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    "boundary_jump": "boundary_jump",
    "encode_s": "encode, s",
    "decode_s": "decode, s",
    "peak_mb": "peak memory, MB",
}


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
def measure_clip(model, video: torch.Tensor, window: int | None) -> dict[str, float]:
    """Returns what one clip costs and how good it comes back."""
    parts = video.split(window, dim=2) if window else [video]
    start = time.perf_counter()
    encodings = [model.encode(part) for part in parts]
    middle = time.perf_counter()
    decoded = torch.cat([model.decode(encoding) for encoding in encodings], dim=2)
    end = time.perf_counter()
    decoded = decoded.float().clamp(-1, 1)
    costs = [numbers_in(encoding, model) for encoding in encodings]
    values = {
        "tokens": float(sum(tokens for tokens, _ in costs)),
        "bits": sum(bits for _, bits in costs),
        "psnr": float(vt.metrics.psnr(decoded, video)),
        "ssim": float(vt.metrics.ssim(decoded, video)),
        "boundary_jump": float(vt.metrics.boundary_jump(decoded, video, WINDOW)),
        "encode_s": middle - start,
        "decode_s": end - middle,
    }
    try:
        values["lpips"] = float(vt.metrics.lpips(decoded, video))
    except FileNotFoundError:
        pass  # the column stays empty
    return values


def measure_system(name: str, source: str, options: dict, queue) -> None:
    """Puts the means over clips of one system into a queue; runs in a process of its own."""
    torch.set_num_threads(options["threads"])
    folder, _, window = source.partition("@")
    model = vt.load_model(folder).eval()
    rows = [
        measure_clip(model, clip_of(i, options["frames"], options["size"]), int(window or 0))
        for i in range(options["clips"])
    ]
    means = {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}
    means["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    means["million_parameters"] = sum(p.numel() for p in model.parameters()) / 1e6
    queue.put({"system": name, "model": model.name, "window": int(window or 0), **means})


def table(rows: list[dict]) -> str:
    """Returns the results as Markdown."""
    lines = [f"| system | {' | '.join(COLUMNS.values())} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for row in rows:
        cells = [f"{row[key]:,.4g}" if key in row else "-" for key in COLUMNS]
        lines.append(f"| {row['system']} | {' | '.join(cells)} |")
    return "\n".join(lines)


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
    path = options.out or RESULTS / device_name("cpu") / "systems.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".json.partial")
    text = json.dumps({"environment": environment("cpu"), **settings, "rows": rows}, indent=1)
    partial.write_text(text + "\n")
    os.replace(partial, path)
    print(table(rows))
    return rows


if __name__ == "__main__":
    main()
