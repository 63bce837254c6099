"""Checks a (reconstruction, source) pair once for all metrics and yields it as frames in [0, 1]."""

from __future__ import annotations

from collections.abc import Iterator

import torch

# The reference evaluation works in groups of 16 frames. Values are means over frames, so a group
# only bounds memory; the size is kept.
_FRAMES_PER_GROUP = 16


def check_pair(
    reconstruction: torch.Tensor,  # [B, C, T, H, W]
    source: torch.Tensor,  # [B, C, T, H, W]
    value_range: tuple[float, float] | None,
    op: str,
) -> tuple[float, float]:
    """Returns the value range (low, high) after checking both videos.

    Raises:
        ValueError, TypeError: see the public functions.
    """
    if reconstruction.dim() != 5:
        raise ValueError(
            f"{op}: reconstruction must be [B, C, T, H, W], got {list(reconstruction.shape)}"
        )
    if reconstruction.shape != source.shape:
        raise ValueError(
            f"{op}: source must have the shape of reconstruction "
            f"{list(reconstruction.shape)}, got {list(source.shape)}"
        )
    if reconstruction.numel() == 0:
        raise ValueError(f"{op}: videos must have pixels, got {list(reconstruction.shape)}")
    if (reconstruction.dtype == torch.uint8) != (source.dtype == torch.uint8):
        raise TypeError(
            f"{op}: source must be uint8 if and only if reconstruction is, got "
            f"{source.dtype} and {reconstruction.dtype}"
        )
    if reconstruction.dtype == torch.uint8:
        if value_range is not None:
            raise ValueError(f"{op}: value_range must be None for uint8, got {value_range}")
        return 0.0, 255.0
    if not (reconstruction.is_floating_point() and source.is_floating_point()):
        raise TypeError(
            f"{op}: videos must be uint8 or floating, got {reconstruction.dtype} and {source.dtype}"
        )
    low, high = (-1.0, 1.0) if value_range is None else value_range
    if not low < high:
        raise ValueError(
            f"{op}: value_range must be (low, high) with low < high, got {low}, {high}"
        )
    return low, high


def unit_frames(
    reconstruction: torch.Tensor,  # [B, C, T, H, W]
    source: torch.Tensor,  # [B, C, T, H, W]
    value_range: tuple[float, float],
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields ([n, C, H, W], [n, C, H, W]) float32 in [0, 1], at most 16 frames at a time.

    The reconstruction is clamped to the range, the source is taken as it is. Clip after clip, in
    order of time.
    """
    low, high = value_range
    for clip_reconstruction, clip_source in zip(reconstruction, source, strict=True):
        for start in range(0, clip_source.shape[1], _FRAMES_PER_GROUP):
            group = slice(start, start + _FRAMES_PER_GROUP)
            a = clip_reconstruction[:, group].transpose(0, 1).float().clamp(low, high)
            b = clip_source[:, group].transpose(0, 1).float()
            yield (a - low) / (high - low), (b - low) / (high - low)
