"""Clips that a model must see as a whole."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def read_whole(op: str, model: Any, parts: Iterable[Tensor]) -> Tensor:
    """Returns the clip [3, T, H, W] of its parts [3, t, H, W], read no further than the model goes.

    Args:
        op: in front of the message.
        model: a VideoTokenizer.
        parts: of a video, in order.

    Raises:
        ValueError: the video is longer or larger than the model's clips.
    """
    kept: list[Tensor] = []
    num_frames = 0
    for part in parts:
        kept.append(part)
        num_frames += part.shape[1]
        model.check_clip(op, (num_frames, *part.shape[2:]))
    return torch.cat(kept, dim=1)
