"""PSNR per frame: -10 log10(MSE + 1e-8) with both videos in [0, 1].

Source: evaluation script of VidTok (microsoft/VidTok).
"""

from __future__ import annotations

import torch

from ._video_pair import check_pair, unit_frames

# Keeps identical frames finite, at 80 dB; the reference's own constant.
_EPS = 1e-8


def psnr(
    reconstruction: torch.Tensor,  # [B, C, T, H, W]
    source: torch.Tensor,  # [B, C, T, H, W]
    *,
    value_range: tuple[float, float] | None = None,
    per_frame: bool = False,
) -> torch.Tensor:
    """Returns the peak signal-to-noise ratio in dB, averaged over frames.

    psnr = mean over frames of -10 log10(mean((a - b)^2) + 1e-8), 80 dB at most.

    Args:
        reconstruction: [B, C, T, H, W], floating or uint8; clamped to the value range.
        source: same shape; uint8 if and only if reconstruction is.
        value_range: (low, high) of floating videos, default (-1, 1); uint8 is always 0..255.
        per_frame: return [B, T] instead of the mean.

    Returns:
        float32 scalar, or [B, T].

    Raises:
        ValueError: not [B, C, T, H, W], shapes differ, no pixels, or an empty value range.
        TypeError: dtypes that are neither uint8 nor floating, or only one of them uint8.

    Deterministic; any device; computed in float32.
    Source: VidTok evaluation script.
    """
    bounds = check_pair(reconstruction, source, value_range, "psnr")
    values = [
        -10 * torch.log10((a - b).square().mean(dim=(1, 2, 3)) + _EPS)
        for a, b in unit_frames(reconstruction, source, bounds)
    ]
    frames = torch.cat(values).view(source.shape[0], source.shape[2])
    return frames if per_frame else frames.mean()
