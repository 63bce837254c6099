"""boundary_jump: 1 without seams, the size of the seam with them."""

import math

import pytest
import torch

from vtok_ext.metrics import boundary_jump


def video(errors: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (reconstruction, source) whose error at frame t is errors[t]."""
    generator = torch.Generator().manual_seed(0)
    source = torch.rand((1, 3, len(errors), 4, 4), generator=generator)
    return source + torch.tensor(errors).view(1, 1, -1, 1, 1), source


def test_the_definition():
    # Changes: 0.1, 0.1, 0.5 (border at 3), 0.1, 0.1, 0.3 (border at 6), 0.1.
    reconstruction, source = video([0, 0.1, 0.2, 0.7, 0.8, 0.7, 0.4, 0.5])
    assert boundary_jump(reconstruction, source, 3).item() == pytest.approx(4, rel=1e-5)
    assert boundary_jump(reconstruction, source, borders=[3, 6]).item() == pytest.approx(
        4, rel=1e-5
    )


def test_a_first_chunk_of_another_length():
    reconstruction, source = video([0, 0.3, 0.4, 0.5, 0.6, 0.9, 1.0])
    jump = boundary_jump(reconstruction, source, 4, first_chunk_frames=1)  # borders 1 and 5
    assert jump.item() == pytest.approx(3, rel=1e-5)


def test_no_seam():
    reconstruction, source = video([0.1 * t for t in range(9)])
    assert boundary_jump(reconstruction, source, 4).item() == pytest.approx(1, rel=1e-5)
    assert boundary_jump(source, source, 4).item() == 1


def test_an_error_that_changes_at_borders_only():
    source = torch.zeros(1, 3, 8, 2, 2)
    reconstruction = torch.cat([source[:, :, :4], source[:, :, 4:] + 0.5], dim=2)
    assert math.isinf(boundary_jump(reconstruction, source, 4).item())


def test_uint8():
    source = torch.full((1, 3, 4, 2, 2), 100, dtype=torch.uint8)
    reconstruction = source + torch.tensor([0, 1, 3, 4], dtype=torch.uint8).view(1, 1, 4, 1, 1)
    assert boundary_jump(reconstruction, source, 2).item() == pytest.approx(2)


@pytest.mark.parametrize(
    ("shape", "options", "words"),
    [
        ((1, 3, 4, 2, 2), {}, "give one of chunk_frames and borders"),
        ((1, 3, 4, 2, 2), {"chunk_frames": 2, "borders": [2]}, "give one of"),
        ((1, 3, 4, 2, 2), {"chunk_frames": 4}, "got 0 borders in 4 frames"),
        ((1, 3, 4, 2, 2), {"chunk_frames": 1}, "got 3 borders in 4 frames"),
        ((1, 3, 4, 2, 2), {"chunk_frames": 0}, "at least 1, got 0"),
        ((1, 3, 4, 2, 2), {"borders": [0, 2]}, r"must lie in 1..3"),
        ((1, 3, 4, 2, 2), {"borders": [4]}, r"must lie in 1..3"),
        ((3, 4, 2, 2), {"chunk_frames": 2}, r"must be \[B, C, T, H, W\]"),
    ],
)
def test_wrong_arguments(shape, options, words):
    with pytest.raises(ValueError, match=words):
        boundary_jump(torch.zeros(shape), torch.zeros(shape), **options)
