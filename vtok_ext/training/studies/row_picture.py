"""The picture of a study's row: frames of a clip above their reconstruction."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from vtok_ext.data.picture import write_png

_SCALE = 3  # screen pixels of a pixel of these small clips


def reconstruction_picture(
    path: Path,
    video: Tensor,  # [3, T, H, W] in [-1, 1]
    decoded: Tensor,  # [3, T, H, W]
    num_frames: int,
) -> Path:
    """Returns the path of a picture: up to `num_frames` of a clip above, decoded below."""
    times = torch.linspace(0, video.shape[1] - 1, min(num_frames, video.shape[1])).long()
    rows = [torch.cat(list(clip[:, times].unbind(1)), -1) for clip in (video, decoded)]
    image = ((torch.cat(rows, 1).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    image = image.repeat_interleave(_SCALE, 1).repeat_interleave(_SCALE, 2)
    write_png(path, image)
    return path
