"""Errors of the triplane lookup: what the function refuses, and what the binding checks to protect
memory."""

import pytest
import torch
from case_triplane_gather import make_coords, make_planes

import vtok_ext as vt
from vtok_ext import _native


def call(change=None, coords=None, **kwargs):
    """The op on good arguments, one of them changed."""
    planes = dict(zip(("plane_xy", "plane_yt", "plane_xt"), make_planes(), strict=True))
    points = make_coords(2, 4) if coords is None else coords
    return vt.triplane_gather(**{**planes, "coords": points, **(change or {}), **kwargs})


AXES = (torch.rand(3), torch.rand(2), torch.rand(4))


@pytest.mark.parametrize(
    "error, message, arguments",
    [
        (
            TypeError,
            "plane_xy must be a torch.Tensor, got list",
            {"change": {"plane_xy": [1.0]}},
        ),
        (
            TypeError,
            "plane_xy must be float32, .* on cpu, got torch.int64",
            {"change": {"plane_xy": torch.zeros(2, 5, 7, 8).long()}},
        ),
        (
            TypeError,
            "plane_xt must be torch.float32 as plane_xy, got torch.float16",
            {"change": {"plane_xt": torch.zeros(2, 6, 5, 8).half()}},
        ),
        (
            ValueError,
            r"plane_yt must be on cpu as plane_xy, got meta",
            {"change": {"plane_yt": torch.zeros(2, 6, 7, 8, device="meta")}},
        ),
        (
            ValueError,
            r"plane_xy must be \[B, rows, columns, C\] .*, got \[5, 7, 8\]",
            {"change": {"plane_xy": torch.zeros(5, 7, 8)}},
        ),
        (
            ValueError,
            r"plane_xy must be \[B, rows, .*at least one row.*, got \[2, 5, 0, 8\]",
            {"change": {"plane_xy": torch.zeros(2, 5, 0, 8)}},
        ),
        (
            ValueError,
            r"plane_xy must have at most 2\^24 rows and columns, got \[2, 16777217, 7, 8\]",
            {"change": {"plane_xy": torch.zeros(1).expand(2, 2**24 + 1, 7, 8)}},
        ),
        (
            ValueError,
            r"plane_yt \[B, Rt, R1, C\] must be \[2, 6, 7, 8\] .* got \[2, 6, 5, 8\]",
            {"change": {"plane_yt": torch.zeros(2, 6, 5, 8)}},
        ),
        (
            ValueError,
            r"plane_xt \[B, Rt, R0, C\] must be \[2, 6, 5, 8\] .* got \[2, 7, 5, 8\]",
            {"change": {"plane_xt": torch.zeros(2, 7, 5, 8)}},
        ),
        (
            ValueError,
            r"coords must be \[B, N, 3\] with B = 2, got \[3, 4, 3\]",
            {"coords": torch.rand(3, 4, 3)},
        ),
        (
            TypeError,
            "coords must be torch.float32, int32 or int64 for torch.float32 planes, got "
            "torch.bfloat16",
            {"coords": torch.rand(2, 4, 3).bfloat16()},
        ),
        (
            TypeError,
            "three axes .*, got tuple of 2",
            {"coords": AXES[:2]},
        ),
        (
            TypeError,
            "an axis of the lattice must be a torch.Tensor, got float",
            {"coords": (*AXES[:2], 0.5)},
        ),
        (
            ValueError,
            r"lattice axes must be \[N\] of one dtype, got \[3\] torch.float32, \[1, 2\]",
            {"coords": (AXES[0], AXES[1][None], AXES[2])},
        ),
        (
            ValueError,
            "lattice axes must not require a gradient",
            {"coords": (AXES[0].clone().requires_grad_(), *AXES[1:])},
        ),
        (
            ValueError,
            "grid must be given with integer coords, got None",
            {"coords": torch.zeros(2, 4, 3).int()},
        ),
        (ValueError, r"grid must be None with real coords, got \(4, 4, 4\)", {"grid": (4, 4, 4)}),
        (
            ValueError,
            r"grid must be three positive sizes \(t, x, y\), got \[4, 0, 4\]",
            {"coords": torch.zeros(2, 4, 3).int(), "grid": (4, 0, 4)},
        ),
        (ValueError, "reduce must be 'cat', 'sum' or 'product', got 'mean'", {"reduce": "mean"}),
    ],
)
def test_errors_name_requirement_and_actual(error, message, arguments):
    with pytest.raises(error, match=f"triplane_gather: .*{message}|triplane_gather: {message}"):
        call(**arguments)


def raw_forward(planes, coords, axis_x=None, axis_y=None, grid=(), reduce="cat", out=None):
    out = torch.empty(2, 4, 24) if out is None else out
    _native.module().triplane_gather_forward(
        *planes, coords, axis_x, axis_y, list(grid), reduce, out, (1, 0)
    )


def test_the_binding_checks_what_protects_memory():
    planes, coords = make_planes(), make_coords(2, 4)
    with pytest.raises(ValueError, match=r"out must be contiguous \[2, 4, 24\], got \[2, 3, 24\]"):
        raw_forward(planes, coords, out=torch.empty(2, 3, 24))
    with pytest.raises(TypeError, match="out must be float32, got float16"):
        raw_forward(planes, coords, out=torch.empty(2, 4, 24).half())
    with pytest.raises(ValueError, match=r"plane_xy must be contiguous \[2, 5, 7, 8\]"):
        raw_forward(
            [planes[0].permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3), *planes[1:]], coords
        )
    with pytest.raises(ValueError, match=r"plane_xt must be contiguous \[2, 6, 5, 8\]"):
        raw_forward([*planes[:2], planes[2][:, :5]], coords)
    with pytest.raises(ValueError, match=r"coords must be \[2, N, 3\], got \[2, 4, 2\]"):
        raw_forward(planes, coords[..., :2])
    with pytest.raises(TypeError, match="coords must be float32, int32 or int64, got float64"):
        raw_forward(planes, coords.double())
    with pytest.raises(ValueError, match="grid must have 3 sizes for integer coords .* got 0"):
        raw_forward(planes, coords.int())
    with pytest.raises(ValueError, match=r"lattice axes must be \[N\] of one dtype"):
        raw_forward(planes, torch.rand(2), torch.rand(2).double(), torch.rand(1))
    with pytest.raises(ValueError, match="reduce must be 'cat', 'sum' or 'product', got 'max'"):
        raw_forward(planes, coords, reduce="max")


def test_the_binding_bounds_what_it_computes_with_32_bits():
    """2^24 + 4 rows: as float32, R - 1 is rounded up to R, one cell behind the last."""
    coords, out = torch.ones(1, 1, 3), torch.empty(1, 1, 3)
    long = torch.empty(1, 2**24 + 4, 1, 1)  # its memory is never touched
    with pytest.raises(ValueError, match=r"at most 2\^24 rows and columns, got 16777220"):
        raw_forward([long, torch.empty(1, 1, 1, 1), long.view(1, 1, -1, 1)], coords, out=out)
    deep = [torch.empty(1, 1, 1, 2**22 + 1) for _ in range(3)]
    out = torch.empty(1, 1, 3 * (2**22 + 1))
    with pytest.raises(ValueError, match=r"at most 2\^22 channels, got 4194305"):
        raw_forward(deep, coords, out=out)


def test_the_last_cell_of_a_long_axis():
    """The most rows there may be: a coordinate of 1 is the last cell, not one behind."""
    plane_xy, plane_yt = torch.zeros(1, 2**24, 1, 1), torch.zeros(1, 1, 1, 1)
    plane_xt = plane_xy.view(1, 1, -1, 1)
    plane_xy[0, -1] = 3
    features = vt.triplane_gather(plane_xy, plane_yt, plane_xt, torch.ones(1, 1, 3))
    assert features.tolist() == [[[3, 0, 3]]]


def test_the_binding_checks_the_workspace():
    planes, coords = make_planes(1, 32, 16, 16), make_coords(1, 9000)
    module, grads = _native.module(), [torch.empty_like(plane) for plane in planes]
    elements = module.triplane_gather_workspace(planes[0], 32, 9000, "cat")
    assert elements == 4 * 1280 * 8, "four chunks of 2,250 points"
    assert module.triplane_gather_workspace(planes[0], 32, 2000, "cat") == 0
    with pytest.raises(ValueError, match=r"workspace must be \[40960\] float32, got \[40959\]"):
        module.triplane_gather_backward(
            torch.zeros(1, 9000, 24),
            *planes,
            coords,
            None,
            None,
            [],
            "cat",
            *grads,
            None,
            torch.empty(elements - 1),
            (1, 0),
        )
