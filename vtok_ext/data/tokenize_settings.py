"""How `vtok tokenize` makes latents, and what tells whether two calls would make the same ones."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from vtok_ext.data.video_list import VideoItem

KINDS = ("tokens", "latent")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class TokenizeSettings:
    """How videos become latents.

    Attributes:
        kind: "tokens" or "latent".
        num_frames: cut each video into clips of so many frames and leave out the rest; None encodes
            it as a whole, in constant memory for models with a stream encoder.
        max_clips: clips of one video at most; None for all.
        fps: take the frame nearest to every 1 / fps seconds; None takes all frames.
        size: (H, W) to scale to and crop at the centre; None keeps that of the video.
        batch_size: clips of one shape that are encoded at once.
        videos_per_shard: consecutive videos of the list that make up a shard.
        dtype: of stored latents.
    """

    kind: str
    num_frames: int | None = None
    max_clips: int | None = None
    fps: float | None = None
    size: tuple[int, int] | None = None
    batch_size: int = 8
    videos_per_shard: int = 64
    dtype: str = "float32"

    def __post_init__(self) -> None:
        """Checks every field."""
        if self.kind not in KINDS or self.dtype not in DTYPES:
            raise ValueError(
                f"tokenize: kind must be one of {KINDS} and dtype one of {tuple(DTYPES)}, "
                f"got {self.kind!r} and {self.dtype!r}"
            )
        for name in ("num_frames", "max_clips", "batch_size", "videos_per_shard", "fps"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"tokenize: {name} must be positive and finite, got {value}")

    def check_procedural(self) -> None:
        """Raises ValueError if procedural clips cannot be made so."""
        if self.fps is not None:
            raise ValueError(
                f"tokenize: fps (--fps) must be None for procedural clips, got {self.fps}"
            )
        if self.num_frames is None or self.size is None:
            raise ValueError(
                "tokenize: num_frames and size (--frames, --size) must be given for procedural "
                "clips"
            )

    def origin(self, model_id: str, videos: list[VideoItem]) -> dict[str, Any]:
        """Returns all that decides what is made, as JSON has it, with a hash of it.

        Of the videos these are names, sizes and fields, not the folder: it may have moved.

        Args:
            model_id: of the tokenizer.
            videos: all of them; their sizes are looked up.
        """
        facts = {
            "model_id": model_id,
            "kind": self.kind,
            "settings": asdict(self),
            "videos": {
                "count": len(videos),
                "names": _hash([video.name for video in videos]),
                "sizes": _hash([_num_bytes(video) for video in videos]),
                "fields": _hash([video.fields for video in videos]),
            },
        }
        facts = json.loads(json.dumps(facts))  # as it is read again: lists instead of tuples
        return {**facts, "settings_hash": _hash(facts)}


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Returns one phrase for everything that two results of `origin` differ in.

    Args:
        found: of what is there.
        wanted: of what is asked for now.
    """
    lines = []
    if found.get("model_id") != wanted["model_id"]:
        lines.append(f"model {found.get('model_id')}, not {wanted['model_id']}")
    there, now = found.get("videos"), wanted["videos"]
    if not isinstance(there, dict):
        lines.append("an older format, which does not tell the videos")
    elif there["names"] != now["names"]:
        lines.append(f"a list of {there['count']} other videos, not these {now['count']}")
    else:
        if there["sizes"] != now["sizes"]:
            lines.append("videos of the same names with files of other sizes")
        if there["fields"] != now["fields"]:
            lines.append("videos of the same names with other fields, such as captions")
    old, new = found.get("settings") or {}, wanted["settings"]
    for name in sorted({*old, *new}):
        if old.get(name) != new.get(name):
            lines.append(f"{name} {old.get(name)}, not {new.get(name)}")
    return lines


def _num_bytes(video: VideoItem) -> int | None:
    """Returns the size of a video, None where there is no file, as of procedural ones."""
    if video.size is not None:
        return video.size
    return video.path.stat().st_size if video.path.is_file() else None


def _hash(values: Any) -> str:
    """Returns 16 hexadecimal digits that change with a JSON value."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
