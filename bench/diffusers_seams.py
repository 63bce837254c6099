"""What the temporal tiling of diffusers costs: seams between tiles, against exact streams.

python bench/diffusers_seams.py     writes results/<device>/diffusers_seams.json

A procedural clip goes through small models with random weights twice: with the tiles or chunks that
diffusers takes (`frames="reference"`, tiling enabled, tiles as large as a frame, so that only
borders in time remain) and as `wrap_diffusers` computes it. "Difference" is the largest between the
two, of the largest value; "seam" is how much more the tiled video changes against the exact one at
borders of tiles than elsewhere (`boundary_jump`; 1 = no seam). HunyuanVideo blends four frames at
each border, which all count.
"""

import json
import warnings

import diffusers
import torch
from bench_diffusers import VAES
from harness import RESULTS, device_name, environment

import vtok_ext as vt
from vtok_ext.data.procedural import procedural_clip

SIZE, NUM_FRAMES = 64, 49
# Frames per tile behind the first frame, and how many frames a border is blended over.
BORDERS = {"HunyuanVideo": (12, 4), "VidTok": (16, 0), "Wan 2.1": (4, 0), "CogVideoX": (8, 0)}


@torch.no_grad()
def seams(name: str) -> dict:
    """Both videos of one model, compared."""
    kind, published, small = VAES[name]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        vae = getattr(diffusers, kind)(**{**published, **small}).eval()
    vae.enable_tiling(tile_sample_min_height=SIZE, tile_sample_min_width=SIZE)
    model = vt.wrap_diffusers(vae)
    clip = procedural_clip(NUM_FRAMES, SIZE, SIZE)[None]
    encoding = model.encode(clip)
    exact = model.decode(encoding)
    if name == "VidTok":  # its own encode and decode want the padding of its forward
        tiled = vae(clip.float() / 127.5 - 1, sample_posterior=False).sample
    else:
        tiled = model.decode(model.encode(clip, frames="reference"))
    difference = float((tiled - exact).abs().max() / exact.abs().max())
    jump, (step, blended) = None, BORDERS[name]
    if difference > 1e-4:
        starts = range(1 + step, NUM_FRAMES, step)
        steps = range(1, 1 + blended) if blended else [0]
        borders = [start + i for start in starts for i in steps if start + i < NUM_FRAMES]
        jump = float(vt.metrics.boundary_jump(tiled, exact, borders=borders))
    return {"name": name, "frames": step, "difference": difference, "jump": jump}


def main() -> None:
    """Measures all and writes the JSON."""
    rows = [seams(name) for name in BORDERS]
    folder = RESULTS / device_name("cpu")
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"environment": environment("cpu"), "clip": f"{NUM_FRAMES}x{SIZE}x{SIZE}"}
    text = json.dumps({**facts, "rows": rows}, indent=1)
    temporary = folder / "diffusers_seams.json.partial"
    temporary.write_text(text + "\n")
    temporary.replace(folder / "diffusers_seams.json")
    print(text)


if __name__ == "__main__":
    main()
