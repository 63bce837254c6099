"""Triplane lookup: features of space-time points from three planes of learned cells.

    u = clamp(coordinate, 0, 1) * (R - 1),  lower = floor(u),  upper = min(lower + 1, R - 1)
    f = u - lower, and along both axes of a plane: sum over its 4 corners of weight * cell
    out = [xy(x, y) | yt(t, y) | xt(t, x)], or their sum, or their product

Source: CoordTok's decoder (specification section 6), whose float32 arithmetic is followed exactly.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vtok_ext import _native
from vtok_ext.ops._dtypes import check_floating
from vtok_ext.ops._library import OpFunction, once_differentiable, register

REDUCTIONS = ("cat", "sum", "product")
_OP = "triplane_gather"
_INTEGER = (torch.int32, torch.int64)
_MAX_RESOLUTION = 2**24  # R - 1 is exact as float32
Coords = Tensor | Sequence[Tensor]


def _real_dtype(plane: Tensor) -> torch.dtype:
    """The dtype of coordinates and of the arithmetic for planes of the given dtype."""
    return torch.float64 if plane.dtype == torch.float64 else torch.float32


def triplane_gather_reference(
    plane_xy: Tensor,  # [B, R0, R1, C]
    plane_yt: Tensor,  # [B, Rt, R1, C]
    plane_xt: Tensor,  # [B, Rt, R0, C]
    coords: Coords,  # [B, N, 3] in the order (t, x, y), or the axes t [Nt], x [Nx], y [Ny]
    *,
    grid: Sequence[int] | None = None,
    reduce: str = "cat",
) -> Tensor:
    """Features in plain PyTorch, the definition of `triplane_gather`: arguments and errors as
    there."""
    axes = _check_triplane_gather(plane_xy, plane_yt, plane_xt, coords, grid, reduce)
    real = _real_dtype(plane_xy)
    if len(axes) == 3:
        points = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(1, -1, 3)
        points = points.expand(plane_xy.shape[0], -1, -1)
    else:
        points = axes[0]
    if grid is not None:
        points = points.to(real) / points.new_tensor([max(g - 1, 1) for g in grid], dtype=real)
    elif points.is_cpu and not torch.compiler.is_compiling() and bool(points.isnan().any()):
        raise ValueError(f"{_OP}: coords must not be NaN, got NaN in coords of {points.shape}")
    t, x, y = points.unbind(-1)
    planes = [plane.to(real) for plane in (plane_xy, plane_yt, plane_xt)]
    xy, yt, xt = (
        _interpolate(plane, rows, columns)
        for plane, rows, columns in zip(planes, (x, t, t), (y, y, x), strict=True)
    )
    if reduce == "cat":
        return torch.cat([xy, yt, xt], -1).to(plane_xy.dtype)
    return (xy + yt + xt if reduce == "sum" else xy * yt * xt).to(plane_xy.dtype)


def _interpolate(
    plane: Tensor,  # [B, R, S, C]
    rows: Tensor,  # [B, N] coordinates in [0, 1] along R
    columns: Tensor,  # [B, N] along S
) -> Tensor:
    """Features [B, N, C], interpolated along S first."""
    batch = torch.arange(plane.shape[0], device=plane.device)[:, None]
    (row, next_row, f), (column, next_column, g) = (
        _locate(coordinate, size)
        for coordinate, size in zip((rows, columns), plane.shape[1:3], strict=True)
    )
    lower = plane[batch, row, column] * (1 - g) + plane[batch, row, next_column] * g
    upper = plane[batch, next_row, column] * (1 - g) + plane[batch, next_row, next_column] * g
    return lower * (1 - f) + upper * f


def _locate(coordinate: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Lower cell, upper cell and fraction [B, N, 1] of coordinates [B, N]."""
    position = coordinate.clamp(0, 1) * (size - 1)
    lower = position.detach().floor()
    cell = lower.nan_to_num().long()
    return cell, (cell + 1).clamp(max=size - 1), (position - lower)[..., None]


def _check_planes(plane_xy: Tensor, plane_yt: Tensor, plane_xt: Tensor) -> None:
    planes = {"plane_xy": plane_xy, "plane_yt": plane_yt, "plane_xt": plane_xt}
    for name, plane in planes.items():
        if not isinstance(plane, Tensor):
            raise TypeError(f"{_OP}: {name} must be a torch.Tensor, got {type(plane).__name__}")
        check_floating(_OP, name, plane)
        if plane.dtype != plane_xy.dtype:
            raise TypeError(
                f"{_OP}: {name} must be {plane_xy.dtype} as plane_xy, got {plane.dtype}"
            )
        if plane.device != plane_xy.device:
            raise ValueError(
                f"{_OP}: {name} must be on {plane_xy.device} as plane_xy, got {plane.device}"
            )
        if plane.dim() != 4 or 0 in plane.shape[1:]:
            raise ValueError(
                f"{_OP}: {name} must be [B, rows, columns, C] with at least one row, column and "
                f"channel, got {list(plane.shape)}"
            )
        if max(plane.shape[1:3]) > _MAX_RESOLUTION:
            raise ValueError(
                f"{_OP}: {name} must have at most 2^24 rows and columns, got {list(plane.shape)}"
            )
    batch, r0, r1, channels = plane_xy.shape
    rt = plane_yt.shape[1]
    for name, plane, shape in (
        ("plane_yt [B, Rt, R1, C]", plane_yt, (batch, rt, r1, channels)),
        ("plane_xt [B, Rt, R0, C]", plane_xt, (batch, rt, r0, channels)),
    ):
        if plane.shape != shape:
            raise ValueError(
                f"{_OP}: {name} must be {list(shape)} for plane_xy [B, R0, R1, C] "
                f"{list(plane_xy.shape)} and Rt {rt}, got {list(plane.shape)}"
            )


def _check_axes(axes: Sequence[Tensor], plane_xy: Tensor, is_lattice: bool) -> None:
    real = _real_dtype(plane_xy)
    what = "an axis of the lattice" if is_lattice else "coords"
    for axis in axes:
        if not isinstance(axis, Tensor):
            raise TypeError(f"{_OP}: {what} must be a torch.Tensor, got {type(axis).__name__}")
        if axis.dtype not in (real, *_INTEGER):
            raise TypeError(
                f"{_OP}: {what} must be {real}, int32 or int64 for {plane_xy.dtype} planes, "
                f"got {axis.dtype}"
            )
        if axis.device != plane_xy.device:
            raise ValueError(
                f"{_OP}: {what} must be on {plane_xy.device} as the planes, got {axis.device}"
            )
    if not is_lattice:
        shape = axes[0].shape
        if axes[0].dim() != 3 or (shape[0], shape[2]) != (plane_xy.shape[0], 3):
            raise ValueError(
                f"{_OP}: coords must be [B, N, 3] with B = {plane_xy.shape[0]}, got {list(shape)}"
            )
        return
    if any(axis.dim() != 1 or axis.dtype != axes[0].dtype for axis in axes):
        found = ", ".join(f"{list(axis.shape)} {axis.dtype}" for axis in axes)
        raise ValueError(f"{_OP}: lattice axes must be [N] of one dtype, got {found}")
    if any(axis.requires_grad for axis in axes):
        raise ValueError(
            f"{_OP}: lattice axes must not require a gradient; pass coords [B, N, 3] to get one"
        )


def _check_triplane_gather(
    plane_xy: Tensor,
    plane_yt: Tensor,
    plane_xt: Tensor,
    coords: Coords,
    grid: Sequence[int] | None,
    reduce: str,
) -> list[Tensor]:
    """Raises for bad arguments; returns [coords], or the three axes of a lattice."""
    if reduce not in REDUCTIONS:
        raise ValueError(f"{_OP}: reduce must be 'cat', 'sum' or 'product', got {reduce!r}")
    _check_planes(plane_xy, plane_yt, plane_xt)
    is_lattice = not isinstance(coords, Tensor)
    axes: list[Any] = [coords]
    if is_lattice:
        axes = list(coords) if isinstance(coords, list | tuple) else []
        if len(axes) != 3:
            raise TypeError(
                f"{_OP}: coords must be a torch.Tensor [B, N, 3] or three axes (t, x, y), "
                f"got {type(coords).__name__} of {len(axes)}"
            )
    _check_axes(axes, plane_xy, is_lattice)
    is_index = axes[0].dtype in _INTEGER
    if is_index != (grid is not None):
        raise ValueError(
            f"{_OP}: grid must be {'given with integer' if is_index else 'None with real'} "
            f"coords, got {grid}"
        )
    if grid is not None and (len(grid) != 3 or any(size < 1 for size in grid)):
        raise ValueError(f"{_OP}: grid must be three positive sizes (t, x, y), got {list(grid)}")
    return axes


def _num_points(coords: Tensor, axis_x: Tensor | None, axis_y: Tensor | None) -> int:
    if axis_x is None or axis_y is None:
        return coords.shape[1]
    return coords.shape[0] * axis_x.shape[0] * axis_y.shape[0]


def _empty_output(
    plane_xy: Tensor,
    plane_yt: Tensor,
    plane_xt: Tensor,
    coords: Tensor,
    axis_x: Tensor | None,
    axis_y: Tensor | None,
    grid: list[int],
    reduce: str,
) -> Tensor:
    channels = plane_xy.shape[3] * (3 if reduce == "cat" else 1)
    return plane_xy.new_empty((plane_xy.shape[0], _num_points(coords, axis_x, axis_y), channels))


def _forward(
    plane_xy: Tensor,  # planes are contiguous
    plane_yt: Tensor,
    plane_xt: Tensor,
    coords: Tensor,  # [B, N, 3], or [Nt] with the other two axes
    axis_x: Tensor | None,  # [Nx]
    axis_y: Tensor | None,  # [Ny]
    grid: list[int],
    reduce: str,
) -> Tensor:
    out = _empty_output(plane_xy, plane_yt, plane_xt, coords, axis_x, axis_y, grid, reduce)
    points = (coords, axis_x, axis_y, grid, reduce)
    context = _native.call_context(plane_xy)
    _native.module().triplane_gather_forward(plane_xy, plane_yt, plane_xt, *points, out, context)
    return out


def _empty_gradients(
    grad_out: Tensor,
    plane_xy: Tensor,
    plane_yt: Tensor,
    plane_xt: Tensor,
    coords: Tensor,
    axis_x: Tensor | None,
    axis_y: Tensor | None,
    grid: list[int],
    reduce: str,
    needed: list[bool],
) -> list[Tensor]:
    wanted = zip((plane_xy, plane_yt, plane_xt, coords), needed, strict=True)
    return [
        torch.empty_like(x, memory_format=torch.contiguous_format) for x, needs in wanted if needs
    ]


def _backward(
    grad_out: Tensor,  # as the output
    plane_xy: Tensor,
    plane_yt: Tensor,
    plane_xt: Tensor,
    coords: Tensor,
    axis_x: Tensor | None,
    axis_y: Tensor | None,
    grid: list[int],
    reduce: str,
    needed: list[bool],  # of the gradients of the three planes and of coords
) -> list[Tensor]:
    points = (coords, axis_x, axis_y, grid, reduce)
    grads = _empty_gradients(grad_out, plane_xy, plane_yt, plane_xt, *points, needed)
    module = _native.module()
    num_points = _num_points(coords, axis_x, axis_y)
    elements = module.triplane_gather_workspace(plane_xy, plane_yt.shape[1], num_points, reduce)
    workspace = plane_xy.new_empty(elements, dtype=_real_dtype(plane_xy))
    present = iter(grads)
    slots = [next(present) if needs else None for needs in needed]
    context = _native.call_context(plane_xy)
    module.triplane_gather_backward(
        grad_out.contiguous(), plane_xy, plane_yt, plane_xt, *points, *slots, workspace, context
    )
    return grads


_POINTS = "Tensor coords, Tensor? axis_x, Tensor? axis_y, SymInt[] grid, str reduce"
_PLANES = "Tensor plane_xy, Tensor plane_yt, Tensor plane_xt"
_triplane_gather_forward = register(
    f"triplane_gather_forward({_PLANES}, {_POINTS}) -> Tensor", _forward, _empty_output
)
_triplane_gather_backward = register(
    f"triplane_gather_backward(Tensor grad_out, {_PLANES}, {_POINTS}, bool[] needed) -> Tensor[]",
    _backward,
    _empty_gradients,
)


class TriplaneGatherFunction(OpFunction):
    """Saves planes and coordinates, which are small against the output."""

    @staticmethod
    def forward(
        plane_xy: Tensor,
        plane_yt: Tensor,
        plane_xt: Tensor,
        coords: Tensor,
        axis_x: Tensor | None,
        axis_y: Tensor | None,
        grid: list[int],
        reduce: str,
    ) -> Tensor:
        """Features of the points."""
        return _triplane_gather_forward(
            plane_xy, plane_yt, plane_xt, coords, axis_x, axis_y, grid, reduce
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keeps all inputs."""
        *tensors, ctx.grid, ctx.reduce = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @once_differentiable("triplane_gather")
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
        """Gradients of the planes, and of coords if they need one."""
        needed = list(ctx.needs_input_grad[:4])
        tensors = ctx.saved_tensors
        grads = iter(_triplane_gather_backward(grad_out, *tensors, ctx.grid, ctx.reduce, needed))
        slots = [next(grads) if needs else None for needs in needed]
        return (*slots, None, None, None, None)


def triplane_gather(
    plane_xy: Tensor,  # [B, R0, R1, C]
    plane_yt: Tensor,  # [B, Rt, R1, C]
    plane_xt: Tensor,  # [B, Rt, R0, C]
    coords: Coords,  # [B, N, 3] in the order (t, x, y), or the axes t [Nt], x [Nx], y [Ny]
    *,
    grid: Sequence[int] | None = None,
    reduce: str = "cat",
) -> Tensor:
    """Features of space-time points, interpolated bilinearly in three planes.

    out = [xy(x, y) | yt(t, y) | xt(t, x)], each the weighted mean of the 4 cells around the point.
    Equivalent to: triplane_gather_reference(plane_xy, plane_yt, plane_xt, coords, grid=grid,
    reduce=reduce)

    Three ways to name the points:
        real coords: [B, N, 3] in [0, 1]; 0 and 1 are the first and the last cell of an axis.
            Values outside are clamped. For points that a batch shares, `expand` [1, N, 3].
        integer coords with `grid`: index i on an axis of G positions stands for the coordinate
            i / (G - 1), divided as float32 (a reciprocal would put some indices into the cell
            before); 0 for G = 1.
        a lattice, coords = (t, x, y): all combinations of three lists of real or integer
            positions, t outermost, y innermost, for every batch entry; no [B, N, 3] is built.
            `(arange(16), arange(16), arange(16))` with `grid=(128, 16, 16)` names the first 16 of
            128 frames.

    Args:
        plane_xy, plane_yt, plane_xt: cells of any real value, first axis of the shape comments
            along the rows; any strides (not contiguous planes are copied). At most 2^24 rows
            and columns, 2^22 channels, and 2^31 - 1 elements per batch entry and plane.
        coords: as above. float32, or float64 for float64 planes; int32 or int64 with `grid`.
        grid: (Gt, Gx, Gy), with integer coords only.
        reduce: "cat", or "sum" or "product" of the three features.

    Returns:
        [B, N, 3 * C] ("cat") or [B, N, C], in the dtype of the planes, autocast or not; N is
        Nt * Nx * Ny for a lattice.

    Raises:
        ValueError: shapes that do not fit together, `grid` or `reduce` of another value, lattice
            axes that require a gradient, or (CPU) a NaN coordinate; on CUDA it gives NaN features.
        TypeError: planes, coords or axes of an unsupported dtype.

    float32, float16 and bfloat16 on cpu and cuda, float64 on cpu; half types are computed in
    float32 and rounded once. Differentiable once, with respect to planes and real coords (0 where
    they are clamped). Forward and backward are deterministic, with or without
    torch.use_deterministic_algorithms: no atomic additions.

    Source: CoordTok, section "decoder"; bilinear lookup with aligned corners.
    """
    if not _native.is_enabled():
        return triplane_gather_reference(
            plane_xy, plane_yt, plane_xt, coords, grid=grid, reduce=reduce
        )
    axes = _check_triplane_gather(plane_xy, plane_yt, plane_xt, coords, grid, reduce)
    first, axis_x, axis_y = axes if len(axes) == 3 else (axes[0], None, None)
    # Without gradients the autograd function would only cost: 12 of 27 us of a small call.
    is_recorded = torch.is_grad_enabled()
    gather = TriplaneGatherFunction.apply if is_recorded else _triplane_gather_forward
    return gather(
        plane_xy.contiguous(),
        plane_yt.contiguous(),
        plane_xt.contiguous(),
        first,
        axis_x,
        axis_y,
        [] if grid is None else list(grid),
        reduce,
    )
