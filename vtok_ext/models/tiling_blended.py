"""Overlapping tiles, each computed as a picture of its own and faded into its neighbours.

    y = sum over tiles of w * network(tile),  w rising and falling linearly across the overlap

What most video autoencoders call tiling. Works for any network; not exact: near its border a tile
lacks its neighbours, attention sees the tile alone, and statistics over a frame are a tile's.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor, nn

from vtok_ext.layers._state import State
from vtok_ext.models.tiling import Tile, below, continued_tile, with_tile

# (start, stop, (overlap before, length, overlap behind))
Range = tuple[int, int, tuple[int, int, int]]


class BlendedNetwork(nn.Module):
    """`network` in overlapping tiles; called like it, with its parameters under its names.

    Args:
        network: an encoder or decoder, `y = network(x)` or `y, state = network(x, state, True)`.
        scale: H and W of the output over those of the input.
        overlap: share of a tile that it has in common with the next one, in (0, 0.5].
        choose_tile: (B, T, H, W) of the input -> (height, width) of a tile in the finer of input
            and output.
    """

    is_exact = False

    def __init__(
        self,
        network: nn.Module,
        scale: Fraction,
        overlap: float,
        choose_tile: Callable[[tuple[int, int, int, int]], Tile],
    ) -> None:
        super().__init__()
        self.__dict__.update(network.__dict__)  # parameters, children, hooks
        self._compute = network.forward
        self.scale, self.overlap, self.choose_tile = scale, overlap, choose_tile

    def forward(self, x: Tensor, state: State | None = None, return_state: bool = False):
        """Returns about what the network does."""
        tile = continued_tile(state, x) or self.choose_tile((x.shape[0], *x.shape[2:]))
        rows, columns = (
            overlapping_ranges(size // self.unit, limit // max(self.unit, self.fine), self.overlap)
            for size, limit in zip(x.shape[3:], tile, strict=True)
        )
        following: dict[str, Tensor] | None = {} if return_state else None
        y: Tensor | None = None
        for index, (row, column) in enumerate((r, c) for r in rows for c in columns):
            prefix = f"tile.{index}."
            part, collected = self._tile(x, row, column, state, prefix, return_state)
            if following is not None:
                following.update({prefix + name: value for name, value in collected.items()})
            if y is None:
                size = (rows[-1][1] * self.fine, columns[-1][1] * self.fine)
                y = part.new_zeros((*part.shape[:3], *size))
                y = y.contiguous(memory_format=torch.channels_last_3d)
            top, left = row[0] * self.fine, column[0] * self.fine
            y[:, :, :, top : top + part.shape[3], left : left + part.shape[4]] += part
        assert y is not None  # there is at least one tile
        return y if following is None else (y, with_tile(following, tile, x[:, :, :0]))

    @property
    def unit(self) -> int:
        """Input positions per unit of the common grid."""
        return self.scale.denominator

    @property
    def fine(self) -> int:
        """Output positions per unit of the common grid."""
        return self.scale.numerator

    def _tile(self, x: Tensor, row: Range, column: Range, state, prefix: str, return_state: bool):
        """Returns the weighted output of a tile, and its state."""
        part = x[
            *(slice(None),) * 3,
            row[0] * self.unit : row[1] * self.unit,
            column[0] * self.unit : column[1] * self.unit,
        ]
        previous = None if state is None else below(state, prefix)
        result = self._compute(part, previous, return_state)
        part, collected = result if return_state else (result, {})
        for axis, (before, length, behind) in ((3, row[2]), (4, column[2])):
            weights = _ramp(before * self.fine, length * self.fine, behind * self.fine)
            shape = [1] * 5
            shape[axis] = -1
            part = part * weights.to(part).view(shape)
        return part, collected


def overlapping_ranges(size: int, tile: int, overlap: float) -> list[Range]:
    """Returns (start, stop, (overlap before, length, overlap behind)) that cover `size`."""
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
