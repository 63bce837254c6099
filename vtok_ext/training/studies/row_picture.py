"""The picture of a study's row: frames of a clip above their reconstruction; and several in one."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from vtok_ext.data.picture import draw_label, write_png
from vtok_ext.data.video import read_clip

_SCALE = 3  # screen pixels of a pixel of these small clips
_BAND, _MARGIN = 12, 3  # above each row of frames, for its name


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


def comparison_picture(path: Path, pictures: dict[str, Path]) -> Path:
    """Returns the path of a picture: a clip, and below it what each row made of it.

    Args:
        path: file to write.
        pictures: what `reconstruction_picture` wrote of the same clip, by the rows' names.
    """
    images = {name: read_clip(picture)[0][:, 0] for name, picture in pictures.items()}
    half = next(iter(images.values())).shape[1] // 2
    strips = {"source": next(iter(images.values()))[:, :half]}
    strips |= {name: image[:, half:] for name, image in images.items()}
    parts = []
    for name, strip in strips.items():
        band = torch.zeros(3, _BAND, strip.shape[2], dtype=torch.uint8)
        draw_label(band, name.replace("_", " "), top=_MARGIN, left=_MARGIN)
        parts += [band, strip]
    write_png(path, torch.cat(parts, 1))
    return path
