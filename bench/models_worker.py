"""A process of its own that runs one provider of VidTok when told to: time, memory, result.

python bench/models_worker.py '{"provider": "native", ...}'

A process per provider, because the peak of a process is the memory that a user of it needs, and
because an allocator is chosen when a process starts. Lines of JSON come in and go out: a task's
name in, {"ms", "peak_mb", "frames"} out. `bench_models.py` is its only caller.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from harness import forget_process_peak, process_peak_mb

import vtok_ext as vt

# Tasks of one clip. "as called" is what a script with encode and decode does: diffusers then gets
# no frames in front of the clip, and returns f k - (f - 1) frames of k = floor(T / f) latents.
TASKS = ("encode", "decode", "encode and decode, as called", "training step")


def build(settings: dict[str, Any]) -> vt.VideoTokenizer:
    """A model with seeded weights, none of them zero: the same in every process."""
    torch.manual_seed(0)
    model = vt.create_model(settings["model"], **settings["overrides"])
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    return model.to(settings["device"], getattr(torch, settings["dtype"]))


class Native:
    """This package's model, with one of its backends."""

    def __init__(self, model: vt.VideoTokenizer, backend: str) -> None:
        self.model = model.set_backend(backend)
        self.encode = lambda clip: model.encode_chunk(clip)[:, : model.latent_channels]
        self.decode = model.decode_chunk
        self.both = lambda clip: model(clip, sample=False).reconstruction
        self.called = lambda clip: model.decode(model.encode(clip))


class Diffusers:
    """AutoencoderVidTok with the same weights."""

    def __init__(self, model: vt.VideoTokenizer) -> None:
        from vtok_ext.models.vidtok_diffusers import to_diffusers

        self.model = to_diffusers(model)
        self.copies = model.temporal_factor - 1

    def encode(self, clip: torch.Tensor) -> torch.Tensor:
        """With the copies in front that its forward puts there, so that no frame is lost."""
        padded = torch.cat([clip[:, :, :1]] * self.copies + [clip], 2)
        return self.model.encode(padded).latent_dist.mode()

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        """The frames without those of the padding."""
        return self.model.decode(latent)

    def both(self, clip: torch.Tensor) -> torch.Tensor:
        """Its forward."""
        return self.model(clip, sample_posterior=False).sample

    def called(self, clip: torch.Tensor) -> torch.Tensor:
        """Its encode and decode on a bare clip."""
        return self.model.decode(self.model.encode(clip).latent_dist.mode())


def tasks(settings: dict[str, Any]) -> dict[str, Callable[[], torch.Tensor]]:
    """What this process can be told to do; each returns its result."""
    model, name = build(settings), settings["provider"]
    if name.startswith("diffusers"):
        provider: Any = Diffusers(model)
    else:
        provider = Native(model, "reference" if name == "reference" else "native")
    network = provider.model.train(settings["training"])
    if name.endswith("compiled"):
        for method in ("encode", "decode", "both", "called"):
            setattr(provider, method, torch.compile(getattr(provider, method)))
    frames, size = settings["frames"], settings["size"]
    generator = torch.Generator().manual_seed(1)
    clip = torch.rand((1, 3, frames, size, size), generator=generator) * 2 - 1
    clip = clip.to(settings["device"], next(network.parameters()).dtype)
    grid = model.token_grid(frames, size, size)
    latent = torch.randn((1, model.latent_channels, *grid), generator=generator).to(clip)

    def step() -> torch.Tensor:
        network.zero_grad(set_to_none=True)
        result = provider.both(clip)
        (result.float() - clip.float()).square().mean().backward()
        return torch.stack([p.grad.float().norm() for p in network.parameters()])

    return {
        "encode": lambda: provider.encode(clip),
        "decode": lambda: provider.decode(latent),
        "encode and decode, as called": lambda: provider.called(clip),
        "training step": step,
    }


def needed_gflop(model: str, overrides: dict, frames: int, size: int) -> dict[str, float]:
    """Multiplications and additions in 1e9 of the convolutions that each task needs.

    Counted in this package's pass without gradients, which does no other: equal frames once, and
    upsampled ones from products of those before. A training step counts as three passes.
    """
    from vtok_ext.layers import _frame_pass, _product_upsample

    count = 0

    def add(out, x, weight, bias, stride=(1, 1, 1), padding=(0, 0, 0)):
        nonlocal count
        count += 2 * weight.numel() * out.shape[2:].numel()

    def upsampled(x, weight, bias):
        nonlocal count
        count += 2 * weight.numel() * x.shape[2:].numel()
        shape = (1, weight.shape[0], x.shape[2], 2 * x.shape[3], 2 * x.shape[4])
        return torch.empty(shape, memory_format=torch.channels_last_3d)

    originals = vars(_frame_pass).copy(), vars(_product_upsample).copy()
    _frame_pass.add_conv3d = _product_upsample.add_conv3d = add
    _frame_pass.upsampled_conv3d = upsampled
    try:
        with torch.device("meta"):
            counted = vt.create_model(model, **overrides)
        counted = counted.to_empty(device="cpu").eval()
        step = 2**5 if size % 2**5 == 0 else size  # proportional to the area, attention aside
        with torch.no_grad():
            latent = counted.encode_chunk(torch.zeros(1, 3, frames, step, step))
            encode, count = count, 0
            counted.decode_chunk(latent[:, : counted.latent_channels])
    finally:
        _frame_pass.add_conv3d = originals[0]["add_conv3d"]
        _frame_pass.upsampled_conv3d = originals[0]["upsampled_conv3d"]
        _product_upsample.add_conv3d = originals[1]["add_conv3d"]
    scale = (size / step) ** 2 / 1e9
    both = (encode + count) * scale
    return dict(zip(TASKS, (encode * scale, count * scale, both, 3 * both), strict=True))


def peak_mb(is_cuda: bool) -> float:
    """Highest memory since `forget_peak`, weights included: of the process, or of the GPU."""
    if is_cuda:
        return torch.cuda.max_memory_allocated() / 2**20
    return process_peak_mb()


def forget_peak(is_cuda: bool) -> None:
    """Starts a new peak."""
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        forget_process_peak()


def timed(call: Callable[[], torch.Tensor], is_cuda: bool) -> tuple[float, torch.Tensor]:
    """Milliseconds and result of one call."""
    if is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = call()
    if is_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3, result


def main() -> None:
    """Answers until the input ends."""
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(settings["threads"])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print is no answer
    is_cuda = settings["device"] == "cuda"
    available = tasks(settings)
    for line in sys.stdin:
        task = json.loads(line)
        forget_peak(is_cuda)
        with torch.set_grad_enabled(settings["training"]):
            ms, result = timed(available[task["name"]], is_cuda)
        peak = peak_mb(is_cuda)
        if task["save"]:
            torch.save(result.float().cpu(), task["save"])
        frames = result.shape[2] if result.dim() == 5 else settings["frames"]
        print(json.dumps({"ms": ms, "peak_mb": peak, "frames": frames}), file=answers, flush=True)


if __name__ == "__main__":
    main()
