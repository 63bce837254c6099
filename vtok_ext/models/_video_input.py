"""The one place where videos from outside are checked and brought to the model's form.

Float videos are [B, 3, T, H, W] in [-1, 1]; uint8 videos become x / 127.5 - 1.
"""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

FRAME_RULES = ("preserve", "reference")
# `isfinite` writes six bytes per value on its way.
_FRAMES_PER_CHECK = 16


def check_video(op: str, video: Tensor, channels: int = 3) -> None:
    """Raises unless `video` is a non-empty [B, channels, T, H, W], float and finite, or uint8.

    The values of CPU tensors are read once to find NaN and infinity (about 1 ms per 10 MB, under
    1 % of encoding); on other devices that would wait for the device, so there they are not.
    """
    if not isinstance(video, Tensor):
        raise TypeError(f"{op}: video must be a torch.Tensor, got {type(video).__name__}")
    form = f"[B, {channels}, T, H, W]"
    if video.dim() != 5 or video.shape[1] != channels:
        raise ValueError(f"{op}: video must be {form}, got {list(video.shape)}")
    if 0 in video.shape:
        raise ValueError(
            f"{op}: video must have at least one clip, frame, row and column, "
            f"got {list(video.shape)} as {form}"
        )
    if video.dtype != torch.uint8 and not video.is_floating_point():
        raise TypeError(f"{op}: video must be floating in [-1, 1] or uint8, got {video.dtype}")
    if video.is_floating_point() and video.device.type == "cpu" and not is_finite(video):
        raise ValueError(f"{op}: video must be finite, got NaN or infinite values")


def is_finite(video: Tensor) -> bool:
    """Returns whether all of [B, C, T, H, W] is finite; True where there are no values to read."""
    if type(video) is not Tensor or torch.compiler.is_compiling():  # such as fake tensors
        return True
    return all(torch.isfinite(part).all() for part in video.split(_FRAMES_PER_CHECK, 2))


def is_integer(value: object) -> bool:
    """Returns whether `value` is an integer; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_frame_rule(op: str, frames: str) -> None:
    """Raises ValueError unless `frames` names a frame rule."""
    if frames not in FRAME_RULES:
        raise ValueError(f"{op}: frames must be one of {FRAME_RULES}, got {frames!r}")


def check_fps(op: str, fps: Any) -> None:
    """Raises ValueError unless `fps` is None or a finite number > 0."""
    number = isinstance(fps, Real) and not isinstance(fps, bool)
    if fps is not None and not (number and 0 < float(fps) < math.inf):
        raise ValueError(f"{op}: fps must be a number > 0 or None, got {fps!r}")


def to_float(video: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the video in [-1, 1] and `dtype`."""
    if video.dtype == torch.uint8:
        video = video.float().div_(127.5).sub_(1)  # in float32: half would round twice
    return video.to(dtype)


def to_uint8(video: Tensor) -> Tensor:
    """Returns round((clamp(video, -1, 1) + 1) * 127.5) as uint8; inverse of `to_float`."""
    return video.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)


def pad_size(video: Tensor, multiple: int) -> Tensor:
    """Returns the video with its last row and column repeated up to multiples of `multiple`."""
    height, width = video.shape[3:]
    return repeat_border(video, -height % multiple, -width % multiple)


def repeat_border(video: Tensor, bottom: int, right: int) -> Tensor:
    """Returns the video with its last row repeated `bottom` times, its last column `right`."""
    if not (bottom or right):
        return video
    padding = (0, right, 0, bottom, 0, 0)
    if video.dtype == torch.float16 and video.device.type == "cpu":  # not in torch 2.4; exact
        return F.pad(video.float(), padding, mode="replicate").half()
    return F.pad(video, padding, mode="replicate")


def pad_tail(video: Tensor, factor: int, alone: int) -> Tensor:
    """Returns the video with its last frame repeated until T - alone is a multiple of `factor`.

    `alone` is the number of frames in front that form a group by themselves.
    """
    missing = (alone - video.shape[2]) % factor
    if not missing:
        return video
    return torch.cat([video, video[:, :, -1:].expand(-1, -1, missing, -1, -1)], dim=2)


def pad_front(video: Tensor, copies: int) -> Tensor:
    """Returns the video with copies of its first frame in front."""
    return torch.cat([video[:, :, :1]] * copies + [video], dim=2) if copies else video
