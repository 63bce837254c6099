"""Which classes of diffusers this package knows, and what a folder holds; needs no diffusers."""

from __future__ import annotations

import json
import os
from pathlib import Path

from vtok_ext.models import _persistence

VIDTOK = "AutoencoderVidTok"
VAE_CLASSES = (
    "AutoencoderKLWan",
    "AutoencoderKLCogVideoX",
    "AutoencoderKLHunyuanVideo",
    VIDTOK,
)
EXTRA = "pip install 'vtok_ext[diffusers]'"


def vae_class_of(folder: str | os.PathLike) -> str | None:
    """Returns the class of `VAE_CLASSES` that diffusers saved in `folder`, None if it did not."""
    path = os.path.join(folder, _persistence.CONFIG_NAME)
    if not os.path.isfile(path) or os.path.getsize(path) > _persistence.MAX_CONFIG_BYTES:
        return None
    try:
        description = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError:
        return None
    name = description.get("_class_name") if isinstance(description, dict) else None
    return name if name in VAE_CLASSES else None
