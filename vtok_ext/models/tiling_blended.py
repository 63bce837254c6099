"""Overlapping tiles, each computed as a picture of its own and faded into its neighbours.

    y = sum over tiles of w * pass(tile),  w rising and falling linearly across the overlap

What most video autoencoders call tiling. Works for any model; not exact: near its border a tile
lacks its neighbours, attention sees the tile alone, and statistics over a frame are a tile's.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from vtok_ext.layers._state import State
from vtok_ext.models.tiling import Tile, below, continued_tile, with_tile

# (start, stop, (overlap before, length, overlap behind))
Range = tuple[int, int, tuple[int, int, int]]


class BlendedPass:
    """`encode_chunk` or `decode_chunk` in overlapping tiles; called like it.

    Args:
        compute: the method.
        scale: H and W of the output over those of the input.
        overlap: share of a tile that it has in common with the next one, in (0, 0.5].
        tile: (height, width) of a tile in the finer of input and output.
    """

    def __init__(
        self, compute: Callable[..., Any], scale: Fraction, overlap: float, tile: Tile
    ) -> None:
        self.compute, self.scale, self.overlap, self.tile = compute, scale, overlap, tile

    def __call__(self, x: Tensor, state: State | None = None, return_state: bool = False):
        """Returns about what the method does."""
        following: dict[str, Tensor] | None = {} if return_state else None
        continued = continued_tile(state, x)
        unit = self.scale.denominator

        def run(prefix: str, row: Range, column: Range) -> Tensor:
            part = x[:, :, :, row[0] * unit : row[1] * unit, column[0] * unit : column[1] * unit]
            previous = None if state is None else below(state, prefix)
            result = self.compute(part, previous, return_state)
            if following is None:
                return result
            following.update({prefix + name: value for name, value in result[1].items()})
            return result[0]

        tile = continued or self.tile
        y = self._blended((x.shape[3], x.shape[4]), tile, run)
        return y if following is None else (y, with_tile(following, tile, x[:, :, :0]))

    def rest(self, decode_rest: Callable[[State], Tensor | None], state: State) -> Tensor | None:
        """Returns the frames that wait in the states of all tiles, None if none can."""
        height, width, *size = state["tile"].shape[1:]
        if decode_rest(below(state, _prefix(0))) is None:
            return None

        def run(prefix: str, row: Range, column: Range) -> Tensor:
            part = decode_rest(below(state, prefix))
            assert part is not None  # the first one was not
            return part

        return self._blended((size[0], size[1]), (height, width), run)

    def _blended(
        self, size: Tile, tile: Tile, run: Callable[[str, Range, Range], Tensor]
    ) -> Tensor:
        """Returns the weighted sum of `run` over the tiles of an input of that (H, W)."""
        unit, fine = self.scale.denominator, self.scale.numerator
        rows, columns = (
            overlapping_ranges(extent // unit, limit // max(unit, fine), self.overlap)
            for extent, limit in zip(size, tile, strict=True)
        )
        y: Tensor | None = None
        for index, (row, column) in enumerate((r, c) for r in rows for c in columns):
            part = run(_prefix(index), row, column)
            for axis, parts in ((3, row[2]), (4, column[2])):
                weights = _ramp(*(fine * length for length in parts))
                shape = [1] * 5
                shape[axis] = -1
                part = part * weights.to(part).view(shape)
            if y is None:
                y = part.new_zeros((*part.shape[:3], rows[-1][1] * fine, columns[-1][1] * fine))
            top, left = row[0] * fine, column[0] * fine
            y[:, :, :, top : top + part.shape[3], left : left + part.shape[4]] += part
        assert y is not None  # there is at least one tile
        return y


def _prefix(index: int) -> str:
    """Returns what the names of a tile's states begin with."""
    return f"tile.{index}."


def overlapping_ranges(size: int, tile: int, overlap: float) -> list[Range]:
    """Returns ranges of `tile` that cover `size`, each sharing `overlap` of it with the next."""
    tile = min(size, max(2, tile))
    shared = min(tile - 1, max(1, round(tile * overlap)))
    starts = [0]
    while starts[-1] + tile < size:
        starts.append(starts[-1] + tile - shared)
    found = []
    for i, start in enumerate(starts):
        stop = min(size, start + tile)
        before, behind = shared * (i > 0), shared * (i < len(starts) - 1)
        found.append((start, stop, (before, stop - start, behind)))
    return found


def _ramp(before: int, length: int, behind: int) -> Tensor:
    """Returns weights that rise over `before` and fall over `behind` positions."""
    weights = torch.ones(length)
    weights[:before] = (torch.arange(before) + 0.5) / max(1, before)
    weights[length - behind :] = 1 - (torch.arange(behind) + 0.5) / max(1, behind)
    return weights
