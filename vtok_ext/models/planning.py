"""Chunk length and tile for a given memory, and the peak that they will have, before anything runs.

    plan = plan_stream(model, "decode", height=2160, width=3840, memory=4 * 2**30)
    view = plan.view(model); plan.chunk_frames, plan.tile, plan.predicted_bytes

Every prediction is a rehearsal of the real modules (`memory_rehearsal`). Chunks of f frames and the
whole picture come first, since they compute nothing twice; then smaller and smaller tiles, whose
neighbourhoods do; what memory is left lengthens the chunks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from vtok_ext.models.memory_rehearsal import free_bytes, predicted_bytes
from vtok_ext.models.tiling import Tile

DIRECTIONS = ("encode", "decode", "reconstruct")
# Positions along one side; at 64 the neighbourhoods already double the work.
_TILES = (1024, 768, 512, 384, 256, 192, 128, 96, 64)
# Longer chunks bring no more speed: measured, 2.1 s for 320 frames of 64x64 in chunks of 16 and 64.
MOST_FRAMES_PER_CHUNK = 16
# Of the memory that is free, to leave room for what is not counted.
_FREE_SHARE = 0.8


@dataclass(frozen=True)
class MemoryPlan:
    """How to run a stream within a limit.

    Attributes:
        chunk_frames: frames that are pushed at once; the f-th part of it in latents.
        tile: (height, width) for `GridTokenizer.tiled`, None for the whole picture.
        predicted_bytes: peak of all tensors besides the weights.
    """

    chunk_frames: int
    tile: Tile | None
    predicted_bytes: int

    def view(self, model: Any) -> Any:
        """Returns the model as planned: a tiled view, or the model itself."""
        return model if self.tile is None else model.tiled(self.tile)


def plan_stream(
    model: Any,
    direction: str,
    *,
    height: int,
    width: int,
    memory: int | None = None,
    num_frames: int | None = None,
    batch: int = 1,
) -> MemoryPlan:
    """Returns the fastest plan whose predicted peak is within `memory`.

    Args:
        model: a GridTokenizer.
        direction: "encode", "decode" or "reconstruct", which is both at once.
        height, width: of the video.
        memory: bytes for everything but the weights; default 80 % of what is free.
        num_frames: T of the clip; needed by models that are not causal, which take it whole.
        batch: B.

    Raises:
        ValueError: no plan fits; the message says what the smallest one takes.
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"plan: direction must be one of {DIRECTIONS}, got {direction!r}")
    if not model.is_causal and num_frames is None:
        raise ValueError(f"plan: num_frames must be given for {model.name}, which is not causal")
    memory = _default_memory(model) if memory is None else memory
    f = model.temporal_factor
    shortest = f if model.is_causal else num_frames or f
    shape = (batch, shortest, height, width)
    smallest: MemoryPlan | None = None
    for tile in _candidates(model, height, width):
        if smallest is not None and _hopeless(smallest, tile, height, width, memory):
            continue
        needed = predict_stream(model, direction, shape, tile)
        plan = MemoryPlan(shortest, tile, needed)
        if needed <= memory:
            return _lengthened(model, direction, plan, shape, memory)
        if smallest is None or needed < smallest.predicted_bytes:
            smallest = plan
    assert smallest is not None  # the whole picture was tried
    raise ValueError(
        f"plan: memory must be at least {smallest.predicted_bytes:,} bytes to {direction} "
        f"{width}x{height} with {model.name}, got {memory:,}"
    )


def _candidates(model: Any, height: int, width: int) -> Iterator[Tile | None]:
    yield None
    try:
        model.tiled(_TILES[0])
    except ValueError:  # no exact tiles of this model
        return
    for side in _TILES:
        if side < max(height, width):
            yield side, side


def _hopeless(known: MemoryPlan, tile: Tile | None, height: int, width: int, memory: int) -> bool:
    """Returns whether a tile cannot help enough, judged by its share of the last tile's area."""
    before = height * width if known.tile is None else min(height * width, known.tile[0] ** 2)
    share = 1 if tile is None else min(1, (tile[0] + 16) ** 2 / before)
    return known.predicted_bytes * share * 0.7 > memory and tile != (_TILES[-1],) * 2


def _lengthened(model, direction: str, plan: MemoryPlan, shape, memory: int) -> MemoryPlan:
    """Returns the plan with longer chunks while they fit."""
    while model.is_causal and 2 * plan.chunk_frames <= MOST_FRAMES_PER_CHUNK:
        if 1.5 * plan.predicted_bytes > memory:
            break
        longer = (shape[0], 2 * plan.chunk_frames, *shape[2:])
        needed = predict_stream(model, direction, longer, plan.tile)
        if needed > memory:
            break
        plan = MemoryPlan(2 * plan.chunk_frames, plan.tile, needed)
    return plan


def predict_stream(
    model: Any, direction: str, shape: tuple[int, int, int, int], tile: Tile | None
) -> int:
    """Returns the peak bytes of a stream (a clip without causality), besides the weights.

    Args:
        model: a GridTokenizer.
        direction: as for `plan_stream`.
        shape: (B, T, H, W) of the frames that are pushed at once.
        tile: for `GridTokenizer.tiled`; None: the whole picture.
    """
    view = model if tile is None else model.tiled(tile)
    run = _Stream(view, direction, shape) if model.is_causal else _Clip(view, direction, shape)
    return predicted_bytes(model, run)


class _Stream:
    """Two pushes: the first one, and one with a state, as all that follow."""

    def __init__(self, model: Any, direction: str, shape: tuple[int, int, int, int]) -> None:
        self.model, self.shape = model, shape
        # Made here, since names of streams are made from the values of weights.
        self.encoder = None if direction == "decode" else model.stream_encoder()
        self.decoder = None if direction == "encode" else model.stream_decoder(output="uint8")

    def __call__(self) -> None:
        model, (batch, frames, height, width) = self.model, self.shape
        f, device = model.temporal_factor, next(model.parameters()).device
        _, rows, columns = model.token_grid(1, height, width)
        for _ in range(2):
            latents = []
            if self.encoder is not None:
                size = (batch, model.video_channels, frames, height, width)
                video = torch.empty(size, dtype=torch.uint8, device=device)
                latents = self.encoder.push(video)
            elif self.decoder is not None:
                size = (batch, model.latent_channels, frames // f, rows, columns)
                latents = [torch.empty(size, dtype=model.dtype, device=device)]
            if self.decoder is not None:
                for latent in latents:
                    self.decoder.push(latent)


class _Clip:
    """One clip, for models that take it whole."""

    def __init__(self, model: Any, direction: str, shape: tuple[int, int, int, int]) -> None:
        self.model, self.direction, self.shape = model, direction, shape

    def __call__(self) -> None:
        model, (batch, frames, height, width) = self.model, self.shape
        device = next(model.parameters()).device
        if self.direction == "decode":
            size = (batch, model.latent_channels, *model.token_grid(frames, height, width))
            encoding: Any = torch.empty(size, dtype=model.dtype, device=device)
        else:
            size = (batch, model.video_channels, frames, height, width)
            encoding = model.encode(torch.empty(size, dtype=torch.uint8, device=device))
        if self.direction != "encode":
            model.decode(encoding, output="uint8")


def choose_tile(
    model: Any, network: str, shape: tuple[int, int, int, int], memory: int | None
) -> Tile:
    """Returns the largest tile with which one call of a network is within `memory`.

    Args:
        model: a GridTokenizer.
        network: "encoder" or "decoder".
        shape: (B, T, H, W) of its input.
        memory: bytes besides the weights; default 80 % of what is free.

    Raises:
        ValueError: none is; the message says what the smallest one takes.
    """
    memory = _default_memory(model) if memory is None else memory
    batch, frames, height, width = shape
    channels = model.video_channels if network == "encoder" else model.latent_channels
    scale = 1 if network == "encoder" else model.spatial_factor
    if network == "encoder":
        frames = -(-frames // model.temporal_factor) * model.temporal_factor  # as they are padded
    needed = 0
    for tile in _candidates(model, scale * height, scale * width):
        tile = (scale * height, scale * width) if tile is None else tile
        run = getattr(model.tiled(tile), network)
        size = (batch, channels, frames, height, width)
        weight = next(model.parameters())

        def call(run=run, size=size, weight=weight):
            run(torch.empty(size, dtype=weight.dtype, device=weight.device))

        needed = predicted_bytes(model, call)
        if needed <= memory:
            return tile
    raise ValueError(
        f"tiled: memory must be at least {needed:,} bytes for {list(shape)} with {model.name}, got "
        f"{memory:,}"
    )


def _default_memory(model: Any) -> int:
    return int(_FREE_SHARE * free_bytes(next(model.parameters()).device))
