"""Triplane lookup as a layer: features of space-time points from three planes.

Source: CoordTok's decoder (specification section 6).
"""

from collections.abc import Sequence

from torch import Tensor, nn

from vtok_ext.ops.triplane_gather import REDUCTIONS, Coords, triplane_gather


class TriplaneGather(nn.Module):
    """Interpolates points in the planes that it is given; has no parameters and no state.

    Args:
        reduce: "cat" gives 3 * C features per point, "sum" and "product" give C.
        grid: sizes (Gt, Gx, Gy) of the grid that integer coords refer to; None for real coords.

    Raises:
        ValueError: reduce or grid of another value.
    """

    def __init__(self, reduce: str = "cat", *, grid: Sequence[int] | None = None) -> None:
        super().__init__()
        if reduce not in REDUCTIONS:
            raise ValueError(
                f"TriplaneGather: reduce must be 'cat', 'sum' or 'product', got {reduce!r}"
            )
        if grid is not None and (len(grid) != 3 or any(size < 1 for size in grid)):
            raise ValueError(
                f"TriplaneGather: grid must be three positive sizes (t, x, y), got {list(grid)}"
            )
        self.reduce = reduce
        self.grid = None if grid is None else tuple(grid)

    def forward(
        self,
        plane_xy: Tensor,  # [B, R0, R1, C]
        plane_yt: Tensor,  # [B, Rt, R1, C]
        plane_xt: Tensor,  # [B, Rt, R0, C]
        coords: Coords,  # [B, N, 3] in the order (t, x, y), or the axes t [Nt], x [Nx], y [Ny]
    ) -> Tensor:
        """Features [B, N, 3 * C] or [B, N, C]; see `triplane_gather`."""
        return triplane_gather(
            plane_xy, plane_yt, plane_xt, coords, grid=self.grid, reduce=self.reduce
        )

    def extra_repr(self) -> str:
        """Reduction and grid, for printing."""
        return f"reduce={self.reduce!r}" + ("" if self.grid is None else f", grid={self.grid}")
