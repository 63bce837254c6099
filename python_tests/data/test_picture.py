"""PNG files are read back by another decoder; labels and error maps show what they say."""

import pytest
import torch

from vtok_ext.data.picture import draw_label, error_map, write_png

av = pytest.importorskip("av")


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (64, 33)])
def test_png_reads_back_bit_for_bit(tmp_path, size):
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator)
    path = tmp_path / "image.png"
    write_png(path, image)
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
        decoded = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
    assert torch.equal(decoded, image)
    assert list(tmp_path.iterdir()) == [path]


def test_png_of_something_else(tmp_path):
    with pytest.raises(ValueError, match=r"must be \[3, H, W\], got \[1, 4, 4\]"):
        write_png(tmp_path / "x.png", torch.zeros(1, 4, 4, dtype=torch.uint8))
    with pytest.raises(TypeError, match="must be uint8, got torch.float32"):
        write_png(tmp_path / "x.png", torch.zeros(3, 4, 4))
    assert list(tmp_path.iterdir()) == []


def test_label_draws_each_letter_in_its_cell():
    image = torch.zeros(3, 9, 14, dtype=torch.uint8)
    draw_label(image, "TI", top=1, left=1, colour=(1, 2, 3))
    drawn = image[0] > 0
    rows = ["".join("#" if dot else "." for dot in row) for row in drawn.tolist()]
    assert rows == [
        "..............",
        ".#####..###...",
        "...#.....#....",
        "...#.....#....",
        "...#.....#....",
        "...#.....#....",
        "...#.....#....",
        "...#....###...",
        "..............",
    ]
    assert image[:, drawn].unique(dim=1).flatten().tolist() == [1, 2, 3]


def test_label_is_cut_at_the_border():
    image = torch.zeros(3, 5, 8, dtype=torch.uint8)
    draw_label(image, "WWW", top=2, left=5, scale=2)
    assert image[:, 2:, 5:].any() and not image[:, :2].any()


def test_error_map_goes_from_black_to_bright():
    a = torch.zeros(3, 1, 4, dtype=torch.uint8)
    b = torch.tensor([0, 16, 32, 200], dtype=torch.uint8).view(1, 1, 4).expand(3, 1, 4)
    brightness = error_map(a, b).float().mean(0).flatten()
    assert brightness[0] == 0
    assert (brightness.diff() > 20).all()
