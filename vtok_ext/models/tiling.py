"""Videos of any resolution at bounded memory: a network computed tile by tile, exactly.

    view = model.tiled((256, 256))       same weights and methods; view.encode, view.stream_decoder
    model.encode(video, tile=(256, 256)), model.decode(latent, tile=(256, 256))

A network is cut where its feature maps are small, at every change of resolution. Between two cuts
each tile is computed from all the inputs that it depends on: its neighbours' positions within the
reach of the layers between (see `tiling_steps`), and zeros only where the picture itself ends. What
needs the whole picture, the attention, gets it, at the lowest resolution. In a stream every tile
has temporal state of its own. The result is that of the whole picture, up to the order of sums.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from vtok_ext.layers._state import State, StateFlow, owned
from vtok_ext.models.tiling_steps import Reach, Step, measure_reaches

Tile = tuple[int, int]

# Note [Cuts]
# One segment from the pixels to the attention would need no feature map as a whole, but the decoder
# of VidTok 488 reaches 114 pixels: tiles of 256x256 would compute 3.6 times as much. Cut at every
# level, no segment reaches further than 10 positions of its own resolution (1.16 times as much),
# and the largest map that is held whole has, per pixel and frame, 32 values instead of the 128 to
# 256 of the maps that are tiled. Sums of layers' radii, not measurements.


@dataclass(frozen=True)
class Segment:
    """Consecutive steps that run tile by tile, or together on the whole picture.

    Attributes:
        steps: indices of the first step and behind the last one.
        reaches: one per step.
    """

    steps: tuple[int, int]
    reaches: tuple[Reach, ...]

    @property
    def is_local(self) -> bool:
        """Whether tiles are possible."""
        return all(reach.is_local for reach in self.reaches)

    @property
    def finest(self) -> float:
        """Positions at its highest resolution per position of its output, along one axis."""
        scale, scales = 1.0, [1.0]
        for reach in self.reaches:
            scale *= reach.up / reach.down
            scales.append(scale)
        return max(scales) / scale

    def output_tile(self, limit: int) -> int:
        """Returns the height or width of outputs that take `limit` positions where it is finest."""
        return max(1, int(limit / self.finest))

    def output_size(self, size: int) -> int:
        """Returns the height or width of the output for that of the input."""
        for reach in self.reaches:
            size = reach.output_size(size)
        return size

    def inputs_for(self, start: int, stop: int, size: int) -> tuple[int, int]:
        """Returns the inputs [start, stop) of `size` that outputs [start, stop) are computed from.

        Both are multiples of all steps down together, so that the tile's grid is the picture's.
        """
        for reach in reversed(self.reaches):
            start, stop = reach.inputs_for(start, stop)
        unit = math.prod(reach.down for reach in self.reaches)
        return max(0, start // unit * unit), min(size, -(-stop // unit) * unit)


def make_segments(steps: Sequence[Step], reaches: Sequence[Reach]) -> list[Segment]:
    """Returns the segments between cuts: at levels, and around steps that are not local."""
    borders = {0, len(steps)}
    for i, (step, reach) in enumerate(zip(steps, reaches, strict=True)):
        if step.begins_level:
            borders.add(i)
        if not reach.is_local:
            borders |= {i, i + 1}
    ordered = sorted(borders)
    return [
        Segment((start, stop), tuple(reaches[start:stop]))
        for start, stop in zip(ordered[:-1], ordered[1:], strict=True)
    ]


def split_axis(size: int, tile: int) -> list[tuple[int, int]]:
    """Returns equal ranges of at most `tile` that cover `size`; the last one may be shorter."""
    length = -(-size // max(1, -(-size // tile)))
    return [(start, min(size, start + length)) for start in range(0, size, length)]


class TiledNetwork(nn.Module):
    """`network` computed tile by tile; called like it, with its parameters under its names.

    Args:
        network: an encoder or decoder, `y = network(x)` or `y, state = network(x, state, True)`.
        steps: returns its steps; asked at every call, so that replaced children are found.
        segments: of these steps.
        choose_tile: (B, T, H, W) of the input, and whether a stream begins with it -> (height,
            width): positions of a feature map that are computed at once, at every resolution; the
            neighbours come on top.
    """

    def __init__(
        self,
        network: nn.Module,
        steps: Callable[..., list[Step]],
        segments: Sequence[Segment],
        choose_tile: Callable[[tuple[int, int, int, int], bool], Tile],
    ) -> None:
        super().__init__()
        self.__dict__.update(network.__dict__)  # parameters, children, hooks
        self.steps, self.segments, self.choose_tile = steps, segments, choose_tile
        self.whole = network.forward

    def forward(
        self, x: Tensor, state: State | None = None, return_state: bool = False, **options: bool
    ):
        """Returns what the network does; options are those of its steps."""
        shape = x.shape[0], *x.shape[2:]
        tile = continued_tile(state, x) or self.choose_tile(shape, return_state)
        empty = x[:, :, :0]
        if self._is_one(tile, x.shape[3:]):
            state = None if state is None else {n: v for n, v in state.items() if n != "tile"}
            result = self.whole(x, state, return_state, **options)
            return (result[0], with_tile(result[1], tile, empty)) if return_state else result
        steps = self.steps(**options)
        following: dict[str, Tensor] | None = {} if return_state else None
        for number, segment in enumerate(self.segments):
            run = _Run(steps[slice(*segment.steps)], segment, f"tile.{number}", state, following)
            x = run.on(x, tile)
        return x if following is None else (x, with_tile(following, tile, empty))

    def _is_one(self, tile: Tile, size: Sequence[int]) -> bool:
        """Returns whether one tile is the whole picture everywhere."""
        for segment in self.segments:
            size = [segment.output_size(extent) for extent in size]
            limits = [segment.output_tile(limit) for limit in tile]
            if segment.is_local and any(s > t for s, t in zip(size, limits, strict=True)):
                return False
        return True


def with_tile(following: dict[str, Tensor], tile: Tile, empty: Tensor) -> dict[str, Tensor]:
    """Returns the state of a network in tiles; empty [B, C, 0, H, W] has the shape of its input.

    A model takes the state of the first layer for a piece of its input.
    """
    following.setdefault("conv_in", owned(empty))
    following["tile"] = empty.new_empty((0, *tile, *empty.shape[3:]))  # its shape says it all
    return following


def continued_tile(state: State | None, x: Tensor) -> Tile | None:
    """Returns the tile that a stream was begun with."""
    if state is None:
        return None
    if "tile" not in state:
        raise ValueError("tiling: state must be that of a stream in tiles, got another")
    height, width, *size = state["tile"].shape[1:]
    if size != list(x.shape[3:]):
        raise ValueError(f"tiling: x must have H and W of the state {size}, got {list(x.shape)}")
    return height, width


@dataclass
class _Run:
    """One pass of a segment.

    Attributes:
        steps, segment: what runs.
        prefix: of the names of its tiles' states.
        state, following: of the network: before, and collected for the next call (None: not).
    """

    steps: Sequence[Step]
    segment: Segment
    prefix: str
    state: State | None
    following: dict[str, Tensor] | None

    def on(self, x: Tensor, tile: Tile) -> Tensor:
        """Returns the segment's output for the whole x [B, C, T, H, W]."""
        rows, columns = (
            split_axis(self.segment.output_size(size), self.segment.output_tile(limit))
            for size, limit in zip(x.shape[3:], tile, strict=True)
        )
        if not self.segment.is_local or len(rows) * len(columns) == 1:
            x = x.contiguous(memory_format=torch.channels_last_3d)
            return self._steps(x, self.state, self.following, "")
        y: Tensor | None = None
        size = rows[-1][1], columns[-1][1]
        for index, (row, column) in enumerate((r, c) for r in rows for c in columns):
            part = self._tile(x, row, column, f"{self.prefix}.{index}.")
            if y is None:
                y = torch.empty(
                    (*part.shape[:3], *size),
                    dtype=part.dtype,
                    device=part.device,
                    memory_format=torch.channels_last_3d,
                )
            y[:, :, :, slice(*row), slice(*column)] = part
        assert y is not None  # there is at least one tile
        return y

    def _tile(self, x: Tensor, row: Tile, column: Tile, prefix: str) -> Tensor:
        """Returns outputs [row, column) of x [B, C, T, H, W]."""
        segment, (height, width) = self.segment, x.shape[3:]
        top, bottom = segment.inputs_for(*row, height)
        left, right = segment.inputs_for(*column, width)
        part = x[:, :, :, top:bottom, left:right]
        part = part.contiguous(memory_format=torch.channels_last_3d)
        part = self._steps(part, self.state, self.following, prefix)
        first_row, first_column = segment.output_size(top), segment.output_size(left)
        rows = slice(row[0] - first_row, row[1] - first_row)
        return part[:, :, :, rows, column[0] - first_column : column[1] - first_column]

    def _steps(self, x: Tensor, state, following, prefix: str) -> Tensor:
        previous = None if state is None else below(state, prefix)
        flow = StateFlow(previous, following is not None)
        for step in self.steps:
            x = step.run(x, flow)
        if following is not None and flow.following is not None:
            following.update({prefix + name: value for name, value in flow.following.items()})
        return x


def below(state: State, prefix: str) -> State:
    """Returns the entries below `prefix`, without it."""
    if not prefix:
        return state
    return {n[len(prefix) :]: v for n, v in state.items() if n.startswith(prefix)}


def check_tile(op: str, tile: Any) -> Tile:
    """Returns (height, width). Raises ValueError for anything but two integers >= 1."""
    sizes = (tile, tile) if isinstance(tile, int) and tile is not True else tile
    if (
        not isinstance(sizes, tuple | list)
        or len(sizes) != 2
        or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in sizes)
    ):
        raise ValueError(f'{op}: tile must be "auto" or (height, width) >= 1, got {tile!r}')
    return sizes[0], sizes[1]


def tiled_view(
    model: Any, tile: Any = "auto", *, mode: str = "exact", overlap: float = 0.25, memory=None
) -> Any:
    """Returns a view of a GridTokenizer whose networks run in tiles; see `GridTokenizer.tiled`."""
    if mode not in ("exact", "blended"):
        raise ValueError(f"tiled: mode must be 'exact' or 'blended', got {mode!r}")
    if not 0 < overlap <= 0.5:
        raise ValueError(f"tiled: overlap must be in (0, 0.5], got {overlap}")
    fixed = None if tile == "auto" else check_tile("tiled", tile)
    backend = getattr(model, "backend", "native")
    if backend != "native":
        raise ValueError(f"tiled: backend must be 'native', got {backend!r}")
    view = copy.copy(model)
    view.is_exact = mode == "exact"
    view.view = "tiles" if view.is_exact else f"tiles blended over {overlap:g}"
    if mode == "blended":
        return _blended(model, view, fixed, overlap)
    networks = {}
    for name in ("encoder", "decoder"):
        choose = (lambda *_: fixed) if fixed else _planned(model, name, memory)
        steps, segments = local_segments(model, name)
        networks[name] = TiledNetwork(getattr(model, name), steps, segments, choose)
    # copy.copy shares the dict of children; nothing of `model` may change.
    view.__dict__["_modules"] = {**model._modules, **networks}
    return view


def _blended(model: Any, view: Any, tile: Tile | None, overlap: float) -> Any:
    """Returns `view` with the passes of `model` in overlapping tiles."""
    from vtok_ext.models.tiling_blended import BlendedPass  # it builds on this file

    if tile is None:
        raise ValueError('tiled: tile must be (height, width) with mode="blended", got "auto"')
    scale = Fraction(model.spatial_factor)
    view.encode_chunk = BlendedPass(model.encode_chunk, 1 / scale, overlap, tile)
    view.decode_chunk = BlendedPass(model.decode_chunk, scale, overlap, tile)
    view.decode_rest = partial(view.decode_chunk.rest, model.decode_rest)
    return view


def _planned(model: Any, network: str, memory: int | None):
    """Returns what gives the tile for (B, T, H, W) of a network's input, planned once for each.

    A stream keeps the tile that it began with, often with a single frame: its tile is planned for
    the chunks that the planner makes, or where these do not fit, for its first one.
    """
    known: dict[tuple[int, ...], Tile] = {}

    def choose(shape: tuple[int, int, int, int], is_stream: bool = False) -> Tile:
        from vtok_ext.models import planning  # it builds on this file

        longest = planning.MOST_FRAMES_PER_CHUNK
        if network == "decoder":
            longest = max(1, longest // model.temporal_factor)
        length = max(shape[1], longest) if is_stream else shape[1]
        key = (shape[0], length, *shape[2:])
        if key not in known:
            try:
                known[key] = planning.choose_tile(model, network, key, memory)
            except ValueError:
                if length == shape[1]:
                    raise
                known[key] = planning.choose_tile(model, network, shape, memory)
        return known[key]

    return choose


# Reaches are measured once for a network as it is: a replaced layer has another identity.
_measured: WeakKeyDictionary[nn.Module, tuple[list, list[Reach]]] = WeakKeyDictionary()


def _reaches(model: Any, name: str, steps: Sequence[Step]) -> list[Reach]:
    network = getattr(model, name)
    layers = [(id(layer), type(layer), *layer._forward_hooks) for layer in network.modules()]
    known = _measured.get(network)
    if known is None or known[0] != layers:
        encodes = name == "encoder"
        channels = model.video_channels if encodes else model.latent_channels
        frames = model.temporal_factor if encodes else 1
        weight = next(network.parameters())
        known = layers, measure_reaches(steps, weight.new_zeros((1, channels, frames, 1, 1)))
        _measured[network] = known
    return known[1]


def local_segments(model: Any, network: str) -> tuple[Callable[..., list[Step]], list[Segment]]:
    """Returns what lists the steps of a network of `model`, and its segments.

    Args:
        model: a GridTokenizer that declares `network_steps`.
        network: "encoder" or "decoder".

    Raises:
        ValueError: the model declares no steps, or needs whole frames at full resolution.
    """

    def steps(**options: bool) -> list[Step]:
        return model.network_steps(getattr(model, network, None), **options)

    found = steps()  # raises for models without steps
    reaches = _reaches(model, network, found)
    segments = make_segments(found, reaches)
    whole = _whole_at_full_size(found, reaches, network == "encoder")
    if whole is not None:
        raise ValueError(
            f"tiled: model must not need whole frames at full resolution, got {model.name}, whose "
            f"{whole} does (statistics over a frame?); mode='blended' is possible, not exact"
        )
    return steps, segments


def _whole_at_full_size(steps: Sequence[Step], reaches: Sequence[Reach], encodes: bool):
    """Returns the name of a step that needs the whole picture in full resolution, or None."""
    pairs = list(zip(steps, reaches, strict=True))
    for step, reach in pairs if encodes else reversed(pairs):
        if not reach.is_local:
            return step.name
        if reach.up != reach.down:
            return None
    return None
