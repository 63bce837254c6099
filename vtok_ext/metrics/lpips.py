"""LPIPS of a reconstruction: the perceptual distance of its frames to those of the source.

Source: Zhang et al. (arXiv 1801.03924); network and weights in `lpips_network`.
"""

from __future__ import annotations

import os

import torch

from ._video_pair import check_pair, unit_frames
from .lpips_network import LPIPS, published_lpips


@torch.no_grad()
def lpips(
    reconstruction: torch.Tensor,  # [B, 3, T, H, W]
    source: torch.Tensor,  # [B, 3, T, H, W]
    *,
    network: LPIPS | None = None,
    backbone: str | os.PathLike | None = None,
    heads: str | os.PathLike | None = None,
    value_range: tuple[float, float] | None = None,
    per_frame: bool = False,
    trust_checkpoint: bool = False,
) -> torch.Tensor:
    """Returns the mean LPIPS distance (VGG16, version 0.1) over frames, 0 for identical videos.

    Args:
        reconstruction: [B, 3, T, H, W], floating or uint8; clamped to the value range.
        source: same shape; uint8 if and only if reconstruction is.
        network: see `published_lpips`; default that, with its files.
        backbone, heads: its files, default those in torch's cache. Nothing is downloaded.
        value_range: (low, high) of floating videos, default (-1, 1); uint8 is always 0..255.
        per_frame: return [B, T] instead of the mean.
        trust_checkpoint: see `published_lpips`.

    Returns:
        float32 scalar, or [B, T].

    Raises:
        FileNotFoundError: the published weights are not there; the message says where they are
            looked for.
        ValueError: as in psnr, or frames that are smaller than 16x16 or not of three colours.
        TypeError: as in psnr.

    Deterministic; on the device of the network, which is that of the videos by default.
    """
    bounds = check_pair(reconstruction, source, value_range, "lpips")
    if source.shape[1] != 3 or min(source.shape[3:]) < 16:
        raise ValueError(f"lpips: videos must be [B, 3, T, >= 16, >= 16], got {list(source.shape)}")
    if network is None:
        network = published_lpips(backbone, heads, trust_checkpoint=trust_checkpoint)
        network = network.to(source.device)
    device = next(network.parameters()).device
    values = [
        network((a * 2 - 1).to(device), (b * 2 - 1).to(device)).flatten()
        for a, b in unit_frames(reconstruction, source, bounds)
    ]
    frames = torch.cat(values).view(source.shape[0], source.shape[2])
    return frames if per_frame else frames.mean()
