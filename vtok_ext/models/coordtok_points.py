"""Points of CoordTok's decoder: which patch of which moment they stand for, and their slices.

A patch covers dt frames, dx rows and dy columns. Patch k of G along an axis has the coordinate
k / (G - 1), divided as float32, and row k of the positional table. Between the frames of index k
and k + 1 the coordinate is real and the row is the lower one, as the reference truncates.
Source: CoordTok (arXiv 2411.14762), specification section 6.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

Times = Sequence[float] | Tensor


@dataclasses.dataclass
class Lattice:
    """All combinations of three axes, t outermost and y innermost.

    Attributes:
        axes: positions along t [Nt], x [Nx], y [Ny] on the CPU, in patches: int64; float64 where
            some time lies between two patches.
        grid: patches of the whole clip along t, x and y.
    """

    axes: tuple[Tensor, Tensor, Tensor]
    grid: tuple[int, int, int]

    @property
    def counts(self) -> tuple[int, int, int]:
        """(Nt, Nx, Ny)."""
        t, x, y = (axis.numel() for axis in self.axes)
        return t, x, y

    @property
    def num_points(self) -> int:
        """Nt * Nx * Ny."""
        return math.prod(self.counts)

    def rows(self, device: torch.device) -> Tensor:
        """Returns the points' rows in the flattened positional table, int64 [N]."""
        t, x, y = (axis.long().to(device) for axis in self.axes)
        return _flat_rows(t[:, None, None], x[None, :, None], y[None, None, :], self.grid).flatten()

    def coords(
        self, real: torch.dtype, device: torch.device
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...] | None]:
        """Returns the lattice axes and the `grid` for `triplane_gather`."""
        if not any(axis.is_floating_point() for axis in self.axes):
            return tuple(axis.to(device) for axis in self.axes), self.grid
        # Divided here, on the CPU: some devices would multiply by a rounded reciprocal.
        coords = (
            axis.to(real) / torch.tensor(max(size - 1, 1), dtype=real)
            for axis, size in zip(self.axes, self.grid, strict=True)
        )
        return tuple(axis.to(device) for axis in coords), None


def _flat_rows(t: Tensor, x: Tensor, y: Tensor, grid: Sequence[int]) -> Tensor:
    return (t * grid[1] + x) * grid[2] + y


def rows_of_points(
    points: Tensor,  # [B, N, 3], patches (int) or coordinates in [0, 1] (real)
    grid: Sequence[int],
) -> Tensor:
    """Returns the points' rows in the flattened positional table, int64 [B, N].

    Integer points are exact. Real ones follow the reference, whose float32 product c * (G - 1) is
    truncated: for G in 4, 8, ..., 256 it recovers k from k / (G - 1); for most others it falls
    short of some k, and then the row is k - 1. Values outside count as the first or last patch.
    """
    last = torch.tensor([size - 1 for size in grid], device=points.device)
    indices = points.detach()
    if indices.is_floating_point():
        indices = (indices.clamp(0, 1) * last).long()  # infinity and 1e20 are no integers
    t, x, y = indices.long().clamp(min=0).minimum(last).unbind(-1)
    return _flat_rows(t, x, y, grid)


def locate_times(
    op: str,
    times: Times,
    num_frames: int,
    patch_frames: int,
    clip_frames: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns the positions [n] along t that cover `times`, and the frame of each time.

    Frame j of the patches decoded at the positions is frame j % patch_frames of position
    j // patch_frames. A time between two frames belongs to the slot of the earlier one; between
    two of the last patch it is the earlier one, there is no patch behind to go to.

    Args:
        op: name in front of the message.
        times: in frames, 0 the first of the clip, from 0 to `clip_frames` - 1; integers or not.
        num_frames: T of the model.
        patch_frames: frames per patch.
        clip_frames: T of the clip; default that of the model.

    Raises:
        TypeError: no real numbers; True and False are none, such as those of a mask.
        ValueError: no time, or one outside the clip.
    """
    clip_frames = num_frames if clip_frames is None else clip_frames
    must = f"{op}: times must be a list or tensor of real numbers"
    try:
        given = torch.as_tensor(times)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{must}, got {times!r}") from error
    if given.dtype == torch.bool or given.is_complex():
        raise TypeError(f"{must}, got {given.dtype}")
    moments = torch.as_tensor(times, dtype=torch.float64).cpu()
    inside = moments.dim() == 1 and moments.numel() and bool(torch.isfinite(moments).all())
    if not inside or moments.min() < 0 or moments.max() > clip_frames - 1:
        shown = moments.flatten()[:4].tolist()
        raise ValueError(
            f"{op}: times must be a non-empty list of numbers in 0..{clip_frames - 1}, got {shown}"
        )
    slot = moments.floor().long() % patch_frames
    position = ((moments - slot) / patch_frames).clamp(max=num_frames // patch_frames - 1)
    positions, which = position.unique(return_inverse=True)
    if bool((positions == positions.floor()).all()):
        positions = positions.long()
    return positions, which * patch_frames + slot


def slice_bounds(num_points: int, num_slices: int, *, drop_rest: bool) -> list[tuple[int, int]]:
    """Returns (start, stop) of consecutive slices of the points.

    Their lengths differ by at most one, the longer ones first. With `drop_rest` all have the length
    num_points // num_slices, and the points after the last one are in none.
    """
    size, longer = divmod(num_points, num_slices)
    if drop_rest:
        longer = 0
    starts = [k * size + min(k, longer) for k in range(num_slices + 1)]
    return list(zip(starts[:-1], starts[1:], strict=True))


def patches_to_video(
    patches: Tensor,  # [B, Nt * Nx * Ny, dt * dx * dy * 3]
    counts: Sequence[int],  # (Nt, Nx, Ny)
    patch: Sequence[int],  # (dt, dx, dy)
) -> Tensor:
    """Returns the video [B, 3, Nt * dt, Nx * dx, Ny * dy] of a lattice of patches."""
    x = patches.unflatten(2, (*patch, 3)).unflatten(1, tuple(counts))
    x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)  # [B, 3, Nt, dt, Nx, dx, Ny, dy]
    sizes = [count * size for count, size in zip(counts, patch, strict=True)]
    return x.reshape(x.shape[0], 3, *sizes)
