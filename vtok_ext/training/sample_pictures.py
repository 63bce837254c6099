"""Videos and pictures that show how far a training is.

    OUT/samples/step-00000100/clip-0.mp4, clip-0.png

A reconstruction is shown as input, output and error map side by side; the picture has a few moments
of it one below the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from vtok_ext.data.picture import error_map, write_png

_ROWS = 4
# Small clips are shown with every pixel as a square of whole pixels.
_COMFORTABLE_HEIGHT = 128


def reconstruction_video(
    source: Tensor,  # [3, T, H, W] in [-1, 1]
    output: Tensor,  # [3, T, H, W] in [-1, 1]
) -> Tensor:
    """Returns [3, T, H', 3 W'] uint8: source, output and error map, enlarged to be seen.

    Args:
        source, output: [3, T, H, W], nominally in [-1, 1].
    """
    shown = [to_uint8(source), to_uint8(output)]
    shown.append(error_map(*shown))
    factor = max(1, _COMFORTABLE_HEIGHT // source.shape[2])
    video = torch.cat(shown, 3)
    return video.repeat_interleave(factor, 2).repeat_interleave(factor, 3)


def to_uint8(video: Tensor) -> Tensor:
    """Returns a video in [-1, 1] as uint8 on the CPU, clamped and rounded."""
    return ((video.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def moments(
    video: Tensor,  # [3, T, H, W] uint8
) -> Tensor:
    """Returns [3, n H, W]: a few frames from the first to the last, one below the other."""
    count = min(_ROWS, video.shape[1])
    chosen = torch.linspace(0, video.shape[1] - 1, count).round().long()
    return video[:, chosen].flatten(1, 2)


def write_samples(folder: Path, videos: Mapping[str, Tensor], fps: float = 8) -> dict[str, Tensor]:
    """Returns the pictures [3, H, W] that it wrote, by name, each beside its video.

    Args:
        folder: made if it is not there.
        videos: [3, T, H, W] uint8 by name.
        fps: frames per second of the files; clips are short, and seen better slowly.
    """
    from vtok_ext.data.video import VideoWriter

    folder.mkdir(parents=True, exist_ok=True)
    pictures = {}
    for name, video in videos.items():
        pictures[name] = moments(video)
        write_png(folder / f"{name}.png", pictures[name])
        height, width = video.shape[2:]
        with VideoWriter(folder / f"{name}.mp4", height=height, width=width, fps=fps) as writer:
            writer.write(video)
    return pictures
