"""What a row's reconstructions of the held-out clips measure, clip by clip."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from vtok_ext.metrics import psnr
from vtok_ext.models._video_input import to_float
from vtok_ext.training.studies.clip_store import fingerprint
from vtok_ext.training.studies.row_picture import reconstruction_picture
from vtok_ext.training.studies.row_result import RowResult

_PICTURE_FRAMES = 9


@torch.no_grad()
def measure_clips(
    clips: Tensor,  # [N, 3, T, H, W] uint8
    reconstruct: Callable[[Tensor], Tensor],
    metrics: Callable[[Tensor, Tensor], dict[str, float]],
    *,
    batch_size: int,
    picture: Path | None = None,
) -> RowResult:
    """Returns metrics of every clip, and a picture of the first one if a file is given for it.

    Args:
        clips: the held-out clips.
        reconstruct: videos [B, 3, T, H, W] in [-1, 1] -> the same, which is clamped.
        metrics: reconstruction and source [1, 3, T, H, W] -> values by name.
        batch_size: clips at a time.
        picture: file to write.
    """
    result = RowResult(held_out=fingerprint(clips))
    for first in range(0, len(clips), batch_size):
        video = to_float(clips[first : first + batch_size], torch.float32)
        decoded = reconstruct(video).clamp(-1, 1)
        for a, b in zip(decoded.split(1), video.split(1), strict=True):
            for name, value in metrics(a, b).items():
                result.per_clip.setdefault(name, []).append(value)
        if picture is not None and first == 0:
            shown = reconstruction_picture(picture, video[0], decoded[0], _PICTURE_FRAMES)
            result.pictures = [shown]
    return result


def without_training(clip: Tensor) -> dict[str, float]:
    """Returns the PSNR of what needs no training, of a clip [1, 3, T, H, W] in [-1, 1].

    psnr_mean_colour    its mean colour
    psnr_mean_frame     the mean of its frames: a model below it has not learnt what moves
    """
    means = {"colour": (2, 3, 4), "frame": (2,)}
    return {
        f"psnr_mean_{name}": psnr(clip.mean(dims, keepdim=True).expand_as(clip), clip).item()
        for name, dims in means.items()
    }


def strata(
    name: str, values: list[float], measure: Sequence[float], count: int
) -> dict[str, list[float]]:
    """Returns NAME_1, ..., NAME_count: the values of the clips from the least to the largest third,
    or other part, by a measure of what is in them.

    Args:
        name: of the metric.
        values, measure: of every clip.
        count: of parts, which differ by one clip at most; 0 for none.
    """
    order = sorted(range(len(measure)), key=measure.__getitem__)
    found = {}
    for i in range(count):
        part = order[i * len(order) // count : (i + 1) * len(order) // count]
        found[f"{name}_{i + 1}"] = [values[clip] for clip in sorted(part)]
    return found
