"""Structural similarity with an 11x11 Gaussian window, of frames reduced to about 256 pixels.

    ssim = (2 mu_a mu_b + c1) (2 cov + c2) / ((mu_a^2 + mu_b^2 + c1) (var_a + var_b + c2))

with c1 = 0.01^2 and c2 = 0.03^2 for values in [0, 1].
Source: Wang et al. 2004, and the evaluation script of VidTok (microsoft/VidTok).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ._video_pair import check_pair, unit_frames

_WINDOW = 11
_SIGMA = 1.5
_C1 = 0.01**2
_C2 = 0.03**2
# Frames are averaged down so that their shorter side is near this before comparison.
_COMPARED_SIZE = 256


def ssim(
    reconstruction: torch.Tensor,  # [B, C, T, H, W]
    source: torch.Tensor,  # [B, C, T, H, W]
    *,
    value_range: tuple[float, float] | None = None,
    per_frame: bool = False,
) -> torch.Tensor:
    """Returns the mean structural similarity over frames, 1 for identical videos.

    Frames are average-pooled by round(min(H, W) / 256) where that exceeds 1; windows that reach
    over the border are left out; channels are averaged.

    Args:
        reconstruction: [B, C, T, H, W], floating or uint8; clamped to the value range.
        source: same shape; uint8 if and only if reconstruction is.
        value_range: (low, high) of floating videos, default (-1, 1); uint8 is always 0..255.
        per_frame: return [B, T] instead of the mean.

    Returns:
        float32 scalar, or [B, T].

    Raises:
        ValueError: as in psnr, or frames smaller than the 11x11 window.
        TypeError: as in psnr.

    Deterministic; any device; computed in float32.
    Source: VidTok evaluation script.
    """
    bounds = check_pair(reconstruction, source, value_range, "ssim")
    if min(source.shape[3:]) < _WINDOW:
        raise ValueError(
            f"ssim: frames must be at least {_WINDOW}x{_WINDOW}, got {list(source.shape[3:])}"
        )
    pool = max(1, round(min(source.shape[3:]) / _COMPARED_SIZE))
    window = _gaussian_window(source.device)
    values = [
        _ssim_of_frames(F.avg_pool2d(a, pool), F.avg_pool2d(b, pool), window)
        for a, b in unit_frames(reconstruction, source, bounds)
    ]
    frames = torch.cat(values).view(source.shape[0], source.shape[2])
    return frames if per_frame else frames.mean()


def _gaussian_window(device: torch.device) -> torch.Tensor:
    """Returns [11], summing to 1."""
    offset = torch.arange(_WINDOW, dtype=torch.float32, device=device) - (_WINDOW - 1) / 2
    weights = torch.exp(-offset.square() / (2 * _SIGMA**2))
    return weights / weights.sum()


def _blur(images: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
    """Returns [N, 1, H - 10, W - 10] of [N, 1, H, W]: the Gaussian, rows then columns."""
    return F.conv2d(F.conv2d(images, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))


def _ssim_of_frames(a: torch.Tensor, b: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
    """Returns [n] of two [n, C, H, W] in [0, 1]."""
    num_frames = a.shape[0]
    a, b = a.flatten(0, 1).unsqueeze(1), b.flatten(0, 1).unsqueeze(1)
    mean_a, mean_b = _blur(a, window), _blur(b, window)
    variance_a = _blur(a * a, window) - mean_a.square()
    variance_b = _blur(b * b, window) - mean_b.square()
    covariance = _blur(a * b, window) - mean_a * mean_b
    contrast = (2 * covariance + _C2) / (variance_a + variance_b + _C2)
    luminance = (2 * mean_a * mean_b + _C1) / (mean_a.square() + mean_b.square() + _C1)
    return (luminance * contrast).view(num_frames, -1).mean(dim=1)
