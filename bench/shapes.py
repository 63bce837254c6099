"""The shapes that the four systems really use; every benchmark takes its sizes from here.

A GPU also gets batches that fill it: the smaller shapes lie in its cache and end before it has
started up.
"""

import os
from dataclasses import dataclass
from typing import TypeVar

import torch

IS_CUDA = os.environ.get("VTOK_BENCH_DEVICE", "cuda" * torch.cuda.is_available()) == "cuda"
S = TypeVar("S")


def only_on_gpu(*shapes: S) -> list[S]:
    """The shapes where the benchmarks run on a GPU, none elsewhere."""
    return list(shapes) if IS_CUDA else []


@dataclass(frozen=True)
class LatentShape:
    """A latent before quantization: [B, C, T, H, W] ("planar") or [N, C] ("packed")."""

    name: str
    shape: tuple[int, ...]
    channel_dim: int
    levels: tuple[int, ...]


# VidTok 488, 17 frames: one 256x256 clip, a training batch of 8, and the 2^18 codebook as tokens x
# channels.
FSQ_SHAPES = [
    LatentShape("VidTok 488, 1 clip 17x256x256", (1, 6, 5, 32, 32), 1, (8,) * 6),
    LatentShape("VidTok 488, 64 clips 17x256x256", (64, 6, 5, 32, 32), 1, (8,) * 6),
    LatentShape("planar, 15.7 MB", (4, 6, 40, 64, 64), 1, (8,) * 6),
    LatentShape("packed, 15.7 MB", (655_360, 6), -1, (8,) * 6),
    LatentShape("packed, 5 channels, 13.1 MB", (655_360, 5), -1, (8, 8, 8, 6, 5)),
] + only_on_gpu(
    LatentShape("planar, 252 MB", (64, 6, 40, 64, 64), 1, (8,) * 6),
    LatentShape("packed, 252 MB", (10_485_760, 6), -1, (8,) * 6),
)


@dataclass(frozen=True)
class EntropyShape:
    """Tokens [N, D] before quantization; `spread` is their standard deviation."""

    name: str
    num_tokens: int
    levels: tuple[int, ...]
    spread: float


# VidTok 488, one clip of 17x256x256, with 2^15 and 2^18 codes. Tokens of spread 1 mostly know their
# code; with spread 0.02 they do not, which is the most expensive case of the clamp.
ENTROPY_SHAPES = [
    EntropyShape("5,120 tokens, 8^5", 5120, (8,) * 5, 1.0),
    EntropyShape("5,120 undecided tokens, 8^5", 5120, (8,) * 5, 0.02),
    EntropyShape("5,120 tokens, 8^6", 5120, (8,) * 6, 1.0),
    EntropyShape("5,120 undecided tokens, 8^6", 5120, (8,) * 6, 0.02),
]


@dataclass(frozen=True)
class BlendShape:
    """Two tensors [B, C, T, H, W] in channels_last_3d memory, and the shape of their factor."""

    name: str
    shape: tuple[int, ...]
    factor: tuple[int, ...] = (1,)


# VidTok 488 on a clip of 17x128x128 (20 frames after padding): what its down and up steps blend.
BLEND_SHAPES = [
    BlendShape("VidTok 488 down, level 2", (1, 512, 5, 16, 16)),
    BlendShape("VidTok 488 down, level 1", (1, 256, 10, 32, 32)),
    BlendShape("VidTok 488 up, level 1", (1, 256, 20, 64, 64)),
    BlendShape("a factor per channel", (1, 256, 10, 32, 32), (256, 1, 1, 1)),
    BlendShape("a factor per item and frame", (4, 256, 5, 32, 32), (4, 1, 5, 1, 1)),
] + only_on_gpu(
    BlendShape("VidTok 488 up, level 1, 8 clips 17x256x256", (8, 256, 20, 128, 128)),
)


@dataclass(frozen=True)
class ResampleShape:
    """Frames [B, C, T, H, W] before resampling, and how: "down", "nearest" or "linear"."""

    name: str
    shape: tuple[int, ...]
    mode: str


RESAMPLE_SHAPES = [
    ResampleShape("VidTok 488 down, level 1", (1, 256, 20, 32, 32), "down"),
    ResampleShape("VidTok 488 down, level 2", (1, 512, 10, 16, 16), "down"),
    ResampleShape("VidTok 488 up, level 2, nearest", (1, 512, 5, 32, 32), "nearest"),
    ResampleShape("VidTok 488 up, level 1, nearest", (1, 256, 10, 64, 64), "nearest"),
    ResampleShape("VidTok 488 up, level 1, linear", (1, 256, 10, 64, 64), "linear"),
] + only_on_gpu(
    ResampleShape("VidTok 488 down, level 1, 8 clips 17x256x256", (8, 256, 20, 64, 64), "down"),
    ResampleShape("VidTok 488 up, level 1, 8 clips, nearest", (8, 256, 10, 128, 128), "nearest"),
    ResampleShape("VidTok 488 up, level 1, 8 clips, linear", (8, 256, 10, 128, 128), "linear"),
)


@dataclass(frozen=True)
class TriplaneShape:
    """Points of a batch and the planes that they look up: [B, 16, 16, C] and two [B, 32, 16, C]."""

    name: str
    batch: int
    num_points: int
    lattice: tuple[int, int, int] | None = None  # all t, x, y of a clip instead of random points
    rt: int = 32
    rxy: int = 16
    channels: int = 8


# CoordTok with 1,280 tokens: its two training steps, at one clip and at a batch for one GPU, and
# whole clips of 128 frames in 16 x 16 patches.
TRIPLANE_SHAPES = [
    TriplaneShape("CoordTok step 1, 1 clip, 1,024 points", 1, 1024),
    TriplaneShape("CoordTok step 1, 16 clips, 1,024 points", 16, 1024),
    TriplaneShape("CoordTok step 2, 4 clips, 4,096 points", 4, 4096),
    TriplaneShape("1 clip, 32,768 points", 1, 32_768),
    TriplaneShape("16 clips, 32,768 points", 16, 32_768),
    TriplaneShape("whole clip 128x16x16", 1, 32_768, (128, 16, 16)),
] + only_on_gpu(
    TriplaneShape("64 clips, 32,768 points", 64, 32_768),
    TriplaneShape("64 whole clips 128x16x16", 64, 32_768, (128, 16, 16)),
)


@dataclass(frozen=True)
class VideoShape:
    """An activation [B, C, T, H, W] in channels_last_3d memory."""

    name: str
    shape: tuple[int, int, int, int, int]


# VidTok 488: the widths 128, 256, 512, 512 at their resolutions, for clips 17x128x128 and
# 17x256x256; of the latter the two levels that hold most of the elements.
NORM_ACT_SHAPES = [
    VideoShape("128 x 17x128x128", (1, 128, 17, 128, 128)),
    VideoShape("256 x 17x64x64", (1, 256, 17, 64, 64)),
    VideoShape("512 x 9x32x32", (1, 512, 9, 32, 32)),
    VideoShape("512 x 5x16x16", (1, 512, 5, 16, 16)),
    VideoShape("128 x 17x256x256", (1, 128, 17, 256, 256)),
    VideoShape("256 x 17x128x128", (1, 256, 17, 128, 128)),
]


@dataclass(frozen=True)
class PoolShape:
    """Features [B, T, N, C] of T frames, Q queries, D outputs of the projection."""

    name: str
    batch: int
    frames: int
    places: int
    channels: int
    queries: int
    outputs: int


# VTok on 5 s at 6 tokens per second: its own encoders, and CLIP-L/336 (24x24 places); one frame of
# a stream.
POOL_SHAPES = [
    PoolShape("vtok_small, 1 clip of 30 frames", 1, 30, 64, 192, 4, 192),
    PoolShape("vtok_base, 8 clips of 30 frames", 8, 30, 256, 384, 4, 384),
    PoolShape("CLIP-L/336, 1 clip of 30 frames", 1, 30, 576, 1024, 4, 1024),
    PoolShape("CLIP-L/336, 1 streamed frame", 1, 1, 576, 1024, 4, 1024),
] + only_on_gpu(
    PoolShape("CLIP-L/336, 8 clips of 30 frames", 8, 30, 576, 1024, 4, 1024),
)
