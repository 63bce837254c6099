"""Long videos in overlapping chunks, blended after decoding: the mode of ProMAG's paper.

    chunk i    frames 13 i to 13 i + 17 of the video, coded by itself
    blended    (1 - w_j) earlier[j] + w_j later[j],  w_j = (j + 1) / 5 in the 4 frames of overlap

Chunks do not see each other, so their borders show where the blend does not hide them, and the
overlap is coded twice. Exact streams (`stream_encoder`) do neither and are the default. Works for
any tokenizer. Source: ProMAG (arXiv 2501.05442); the weights of the linear blend are ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from vtok_ext.models.encoding import Encoding

CHUNK_FRAMES = 17
OVERLAP = 4


def chunk_bounds(
    num_frames: int, chunk_frames: int = CHUNK_FRAMES, overlap: int = OVERLAP
) -> list[tuple[int, int]]:
    """Returns (start, end) of the chunks that cover a clip; the last one may be shorter.

    Raises:
        ValueError: no frames, or an overlap that is not below the chunk's length.
    """
    if num_frames < 1:
        raise ValueError(f"overlap: num_frames must be at least 1, got {num_frames}")
    if not 0 <= overlap < chunk_frames:
        raise ValueError(f"overlap: overlap must be in 0..{chunk_frames - 1}, got {overlap}")
    bounds, start = [(0, min(chunk_frames, num_frames))], 0
    while bounds[-1][1] < num_frames:
        start += chunk_frames - overlap
        bounds.append((start, min(start + chunk_frames, num_frames)))
    return bounds


def encode_overlapping(
    model: Any,  # a VideoTokenizer
    video: Tensor,  # [B, 3, T, H, W]
    *,
    chunk_frames: int = CHUNK_FRAMES,
    overlap: int = OVERLAP,
    **options: Any,
) -> list[Encoding]:
    """Returns the encoding of each chunk; 56 frames are 4 chunks.

    Args:
        model: any tokenizer.
        video: [B, 3, T, H, W], any T.
        chunk_frames, overlap: 17 and 4 in the paper.
        **options: of `model.encode`.

    Raises:
        ValueError: an overlap that is not below chunk_frames, and as `model.encode`.
    """
    bounds = chunk_bounds(video.shape[2], chunk_frames, overlap)
    return [model.encode(video[:, :, start:end], **options) for start, end in bounds]


def decode_overlapping(
    model: Any,  # a VideoTokenizer
    encodings: Iterable[Encoding],
    *,
    overlap: int = OVERLAP,
) -> Tensor:
    """Returns the video [B, 3, T, H, W] of chunks, each overlap blended linearly.

    Args:
        model: the tokenizer that encoded them.
        encodings: of `encode_overlapping`.
        overlap: as there.

    Raises:
        ValueError: no chunk, or one that is not longer than the overlap.
    """
    return torch.cat(list(blend_chunks((model.decode(e) for e in encodings), overlap)), 2)


def blend_chunks(chunks: Iterable[Tensor], overlap: int = OVERLAP) -> Iterator[Tensor]:
    """Yields the frames of chunks [B, C, t, H, W] in order; holds one chunk at a time.

    Raises:
        ValueError: no chunk, or a later one that is not longer than the overlap.
    """
    waiting: Tensor | None = None
    for chunk in chunks:
        if waiting is not None:
            if chunk.shape[2] <= overlap:
                raise ValueError(
                    f"overlap: a chunk must have more than {overlap} frames, got {chunk.shape[2]}"
                )
            first = waiting.shape[2] - overlap
            yield waiting[:, :, :first]
            if overlap:
                steps = torch.arange(1, overlap + 1, device=chunk.device, dtype=chunk.dtype)
                weight = (steps / (overlap + 1)).view(-1, 1, 1)
                seam = torch.lerp(waiting[:, :, first:], chunk[:, :, :overlap], weight)
                chunk = torch.cat([seam, chunk[:, :, overlap:]], 2)
        waiting = chunk
    if waiting is None:
        raise ValueError("overlap: there must be at least one chunk, got none")
    yield waiting
