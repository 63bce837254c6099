"""The shapes that the four systems really use; every benchmark takes its sizes from here."""

from dataclasses import dataclass


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
]
