"""Prints {"predicted": bytes, "measured": bytes} of one stream, as JSON; see `test_planning.py`.

Arguments: name, JSON of overrides, direction, JSON of (B, T, H, W), JSON of the tile or null. The
measured peak is that of the resident memory above what there was before, on Linux.
"""

import ctypes
import gc
import json
import sys

import torch

import vtok_ext as vt
from vtok_ext.cli.freed_memory import return_freed_memory
from vtok_ext.models.planning import predict_stream


def status(name: str) -> int:
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(name))


@torch.no_grad()
def push_three(model, direction, shape) -> None:
    batch, frames, height, width = shape
    _, rows, columns = model.token_grid(1, height, width)
    encoder = None if direction == "decode" else model.stream_encoder()
    decoder = None if direction == "encode" else model.stream_decoder(output="uint8")
    for _ in range(3):
        latents = []
        if encoder is not None:
            latents = encoder.push(
                torch.zeros((batch, 3, frames, height, width), dtype=torch.uint8)
            )
        else:
            size = (batch, model.latent_channels, frames // model.temporal_factor, rows, columns)
            latents = [torch.zeros(size)]
        if decoder is not None:
            for latent in latents:
                decoder.push(latent)


def main(name, overrides, direction, shape, tile) -> None:
    shape, tile = json.loads(shape), json.loads(tile)
    model = vt.create_model(name, **json.loads(overrides)).eval()
    predicted = predict_stream(model, direction, shape, tile)
    view = model if tile is None else model.tiled(tile)
    push_three(model, direction, (1, 8, 32, 32))  # loads what is loaded once
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed does not count as present
    return_freed_memory()  # as commands with --memory do
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak begins anew
    before = status("VmRSS")
    push_three(view, direction, shape)
    measured = status("VmHWM") - before
    print(json.dumps({"predicted": predicted, "measured": measured}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
