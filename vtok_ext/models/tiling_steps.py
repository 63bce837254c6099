"""What tiling must know of a network: its steps, and how far each of them reaches in space.

    outputs < p up / down + before  are spoilt by wrong inputs < p  (p a multiple of `down`)
    outputs >= p up / down - behind are spoilt by wrong inputs >= p

The reach is measured on the layers as they are, adapters and all: inputs of a small picture are set
to NaN, which no sum, product or norm can hide, and the outputs that stay numbers are looked up. A
step whose every output is spoilt needs the whole picture (attention, statistics over a frame).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vtok_ext.layers._state import StateFlow

# Positions along H and W of the picture that the reach is measured on; if it spoils everything, a
# larger one decides whether the step is local at all.
_PROBE_SIZES = (16, 40)


@dataclass(frozen=True)
class Step:
    """A part of a network that runs by itself: y = run(x, flow) for x [B, C, T, H, W].

    Attributes:
        name: for messages.
        run: calls layers with temporal context through the StateFlow that it is given.
        begins_level: whether the feature map before this step is a small one, worth cutting at.
    """

    name: str
    run: Callable[[Tensor, StateFlow], Tensor]
    begins_level: bool = False


@dataclass(frozen=True)
class Reach:
    """How a step maps positions: `down` inputs to `up` outputs, and what borders spoil.

    Attributes:
        down, up: H and W change by up / down.
        before, behind: outputs spoilt by a wrong border at the low and at the high end.
        is_local: False: every output depends on the whole picture.
    """

    down: int
    up: int
    before: int
    behind: int
    is_local: bool = True

    def inputs_for(self, start: int, stop: int) -> tuple[int, int]:
        """Returns the inputs [start, stop) that right outputs [start, stop) need, unclipped."""
        first = (start - self.before) // self.up * self.down
        last = -(-(stop + self.behind) // self.up) * self.down
        return first, last

    def output_size(self, size: int) -> int:
        """Returns how many outputs `size` inputs have."""
        return size * self.up // self.down


@torch.no_grad()
def measure_reaches(steps: Sequence[Step], x: Tensor) -> list[Reach]:
    """Returns the reach of every step; x [1, C, T, h, w] gives channels, frames and dtype.

    Runs each step a few times on pictures of 16x16 positions and calls its hooks. On a GPU without
    cuDNN, whose transforms to frequency space would make everything depend on everything.
    """
    reaches = []
    with torch.backends.cudnn.flags(enabled=False):
        for step in steps:
            y, reach = _measure(step, x[:, :, :, :1, :1])
            reaches.append(reach)
            x = y
    return reaches


def _measure(step: Step, like: Tensor) -> tuple[Tensor, Reach]:
    """Returns an output and the reach of a step."""
    for size in _PROBE_SIZES:
        x = like.new_zeros((*like.shape[:3], size, size))
        x = x.contiguous(memory_format=torch.channels_last_3d)
        y = _run(step, x)
        shrunk = math.gcd(size, y.shape[3])
        down, up = size // shrunk, y.shape[3] // shrunk
        if y.shape[3] != y.shape[4] or size % down:
            raise ValueError(
                f"tiling: step {step.name} must scale H and W alike, got {list(y.shape[3:])} of "
                f"{[size, size]}"
            )
        x[:, :, :, :down] = x[..., :down] = math.nan
        good = ~_run(step, x).isnan().flatten(0, 2).any(0)
        x.zero_()
        x[:, :, :, size - down :] = x[..., size - down :] = math.nan
        right = ~_run(step, x).isnan().flatten(0, 2).any(0)
        if good.any() and right.any():
            first = max(_first(good.any(1)), _first(good.any(0)))
            last = max(_first(right.any(1).flip(0)), _first(right.any(0).flip(0)))
            return y, Reach(down, up, max(0, first - up), max(0, last - up))
    return y, Reach(down, up, 0, 0, is_local=False)


def _run(step: Step, x: Tensor) -> Tensor:
    return step.run(x, StateFlow(None, False))


def _first(flags: Tensor) -> int:
    """Returns the index of the first True."""
    return int(flags.int().argmax())
