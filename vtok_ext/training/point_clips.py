"""Clips of different lengths in tensors of one length, as CoordTok is trained on them."""

from __future__ import annotations

import random

import torch

from vtok_ext.data.clips import Clips, VideoClips


class PointClips:
    """Clips whose number of real frames is a function of seed, epoch and index, but not more than
    its video has.

    An item is {"video": [3, T, H, W] uint8, "num_frames": int64}; frames from `num_frames` on are
    there only to make tensors of one length.

    Args:
        clips: clips of T frames.
        min_frames, max_frames: least and largest number of real frames, max_frames = T.
        seed: of the lengths.
    """

    def __init__(self, clips: Clips, min_frames: int, max_frames: int, seed: int) -> None:
        self.clips, self.lengths, self.seed = clips, (min_frames, max_frames), seed

    def __len__(self) -> int:
        """Number of clips of an epoch."""
        return len(self.clips)

    def __getitem__(self, place: tuple[int, int]) -> dict[str, torch.Tensor]:
        """Returns the item at (epoch, index)."""
        epoch, index = place
        draws = random.Random(f"length/{self.seed}/{epoch}/{index}")
        num_frames = draws.randint(*self.lengths)
        if isinstance(self.clips, VideoClips):
            video, available = self.clips.with_length(place)
        else:
            video, available = self.clips[place], num_frames
        return {"video": video, "num_frames": torch.tensor(min(num_frames, available))}
