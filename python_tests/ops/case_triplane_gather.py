"""The triplane lookup under test: points by real coordinates, by grid indices, and on a lattice."""

import torch
from op_case import OpCase, Sample

from vtok_ext.ops.triplane_gather import triplane_gather, triplane_gather_reference


def make_planes(batch=2, rt=6, r0=5, r1=7, channels=8, seed=0, **kwargs):
    """Random planes xy, yt, xt."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, r0, r1), (batch, rt, r1), (batch, rt, r0)
    return [torch.randn(*s, channels, generator=generator, **kwargs) for s in shapes]


def make_coords(batch, num_points, seed=1, **kwargs):
    return torch.rand(batch, num_points, 3, generator=torch.Generator().manual_seed(seed), **kwargs)


def _planes(batch, rt, r0, r1, channels):
    """Shapes of the three planes."""
    return {
        "plane_xy": (batch, r0, r1, channels),
        "plane_yt": (batch, rt, r1, channels),
        "plane_xt": (batch, rt, r0, channels),
    }


def _make(name, shape, dtype, generator, kwargs):
    if name != "coords":
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    return 1.2 * torch.rand(shape, generator=generator, dtype=real) - 0.1  # some are clamped


def _with_coords(planes, num_points, **kwargs):
    coords = (planes["plane_xy"][0], num_points, 3)
    return Sample({**planes, "coords": coords}, kwargs)


_COORDTOK = (1, 32, 16, 16, 8)  # 1,280 cells
_RAW_POINTS = (torch.rand(2, 7, 3), None, None, [], "cat")


def _raw_planes():
    return [torch.randn(shape) for shape in _planes(2, 5, 4, 3, 8).values()]


TRIPLANE_GATHER = OpCase(
    name="triplane_gather",
    function=triplane_gather,
    reference=triplane_gather_reference,
    samples=[
        _with_coords(_planes(2, 8, 8, 8, 4), 80),  # as the recorded reference
        _with_coords(_planes(*_COORDTOK), 1024),
        _with_coords(_planes(3, 7, 5, 6, 8), 131, reduce="sum"),
        _with_coords(_planes(2, 32, 32, 32, 8), 700, reduce="product"),  # CoordTok, 3,072 cells
        _with_coords(_planes(1, 3, 2, 5, 13), 1031),
        _with_coords(_planes(2, 4, 6, 5, 16), 37, reduce="product"),
        _with_coords(_planes(1, 5, 3, 7, 5), 2, reduce="product"),
        _with_coords(_planes(2, 1, 1, 1, 1), 1),
        _with_coords(_planes(1, 130, 3, 530, 9), 300),  # tiles of sums in both directions
        _with_coords(_planes(1, 32, 4, 4, 8), 20),  # 48 KiB of dynamic beside static shared memory
        _with_coords(_planes(2, 3, 4, 5, 8), 0),
        _with_coords(_planes(0, 3, 4, 5, 8), 6),
    ],
    make=_make,
    differentiable=("plane_xy", "plane_yt", "plane_xt", "coords"),
    raw=(
        ("triplane_gather_forward", lambda: (*_raw_planes(), *_RAW_POINTS)),
        (
            "triplane_gather_backward",
            lambda: (
                torch.randn(2, 7, 24),
                *_raw_planes(),
                *_RAW_POINTS,
                [True, False, True, True],
            ),
        ),
    ),
)


def _at_indices(function):
    """`function` at scattered indices of a grid, some just outside of it."""

    def call(plane_xy, plane_yt, plane_xt, *, num_points, grid, reduce="cat", dtype=torch.int64):
        batch = plane_xy.shape[0]
        numbers = torch.arange(batch * num_points, dtype=dtype, device=plane_xy.device)
        axes = [
            numbers * prime % (size + 2) - 1
            for prime, size in zip((7919, 104729, 1299709), grid, strict=True)
        ]
        indices = torch.stack(axes, -1).view(batch, num_points, 3)
        return function(plane_xy, plane_yt, plane_xt, indices, grid=grid, reduce=reduce)

    return call


TRIPLANE_GATHER_INDICES = OpCase(
    name="triplane_gather_indices",
    function=_at_indices(triplane_gather),
    reference=_at_indices(triplane_gather_reference),
    samples=[
        Sample(_planes(*_COORDTOK), {"num_points": 512, "grid": (128, 16, 16)}),
        Sample(
            _planes(2, 6, 5, 7, 12),
            {"num_points": 61, "grid": (23, 1, 24), "dtype": torch.int32, "reduce": "sum"},
        ),
        Sample(
            _planes(2, 3, 4, 5, 8), {"num_points": 50, "grid": (30, 38, 9), "reduce": "product"}
        ),
    ],
    make=_make,
    differentiable=("plane_xy", "plane_yt", "plane_xt"),
    raw=(
        (
            "triplane_gather_forward",
            lambda: (*_raw_planes(), torch.zeros(2, 7, 3).int(), None, None, [4, 5, 6], "sum"),
        ),
    ),
)


def _on_lattice(function):
    """`function` on all combinations of the first `sizes` positions of a grid, or of real
    positions."""

    def call(plane_xy, plane_yt, plane_xt, *, sizes, grid=None, reduce="cat"):
        if grid is not None:
            axes = tuple(torch.arange(size, device=plane_xy.device) for size in sizes)
        else:
            real = torch.float64 if plane_xy.dtype == torch.float64 else torch.float32
            axes = tuple(
                torch.linspace(-0.1, 1.05, size, dtype=real, device=plane_xy.device)
                for size in sizes
            )
        return function(plane_xy, plane_yt, plane_xt, axes, grid=grid, reduce=reduce)

    return call


TRIPLANE_GATHER_LATTICE = OpCase(
    name="triplane_gather_lattice",
    function=_on_lattice(triplane_gather),
    reference=_on_lattice(triplane_gather_reference),
    samples=[
        Sample(_planes(*_COORDTOK), {"sizes": (5, 16, 16), "grid": (128, 16, 16)}),
        Sample(_planes(2, 6, 5, 7, 13), {"sizes": (7, 3, 65)}),
        Sample(_planes(3, 4, 3, 2, 8), {"sizes": (11, 2, 3), "reduce": "sum"}),
        Sample(_planes(2, 4, 3, 2, 8), {"sizes": (3, 1, 70), "reduce": "product"}),
        Sample(_planes(2, 4, 3, 2, 5), {"sizes": (9, 7, 1)}),
        Sample(_planes(2, 4, 3, 2, 8), {"sizes": (3, 0, 2)}),
    ],
    make=_make,
    differentiable=("plane_xy", "plane_yt", "plane_xt"),
    raw=(
        (
            "triplane_gather_forward",
            lambda: (*_raw_planes(), torch.rand(3), torch.rand(2), torch.rand(4), [], "cat"),
        ),
        (
            "triplane_gather_backward",
            lambda: (
                torch.randn(2, 24, 8),
                *_raw_planes(),
                torch.rand(3),
                torch.rand(2),
                torch.rand(4),
                [],
                "product",
                [False, True, True, False],
            ),
        ),
    ),
)
