"""Exact spatial tiling inside each layer, for networks whose norms look at whole frames.

    convolution   every tile with a border of its neighbours' values, kernel / 2 wide
    group norm    sums of squares of all tiles are added before any tile is divided
    else          tile by tile

A network tiled as a whole would normalise every tile by itself: seams. Here nothing differs from
the whole picture but the order of sums. The tiles of one layer exist together, on `storage`;
the device of the weights holds one tile with its border at a time. Source: ProMAG (arXiv
2501.05442), layer-wise spatial tiling.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok_ext.layers import CausalConv3d, GroupNormAct
from vtok_ext.layers._state import State
from vtok_ext.layers.causal_conv3d import is_plain
from vtok_ext.layers.volume import RepeatFrames, VolumeDown
from vtok_ext.models.grid import GridTokenizer
from vtok_ext.models.tiling import check_tile


class Tiles:
    """A video tensor [B, C, T, H, W] in tiles that stand in for it in the code of networks.

    Args:
        tiles: rows of tiles.
        compute: device on which tiles are worked on.
        storage: device on which they are kept.
    """

    def __init__(
        self, tiles: list[list[Tensor]], compute: torch.device, storage: torch.device
    ) -> None:
        self.tiles = [[tile.to(storage) for tile in row] for row in tiles]
        self.compute, self.storage = compute, storage
        self.rows = _bounds([row[0].shape[3] for row in tiles])
        self.columns = _bounds([tile.shape[4] for tile in tiles[0]])

    @classmethod
    def split(
        cls, x: Tensor, height: int, width: int, compute: torch.device, storage: torch.device
    ) -> Tiles:
        """Returns x in tiles of that size, smaller at the bottom and the right."""
        rows = [list(row.split(width, 4)) for row in x.split(height, 3)]
        return cls(rows, compute, storage)

    def join(self) -> Tensor:
        """Returns the whole tensor on the storage device."""
        return torch.cat([torch.cat(row, 4) for row in self.tiles], 3)

    def map(self, function: Callable[..., Tensor], *others: Any) -> Tiles:
        """Returns what `function` makes of each tile, and of the same tile of `others`."""
        found = [
            [
                function(tile.to(self.compute), *(o.tiles[i][j].to(self.compute) for o in others))
                for j, tile in enumerate(row)
            ]
            for i, row in enumerate(self.tiles)
        ]
        return Tiles(found, self.compute, self.storage)

    def window(self, top: int, bottom: int, left: int, right: int) -> Tensor:
        """Returns rows and columns of the whole, zeros where it ends, on the computing device."""
        height, width = self.rows[-1], self.columns[-1]
        inside = (max(0, top), min(bottom, height), max(0, left), min(right, width))
        bands = []
        for i, row in enumerate(self.tiles):
            upper, lower = _overlap(self.rows, i, inside[0], inside[1])
            if upper < lower:
                parts = []
                for j, tile in enumerate(row):
                    begin, end = _overlap(self.columns, j, inside[2], inside[3])
                    if begin < end:
                        parts.append(tile[:, :, :, upper:lower, begin:end].to(self.compute))
                bands.append(torch.cat(parts, 4))
        sides = (inside[2] - left, right - inside[3], inside[0] - top, bottom - inside[1])
        return F.pad(torch.cat(bands, 3), sides)

    # What networks do with a tensor apart from calling layers.

    @property
    def shape(self) -> torch.Size:
        """Shape of the whole."""
        first = self.tiles[0][0].shape
        return torch.Size([*first[:3], self.rows[-1], self.columns[-1]])

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the tiles."""
        return self.tiles[0][0].dtype

    @property
    def requires_grad(self) -> bool:
        """Whether a gradient is wanted for a tile."""
        return any(tile.requires_grad for row in self.tiles for tile in row)

    def contiguous(self, **options: Any) -> Tiles:
        """Returns the tiles in the memory format of `options`."""
        return self.map(lambda tile: tile.contiguous(**options))

    def clone(self, **options: Any) -> Tensor:
        """Returns the whole as a tensor of its own, as the states of streams are."""
        return self.join().clone(**options)

    def __getitem__(self, index: Any) -> Tiles:
        return self.map(lambda tile: tile[index])

    def __add__(self, other: Tiles) -> Tiles:
        return self.map(torch.add, other)

    def __mul__(self, other: Tiles) -> Tiles:
        return self.map(torch.mul, other)


def _bounds(sizes: list[int]) -> list[int]:
    """Returns where tiles of these sizes begin, and the end of the last."""
    return [sum(sizes[:i]) for i in range(len(sizes) + 1)]


def _overlap(bounds: list[int], i: int, first: int, end: int) -> tuple[int, int]:
    """Returns the part of first..end that lies in tile i, counted within the tile."""
    return max(first, bounds[i]) - bounds[i], min(end, bounds[i + 1]) - bounds[i]


class _TiledConv(CausalConv3d):
    """A causal convolution of Tiles; its state is one tensor per tile."""

    def forward(  # type: ignore[override]
        self, x: Tiles, state: State | None = None, return_state: bool = False
    ):
        """Returns Tiles, or `(tiles, state)`."""
        if not is_plain(self.conv):
            raise ValueError("tiling: a convolution must be without hooks and adapters, got one")
        names = [[f"{i}.{j}" for j, _ in enumerate(row)] for i, row in enumerate(x.tiles)]
        padded = [
            [
                self.pad(tile, None if state is None else state[name].to(tile.device))
                for tile, name in zip(*row, strict=True)
            ]
            for row in zip(x.tiles, names, strict=True)
        ]
        tiles = Tiles(padded, x.compute, x.storage)
        found = []
        for i in range(len(padded)):
            rows = tiles.rows[i], tiles.rows[i + 1]
            columns = [tiles.columns[j : j + 2] for j in range(len(padded[i]))]
            found.append([self._tile(tiles, rows, (a, b)).to(x.storage) for a, b in columns])
        y = Tiles(found, x.compute, x.storage)
        if not return_state:
            return y
        carry = zip(sum(names, []), sum(padded, []), strict=True)
        return y, {name: self.carry(tile) for name, tile in carry}

    def _tile(self, x: Tiles, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
        """Returns the outputs over these rows and columns of the padded frames."""
        g, extents, crop = self.geometry, [], []
        sides = zip((rows, columns), self.kernel[1:], g.stride[1:], (g.top, g.left), strict=True)
        for (first, end), kernel, stride, before in sides:
            if g.repeat_space == 1:
                last = -(-end // stride) - 1
                extents += [first // stride * stride - before, last * stride - before + kernel]
                crop += [0, None]
            else:  # a border wide enough for the kernel once it is repeated
                border = -(-before // g.repeat_space)
                extents += [first - border, end + border]
                extra = border * g.repeat_space - before
                crop += [extra, -extra or None]
        y = self.conv(
            x.window(*extents),
            temporal="valid",
            spatial_padding=((0, 0), (0, 0)),
            upsample="space" if g.repeat_space > 1 else None,
        )
        return y[:, :, :, crop[0] : crop[1], crop[2] : crop[3]]


class _TiledNorm(GroupNormAct):
    """A group norm of Tiles with the statistics of whole frames."""

    def forward(self, x: Tiles) -> Tiles:  # type: ignore[override]
        """Returns Tiles."""
        count = self.num_channels // self.num_groups * x.rows[-1] * x.columns[-1]
        mean = self._total(x, lambda v: v) / count if self.subtract_mean else None
        centred = (lambda v: v) if mean is None else (lambda v: v - mean.to(v.device, v.dtype))
        square = self._total(x, lambda v: centred(v).square()) / count
        scale = (square + self.eps).rsqrt()

        def normalise(tile: Tensor) -> Tensor:
            h = centred(self._grouped(tile)) * scale.to(tile.device, torch.float32)
            h = h.flatten(1, 2) * self.weight.float().view(-1, 1, 1, 1)
            h = h + self.bias.float().view(-1, 1, 1, 1)
            return (F.silu(h) if self.act else h).to(tile.dtype)

        return x.map(normalise)

    def _grouped(self, tile: Tensor) -> Tensor:
        return tile.float().unflatten(1, (self.num_groups, -1))  # [B, G, C / G, T, H, W]

    def _total(self, x: Tiles, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Returns [B, G, 1, T, 1, 1] float64: the sum over groups, tiles and positions."""
        sums = []
        for tile in (tile for row in x.tiles for tile in row):
            values = function(self._grouped(tile.to(x.compute)))
            sums.append(values.sum((2, 4, 5), keepdim=True, dtype=torch.float64))
        return torch.stack(sums).sum(0)


class _TiledRepeat(RepeatFrames):
    """Repetition of frames, tile by tile."""

    def forward(self, x: Tiles, starts: bool) -> Tiles:  # type: ignore[override]
        """Returns Tiles."""
        return x.map(lambda tile: RepeatFrames.forward(self, tile, starts))


_TILED = {
    CausalConv3d: _TiledConv,
    VolumeDown: _TiledConv,
    GroupNormAct: _TiledNorm,
    RepeatFrames: _TiledRepeat,
}


def _tiled_layers(module: nn.Module, name: str) -> nn.Module:
    """Returns a copy that shares all weights, with the layers that need it working on Tiles."""
    shallow: nn.Module = copy.copy(module)
    if type(module) in _TILED:
        shallow.__class__ = _TILED[type(module)]
        return shallow
    if module._parameters or module._buffers:
        raise ValueError(
            f"tiling: layers must be convolutions and group norms, got {type(module).__name__} "
            f"({name}); models whose norms look at single positions need no tiling in layers"
        )
    shallow.__dict__["_modules"] = {
        key: None if child is None else _tiled_layers(child, f"{name}.{key}")
        for key, child in module._modules.items()
    }
    return shallow


def layerwise_tiled(
    model: Any,
    height: int,
    width: int,
    *,
    storage: torch.device | str | None = None,
) -> Any:
    """Returns `model`, sharing its weights, with all layers computed tile by tile; for inference.

    It encodes, decodes and streams what `model` does up to the order of sums.

    Args:
        model: a ProMAG, or one grown from it.
        height, width: of a tile in pixels, multiples of the spatial factor.
        storage: where activations are kept; default the device of the weights, "cpu" saves its
            memory.

    Raises:
        ValueError: another model, or a size that is not a positive multiple.
    """
    if not (isinstance(model, GridTokenizer) and model.is_causal):
        raise ValueError(f"tiling: model must be a causal grid tokenizer, got {model}")
    factor = model.spatial_factor
    if min(height, width) < factor or height % factor or width % factor:
        raise ValueError(
            f"tiling: height and width must be multiples of {factor}, got {[height, width]}"
        )
    compute = next(model.parameters()).device
    kept = compute if storage is None else torch.device(storage)
    tiled: Any = _tiled_layers(model, model.name)

    class Tiled(type(model)):  # type: ignore[misc]
        """The model between a split and a join."""

        def encode_chunk(self, video, state=None, return_state=False):
            if isinstance(video, Tiles):
                return super().encode_chunk(video, state, return_state)
            with torch.no_grad():
                x = Tiles.split(video, height, width, compute, kept)
                return _joined(super().encode_chunk(x, state, return_state), compute)

        def decode_chunk(self, latent, state=None, return_state=False):
            if isinstance(latent, Tiles):
                return super().decode_chunk(latent, state, return_state)
            with torch.no_grad():
                x = Tiles.split(latent, height // factor, width // factor, compute, kept)
                return _joined(super().decode_chunk(x, state, return_state), kept)

    Tiled.__name__ = type(model).__name__  # what files call the model
    tiled.__class__ = Tiled
    return tiled


def exact_view(model: Any, tile: Any) -> Any:
    """Returns `layerwise_tiled` for a tile as `GridTokenizer.tiled` takes it, in pixels.

    Raises:
        ValueError: "auto", another tile than (height, width) >= 1, or as `layerwise_tiled`.
    """
    if tile == "auto":
        raise ValueError(
            f'tiled: tile must be (height, width) in pixels for {model.name}, got "auto"'
        )
    factor = model.spatial_factor
    height, width = (-(-size // factor) * factor for size in check_tile("tiled", tile))
    view = layerwise_tiled(model, height, width)
    view.is_exact, view.view = True, "tiles"
    return view


def _joined(result: Any, device: torch.device) -> Any:
    if isinstance(result, tuple):
        return result[0].join().to(device), result[1]
    return result.join().to(device)
