"""Spatial detail of a video: the mean length of the Sobel gradient of its brightness.

    frequency = mean over frames and pixels of sqrt(gx^2 + gy^2)

gx, gy: 3x3 Sobel filters of 0.299 R + 0.587 G + 0.114 B in [0, 1]; pixels without a full window
are left out. Source: the quantity against which CoordTok (arXiv 2411.14762) plots reconstruction
quality, with an edge filter of Sobel; brightness and normalisation are our own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._unit_video import unit_video

_BRIGHTNESS = (0.299, 0.587, 0.114)  # ITU-R BT.601
_SOBEL = ((-1.0, 0.0, 1.0), (-2.0, 0.0, 2.0), (-1.0, 0.0, 1.0))


def sobel_frequency(
    video: Tensor,  # [B, 3, T, H, W]
) -> Tensor:
    """Returns the mean Sobel gradient [B], float32 >= 0: 4 for a step from 0 to 1 at its edge.

    Args:
        video: [B, 3 or 1, T, H >= 3, W >= 3], uint8 or float in [-1, 1].

    Raises:
        TypeError, ValueError: not that.

    Deterministic; any device.
    """
    frames = unit_video("sobel_frequency", video)
    if frames.shape[1] not in (1, 3) or min(frames.shape[3:]) < 3:
        raise ValueError(
            f"sobel_frequency: video must be [B, 3 or 1, T, H >= 3, W >= 3], "
            f"got {list(video.shape)}"
        )
    if frames.shape[1] == 3:
        weights = torch.tensor(_BRIGHTNESS, device=frames.device).view(1, 3, 1, 1, 1)
        frames = (frames * weights).sum(1, keepdim=True)
    sobel = torch.tensor(_SOBEL, device=frames.device)
    filters = torch.stack([sobel, sobel.mT])[:, None]  # [2, 1, 3, 3]
    # Frame by frame: a long clip needs no gradients of all its frames at once.
    means = [
        F.conv2d(frame, filters).square().sum(1).sqrt().flatten(1).mean(1)
        for frame in frames.unbind(2)
    ]
    return torch.stack(means).mean(0)
