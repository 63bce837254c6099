"""Checks of what a training is fed: layout, range and order of frames.

The errors that are caught are those that a training survives and nobody notices: clips in [0, 1]
instead of 0..255, time and channels exchanged, frames out of order, empty clips.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from vtok_ext.training.distributed import gathered

# Frames further apart than this are as different as those of a shuffled clip would be.
_FAR = 4


def clips_of(data: Any) -> Iterator[Tensor]:
    """Yields the clips [B, 3, T, H, W] uint8 among the tensors of a collated batch."""
    if isinstance(data, Tensor):
        if data.dim() == 5 and data.dtype == torch.uint8:
            yield data
    elif isinstance(data, dict):
        for value in data.values():
            yield from clips_of(value)
    elif isinstance(data, list | tuple):
        for value in data:
            yield from clips_of(value)


def check_first_step(parts: list[Any], resumed: bool = False) -> list[str]:
    """Returns warnings about the micro-batches of a step; all processes ask together.

    A black clip is no error, and a resumed run has shown its range: values are wrong where none of
    all micro-batches of all processes is above 1.

    Args:
        parts: collated micro-batches of this process.
        resumed: whether values may be as they are.

    Raises:
        ValueError: wrong layout, or values that are not those of 8-bit video; on every process.
    """
    warnings: list[str] = []
    error, largest = None, -1
    try:
        for clips in (clips for part in parts for clips in clips_of(part)):
            warnings += check_clips(clips)
            largest = max(largest, int(clips.max()))
    except (ValueError, TypeError) as caught:
        error = str(caught)
    errors, values = zip(*gathered((error, largest)), strict=True)
    for text in filter(None, errors):
        raise ValueError(text)
    if 0 <= max(values) <= 1 and not resumed:
        raise ValueError(
            f"train: clips must have values in 0..255, got 0..{max(values)} in the whole first "
            "step: black, or scaled to [0, 1] before the conversion to uint8"
        )
    return warnings


def check_clips(
    clips: Tensor,  # [B, 3, T, H, W] uint8
) -> list[str]:
    """Returns warnings about a batch of clips, [] if it looks right.

    Args:
        clips: [B, 3, T, H, W] uint8.

    Raises:
        ValueError: wrong layout.
        TypeError: not uint8.
    """
    if clips.dim() != 5 or clips.shape[1] != 3:
        raise ValueError(f"train: clips must be [B, 3, T, H, W], got {list(clips.shape)}")
    if clips.dtype != torch.uint8:
        raise TypeError(f"train: clips must be uint8, got {clips.dtype}")
    warnings = []
    empty = [i for i, clip in enumerate(clips) if clip.min() == clip.max()]
    if empty:
        warnings.append(f"clips {empty} of the first batch have a single colour everywhere")
    order = frame_order(clips)
    if order is not None and order > 1:
        warnings.append(
            f"frames may be out of order: neighbours differ {order:.2f} times as much as frames "
            f"{_FAR} apart"
        )
    return warnings


def frame_order(
    clips: Tensor,  # [B, 3, T, H, W] uint8
) -> float | None:
    """Returns mean |x_t - x_(t+1)| / mean |x_t - x_(t+4)|: below 1 for video, about 1 if shuffled.

    None where a clip is too short or does not move.
    """
    if clips.shape[2] <= _FAR:
        return None
    video = clips.float()
    near = (video[:, :, 1:] - video[:, :, :-1]).abs().mean()
    far = (video[:, :, _FAR:] - video[:, :, :-_FAR]).abs().mean()
    return None if far < 0.5 else float(near / far)
