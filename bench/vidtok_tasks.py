"""What a process of `models_worker.py` does with VidTok: this package's backends, diffusers."""

from collections.abc import Callable
from typing import Any

import torch

import vtok_ext as vt

# Tasks of one clip. "as called" is what a script with encode and decode does: diffusers then gets
# no frames in front of the clip, and returns f k - (f - 1) frames of k = floor(T / f) latents.
TASKS = ("encode", "decode", "encode and decode, as called", "training step")


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


def tasks(model: Any, settings: dict[str, Any]) -> dict[str, Callable[[], torch.Tensor]]:
    """What a provider can be told to do; each returns its result."""
    name = settings["provider"]
    if name.startswith("diffusers"):
        provider: Any = Diffusers(model)
    else:
        provider = Native(model, "reference" if name == "reference" else "native")
    network = provider.model
    network.train(settings["training"])
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


def needed_gflop(settings: dict[str, Any]) -> dict[str, float]:
    """Multiplications and additions in 1e9 of the convolutions that each task needs.

    Counted in this package's pass without gradients, which does no other: equal frames once, and
    upsampled ones from products of those before. A training step counts as three passes.
    """
    from vtok_ext.layers import _frame_pass, _product_upsample

    count, frames, size = 0, settings["frames"], settings["size"]

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
            counted = vt.create_model(settings["model"], **settings["overrides"])
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
