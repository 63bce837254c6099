"""Trains a tokenizer on one clip until it knows it by heart: the smallest training loop.

    loss           mean squared error of the reconstruction
    optimisers     Muon for matrices, AdamW for vectors and the two output layers
    learning rate  linear warm-up, then half a cosine down to zero

A tokenizer that cannot do this has a defect; one that can shows the whole chain at work in a
minute.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from vtok_ext.models.failed_computation import FailedComputationError
from vtok_ext.models.vidtok import VidTok
from vtok_ext.training.muon import Muon

# Found on the procedural clip (17 frames of 96x96, 80 steps): Muon at 0.005, 0.01, 0.02, 0.04 ends
# at 26.2, 26.7, 26.5, 24.6 dB, AdamW alone at 19.6 dB; without clipping the gradient 24.1 dB.
MUON_LR = 0.01
ADAM_LR = 2e-3
_WARMUP_STEPS = 10
_GRADIENT_CLIP = 1.0


@dataclass(frozen=True)
class OverfitResult:
    """How a training went.

    Attributes:
        steps: optimiser steps taken.
        seconds: wall time they took.
        loss: mean squared error of the last step, video in [-1, 1].
    """

    steps: int
    seconds: float
    loss: float


@dataclass(frozen=True)
class OverfitProgress:
    """State after a step: `fraction` of the training done, 0..1, and that step's PSNR in dB."""

    step: int
    fraction: float
    psnr: float


def overfit_clip(
    model: VidTok,
    video: torch.Tensor,  # [B, 3, T, H, W]
    *,
    max_steps: int | None = 300,
    max_seconds: float | None = None,
    min_steps: int = 1,
    autocast_dtype: torch.dtype | None = None,
    on_step: Callable[[OverfitProgress], None] | None = None,
) -> OverfitResult:
    """Returns the course of the training; `model` is changed in place and left in eval mode.

    The training ends at whichever limit comes first and the learning rate reaches zero there. While
    the number of steps is the limit, the result does not depend on the speed of the machine.

    Args:
        model: a VidTok with random weights.
        video: [B, 3, T, H, W] in [-1, 1], on the model's device.
        max_steps: optimiser steps, >= 1; None for no limit.
        max_seconds: wall time; None for no limit.
        min_steps: steps that are taken even if the time is over.
        autocast_dtype: run the network in this dtype (bfloat16); None for float32.
        on_step: called after every step.

    Raises:
        ValueError: no limit at all, or one that is not positive; a video the model does not take.
        FailedComputationError: the loss is not finite.
    """
    _check_limits(max_steps, max_seconds, min_steps)
    model.train()
    center_latent(model, video)

    def loss_of(step: int) -> torch.Tensor:
        with torch.autocast(
            video.device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None
        ):
            reconstruction = model(video, compute_loss=False).reconstruction
        return (reconstruction.float() - video).square().mean()

    result = learn_by_heart(
        loss_of,
        muon_and_adamw(model, MUON_LR, ADAM_LR),
        max_steps=max_steps,
        max_seconds=max_seconds,
        min_steps=min_steps,
        on_step=on_step,
    )
    model.eval()
    return result


def learn_by_heart(
    loss_of: Callable[[int], torch.Tensor],
    optimizers: list[torch.optim.Optimizer],
    *,
    max_steps: int | None,
    max_seconds: float | None = None,
    min_steps: int = 1,
    on_step: Callable[[OverfitProgress], None] | None = None,
) -> OverfitResult:
    """Returns the course of a training on the same clips in every step.

    Args:
        loss_of: called with the steps done before; a mean squared error of videos in [-1, 1], or
            what is like one.
        optimizers: at their top learning rates, which rise to there and fall to zero.
        max_steps, max_seconds, min_steps, on_step: see `overfit_clip`.

    Raises:
        FailedComputationError: the loss is not finite.
        ValueError: limits that are no limits.
    """
    _check_limits(max_steps, max_seconds, min_steps)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    parameters = [p for group in groups for p in group["params"]]
    peaks = [group["lr"] for group in groups]
    start = time.monotonic()
    step, fraction = 0, 0.0
    while fraction < 1:
        _set_learning_rates(optimizers, peaks, step, fraction)
        loss = clipped_step(loss_of(step), parameters, optimizers)
        step += 1
        of_time = (time.monotonic() - start) / (max_seconds or math.inf)
        of_steps = step / (max_steps or math.inf)
        fraction = min(1.0, max(of_steps, min(of_time, step / min_steps)))
        if not math.isfinite(loss):
            raise FailedComputationError(
                f"overfit_clip: the loss must be finite, got {loss} at step {step}"
            )
        if on_step is not None:
            # Videos span 2, so the peak signal is 4 in squared units.
            on_step(OverfitProgress(step, fraction, -10 * math.log10(loss / 4 + 1e-8)))
    return OverfitResult(step, time.monotonic() - start, loss)


@torch.no_grad()
def center_latent(model: VidTok, video: torch.Tensor) -> None:
    """Returns None after scaling the encoder's last layer to latents of mean 0 and deviation 1.

    A fresh encoder uses a narrow, shifted range of values, so that quantisation merges what
    differs. Spreading it over the levels is worth 2.3 dB after 80 steps on the procedural clip.

    Args:
        model: a VidTok.
        video: [B, 3, T, H, W] in [-1, 1].
    """
    channels = raw_latent(model, video).transpose(0, 1).flatten(1)  # [C, B T H W]
    mean, deviation = channels.mean(1), channels.std(1).clamp(min=1e-6)
    weight, bias = model.encoder.conv_out.parameters()
    weight.div_(deviation.view(-1, 1, 1, 1, 1))
    bias.sub_(mean).div_(deviation)


@torch.no_grad()
def raw_latent(model: VidTok, video: torch.Tensor) -> torch.Tensor:
    """Returns what the encoder gives its quantizer, [B, C, T, H, W], of a video as `encode` has."""
    latents: list[torch.Tensor] = []
    last = model.encoder.conv_out
    hook = last.register_forward_hook(lambda module, inputs, output: latents.append(output))
    try:
        model.encode(video, compute_loss=False)
    finally:
        hook.remove()
    return latents[0]


def _check_limits(max_steps: int | None, max_seconds: float | None, min_steps: int) -> None:
    if max_steps is None and max_seconds is None:
        raise ValueError("overfit_clip: one of max_steps and max_seconds must be given, got None")
    if max_steps is not None and max_steps < 1:
        raise ValueError(f"overfit_clip: max_steps must be at least 1, got {max_steps}")
    if max_seconds is not None and not max_seconds > 0:
        raise ValueError(f"overfit_clip: max_seconds must be positive, got {max_seconds}")
    if min_steps < 1:
        raise ValueError(f"overfit_clip: min_steps must be at least 1, got {min_steps}")


def muon_and_adamw(model: VidTok, muon_lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    """Returns Muon for the matrices within the network that train, AdamW for the rest.

    The layers that produce the latent and the picture have few rows, whose scale matters by itself:
    orthogonalising them would fix it.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    ends = {p for part in (model.encoder, model.decoder) for p in part.conv_out.parameters()}
    if model.quantizer is not None:
        ends |= set(model.quantizer.parameters())  # so has a codebook
    matrices = [p for p in trained if p.dim() >= 2 and p not in ends]
    others = [p for p in trained if p.dim() < 2 or p in ends]
    return [
        Muon(matrices, lr=muon_lr),
        torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.99), weight_decay=0.0),
    ]


def _set_learning_rates(
    optimizers: list[torch.optim.Optimizer], peaks: list[float], step: int, fraction: float
) -> None:
    scale = min(1.0, (step + 1) / _WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * fraction))
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for group, peak in zip(groups, peaks, strict=True):
        group["lr"] = peak * scale


def clipped_step(
    loss: torch.Tensor,
    parameters: list[nn.Parameter],
    optimizers: list[torch.optim.Optimizer],
) -> float:
    """Returns the loss before this step's update, whose gradient is clipped to norm 1.

    Args:
        loss: a scalar.
        parameters: all that the optimizers hold.
        optimizers: at the learning rates of the step.
    """
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, _GRADIENT_CLIP)
    for optimizer in optimizers:
        optimizer.step()
    return loss.item()
