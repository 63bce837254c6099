"""What CoordTok accepts: numbers of real frames, planes, and the rectangle of a clip."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vtok_ext.models._video_input import is_finite, is_integer
from vtok_ext.models.coordtok_config import PLANE_AXES, CoordTokConfig


def checked_num_frames(num_frames: Any, video: Tensor) -> Tensor:
    """Returns `num_frames` [B] on the device of a video [B, 3, T, H, W].

    Raises:
        ValueError: not integers in 1..T, one per clip; values are looked at on a CPU only.
    """
    ok = isinstance(num_frames, Tensor) and num_frames.dtype in (torch.int32, torch.int64)
    if not ok or num_frames.shape != video.shape[:1]:
        shown = num_frames
        if isinstance(num_frames, Tensor):
            shown = f"{list(num_frames.shape)} {num_frames.dtype}"
        raise ValueError(
            f"encode: num_frames must be integers [B] with B = {video.shape[0]}, got {shown}"
        )
    if num_frames.device.type == "cpu" and not torch.compiler.is_compiling():
        least, most = int(num_frames.min()), int(num_frames.max())
        if least < 1 or most > video.shape[2]:
            raise ValueError(
                f"encode: num_frames must be in 1..{video.shape[2]}, got {least}..{most}"
            )
    return num_frames.to(video.device)


def check_planes(op: str, planes: Any, config: CoordTokConfig, *, finite: bool) -> None:
    """Raises unless `planes` are floating ones of a model of `config`.

    Args:
        op: name in front of the message.
        planes: of anything.
        config: of the model.
        finite: whether the values of CPU tensors are looked at, as those of videos are.

    Raises:
        TypeError: no dict of floating tensors xy, yt and xt.
        ValueError: another shape, or NaN or infinity.
    """
    if not isinstance(planes, dict) or set(planes) != set(PLANE_AXES):
        found = sorted(planes) if isinstance(planes, dict) else type(planes).__name__
        raise TypeError(f"{op}: latent must be a dict of planes xy, yt and xt, got {found}")
    batch = getattr(planes["xy"], "shape", ())[:1]
    for name, plane in planes.items():
        if not isinstance(plane, Tensor):
            raise TypeError(f"{op}: plane {name} must be a tensor, got {type(plane).__name__}")
        shape = config.plane_shape(name)
        if plane.shape[1:] != shape or plane.shape[:1] != batch or 0 in batch:
            form = ", ".join(map(str, shape))
            raise ValueError(f"{op}: plane {name} must be [B, {form}], got {list(plane.shape)}")
        if not plane.is_floating_point():
            raise TypeError(f"{op}: plane {name} must be floating, got {plane.dtype}")
        if finite and plane.device.type == "cpu" and not is_finite(plane):
            raise ValueError(f"{op}: plane {name} must be finite, got NaN or infinite values")


def check_region(op: str, region: Sequence[int], size: Sequence[int]) -> None:
    """Raises ValueError unless (top, left, height, width) lies within a picture of `size`."""
    top, left, height, width = region
    whole = all(map(is_integer, region)) and min(height, width) >= 1
    if not whole or not (0 <= top <= size[0] - height and 0 <= left <= size[1] - width):
        raise ValueError(
            f"{op}: top, left, height, width must be integers within {size[0]}x{size[1]}, "
            f"got {tuple(region)}"
        )
