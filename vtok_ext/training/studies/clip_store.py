"""Procedural clips of a study, drawn once and kept in a file that all its runs share."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor

from vtok_ext.data.atomic_output import output_file
from vtok_ext.data.procedural import procedural_clip

# Part of the files' names: another number when procedural clips change.
_REVISION = 1


def clip_store(
    folder: Path,
    num_clips: int,
    num_frames: int,
    size: int,
    *,
    motion: str = "erratic",
    frame_step: int = 1,
    first_seed: int = 0,
) -> Tensor:
    """Returns [num_clips, 3, num_frames, size, size] uint8; clip i has seed first_seed + i.

    Args:
        folder: where the file is, or will be; see `shared_folder`.
        num_clips, num_frames, size: N, T, H = W.
        motion, frame_step: see `procedural_clip`.
        first_seed: of clip 0.
    """
    from safetensors.torch import load_file, save_file

    settings = [_REVISION, num_clips, num_frames, size, motion, frame_step, first_seed]
    name = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    path = folder / f"clips-{name}.safetensors"
    if not path.exists():
        clips = torch.empty(num_clips, 3, num_frames, size, size, dtype=torch.uint8)
        for i in range(num_clips):
            clips[i] = procedural_clip(
                num_frames,
                size,
                size,
                seed=first_seed + i,
                motion=motion,
                frame_step=frame_step,
            )
        with output_file(path, "study") as partial:
            save_file({"clips": clips}, partial)
    return load_file(path)["clips"]


def fingerprint(clips: Tensor) -> str:
    """Returns 16 hexadecimal digits that change with any byte of the clips [N, 3, T, H, W]."""
    return hashlib.sha256(clips.contiguous().numpy().tobytes()).hexdigest()[:16]
