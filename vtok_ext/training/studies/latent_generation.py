"""A small SiT on the latents of a tokenizer, trained with a given amount of work, and its samples.

The same transformer for grids, with a token per latent position, and for planes, with a token per
2x2 cells as published; fewer tokens mean cheaper steps, hence more of them for the same
multiply-adds. Measured on as many samples as there are held-out clips:

    kvd                     to the held-out clips, as published distances are
    kvd_decoded             to their reconstructions, which is what latents can give
    kvd_decoded_gaussian    the same of normal latents with the statistics of the training ones
    kvd_reconstructed       of reconstructions to held-out clips, the floor of kvd
    motion_ratio            mean squared change of frames over that of held-out clips
    tokens                  of a clip, as its tokenizer counts them
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vtok_ext.metrics import kvd, video_dynamics
from vtok_ext.models._video_input import to_float
from vtok_ext.models.latent_statistics import Latent, StatisticsCounter
from vtok_ext.models.multiply_adds import multiply_adds_of
from vtok_ext.models.sit import SiT
from vtok_ext.models.sit_config import SiTConfig
from vtok_ext.training.clip_order import ClipOrder
from vtok_ext.training.studies.clip_store import fingerprint
from vtok_ext.training.studies.row_picture import reconstruction_picture
from vtok_ext.training.studies.row_result import RowResult
from vtok_ext.training.studies.row_training import train_steps

_SIZE: dict[str, Any] = {"hidden_size": 96, "depth": 4, "num_heads": 4}
_PLANE_PATCH = 2
_BATCH = 16
_LR = 1e-3
_WARMUP = 20
_ENCODED_AT_ONCE = 16
_PICTURE_FRAMES = 9


def generation_result(
    model: Any,  # a tokenizer
    clips: Tensor,  # [N, 3, T, H, W] uint8
    held_out: Tensor,  # [M, 3, T, H, W] uint8
    tera_work: float,
    seed: int,
    folder: Path,
    progress: Callable[[float, str], None],
) -> RowResult:
    """Returns the metrics above in the summary; with seed 0 a picture of two samples.

    Args:
        model: the tokenizer, of continuous latents, in eval mode.
        clips: to train on.
        held_out: to compare with.
        tera_work: 10^12 multiply-adds of the training, a step counting three forward passes.
        seed: of weights, order, noise and samples.
        folder: of the run.
        progress: called now and then.
    """
    generator, steps = _trained(_encoded(model, clips), tera_work * 1e12, seed, progress)
    samples = generator.sample(
        len(held_out),
        sampler="ode",
        generator=torch.Generator().manual_seed(seed),
    )
    statistics = generator.require_statistics("study")
    noise = _normal_like(samples, torch.Generator().manual_seed(seed))
    latents = (samples, _encoded(model, held_out), statistics.restore(noise))
    videos, again, gaussian = (_decoded(model, latent, held_out) for latent in latents)
    moved = video_dynamics(held_out).mean()
    summary = {
        "kvd": kvd(videos, held_out).value,
        "kvd_decoded": kvd(videos, again).value,
        "kvd_decoded_gaussian": kvd(gaussian, again).value,
        "kvd_reconstructed": kvd(again, held_out, paired=True).value,
        "motion_ratio": (video_dynamics(videos).mean() / moved).item(),
        "motion_ratio_reconstructed": (video_dynamics(again).mean() / moved).item(),
        "tokens": float(math.prod(model.token_grid(*held_out.shape[2:]))),
        "generator_steps": float(steps),
    }
    result = RowResult(summary=summary, held_out=fingerprint(held_out))
    if seed == 0:
        above, below = (to_float(video, torch.float32) for video in videos[:2])
        path = folder / "samples.png"
        result.pictures = [reconstruction_picture(path, above, below, _PICTURE_FRAMES)]
    return result


@torch.no_grad()
def _encoded(model: Any, clips: Tensor) -> Latent:
    """Returns the latents of uint8 clips."""
    parts = clips.split(_ENCODED_AT_ONCE)
    latents = [model.encode(to_float(part, torch.float32)).latent for part in parts]
    if isinstance(latents[0], Tensor):
        return torch.cat(latents)
    return {name: torch.cat([latent[name] for latent in latents]) for name in latents[0]}


@torch.no_grad()
def _decoded(model: Any, latent: Latent, like: Tensor) -> Tensor:
    """Returns the uint8 videos of latents, in number and shape as `like`."""
    frames, size = like.shape[2], (like.shape[3], like.shape[4])
    places = torch.arange(len(like)).split(_ENCODED_AT_ONCE)
    options: dict[str, Any] = {"num_frames": frames, "size": size, "output": "uint8"}
    return torch.cat([model.decode(_chosen(latent, part), **options) for part in places])


def _chosen(latent: Latent, places: Any) -> Latent:
    """Returns some of the latents of a batch."""
    if isinstance(latent, Tensor):
        return latent[places]
    return {name: plane[places] for name, plane in latent.items()}


def _normal_like(latent: Latent, source: torch.Generator) -> Latent:
    """Returns normal noise of the shapes of a latent."""
    if isinstance(latent, Tensor):
        return torch.randn(latent.shape, generator=source)
    return {name: torch.randn(plane.shape, generator=source) for name, plane in latent.items()}


def _config(latents: Latent) -> SiTConfig:
    options = {**_SIZE, "learn_sigma": False}
    if isinstance(latents, Tensor):
        shape = tuple(latents.shape[2:])
        return SiTConfig("grid", shape, latents.shape[1], patch_size=1, **options)
    _, rows, columns, channels = latents["xy"].shape
    shape = (latents["yt"].shape[1], rows, columns)
    return SiTConfig("triplane", shape, channels, patch_size=_PLANE_PATCH, **options)


def _trained(
    latents: Latent, work: float, seed: int, progress: Callable[[float, str], None]
) -> tuple[SiT, int]:
    """Returns a generator of such latents and the steps that the work paid for."""
    torch.manual_seed(seed)
    generator = SiT(_config(latents), "study")
    counter = StatisticsCounter()
    counter.update(latents)
    generator.statistics = counter.result()
    one = generator.statistics.normalize(_chosen(latents, slice(1)))
    forward = multiply_adds_of(lambda: generator(one, torch.zeros(1)))
    num_steps = max(1, round(work / (3 * forward * _BATCH)))
    num_clips = len(next(iter(latents.values())) if isinstance(latents, dict) else latents)
    order = ClipOrder(num_clips, _BATCH, seed=seed)
    generator.train()

    def loss_of(step: int) -> Tensor:
        places = [index for _, index in order.places(step, 0)]
        return generator.loss(_chosen(latents, places)).mean()

    def on_step(step: int, loss: float) -> None:
        progress(0.5 + 0.4 * step / num_steps, f"generator, step {step}, {loss:.3f}")

    optimizer = torch.optim.AdamW(generator.parameters(), lr=_LR, weight_decay=0.0)
    train_steps(loss_of, [optimizer], num_steps, warmup=_WARMUP, on_step=on_step)
    generator.eval()
    return generator, num_steps
