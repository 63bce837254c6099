"""SiTConfig and the sizes S, B, L and XL with patches of 2, 4 and 8."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vtok_ext.models._config import ModelConfig
from vtok_ext.models.coordtok_config import PLANE_AXES
from vtok_ext.models.transport import PATHS, PREDICTIONS

LATENTS = ("triplane", "grid")
_LARGEST = 1 << 20
GRID = "grid"  # name of the only part of a latent grid, beside those of the planes


@dataclass(frozen=True)
class SiTConfig(ModelConfig):
    """Configuration of a SiT.

    Attributes:
        latent: "triplane", planes xy, yt, xt as CoordTok's; or "grid", [B, C, t, h, w] as VidTok's.
        input_size: (Rt, Rx, Ry) of the planes, or (t, h, w) of the grid.
        in_channels: C of the latent.
        patch_size: cells per token along every axis of a plane, or along h and w of a grid.
        temporal_patch_size: cells per token along t of a grid.
        hidden_size, depth, num_heads: of the transformer.
        num_classes: labels 0 .. num_classes - 1; 1 for an unconditional model.
        class_dropout: share of labels that training replaces by "none", which makes guidance
            possible; with 0 there is no "none".
        learn_sigma: twice as many outputs, of which the second half is unused, as in the released
            weights.
        path, prediction: what the weights were trained for; see `Transport`.
    """

    latent: str = "triplane"
    input_size: tuple[int, ...] = (32, 16, 16)
    in_channels: int = 8
    patch_size: int = 2
    temporal_patch_size: int = 1
    hidden_size: int = 1024
    depth: int = 24
    num_heads: int = 16
    num_classes: int = 1
    class_dropout: float = 0.0
    learn_sigma: bool = True
    path: str = "linear"
    prediction: str = "velocity"

    def __post_init__(self) -> None:
        """Checks every field."""
        for name, choices in (("latent", LATENTS), ("path", PATHS), ("prediction", PREDICTIONS)):
            self._require_choice(name, choices)
        for name in ("in_channels", "patch_size", "temporal_patch_size", "hidden_size", "depth"):
            self._require_int(name, 1)
        self._require_int("num_heads", 1)
        self._require_int("num_classes", 1)
        self._require_choice("learn_sigma", (True, False))
        self._require_number("class_dropout", 0.0)
        if not self.class_dropout < 1:
            raise self._error("class_dropout", "below 1")
        self._require_ints("input_size", 1, _LARGEST, empty=False)
        if len(self.input_size) != 3:
            raise self._error("input_size", "three integers (t, x, y)")
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise self._error("hidden_size", f"a multiple of 4 and of the {self.num_heads} heads")
        if self.latent == "triplane" and self.temporal_patch_size != 1:
            raise self._error("temporal_patch_size", "1 for planes, whose patches are square")
        for size, patch in zip(self.input_size, self._patches(), strict=True):
            if size % patch:
                raise self._error("input_size", f"multiples of the patches {self._patches()}")

    def _patches(self) -> tuple[int, int, int]:
        p = self.patch_size
        return (p if self.latent == "triplane" else self.temporal_patch_size), p, p

    def parts(self) -> tuple[str, ...]:
        """Returns the names of the parts of a latent, in the order of their tokens."""
        return tuple(PLANE_AXES) if self.latent == "triplane" else (GRID,)

    def part_size(self, part: str) -> tuple[int, ...]:
        """Returns (rows, columns) of a plane, or (t, h, w)."""
        if self.latent == "grid":
            return self.input_size
        return tuple(self.input_size[axis] for axis in PLANE_AXES[part])

    def part_patch(self, part: str) -> tuple[int, ...]:
        """Returns the cells of a token along each axis of a part."""
        return self._patches() if self.latent == "grid" else (self.patch_size,) * 2

    def part_grid(self, part: str) -> tuple[int, ...]:
        """Returns the tokens of a part along each of its axes."""
        pairs = zip(self.part_size(part), self.part_patch(part), strict=True)
        return tuple(size // patch for size, patch in pairs)

    @property
    def has_none(self) -> bool:
        """Whether there is a label "none" for guidance."""
        return self.class_dropout > 0


def square_input_size(
    patch_size: int, num_tokens_xy: int, num_positions_t: int
) -> tuple[int, int, int] | None:
    """Returns the `input_size` of planes with Rx = Ry that have so many tokens of plane xy and
    positions of yt and xt; None of no such planes."""
    side = math.isqrt(num_tokens_xy)
    if side == 0 or side**2 != num_tokens_xy or num_positions_t % side:
        return None
    return num_positions_t // side * patch_size, side * patch_size, side * patch_size


_SIZES = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "xl": (1152, 28, 16)}
# Planes of the released CoordTok of 1,280 tokens; "sit_l_2" is the released generator.
SIT_PRESETS = {
    f"sit_{size}_{patch}": SiTConfig(
        patch_size=patch, hidden_size=width, depth=depth, num_heads=heads
    )
    for size, (width, depth, heads) in _SIZES.items()
    for patch in (2, 4, 8)
}
