"""The steps of VidTok's networks, for tiling: what each `forward` does, in the same order.

A level begins where the feature map is smallest: in the encoder behind a step down, in the decoder
before a step up.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from vtok_ext.layers._state import StateFlow
from vtok_ext.models.tiling_steps import Step


def network_steps(network: Any, first_alone: bool = False) -> list[Step]:
    """Returns the steps of an Encoder or Decoder, or of one of an ablation.

    Args:
        network: the Encoder, ...
        first_alone: as for `Encoder.forward`.
    """
    pairs = hasattr(network, "down_temporal") or hasattr(network, "up_temporal")
    alone = {"first_alone": True} if first_alone else {}
    levels = _paired_levels(network, alone) if pairs else _full_levels(network)
    first = _layer("conv_in", network.conv_in)
    last = Step("conv_out", lambda x, flow: flow("conv_out", network.conv_out, network.norm_out(x)))
    if hasattr(network, "down"):
        return [first, *levels, *_middle(network.mid), last]
    return [first, *_middle(network.mid), *levels, last]


def _layer(name: str, layer: nn.Module, begins_level: bool = False) -> Step:
    """A layer with streaming state of its own."""
    return Step(name, lambda x, flow: flow(name, layer, x), begins_level)


def _middle(mid: Any) -> Iterator[Step]:
    names = [name for name, _ in mid.named_children()]
    for name in names:
        layer = getattr(mid, name)
        if name == "attn_1" or f"{name}_temporal" in names:
            yield Step(f"mid.{name}", _stateless(layer))
        else:
            yield _layer(f"mid.{name}", layer)


def _stateless(layer: nn.Module):
    return lambda x, flow: layer(x)


def _paired_levels(network: Any, alone: dict[str, bool]) -> Iterator[Step]:
    """Pairs of a block in space and one in time, and changes of both resolutions."""
    encodes = hasattr(network, "down")
    kind = "down" if encodes else "up"
    spaces, times = getattr(network, kind), getattr(network, f"{kind}_temporal")
    order = range(len(spaces)) if encodes else reversed(range(len(spaces)))
    begins = False
    for level in order:
        space, time = spaces[level], times[level]
        name = f"{kind}_temporal.{level}"
        for i, blocks in enumerate(zip(space.block, time.block, strict=True)):
            yield Step(f"{kind}.{level}.block.{i}", _pair(f"{name}.block.{i}", *blocks), begins)
            begins = False
        resample = f"{kind}sample"
        change, rate = getattr(space, resample), getattr(time, resample)
        if change is not None or rate is not None:
            run = _pair(f"{name}.{resample}", change, rate, **alone)
            yield Step(f"{kind}.{level}.{resample}", run, not encodes)
            begins = encodes


def _pair(name: str, space: nn.Module | None, time: nn.Module | None, **options: bool):
    """Returns what runs a layer without state, then one with it; either may be missing."""

    def run(x: Tensor, flow: StateFlow) -> Tensor:
        x = x if space is None else space(x)
        return x if time is None else flow(name, time, x, **options)

    return run


def _full_levels(network: Any) -> Iterator[Step]:
    """Blocks over space and time together."""
    encodes = hasattr(network, "down")
    kind = "down" if encodes else "up"
    stages = getattr(network, kind)
    order = range(len(stages)) if encodes else reversed(range(len(stages)))
    begins = False
    for level in order:
        for i, block in enumerate(stages[level].block):
            yield _layer(f"{kind}.{level}.block.{i}", block, begins)
            begins = False
        change = getattr(stages[level], f"{kind}sample")
        if change is not None:
            yield _layer(f"{kind}.{level}.{kind}sample", change, not encodes)
            begins = encodes
