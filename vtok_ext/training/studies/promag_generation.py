"""A small SiT on the latents of a tokenizer, trained with a given amount of work, and its samples.

The same transformer, with one token per latent position, at any temporal factor: fewer latents mean
cheaper steps, hence more of them for the same multiply-adds. Measured on as many samples as there
are held-out clips: kvd, and kvd of the tokenizer's reconstructions, its floor; the mean squared
change of frames over that of held-out clips, motion_ratio; tokens of a clip.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vtok_ext.metrics import kvd, video_dynamics
from vtok_ext.models._video_input import to_float
from vtok_ext.models.latent_statistics import LatentStatistics
from vtok_ext.models.multiply_adds import multiply_adds_of
from vtok_ext.models.sit import SiT
from vtok_ext.models.sit_config import GRID, SiTConfig
from vtok_ext.training.clip_order import ClipOrder

_SIZE: dict[str, Any] = {"hidden_size": 96, "depth": 4, "num_heads": 4}
_BATCH = 16
_LR = 1e-3
_WARMUP = 20
_SAMPLER_STEPS = 40
_ENCODED_AT_ONCE = 16


def measure_generation(
    model: Any,  # a GridTokenizer
    clips: Tensor,  # [N, 3, T, H, W] uint8
    held_out: Tensor,  # [M, 3, T, H, W] uint8
    work: float,
    seed: int,
    progress: Callable[[float, str], None],
) -> tuple[dict[str, float], Tensor]:
    """Returns the metrics above and the samples [M, 3, T, H, W] uint8.

    Args:
        model: the tokenizer, in eval mode.
        clips: to train on.
        held_out: to compare with.
        work: multiply-adds of the training, a step counting three forward passes.
        seed: of weights, order, noise and samples.
        progress: called now and then.
    """
    with torch.no_grad():
        latents = torch.cat(
            [model.encode(to_float(part, torch.float32)).latent for part in _parts(clips)]
        )
    torch.manual_seed(seed)
    generator = SiT(_config(latents), "study")
    mean, std = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4)).clamp(min=1e-4)
    generator.statistics = LatentStatistics({GRID: mean}, {GRID: std})
    forward = multiply_adds_of(
        lambda: generator(latents[:1] * 0, torch.zeros(1)),
    )
    steps = max(1, round(work / (3 * forward * _BATCH)))
    _train(generator, latents, steps, seed, progress)
    samples = generator.sample(
        len(held_out),
        sampler="ode",
        num_steps=_SAMPLER_STEPS,
        generator=torch.Generator().manual_seed(seed),
    )
    size = (held_out.shape[3], held_out.shape[4])
    options: dict[str, Any] = {"num_frames": held_out.shape[2], "size": size, "output": "uint8"}
    with torch.no_grad():
        videos = torch.cat([model.decode(part, **options) for part in _parts(samples)])
        again = torch.cat(
            [
                model.decode(model.encode(to_float(part, torch.float32)), output="uint8")
                for part in _parts(held_out)
            ]
        )
    moved = video_dynamics(held_out).mean()
    return {
        "kvd": kvd(videos, held_out).value,
        "kvd_reconstructed": kvd(again, held_out).value,
        "motion_ratio": (video_dynamics(videos).mean() / moved).item(),
        "motion_ratio_reconstructed": (video_dynamics(again).mean() / moved).item(),
        "tokens": float(latents[0, 0].numel()),
        "generator_steps": float(steps),
    }, videos


def _parts(videos: Any) -> tuple[Tensor, ...]:
    return videos.split(_ENCODED_AT_ONCE)


def _config(latents: Tensor) -> SiTConfig:
    return SiTConfig(
        latent="grid",
        input_size=tuple(latents.shape[2:]),
        in_channels=latents.shape[1],
        patch_size=1,
        learn_sigma=False,
        **_SIZE,
    )


def _train(
    generator: SiT,
    latents: Tensor,
    num_steps: int,
    seed: int,
    progress: Callable[[float, str], None],
) -> None:
    optimizer = torch.optim.AdamW(generator.parameters(), lr=_LR, weight_decay=0.0)
    order = ClipOrder(len(latents), _BATCH, seed=seed)
    generator.train()
    for step in range(num_steps):
        rising = min(1.0, (step + 1) / _WARMUP)
        optimizer.param_groups[0]["lr"] = (
            _LR * rising * 0.5 * (1 + math.cos(math.pi * step / num_steps))
        )
        places = [index for _, index in order.places(step, 0)]
        loss = generator.loss(latents[places]).mean()
        if not math.isfinite(loss.item()):
            raise RuntimeError(f"study: the generator's loss became {loss.item()} at step {step}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(generator.parameters(), 1.0)
        optimizer.step()
        progress(0.5 + 0.4 * step / num_steps, f"generator, step {step}, {loss.item():.3f}")
    generator.eval()
