"""Checks a single video for the measures of what is in it, and gives its frames in [0, 1]."""

from __future__ import annotations

import torch
from torch import Tensor


def unit_video(op: str, video: Tensor, min_frames: int = 1) -> Tensor:
    """Returns [B, C, T, H, W] float32 in [0, 1] of uint8, or of floats in [-1, 1], not clamped.

    Raises:
        TypeError, ValueError: something else, or fewer frames.
    """
    if video.dim() != 5 or 0 in video.shape or video.shape[2] < min_frames:
        raise ValueError(
            f"{op}: video must be [B, C, T >= {min_frames}, H, W], got {list(video.shape)}"
        )
    if video.dtype == torch.uint8:
        return video.float() / 255
    if not video.is_floating_point():
        raise TypeError(f"{op}: video must be uint8 or floating, got {video.dtype}")
    return (video.float() + 1) / 2
