"""CoordTokConfig, the released configurations and two smaller ones of our own.

Triples are in the order (t, x, y); x runs along the height, y along the width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from vtok_ext.models._config import ModelConfig

PADDING_MASKS = ("additive", "true")
UNPATCHIFY = ("grid", "square_root")
# Axes of the three planes, as positions in a triple.
PLANE_AXES = {"xy": (1, 2), "yt": (0, 2), "xt": (0, 1)}
_LARGEST = 1 << 20


@dataclass(frozen=True)
class CoordTokConfig(ModelConfig):
    """Configuration of CoordTok; triples are (t, x, y), all multiples of their patches.

    Attributes:
        video_shape: frames, height and width of the clip that the model describes.
        enc_embed_dim, enc_num_heads: width and heads of both encoder transformers.
        enc_num_layers, enc_patch_num_layers: layers of the query transformer and of the one that
            sees the video.
        enc_patch_size: frames, rows and columns per token of the video.
        latent_resolution: (Rt, Rx, Ry), cells of the planes along each axis.
        latent_channels: numbers per cell.
        latent_patch_size: cells per query token along each axis.
        dec_embed_dim, dec_num_layers, dec_num_heads: the decoder.
        dec_patch_size: frames, rows and columns that one point decodes to.
        padding_mask: "additive" adds 1 to every logit of a padded token, as the released weights
            were trained with (it favours padding); "true", also as a boolean, hides padded tokens
            everywhere.
        unpatchify: "grid" puts the query tokens of a plane on their own grid; "square_root" on a
            square one and reinterprets the result, as the reference does: the same for square
            grids, scrambled cells for others.
    """

    video_shape: tuple[int, ...] = (128, 128, 128)
    enc_embed_dim: int = 1024
    enc_num_layers: int = 24
    enc_num_heads: int = 16
    enc_patch_num_layers: int = 8
    enc_patch_size: tuple[int, ...] = (8, 16, 16)
    latent_resolution: tuple[int, ...] = (32, 16, 16)
    latent_channels: int = 8
    latent_patch_size: tuple[int, ...] = (16, 8, 8)
    dec_embed_dim: int = 1024
    dec_num_layers: int = 24
    dec_num_heads: int = 16
    dec_patch_size: tuple[int, ...] = (1, 8, 8)
    padding_mask: str = "additive"
    unpatchify: str = "grid"

    def __post_init__(self) -> None:
        """Checks every field."""
        if self.padding_mask is True:  # how YAML reads it
            object.__setattr__(self, "padding_mask", "true")
        counts = ("embed_dim", "num_layers", "num_heads")
        for name in (*(f"{part}_{count}" for part in ("enc", "dec") for count in counts),):
            self._require_int(name, 1)
        self._require_int("enc_patch_num_layers", 0)
        self._require_int("latent_channels", 1)
        for part in ("enc", "dec"):
            heads = getattr(self, f"{part}_num_heads")
            if getattr(self, f"{part}_embed_dim") % heads:
                raise self._error(f"{part}_embed_dim", f"a multiple of the {heads} heads")
        for name in ("video_shape", "latent_resolution"):
            self._require_triple(name)
        for name, whole in (
            ("enc_patch_size", "video_shape"),
            ("dec_patch_size", "video_shape"),
            ("latent_patch_size", "latent_resolution"),
        ):
            self._require_triple(name)
            sizes = getattr(self, whole)
            if any(size % part for size, part in zip(sizes, getattr(self, name), strict=True)):
                raise self._error(name, f"divisors of {whole} {sizes}")
        self._require_choice("padding_mask", PADDING_MASKS)
        self._require_choice("unpatchify", UNPATCHIFY)
        if self.unpatchify == "square_root":
            for plane in PLANE_AXES:
                rows, columns = self.query_grid(plane)
                if math.isqrt(rows * columns) ** 2 != rows * columns:
                    requirement = f"'grid' for {rows} x {columns} tokens of plane {plane}"
                    raise self._error("unpatchify", requirement)

    def _require_triple(self, name: str) -> None:
        self._require_ints(name, 1, _LARGEST, empty=False)
        if len(getattr(self, name)) != 3:
            raise self._error(name, "three integers (t, x, y)")

    def memory_grid(self) -> tuple[int, int, int]:
        """Returns the tokens of the video along t, x and y."""
        return self._ratio(self.video_shape, self.enc_patch_size)

    def point_grid(self) -> tuple[int, int, int]:
        """Returns the points that a whole clip is decoded from, along t, x and y."""
        return self._ratio(self.video_shape, self.dec_patch_size)

    def query_grid(self, plane: str) -> tuple[int, int]:
        """Returns rows and columns of the query tokens of a plane."""
        grid = self._ratio(self.latent_resolution, self.latent_patch_size)
        row, column = PLANE_AXES[plane]
        return grid[row], grid[column]

    def plane_shape(self, plane: str) -> tuple[int, int, int]:
        """Returns (rows, columns, C) of a plane."""
        row, column = PLANE_AXES[plane]
        return self.latent_resolution[row], self.latent_resolution[column], self.latent_channels

    def plane_patch(self, plane: str) -> tuple[int, int]:
        """Returns rows and columns of the cells of one query token."""
        row, column = PLANE_AXES[plane]
        return self.latent_patch_size[row], self.latent_patch_size[column]

    @property
    def num_tokens(self) -> int:
        """Cells of the three planes; publications call them tokens."""
        return sum(math.prod(self.plane_shape(plane)[:2]) for plane in PLANE_AXES)

    @staticmethod
    def _ratio(sizes: tuple[int, ...], parts: tuple[int, ...]) -> tuple[int, int, int]:
        t, x, y = (size // part for size, part in zip(sizes, parts, strict=True))
        return t, x, y


PRESETS = {
    # Released: 1,280 tokens, and 3,072.
    "coordtok_large_128": CoordTokConfig(),
    "coordtok_large_128_3072": CoordTokConfig(
        latent_resolution=(32, 32, 32), latent_patch_size=(16, 16, 16)
    ),
    # Our own sizes: nothing is published for them.
    "coordtok_base_128": CoordTokConfig(
        enc_embed_dim=768,
        enc_num_layers=12,
        enc_num_heads=12,
        enc_patch_num_layers=4,
        dec_embed_dim=768,
        dec_num_layers=12,
        dec_num_heads=12,
    ),
    "coordtok_small_128": CoordTokConfig(
        enc_embed_dim=384,
        enc_num_layers=8,
        enc_num_heads=6,
        enc_patch_num_layers=4,
        dec_embed_dim=384,
        dec_num_layers=8,
        dec_num_heads=6,
    ),
}
