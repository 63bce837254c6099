"""The clip that `vtok demo` trains on: procedural, or the beginning of a video, made small."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
import torch.nn.functional as F

# 1 + 4 k frames fill the causal model's 4-frame groups. The size is what two cores can train on in
# time.
NUM_FRAMES = 17
HEIGHT, WIDTH = 96, 128
_FPS = 12
# Sizes are cut to multiples of the spatial compression so that no token covers padding.
_MULTIPLE = 8


@dataclass(frozen=True)
class DemoClip:
    """A short clip.

    Attributes:
        frames: [3, T, H, W] uint8.
        timestamps: T integers in units of `time_base` seconds.
        fps: average frame rate.
        source: "procedural" or the name of the video file.
        description: one line about what it is and what was done to it.
    """

    frames: torch.Tensor  # [3, T, H, W]
    timestamps: list[int]
    time_base: Fraction
    fps: float
    source: str
    description: str

    @property
    def seconds(self) -> list[float]:
        """Time of every frame since the first."""
        return [float((t - self.timestamps[0]) * self.time_base) for t in self.timestamps]


def default_clip(seed: int) -> DemoClip:
    """Returns the procedural clip of that seed."""
    from vtok_ext.data.procedural import procedural_clip

    frames = procedural_clip(NUM_FRAMES, HEIGHT, WIDTH, seed=seed)
    return DemoClip(
        frames=frames,
        timestamps=list(range(NUM_FRAMES)),
        time_base=Fraction(1, _FPS),
        fps=float(_FPS),
        source="procedural",
        description=f"procedural, seed {seed}, {_dimensions(frames)}",
    )


def clip_from_video(path: Path) -> DemoClip:
    """Returns the first frames of a video, scaled down and cut to a trainable size.

    Raises:
        VideoError: the file cannot be read.
        ValueError: the video is too small.
    """
    from vtok_ext.data.video import read_clip

    frames, timestamps, info = read_clip(path, max_frames=NUM_FRAMES)
    done = [f"first {frames.shape[1]} frames of {path.name} ({info.width}x{info.height})"]
    scaled = _scaled_down(frames)
    if scaled is not frames:
        done.append(f"scaled to {scaled.shape[3]}x{scaled.shape[2]}")
    cut = _centre_cut(scaled)
    if cut.shape != scaled.shape:
        done.append("centre cut")
    done.append(_dimensions(cut))
    duration = float((timestamps[-1] - timestamps[0]) * info.time_base)
    fps = (len(timestamps) - 1) / duration if duration > 0 else float(info.fps or _FPS)
    return DemoClip(cut, timestamps, info.time_base, fps, path.name, ", ".join(done))


def _dimensions(frames: torch.Tensor) -> str:
    return f"{frames.shape[1]} frames of {frames.shape[3]}x{frames.shape[2]}"


def _scaled_down(frames: torch.Tensor) -> torch.Tensor:
    """Returns frames whose shorter side is at most 96; smaller ones as they are."""
    height, width = frames.shape[2:]
    scale = min(HEIGHT, WIDTH) / min(height, width)
    if scale >= 1:
        return frames
    size = (round(height * scale), round(width * scale))
    scaled = [
        F.interpolate(
            frame[None].float(), size=size, mode="bilinear", antialias=True, align_corners=False
        )
        for frame in frames.unbind(1)
    ]
    return torch.cat(scaled).transpose(0, 1).round().clamp(0, 255).to(torch.uint8)


def _centre_cut(frames: torch.Tensor) -> torch.Tensor:
    """Returns the middle of the frames, sides multiples of 8 and at most 128."""
    longest = max(HEIGHT, WIDTH)
    height, width = (min(side, longest) // _MULTIPLE * _MULTIPLE for side in frames.shape[2:])
    if height == 0 or width == 0:
        raise ValueError(
            f"demo: video must be at least {_MULTIPLE}x{_MULTIPLE} pixels, got "
            f"{frames.shape[3]}x{frames.shape[2]}"
        )
    top, left = (frames.shape[2] - height) // 2, (frames.shape[3] - width) // 2
    return frames[:, :, top : top + height, left : left + width]
