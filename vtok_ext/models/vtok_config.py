"""VTokConfig and the presets; beyond S = 16 and 6 tokens per second nothing is published."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vtok_ext.models._config import ModelConfig
from vtok_ext.ops.residual_pool import MAX_POOLED, MAX_QUERIES

ENCODERS = ("vit", "huggingface")
RESIDUAL_POOLS = ("mean", "attention", "grid")
KEY_FRAMES = ("first", "auto")
# Places per side of the pooled difference in the "grid" pool, as in the key frame's 16 tokens.
RESIDUAL_GRID = 4


@dataclass(frozen=True)
class VTokConfig(ModelConfig):
    """Configuration of VTok.

    Attributes:
        encoder: "vit", the small one of this package; or "huggingface".
        encoder_source: folder or hub id of a Hugging Face vision tower; read when
            `encoder_config` is empty.
        encoder_config: JSON of that tower's configuration; a saved model has it, so that loading
            needs no second source.
        encoder_layer: which hidden state of that tower is taken, counted as transformers does; -1
            is its output, -2 what LLaVA takes of CLIP.
        image_size: frames are resized to this before they are encoded, in pixels; a tower's own
            takes its place.
        encoder_patch, encoder_dim, encoder_depth, encoder_heads: the small ViT, not read for a
            tower, whose own width takes the place of `encoder_dim`.
        key_tokens: S, a square number: tokens of a key frame.
        token_dim: D, numbers per token of a continuous model.
        residual_pool: what makes one token of a difference of feature maps: "mean", the paper's;
            "attention", learned queries; "grid", the 4x4 pooled difference.
        num_queries: of the attention pool.
        motion_tokens_per_second: residual tokens per second of video.
        stride: frames per residual token instead, 0 for none.
        default_fps: frames per second of a video whose rate is not given.
        key_frame: "first", or "auto" for the frame nearest to the mean of its segment.
        cut_threshold: mean change of a frame, in [0, 2], from which on a new segment begins; 0 for
            one segment.
        levels: of FSQ; empty for a continuous model.
        decoder_dim, decoder_depth, decoder_heads: the reconstruction decoder.
        decoder_patch: frames, rows and columns per token of the video.
        sampling_steps: of the decoder's flow.
    """

    encoder: str = "vit"
    encoder_source: str = ""
    encoder_config: str = ""
    encoder_layer: int = -1
    image_size: int = 128
    encoder_patch: int = 8
    encoder_dim: int = 384
    encoder_depth: int = 8
    encoder_heads: int = 6
    key_tokens: int = 16
    token_dim: int = 384
    residual_pool: str = "grid"
    num_queries: int = 4
    motion_tokens_per_second: float = 6.0
    stride: int = 0
    default_fps: float = 24.0
    key_frame: str = "first"
    cut_threshold: float = 0.0
    levels: tuple[int, ...] = ()
    decoder_dim: int = 384
    decoder_depth: int = 8
    decoder_heads: int = 6
    decoder_patch: tuple[int, ...] = (2, 8, 8)
    sampling_steps: int = 8

    def __post_init__(self) -> None:
        """Checks every field."""
        for name in (
            *("image_size", "encoder_patch", "encoder_dim", "encoder_depth", "encoder_heads"),
            *("key_tokens", "token_dim", "num_queries", "sampling_steps"),
            *("decoder_dim", "decoder_depth", "decoder_heads"),
        ):
            self._require_int(name, 1)
        self._require_int("stride", 0)
        self._require_choice("encoder", ENCODERS)
        self._require_choice("residual_pool", RESIDUAL_POOLS)
        self._require_choice("key_frame", KEY_FRAMES)
        for name in ("encoder_source", "encoder_config"):
            if not isinstance(getattr(self, name), str):
                raise self._error(name, "a string")
        if self.encoder == "huggingface" and not (self.encoder_source or self.encoder_config):
            raise self._error("encoder_source", "given for encoder 'huggingface'")
        if not isinstance(self.encoder_layer, int) or isinstance(self.encoder_layer, bool):
            raise self._error("encoder_layer", "an integer")
        if self.encoder == "vit":
            if self.encoder_layer != -1:
                raise self._error("encoder_layer", "-1 for encoder 'vit'")
            self._require_multiple("encoder_dim", self.encoder_heads, "encoder_heads")
            # Sine-cosine positions: a pair of numbers per frequency and axis.
            self._require_multiple("encoder_dim", 4, "sine and cosine along two axes")
            self._require_multiple("image_size", self.encoder_patch, "encoder_patch")
        if self.residual_pool == "attention" and not (
            self.num_queries <= MAX_QUERIES and self.num_queries * self.encoder_dim <= MAX_POOLED
        ):
            raise self._error(
                "num_queries",
                f"at most {MAX_QUERIES} and {MAX_POOLED} / encoder_dim ({self.encoder_dim}), the "
                "limits of residual_pool",
            )
        self._require_multiple("decoder_dim", self.decoder_heads, "decoder_heads")
        self._require_multiple("decoder_dim", 2, "sine and cosine")
        if math.isqrt(self.key_tokens) ** 2 != self.key_tokens:
            raise self._error("key_tokens", "a square number")
        for name in ("motion_tokens_per_second", "default_fps"):
            self._require_number(name, 0)
            if not getattr(self, name) > 0:
                raise self._error(name, "positive")
        self._require_number("cut_threshold", 0)
        if self.levels != ():
            self._require_ints("levels", 2, 256, empty=True)
        self._require_ints("decoder_patch", 1, 64, empty=False)
        if len(self.decoder_patch) != 3:
            raise self._error("decoder_patch", "three integers (frames, rows, columns)")

    def _require_multiple(self, name: str, of: int, why: str) -> None:
        if getattr(self, name) % of:
            raise self._error(name, f"a multiple of {of} ({why})")

    @property
    def is_discrete(self) -> bool:
        """Whether tokens are quantised."""
        return bool(self.levels)

    @property
    def regularizer(self) -> str:
        """What tables call the kind of latent."""
        return "fsq" if self.levels else "tokens"

    @property
    def latent_dim(self) -> int:
        """Numbers per token of the latent: D, or those that FSQ rounds."""
        return len(self.levels) if self.levels else self.token_dim

    @property
    def key_grid(self) -> int:
        """Key tokens per side."""
        return math.isqrt(self.key_tokens)


_SMALL = VTokConfig(
    image_size=64,
    encoder_dim=192,
    encoder_depth=6,
    encoder_heads=3,
    token_dim=192,
    decoder_dim=192,
    decoder_depth=6,
    decoder_heads=3,
)
# Codebook of 64,000: the published suggestion of FSQ for 2^16.
_FSQ_LEVELS = (8, 8, 8, 5, 5, 5)
PRESETS = {
    "vtok_base": VTokConfig(),
    "vtok_base_fsq": VTokConfig(levels=_FSQ_LEVELS),
    "vtok_small": _SMALL,
    "vtok_small_fsq": _SMALL.replace(levels=_FSQ_LEVELS),
}
