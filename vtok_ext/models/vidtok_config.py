"""VidTokConfig, and the configurations of all released VidTok models and the paper's ablations.

Names say regularizer, causality, factors of time, height and width, latent channels or codes, and
the version of the release where it is not 1.0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vtok_ext.layers.lfq import MAX_BITS
from vtok_ext.layers.norm_act import NORM_TYPES
from vtok_ext.layers.temporal_resample import INTERPOLATIONS
from vtok_ext.layers.vq import CODEBOOKS
from vtok_ext.models._config import ModelConfig
from vtok_ext.ops.fsq import MAX_LEVELS

ARCHITECTURES = ("vidtok", "full_3d", "without_blender", "without_3d")


@dataclass(frozen=True)
class VidTokConfig(ModelConfig):
    """Configuration of VidTok; ch * ch_mult[l] channels at level l, level 0 at full resolution.

    Attributes:
        regularizer: "kl", "fsq", "lfq" or "vq".
        z_channels: latent channels (KL, LFQ with 2^z_channels codes, VQ).
        levels: values per latent channel (FSQ); prod(levels) codes.
        codebook_size, codebook, restart_dead: VQ's vectors, how they learn ("gradient" or "ema"),
            and whether unused ones are moved.
        ch, ch_mult, num_res_blocks: width, width multiplier per level, block pairs per level.
        spatial_ds, spatial_us: levels whose down or up step halves or doubles H and W; default all.
        tempo_ds, tempo_us: those that change the frame rate as well; default two in the middle.
        norm_type: "layernorm" or "groupnorm".
        causal: whether a latent depends on its own and earlier frames only.
        version: "1.0" or "1.1": whether zeros or copies of the first frame precede a clip in every
            causal convolution. Weights of both have the same names and shapes.
        interpolation: of the decoder in time, "nearest", or "linear" (1.1 only).
        architecture: "vidtok", or one of the paper's ablations, causal and 1.0 only: "full_3d",
            "without_blender", "without_3d"; see `vidtok_ablations`.
        entropy_weight, entropy_annealing_steps, entropy_annealing_factor, commitment_weight: the
            auxiliary loss of FSQ and LFQ, the last one that of VQ too.
    """

    regularizer: str
    z_channels: int | None = None
    levels: tuple[int, ...] = ()
    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    spatial_ds: tuple[int, ...] | None = None
    spatial_us: tuple[int, ...] | None = None
    tempo_ds: tuple[int, ...] | None = None
    tempo_us: tuple[int, ...] | None = None
    in_channels: int = 3
    out_ch: int = 3
    norm_type: str = "layernorm"
    entropy_weight: float = 0.1
    entropy_annealing_steps: int = 2000
    entropy_annealing_factor: float = 3.0
    commitment_weight: float = 0.25
    causal: bool = True
    version: str = "1.0"
    interpolation: str = "nearest"
    architecture: str = "vidtok"
    codebook_size: int | None = None
    codebook: str = "gradient"
    restart_dead: bool = False

    def __post_init__(self) -> None:
        """Checks every field."""
        self._require_choice("regularizer", ("kl", "fsq", "lfq", "vq"))
        self._require_choice("norm_type", NORM_TYPES)
        self._require_choice("causal", (True, False))
        self._require_choice("version", ("1.0", "1.1") if self.causal else ("1.0",))
        linear = self.version == "1.1"
        self._require_choice("interpolation", INTERPOLATIONS if linear else ("nearest",))
        published = self.causal and self.version == "1.0"
        self._require_choice("architecture", ARCHITECTURES if published else ARCHITECTURES[:1])
        for name in ("ch", "num_res_blocks", "in_channels", "out_ch"):
            self._require_int(name, 1)
        self._require_ints("ch_mult", 1, 1024, empty=False)
        self._check_regularizer()
        for name in ("entropy_weight", "entropy_annealing_factor", "commitment_weight"):
            self._require_number(name, 0.0)
        self._require_int("entropy_annealing_steps", 0)
        self._check_resampling()

    def _check_regularizer(self) -> None:
        kind = self.regularizer
        if kind == "fsq":
            self._require_ints("levels", 2, MAX_LEVELS, empty=False)
            if self.z_channels not in (None, len(self.levels)):
                raise self._error("z_channels", f"{len(self.levels)}, the number of levels")
        else:
            self._require_int("z_channels", 1)
            if self.levels != ():
                raise self._error("levels", f"empty for {kind}")
        if kind == "lfq" and not 1 <= (self.z_channels or 0) <= MAX_BITS:
            raise self._error("z_channels", f"in 1..{MAX_BITS} for lfq")
        if kind == "vq":
            self._require_int("codebook_size", 1)
        elif self.codebook_size is not None:
            raise self._error("codebook_size", f"None for {kind}")
        self._require_choice("codebook", CODEBOOKS)
        self._require_choice("restart_dead", (True, False))

    def _check_resampling(self) -> None:
        for name in ("spatial_ds", "spatial_us", "tempo_ds", "tempo_us"):
            if getattr(self, name) is not None:
                self._require_ints(name, 0, len(self.ch_mult) - 1, empty=True)
        for down, up in (("spatial_ds", "spatial_us"), ("tempo_ds", "tempo_us")):
            if len(self.steps(down)) != len(self.steps(up)):
                raise self._error(up, f"as many levels as {down} {self.steps(down)}")
        for time, space in (("tempo_ds", "spatial_ds"), ("tempo_us", "spatial_us")):
            if not set(self.steps(time)) <= set(self.steps(space)):
                raise self._error(time, f"among {space} {self.steps(space)}")

    def steps(self, name: str) -> tuple[int, ...]:
        """Returns the levels of `spatial_ds`, `tempo_us`, ..., its default when it is None."""
        if getattr(self, name) is not None:
            return tuple(sorted(set(getattr(self, name))))
        top = len(self.ch_mult) - 1
        if name.startswith("spatial"):
            return tuple(range(top)) if name == "spatial_ds" else tuple(range(1, top + 1))
        middle = (top - 2, top - 1) if name == "tempo_ds" else (1, 2)
        space = self.steps(name.replace("tempo", "spatial"))
        return tuple(level for level in middle if level in space)

    @property
    def is_discrete(self) -> bool:
        """Whether the latent is quantised."""
        return self.regularizer != "kl"

    @property
    def time_options(self) -> dict[str, Any]:
        """Options of every layer that looks across time."""
        return {
            "temporal": "replicate" if self.version == "1.1" else "zeros",
            "causal": self.causal,
        }

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels per level."""
        return tuple(self.ch * mult for mult in self.ch_mult)

    @property
    def latent_channels(self) -> int:
        """Channels of the latent."""
        return self.z_channels or len(self.levels)

    @property
    def raw_channels(self) -> int:
        """Channels of the encoder's output: mean and log variance for KL."""
        return self.latent_channels * (2 if self.regularizer == "kl" else 1)


_DEEP = (1, 2, 4, 4, 4)  # one level more: 16x16 pixels per latent position
_V1_1: dict[str, Any] = {"version": "1.1", "interpolation": "linear"}
_288: dict[str, Any] = {"tempo_ds": (1,), "tempo_us": (2,)}
_888: dict[str, Any] = {"tempo_ds": (0, 1, 2), "tempo_us": (1, 2, 3)}
PRESETS = {
    "vidtok_kl_causal_488_4chn": VidTokConfig("kl", 4),
    "vidtok_kl_causal_488_8chn": VidTokConfig("kl", 8),
    "vidtok_kl_causal_488_16chn": VidTokConfig("kl", 16),
    "vidtok_kl_causal_288_8chn": VidTokConfig("kl", 8, **_288),
    "vidtok_kl_causal_444_4chn": VidTokConfig("kl", 4, spatial_ds=(1, 2), spatial_us=(1, 2)),
    "vidtok_kl_causal_41616_4chn": VidTokConfig("kl", 4, ch_mult=_DEEP),
    "vidtok_kl_noncausal_488_4chn": VidTokConfig("kl", 4, causal=False),
    "vidtok_kl_noncausal_488_16chn": VidTokConfig("kl", 16, causal=False),
    "vidtok_kl_noncausal_41616_4chn": VidTokConfig("kl", 4, ch_mult=_DEEP, causal=False),
    "vidtok_kl_noncausal_41616_16chn": VidTokConfig("kl", 16, ch_mult=_DEEP, causal=False),
    "vidtok_fsq_causal_488_262144": VidTokConfig("fsq", levels=(8,) * 6),
    "vidtok_fsq_causal_488_32768": VidTokConfig("fsq", levels=(8,) * 5),
    "vidtok_fsq_causal_488_4096": VidTokConfig("fsq", levels=(8,) * 4),
    "vidtok_fsq_causal_41616_262144": VidTokConfig("fsq", levels=(8,) * 6, ch_mult=_DEEP),
    "vidtok_fsq_noncausal_488_262144": VidTokConfig("fsq", levels=(8,) * 6, causal=False),
    "vidtok_fsq_noncausal_41616_262144": VidTokConfig(
        "fsq", levels=(8,) * 6, ch_mult=_DEEP, causal=False
    ),
    "vidtok_kl_causal_488_4chn_v1_1": VidTokConfig("kl", 4, **_V1_1),
    "vidtok_kl_causal_488_16chn_v1_1": VidTokConfig("kl", 16, **_V1_1),
    "vidtok_kl_causal_41616_16chn_v1_1": VidTokConfig("kl", 16, ch_mult=_DEEP, **_V1_1),
    "vidtok_kl_causal_288_8chn_v1_1": VidTokConfig("kl", 8, **_288, **_V1_1),
    "vidtok_fsq_causal_488_32768_v1_1": VidTokConfig("fsq", levels=(8,) * 5, **_V1_1),
    "vidtok_fsq_causal_888_32768_v1_1": VidTokConfig("fsq", levels=(8,) * 5, **_888, **_V1_1),
    "vidtok_fsq_causal_41616_262144_v1_1": VidTokConfig(
        "fsq", levels=(8,) * 6, ch_mult=_DEEP, **_V1_1
    ),
    **{
        f"vidtok_kl_causal_488_4chn_{name}": VidTokConfig("kl", 4, architecture=name)
        for name in ARCHITECTURES[1:]
    },
}
