"""Visibility of chunk borders: how much more the error changes there than elsewhere.

    boundary_jump = mean |e_t - e_(t-1)| at borders / the same elsewhere

with e = reconstruction - source; 1 means no seam.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ._video_pair import check_pair


def boundary_jump(
    reconstruction: torch.Tensor,  # [B, C, T, H, W]
    source: torch.Tensor,  # [B, C, T, H, W]
    chunk_frames: int | None = None,
    *,
    first_chunk_frames: int | None = None,
    borders: Sequence[int] | None = None,
) -> torch.Tensor:
    """Returns the change of the error across chunk borders relative to its change elsewhere.

    A model without seams gives about 1; the difference of errors, not of frames, is taken, so
    motion in the video does not count. Two error-free videos give 1; an error that changes at
    borders only gives infinity.

    Args:
        reconstruction: [B, C, T, H, W], floating or uint8.
        source: same shape; uint8 if and only if reconstruction is.
        chunk_frames: frames per chunk; give this or `borders`.
        first_chunk_frames: length of the first chunk where it differs (causal models: 1).
        borders: indices t in 1..T-1 of the first frame of every chunk but the first.

    Returns:
        float32 scalar >= 0.

    Raises:
        ValueError: wrong shapes; neither or both of chunk_frames and borders; no border in the
            clip, or nothing but borders.
        TypeError: dtypes that are neither uint8 nor floating, or only one of them uint8.

    Deterministic; any device; computed in float32.
    """
    check_pair(reconstruction, source, None, "boundary_jump")
    num_frames = source.shape[2]
    at_border = torch.zeros(num_frames, dtype=torch.bool)
    at_border[_borders(num_frames, chunk_frames, first_chunk_frames, borders)] = True
    at_border = at_border[1:]
    if not at_border.any() or at_border.all():
        raise ValueError(
            f"boundary_jump: a clip must have frames at chunk borders and elsewhere, got "
            f"{int(at_border.sum())} borders in {num_frames} frames"
        )
    changes = torch.empty(num_frames - 1)
    previous = reconstruction[:, :, 0].float() - source[:, :, 0].float()
    for t in range(1, num_frames):  # frame by frame: no copy of the whole clip in float32
        error = reconstruction[:, :, t].float() - source[:, :, t].float()
        changes[t - 1] = (error - previous).abs().mean()
        previous = error
    border, elsewhere = changes[at_border].mean(), changes[~at_border].mean()
    return torch.ones(()) if border == elsewhere else border / elsewhere


def _borders(
    num_frames: int,
    chunk_frames: int | None,
    first_chunk_frames: int | None,
    borders: Sequence[int] | None,
) -> list[int]:
    """Returns the indices of the first frame of each chunk but the first."""
    if (chunk_frames is None) == (borders is None):
        raise ValueError("boundary_jump: give one of chunk_frames and borders, got both or neither")
    if borders is not None:
        outside = [t for t in borders if not 1 <= t < num_frames]
        if outside or first_chunk_frames is not None:
            raise ValueError(
                f"boundary_jump: borders must lie in 1..{num_frames - 1} and come without "
                f"first_chunk_frames, got {list(borders)} and {first_chunk_frames}"
            )
        return list(borders)
    first = chunk_frames if first_chunk_frames is None else first_chunk_frames
    if chunk_frames is None or first is None or chunk_frames < 1 or first < 1:
        raise ValueError(
            f"boundary_jump: chunk lengths must be at least 1, got {chunk_frames}, {first}"
        )
    return list(range(first, num_frames, chunk_frames))
