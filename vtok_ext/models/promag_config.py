"""ProMAGConfig; the base, directly trained counterparts of grown models, and an image model.

Widths and block counts of ProMAG are not public. Ours: base width 128, multipliers (1, 2, 2, 4),
two residual blocks per level, the frame rate halved at the two deepest of the three steps down,
zeros in front of a clip, nearest repetition before the convolution of a step up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from vtok_ext.models._config import ModelConfig

# At the full width groups have 4 to 16 channels in 32 groups; narrower layers keep 4.
_MOST_GROUPS = 32
_FEWEST_CHANNELS = 4


@dataclass(frozen=True)
class ProMAGConfig(ModelConfig):
    """Configuration of ProMAG's base; ch * ch_mult[l] channels at level l.

    Attributes:
        z_channels: latent channels.
        ch, ch_mult, num_res_blocks: width, width multiplier per level, residual blocks per level.
        time_levels: how many of the deepest steps between levels halve the frame rate.
        extra_halvings: halvings of the frame rate alone, each behind a residual block, at the
            lowest resolution: what growing adds, trained from the start. The baseline of studies.
        subtract_mean: whether group norms subtract the mean (MAGVIT-v2) or not (ProMAG).
        is_image: frames are coded one by one by 2-D kernels; `ProMAG.inflate` makes a video model.
        freeze_image_encoder: whether what an inflated encoder took from an image model stays.
    """

    z_channels: int = 8
    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 2, 4)
    num_res_blocks: int = 2
    time_levels: int = 2
    extra_halvings: int = 0
    subtract_mean: bool = False
    is_image: bool = False
    freeze_image_encoder: bool = False

    def __post_init__(self) -> None:
        """Checks every field."""
        for name in ("z_channels", "ch", "num_res_blocks"):
            self._require_int(name, 1)
        self._require_ints("ch_mult", 1, 1024, empty=False)
        self._require_int("time_levels", 0)
        self._require_int("extra_halvings", 0)
        for name in ("subtract_mean", "is_image", "freeze_image_encoder"):
            self._require_choice(name, (True, False))
        if self.time_levels > len(self.ch_mult) - 1:
            raise self._error("time_levels", f"at most {len(self.ch_mult) - 1}, the steps down")
        if self.is_image and (self.time_levels or self.extra_halvings):
            raise self._error("is_image", "False for a model that changes the frame rate")

    @property
    def regularizer(self) -> str:
        """Kind of latent, for tables."""
        return "kl"

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels per level."""
        return tuple(self.ch * mult for mult in self.ch_mult)

    @property
    def kernel_frames(self) -> int:
        """Frames of a kernel."""
        return 1 if self.is_image else 3

    @property
    def temporal_factor(self) -> int:
        """Frames per latent frame."""
        return 2 ** (self.time_levels + self.extra_halvings)

    def time_stride(self, step: int) -> int:
        """Returns the change of the frame rate between levels `step` and `step + 1`."""
        return 2 if step >= len(self.ch_mult) - 1 - self.time_levels else 1


def num_groups(channels: int) -> int:
    """Returns the groups of a norm: 32, fewer where a group would have under 4 channels."""
    return math.gcd(math.gcd(_MOST_GROUPS, max(1, channels // _FEWEST_CHANNELS)), channels)


PRESETS = {
    "promag_base_4x8x8": ProMAGConfig(),
    "promag_base_4x8x8_16chn": ProMAGConfig(z_channels=16),
    "promag_direct_8x8x8": ProMAGConfig(extra_halvings=1),
    "promag_direct_16x8x8": ProMAGConfig(extra_halvings=2),
    "promag_image_8x8": ProMAGConfig(time_levels=0, is_image=True),
}
