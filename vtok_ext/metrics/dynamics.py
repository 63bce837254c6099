"""Dynamics of a video: how much consecutive frames differ.

    dynamics = mean over frames, pixels and colours of (x_(t+1) - x_t)^2,  x in [0, 1]

Source: the quantity against which CoordTok (arXiv 2411.14762) plots reconstruction quality; its
normalisation is our own, no code of it is public.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._unit_video import unit_video


def video_dynamics(
    video: Tensor,  # [B, C, T, H, W]
) -> Tensor:
    """Returns the mean squared difference [B] of consecutive frames, float32 in [0, 1].

    Args:
        video: [B, C, T >= 2, H, W], uint8 or float in [-1, 1].

    Raises:
        TypeError, ValueError: not that.

    Deterministic; any device.
    """
    frames = unit_video("video_dynamics", video, min_frames=2)
    pairs = zip(frames.unbind(2), frames.unbind(2)[1:], strict=False)
    changes = [(after - before).square().flatten(1).mean(1) for before, after in pairs]
    return torch.stack(changes).mean(0)
