"""A video autoencoder of diffusers, patched, on a video of any length; input beside output.

    python docs/examples/diffusers_vae.py clip.mp4 --vae folder -o out.mp4
    python docs/examples/diffusers_vae.py clip.mp4 --kind AutoencoderKLCogVideoX   # random weights

The folder is one that diffusers saved, such as the `vae` folder of a pipeline. Without one the
model is small and random: the output then shows noise, the numbers what the layers do. Cells are
marked as notebooks and editors know them (`# %%`). Needs `pip install 'vtok_ext[diffusers]'`.
"""

# %% What to do
import argparse
import json
import time
import warnings
from pathlib import Path

import diffusers
import torch

import vtok_ext as vt
from vtok_ext.data.video import VideoReader, VideoWriter

SMALL = {
    "AutoencoderKLWan": {"base_dim": 16, "num_res_blocks": 1},
    "AutoencoderKLCogVideoX": {"block_out_channels": (32, 32, 32, 64), "layers_per_block": 1},
    "AutoencoderVidTok": {"ch": 16, "num_res_blocks": 1},
}
parser = argparse.ArgumentParser(description="diffusers' video autoencoder, patched and streamed")
parser.add_argument("video", type=Path)
parser.add_argument("-o", "--output", type=Path, default=Path("side-by-side.mp4"))
parser.add_argument("--vae", type=Path, help="folder that diffusers saved")
parser.add_argument("--kind", choices=SMALL, default="AutoencoderKLWan", help="without --vae")
parser.add_argument("--max-frames", type=int, default=10**9)
options = parser.parse_args()

# %% The model: diffusers makes it, one line patches it
warnings.simplefilter("ignore")
torch.manual_seed(0)
if options.vae is None:
    vae = getattr(diffusers, options.kind)(**SMALL[options.kind])
else:
    kind = json.loads((options.vae / "config.json").read_text())["_class_name"]
    vae = getattr(diffusers, kind).from_pretrained(options.vae)
vae = vae.eval().to("cuda" if torch.cuda.is_available() else "cpu")
device = next(vae.parameters()).device


# %% The same result, and how long it takes: a few frames, before and after
def timed_encode(clip: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Returns the moments of `clip` and the seconds of the second of two calls."""
    for _ in range(2):
        start = time.perf_counter()
        encoded = vae.encode(clip)
        if device.type == "cuda":
            torch.cuda.synchronize()
    return encoded.latent_dist.parameters, time.perf_counter() - start


with torch.no_grad(), VideoReader(options.video) as reader:
    # VidTok's `encode` wants a multiple of its frames per latent, the others one frame more.
    count = 8 if type(vae).__name__ == "AutoencoderVidTok" else 9
    frames = next(reader.chunks(count)).frames[None].to(device)
    clip = frames.float() / 127.5 - 1
    before, seconds_before = timed_encode(clip)
    vt.patch_diffusers(vae)
    after, seconds_after = timed_encode(clip)
error = float((after - before).abs().max() / before.abs().max())
print(f"encoding {clip.shape[2]} frames: {seconds_before:.3f} s, patched {seconds_after:.3f} s")
print(f"largest difference: {error:.1e} of the largest value")

# %% The whole video in constant memory: frames go in as they come, pairs go out
model = vt.wrap_diffusers(vae)
waiting, num_written, squares = None, 0, 0.0


def write(writer: VideoWriter, decoded: list[torch.Tensor]) -> None:
    """Writes decoded frames next to their sources, which have been waiting for them."""
    global waiting, num_written, squares
    for part in decoded:
        source, waiting = waiting[:, : part.shape[2]], waiting[:, part.shape[2] :]
        writer.write(torch.cat([source, part[0].cpu()], dim=3))
        squares += float((source.float() - part[0].cpu().float()).square().mean((0, 2, 3)).sum())
        num_written += part.shape[2]


start = time.perf_counter()
with torch.no_grad(), VideoReader(options.video) as reader:
    info = reader.info
    encoder = model.stream_encoder()
    decoder = model.stream_decoder(size=(info.height, info.width), output="uint8")
    form = {"height": info.height, "width": 2 * info.width, "fps": info.fps or 30}
    with VideoWriter(options.output, **form) as writer:
        left = options.max_frames
        for chunk in reader.chunks(8):
            frames = chunk.frames[:, :left]
            left -= frames.shape[1]
            waiting = frames if waiting is None else torch.cat([waiting, frames], dim=1)
            for latent in encoder.push(frames[None].to(device)):
                write(writer, decoder.push(latent))
            if left == 0:
                break
        for latent in encoder.flush():
            write(writer, decoder.push(latent))
        write(writer, decoder.flush(num_frames=encoder.num_frames))
seconds = time.perf_counter() - start

# %% What came out
psnr = 10 * torch.log10(torch.tensor(255.0**2 * num_written / max(squares, 1e-9))).item()
print(f"{model.name}: {num_written} frames of {info.width}x{info.height} in {seconds:.1f} s")
print(f"PSNR {psnr:.2f} dB; wrote {options.output}")
