"""Which frames of which videos `vtok eval` looks at.

    default    all frames; with --size resized and rounded to bytes
    reference  every n-th frame, n = round(fps / 30); with --size resized and not rounded

The shorter side is scaled to the size (bilinear, antialiased), then the centre is cut out. Source
of the second: the data set of microsoft/VidTok (specification section 9) at evaluation's 30 fps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from vtok_ext.data.video import VideoInfo, VideoReader
from vtok_ext.data.video_list import VIDEO_SUFFIXES

if TYPE_CHECKING:
    from .evaluate import EvalOptions

# Frames per second that the published evaluation reads.
PUBLISHED_FPS = 30


def video_files(given: list[Path]) -> list[Path]:
    """Returns the files, and those in the folders, in order."""
    found: list[Path] = []
    for path in given:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in VIDEO_SUFFIXES)
            if not inside:
                raise ValueError(f"eval: a folder must hold videos, got none in {path}")
            found += inside
        else:
            found.append(path)
    return found


def size_of(reader: VideoReader, options: EvalOptions) -> tuple[int, int]:
    """Returns (height, width) of the frames that `frames_of` gives."""
    if options.size is None:
        return reader.info.height, reader.info.width
    return options.size, options.size


def interval_of(info: VideoInfo, options: EvalOptions) -> int:
    """Returns n of "every n-th frame": 1, or that of the reference protocol.

    Up to 15 frames per second the published interval is 0, of which no frames come; and files do
    not have to say their rate. Both give 1 here.
    """
    return max(1, round(info.fps / PUBLISHED_FPS)) if options.protocol == "reference" else 1


def frames_of(reader: VideoReader, options: EvalOptions, count: int) -> Iterator[Tensor]:
    """Yields frames [1, 3, t, H, W] of those to look at, resized and cropped if asked for.

    uint8; float in [-1, 1] where the reference protocol resizes, which does not round.
    """
    left = math.inf if options.max_frames is None else options.max_frames
    interval, seen = interval_of(reader.info, options), 0
    for chunk in reader.chunks(count):
        frames = chunk.frames[:, -seen % interval :: interval]
        frames = frames[:, : int(min(left, frames.shape[1]))]
        seen += len(chunk.timestamps)
        left -= frames.shape[1]
        if frames.shape[1]:
            yield (frames if options.size is None else _cropped(frames, options))[None]
        if left <= 0:
            return


def _cropped(frames: Tensor, options: EvalOptions) -> Tensor:
    """Returns [3, t, size, size]: the shorter side scaled to `size`, then the centre."""
    assert options.size is not None  # checked by the caller
    (height, width), size = frames.shape[2:], options.size
    scale = size / min(height, width)
    scaled = (max(size, round(height * scale)), max(size, round(width * scale)))
    images = frames.transpose(0, 1).float()
    images = F.interpolate(images, scaled, mode="bilinear", antialias=True, align_corners=False)
    top, left = (scaled[0] - size) // 2, (scaled[1] - size) // 2
    images = images[:, :, top : top + size, left : left + size]
    if options.protocol == "reference":
        return (images / 127.5 - 1).transpose(0, 1)
    return images.round().clamp(0, 255).to(torch.uint8).transpose(0, 1)
