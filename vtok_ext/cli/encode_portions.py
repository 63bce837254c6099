"""`vtok encode` with a VTok: the file in portions, to the bits of the whole clip.

A VTok is no causal model, so that no stream of tokens can be cut off and resumed, but its encoder
looks at a frame and at its key frame only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vtok_ext.data.video import VideoReader

# What the model takes at a time; more frames in memory would gain nothing.
_PORTION_FRAMES = 16


def takes_portions(model: Any, frames: str) -> bool:
    """Returns whether `encode_in_portions` can encode a file with `model` and a frame rule."""
    from vtok_ext.models.vtok import VTok

    return isinstance(model, VTok) and model.config.key_frame == "first" and frames == "preserve"


def encode_in_portions(out: Path, model: Any, kind: str, reader: VideoReader) -> dict[str, Any]:
    """Returns frames and grid after writing the file of a video; memory does not grow with it.

    Args:
        out: file to write.
        model: for which `takes_portions` is true.
        kind: "tokens" or "encoding".
        reader: of the video.

    Raises:
        ValueError: latents that are not finite, or tokens that would lose their positions.
    """
    from vtok_ext.models import Tokens
    from vtok_ext.models.vtok_streaming import encode_portions

    if kind == "tokens":
        model.refuse_unrecorded_positions("tokenize")
    device = next(model.parameters()).device
    portions = (chunk.frames[None].to(device) for chunk in reader.chunks(_PORTION_FRAMES))
    encoding = encode_portions(model, portions, fps=float(reader.info.fps) or None)
    latent: Any = encoding.latent  # a sequence [1, L, D]
    ids = encoding.indices
    # Of NaN an index is -1.
    if not latent.isfinite().all() or (ids is not None and ids.min() < 0):
        raise ValueError(
            f"encode: the model must give finite latents, got NaN or infinity within "
            f"{encoding.num_frames} frames"
        )
    if kind == "tokens":
        assert ids is not None  # a discrete model's encoding has indices
        facts = (encoding.num_frames, encoding.size, encoding.fps, model.model_id)
        Tokens(ids, tuple(ids.shape[1:]), *facts).save(out)
    else:
        encoding.model_id, encoding.indices = model.model_id, None
        encoding.save(out)
    grid = ids.shape[1:] if kind == "tokens" and ids is not None else latent.shape[1:]
    return {"frames": encoding.num_frames, "grid": list(grid)}
