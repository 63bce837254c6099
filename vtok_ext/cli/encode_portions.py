"""`vtok encode` with a VTok: the file in portions, to the bits of the whole clip.

A VTok is no causal model, so that no stream of tokens can be cut off and resumed, but its encoder
looks at a frame and at its key frame only.
"""

from __future__ import annotations

from typing import Any

from vtok_ext.data.video import VideoReader

# What the model takes at a time; more frames in memory would gain nothing.
_PORTION_FRAMES = 16


def takes_portions(model: Any, frames: str) -> bool:
    """Returns whether `encode_in_portions` can encode a file with `model` and a frame rule."""
    from vtok_ext.models.vtok import VTok

    return isinstance(model, VTok) and model.config.key_frame == "first" and frames == "preserve"


def encode_in_portions(model: Any, kind: str, reader: VideoReader) -> Any:
    """Returns the Tokens or Encoding of a video; memory does not grow with its length.

    Args:
        model: for which `takes_portions` is true.
        kind: "tokens" or "encoding".
        reader: of the video.

    Raises:
        ValueError: tokens that would lose their positions.
    """
    from vtok_ext.models import Tokens
    from vtok_ext.models.vtok_streaming import encode_portions

    if kind == "tokens":
        model.refuse_unrecorded_positions("tokenize")
    device = next(model.parameters()).device
    portions = (chunk.frames[None].to(device) for chunk in reader.chunks(_PORTION_FRAMES))
    encoding = encode_portions(model, portions, fps=float(reader.info.fps) or None)
    if kind != "tokens":
        return encoding
    ids: Any = encoding.indices  # a discrete model's encoding has them
    facts = (encoding.num_frames, encoding.size, encoding.fps, model.model_id)
    return Tokens(ids, tuple(ids.shape[1:]), *facts)
