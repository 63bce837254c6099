"""Data sets of generators: clips with a label, or latents instead of clips.

An item is a clip [3, T, H, W] uint8 or a latent, alone or in a tuple with a label.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from vtok_ext.data.clips import Clips, VideoClips


class LabelledClips:
    """Returns (clip, label): labels are the numbers of the sorted folders next to `root`.

    The label is that of the video which the clip is really from: another one stands in for a
    damaged one (`VideoClips`), and may be of another class.

    Args:
        clips: of video files.
        root: the folder that holds one folder per class.
        names: of the classes; default the folders that hold some of the files.

    Raises:
        ValueError: a file that lies in none of them.
    """

    def __init__(self, clips: VideoClips, root: str | Path, names: list[str] | None = None) -> None:
        self.clips = clips
        places = [video.path.relative_to(root).parts for video in clips.videos]
        outside = [place for place in places if len(place) < 2]
        if outside:
            raise ValueError(
                f"latent.labels: every file must lie in the folder of its class for 'folders', "
                f"got {outside[0][0]} in {root} itself"
            )
        self.names = sorted({place[0] for place in places}) if names is None else names
        unknown = sorted({place[0] for place in places} - set(self.names))
        if unknown:
            raise ValueError(
                f"latent.labels: held-out classes must be among {self.names}, got {unknown}"
            )
        self.labels = [self.names.index(place[0]) for place in places]

    def __len__(self) -> int:
        """Number of clips of an epoch."""
        return len(self.clips)

    def __getitem__(self, place: tuple[int, int]) -> tuple[Tensor, int]:
        """Returns (clip, label) at (epoch, index)."""
        clip, _, index = self.clips.read(place)
        return clip, self.labels[index]


class CachedLatents:
    """Latents of clips, each encoded when it is first asked for, always as in epoch 0.

    Args:
        clips: where they come from, with or without labels.
        encode: clips [B, 3, T, H, W] uint8 -> latent or ids with that B.
    """

    def __init__(self, clips: Clips | LabelledClips, encode: Callable[[Tensor], Any]) -> None:
        self.clips, self.encode = clips, encode
        self._kept: dict[int, Any] = {}

    def __len__(self) -> int:
        """Number of clips of an epoch."""
        return len(self.clips)

    def __getitem__(self, place: tuple[int, int]) -> Any:
        """Returns the latent, or (latent, label), at (epoch, index)."""
        index = place[1]
        if index not in self._kept:
            item: Any = self.clips[0, index]
            clip, label = item if isinstance(item, tuple) else (item, None)
            latent = self.encode(clip[None])
            if isinstance(latent, dict):
                latent = {name: plane[0].cpu() for name, plane in latent.items()}
            else:
                latent = latent[0].cpu()
            self._kept[index] = latent if label is None else (latent, label)
        return self._kept[index]
