"""The captioned set: clips, captions and questions by index, split by attribute combination."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vtok_ext.data.captioned.questions import Question, caption_of, questions_of
from vtok_ext.data.captioned.scene import Scene, draw_scene, render

# Frames per second of the clips: 32 frames are 4 s, and 8 frames one second.
FPS = 8.0


@dataclass(frozen=True)
class CaptionedClip:
    """A clip with all that is known of it.

    Attributes:
        video: [3, T, H, W] uint8.
        scene: what is in it.
        caption: one sentence.
        questions: one of every kind that the scene answers.
    """

    video: torch.Tensor
    scene: Scene
    caption: str
    questions: list[Question]


class CaptionedClips:
    """Clips of `draw_scene`, the same on every machine and in every epoch.

    Args:
        num_clips: how many.
        num_frames, height, width: T, H, W of each.
        split: "train" or "test": no combination of all attributes of a shape is in both.
        first_seed: seed of clip 0; clip i has the i-th after it.

    Raises:
        ValueError: num_clips < 1, or as `draw_scene`.
    """

    def __init__(
        self,
        num_clips: int,
        num_frames: int = 32,
        height: int = 64,
        width: int = 64,
        *,
        split: str = "train",
        first_seed: int = 0,
    ) -> None:
        if num_clips < 1:
            raise ValueError(f"CaptionedClips: num_clips must be at least 1, got {num_clips}")
        self.num_clips, self.split, self.first_seed = num_clips, split, first_seed
        self.shape = (num_frames, height, width)
        draw_scene(first_seed, num_frames, split)  # refuses what cannot be

    def __len__(self) -> int:
        """Number of clips."""
        return self.num_clips

    def scene(self, index: int) -> Scene:
        """Returns what is in clip `index`, without drawing it."""
        return draw_scene(self.first_seed + index, self.shape[0], self.split)

    def clip(self, index: int) -> CaptionedClip:
        """Returns clip `index` with caption and questions."""
        scene = self.scene(index)
        video = render(scene, *self.shape[1:])
        return CaptionedClip(video, scene, caption_of(scene), questions_of(scene))

    def __getitem__(self, place: tuple[int, int]) -> torch.Tensor:
        """Returns the clip [3, T, H, W] uint8 at (epoch, index): what training a tokenizer wants;
        see `data.clips.Clips`."""
        return self.clip(place[1]).video
