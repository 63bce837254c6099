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
