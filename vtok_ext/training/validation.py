"""How good a tokenizer is on held-out clips while it trains."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from vtok_ext.metrics import psnr
from vtok_ext.training.setup import Training
from vtok_ext.training.step import to_video


@torch.no_grad()
def validate(training: Training, clips: list[torch.Tensor]) -> dict[str, float]:
    """Returns `rec_loss`, lower is better, and `psnr` in dB: means over clips [3, T, H, W] uint8.

    With moving averages these are the weights that are measured. Latents are not sampled, and no
    random generator is used. The model is left in training mode.

    Args:
        training: what is trained.
        clips: [3, T, H, W] uint8 each, at least one.
    """
    model, averages = training.model, training.averages
    model.eval()
    totals = {"rec_loss": 0.0, "psnr": 0.0}
    with averages.applied() if averages is not None else nullcontext():
        for clip in clips:
            video = to_video(clip.unsqueeze(0), training.device)
            dtype = training.autocast_dtype
            with torch.autocast(training.device.type, dtype, enabled=dtype is not None):
                reconstruction = model(video).reconstruction
                rec = training.loss.reconstruction_loss(video, reconstruction)
            totals["rec_loss"] += rec.item() / len(clips)
            totals["psnr"] += psnr(reconstruction.float(), video).mean().item() / len(clips)
    training.train_mode()
    return totals
