"""`--streaming`: the exact stream, or the published chunks of VidTok 1.1, and who has them."""

from __future__ import annotations

from typing import Any

MODES = ("exact", "reference")


def check_streaming(op: str, streaming: str) -> None:
    """Raises ValueError unless `streaming` is one of `MODES`."""
    if streaming not in MODES:
        raise ValueError(f"{op}: --streaming must be one of {', '.join(MODES)}, got {streaming}")


def check_published(op: str, what: str, model: Any) -> None:
    """Raises ValueError unless `model` has published chunks: a VidTok 1.1, which is causal.

    Args:
        op: name in front of the message.
        what: asks for the chunks.
        model: any VideoTokenizer.
    """
    from vtok_ext.models.vidtok import VidTok

    if not isinstance(model, VidTok) or model.reference_version != "1.1":
        raise ValueError(
            f"{op}: {what} must be given a causal VidTok of version 1.1, got {model.name}; other "
            "models have no published chunks"
        )
