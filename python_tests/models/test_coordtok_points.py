"""Decoding CoordTok's planes in parts: slices, frames, times in between, rectangles, points."""

import pytest
import torch
from helpers import assert_close

import vtok_ext as vt
from vtok_ext.models import coordtok
from vtok_ext.models.coordtok_points import (
    Lattice,
    locate_times,
    patches_to_video,
    rows_of_points,
    slice_bounds,
)
from vtok_ext.models.latent_statistics import LatentStatistics

SMALL = {
    "video_shape": (8, 16, 24),
    "enc_embed_dim": 8,
    "enc_num_layers": 1,
    "enc_num_heads": 2,
    "enc_patch_num_layers": 0,
    "enc_patch_size": (2, 8, 8),
    "latent_resolution": (8, 4, 6),
    "latent_channels": 3,
    "latent_patch_size": (4, 1, 2),
    "dec_embed_dim": 24,
    "dec_num_layers": 2,
    "dec_num_heads": 2,
    "dec_patch_size": (1, 4, 4),
}
POINTS = 8 * 4 * 6


def small(independent: bool = False, **overrides):
    """A model; `independent`: its points do not see each other, so parts equal the whole."""
    torch.manual_seed(0)
    model = vt.create_model("coordtok_large_128", **{**SMALL, **overrides}).eval()
    if independent:
        for layer in model.decoder.transformer.layers:
            torch.nn.init.zeros_(layer.attn.proj.weight)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def tok():
    return small()


@pytest.fixture(scope="module")
def planes():
    generator = torch.Generator().manual_seed(1)
    shapes = {"xy": (4, 6), "yt": (8, 6), "xt": (8, 4)}
    return {name: torch.randn(2, *shape, 3, generator=generator) for name, shape in shapes.items()}


def all_points(grid):
    axes = torch.meshgrid(*(torch.arange(size) for size in grid), indexing="ij")
    return torch.stack(axes, -1).reshape(1, -1, 3).expand(2, -1, -1)


@pytest.mark.parametrize("num_slices", [1, 2, 7, 100, POINTS])
def test_no_slice_count_leaves_points_out(num_slices):
    bounds = slice_bounds(POINTS, num_slices, drop_rest=False)
    assert [point for a, b in bounds for point in range(a, b)] == list(range(POINTS))
    sizes = {b - a for a, b in bounds}
    assert len(bounds) == num_slices and max(sizes) - min(sizes) <= 1
    dropped = slice_bounds(POINTS, num_slices, drop_rest=True)
    assert {b - a for a, b in dropped} == {POINTS // num_slices} and dropped[0][0] == 0


@pytest.mark.parametrize("num_slices", [1, 5, 8])
def test_a_slice_is_one_call_of_the_decoder(tok, planes, num_slices):
    points = all_points((8, 4, 6))
    parts = [
        tok.decode_points(planes, points[:, a:b])
        for a, b in slice_bounds(POINTS, num_slices, drop_rest=False)
    ]
    expected = patches_to_video(torch.cat(parts, 1), (8, 4, 6), (1, 4, 4))
    decoded = tok.decode(planes, num_slices=num_slices)
    assert_close(decoded, expected, "slices", factor=5)
    if num_slices == 5:
        assert not torch.allclose(decoded, tok.decode(planes), atol=1e-3), "slices change it"
        reference = tok.decode(planes, num_slices=5, frames="reference")
        # 5 slices of 38 points: the last two patches are blank.
        assert (reference[:, :, -1, -4:, -8:] == 0).all() and (decoded[:, :, -1, -4:] != 0).any()
        assert (reference[:, :, -1, -4:, :-8] != 0).all()


def test_fewer_frames_of_the_same_planes(tok, planes):
    points = all_points((3, 4, 6))
    expected = patches_to_video(tok.decode_points(planes, points), (3, 4, 6), (1, 4, 4))
    assert_close(tok.decode(planes, num_frames=3), expected, "three frames", factor=5)


def test_several_videos_at_a_time(tok, planes, monkeypatch):
    together = tok.decode(planes)
    batches = []
    hook = tok.decoder.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    monkeypatch.setattr(coordtok, "_DECODE_BYTES", 1)
    one_by_one = tok.decode(planes)
    hook.remove()
    assert batches == [1, 1]
    assert_close(one_by_one, together, "one video at a time", factor=5)


@pytest.mark.parametrize(
    ("dtype", "batches"), [(torch.float32, [1, 1, 1]), (torch.bfloat16, [2, 1])]
)
def test_default_plan_stays_below_two_gibibytes(dtype, batches):
    """Released width, 32,768 points: 12 vectors of 1,024 numbers each are 1.5 GiB in float32."""
    with torch.device("meta"):
        model = vt.create_model("coordtok_large_128", dec_num_layers=1, enc_num_layers=1)
        model = model.to(dtype).requires_grad_(False)
        planes = {
            name: torch.empty(3, *model.config.plane_shape(name)) for name in ("xy", "yt", "xt")
        }
    seen = []
    model.decoder.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    assert model.decode(planes).shape == (3, 3, 128, 128, 128) and seen == batches


def test_parts_are_cut_by_the_recorded_rule(tok, planes):
    """48 points of two frames in 5 slices of 9: the last 3 patches are blank."""
    recorded = vt.Encoding(planes, 8, (16, 24), frame_rule="reference")
    frames = tok.decode_frames(recorded, [1, 6], num_slices=5)
    assert (frames[:, :, -1, -4:, -12:] == 0).all() and (frames[:, :, -1, -4:, :-12] != 0).all()
    region = tok.decode_region(recorded, 0, 0, 16, 24, times=[1, 6], num_slices=5)
    assert torch.equal(frames, region)
    assert torch.equal(tok.decode_frames(recorded, [1, 6]), tok.decode_frames(planes, [1, 6]))


def test_normalised_planes(planes):
    model = small()
    model.latent_statistics = LatentStatistics(
        {name: torch.tensor([0.5, -1.0, 2.0]) for name in planes},
        {name: torch.tensor([2.0, 1.0, 0.5]) for name in planes},
    )
    given = model.latent_statistics.normalize_as_given(planes)
    points = all_points((1, 4, 6))
    for decode in (
        lambda latent, **options: model.decode(latent, **options),
        lambda latent, **options: model.decode_frames(latent, [3, 1.5], **options),
        lambda latent, **options: model.decode_region(latent, 2, 2, 4, 4, **options),
        lambda latent, **options: model.decode_points(latent, points, **options),
    ):
        assert_close(decode(given, normalize=True), decode(planes), "restored", factor=10)


def test_frames_see_only_each_other(tok, planes):
    """Slices of one frame equal single frames; the order of the times is that of the result."""
    each = tok.decode(planes, num_slices=8)
    for time in (0, 5):
        alone = tok.decode_frames(planes, [time])
        assert_close(alone, each[:, :, time : time + 1], f"frame {time}", factor=5)
    pair, swapped = tok.decode_frames(planes, [6, 1]), tok.decode_frames(planes, [1.0, 6.0, 1.0])
    assert torch.equal(pair, swapped[:, :, [1, 0]])
    assert torch.equal(swapped[:, :, 0], swapped[:, :, 2])
    assert not torch.allclose(pair[:, :, 1:], each[:, :, 1:2], atol=1e-3), "they see each other"


def test_parts_equal_the_whole_where_points_are_independent(planes):
    model = small(independent=True)
    whole = model.decode(planes)
    assert_close(model.decode_frames(planes, [7, 0, 3]), whole[:, :, [7, 0, 3]], "frames", 5)
    part = model.decode_region(planes, 3, 5, 7, 9, num_slices=3)
    assert_close(part, whole[:, :, :, 3:10, 5:14], "rectangle", factor=5)
    part = model.decode_region(planes, 15, 23, 1, 1, times=[2])
    assert_close(part, whole[:, :, 2:3, 15:, 23:], "last pixel", factor=5)
    encoding = vt.Encoding(planes, 5, (10, 20))
    part = model.decode_region(encoding, 2, 0, 8, 20)
    assert_close(part, whole[:, :, :5, 2:10, :20], "rectangle of a short clip", factor=5)
    assert_close(model.decode_frames(encoding, [4]), whole[:, :, 4:5, :10, :20], "cropped", 5)


def test_patches_of_two_frames(planes):
    model = small(independent=True, dec_patch_size=(2, 4, 8))
    whole = model.decode(planes)
    assert whole.shape == (2, 3, 8, 16, 24)
    assert_close(model.decode(planes, num_frames=3), whole[:, :, :3], "odd number", factor=5)
    assert_close(model.decode_frames(planes, [6, 7, 1]), whole[:, :, [6, 7, 1]], "frames", 5)
    short = vt.Encoding(planes, 3, (16, 24))  # ends within a patch
    assert_close(model.decode_frames(short, [2]), whole[:, :, 2:3], "last frame", factor=5)
    positions, wanted = locate_times("op", [6, 7, 5.5, 6.5], 8, 2)
    assert positions.tolist() == [2.25, 3.0] and wanted.tolist() == [2, 3, 1, 2]


def test_times_between_frames(tok, planes):
    """The planes are interpolated, the positional vector is that of the frame before."""
    points = all_points((1, 4, 6)).double() / torch.tensor([1, 3, 5])
    points[..., 0] = 2.5 / 7
    expected = patches_to_video(tok.decode_points(planes, points.float()), (1, 4, 6), (1, 4, 4))
    between = tok.decode_frames(planes, [2.5])
    assert_close(between, expected, "between two frames", factor=5)
    assert not torch.allclose(between, tok.decode_frames(planes, [2]), atol=1e-3)
    near = tok.decode_frames(planes, [2 + 1e-6])
    assert torch.allclose(near, tok.decode_frames(planes, [2]), atol=1e-4)
    integral = locate_times("op", torch.tensor([3.0, 1.0]), 8, 1)
    assert integral[0].dtype == torch.int64 and integral[0].tolist() == [1, 3]


def test_integer_rows_are_exact_for_every_grid():
    for size in range(1, 300):
        index = torch.arange(size)
        points = torch.stack([index, index * 0, index * 0], -1)[None]
        assert torch.equal(rows_of_points(points, (size, 1, 1))[0], index)
        lattice = Lattice((index, torch.zeros(1).long(), torch.zeros(1).long()), (size, 1, 1))
        assert torch.equal(lattice.rows(torch.device("cpu")), index)


def test_real_rows_follow_the_reference_arithmetic():
    """Truncated float32 products: exact for powers of two, one short for some indices of others."""

    def recovered(size):
        index = torch.arange(size)
        coords = torch.stack([index / (size - 1), index * 0.0, index * 0.0], -1)[None]
        return rows_of_points(coords, (size, 1, 1))[0], index

    for size in (4, 8, 16, 32, 64, 128, 256):
        assert torch.equal(*recovered(size))
    rows, index = recovered(23)
    assert not torch.equal(rows, index) and set((index - rows).tolist()) == {0, 1}
    infinity = float("inf")
    for low, high in ((-1.0, 2.0), (-1e20, 1e20), (-infinity, infinity)):
        outside = torch.tensor([[[low, high, 0.5]]])
        assert rows_of_points(outside, (3, 3, 4)).tolist() == [[0 * 12 + 2 * 4 + 1]]


def test_points_are_left_as_they_are(tok, planes):
    coords = torch.rand(2, 5, 3)
    before, cells = coords.clone(), {name: plane.clone() for name, plane in planes.items()}
    first = tok.decode_points(planes, coords)
    assert torch.equal(first, tok.decode_points(planes, coords)) and torch.equal(coords, before)
    assert all(torch.equal(planes[name], cells[name]) for name in planes)
    leaf = coords.requires_grad_()
    tok.decode_points(planes, leaf).sum().backward()
    assert leaf.grad.abs().max() > 0


def test_errors(tok, planes):
    for times in ([], [8], [-0.5], [float("nan")], [[1.0]]):
        message = r"decode_frames: times must be a non-empty list of numbers in 0..7"
        with pytest.raises(ValueError, match=message):
            tok.decode_frames(planes, times)
    for region in ((0, 0, 17, 1), (-1, 0, 2, 2), (0, 24, 1, 1), (0, 0, 0, 4)):
        with pytest.raises(ValueError, match="must be integers within 16x24, got"):
            tok.decode_region(planes, *region)
    for times in ([True, False], torch.ones(8, dtype=torch.bool), [1j], "abc", None):
        with pytest.raises(TypeError, match="times must be a list or tensor of real numbers, got"):
            tok.decode_frames(planes, times)
    with pytest.raises(TypeError, match="decode_points: points must be a torch.Tensor, got list"):
        tok.decode_points(planes, [[[0, 0, 0]]])
    short = vt.Encoding(planes, 5, (16, 24))  # what lies behind its end was never trained
    for decode in (
        lambda: tok.decode_frames(short, [4, 4.5]),
        lambda: tok.decode_region(short, 0, 0, 2, 2, times=[5]),
    ):
        with pytest.raises(ValueError, match=r"times must be a non-empty list of numbers in 0..4"):
            decode()
    with pytest.raises(ValueError, match="decode: num_frames must be an integer in 1..5, got 6"):
        tok.decode(short, num_frames=6)
    with pytest.raises(TypeError, match="decode: plane yt must be a tensor, got list"):
        tok.decode({**planes, "yt": []})
    with pytest.raises(ValueError, match="num_slices must be an integer in 1..24, the points"):
        tok.decode_frames(planes, [1], num_slices=25)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_planes_of_no_real_numbers(tok, planes, dtype):
    wrong = {**planes, "yt": planes["yt"].to(dtype)}
    with pytest.raises(TypeError, match=f"decode: plane yt must be floating, got {dtype}"):
        tok.decode(wrong)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_planes_that_are_not_finite(tok, planes, value):
    wrong = {**planes, "xt": planes["xt"].clone()}
    wrong["xt"][0, 0, 0, 0] = value
    for decode in (
        tok.decode,
        lambda latent: tok.decode_frames(latent, [1]),
        lambda latent: tok.decode_region(latent, 0, 0, 4, 4),
        lambda latent: tok.decode_points(latent, all_points((1, 1, 1))),
    ):
        with pytest.raises(ValueError, match="plane xt must be finite, got NaN or infinite values"):
            decode(wrong)


@pytest.mark.parametrize(
    ("decode", "message"),
    [
        (lambda m, p: m.decode(p, num_frames=True), "num_frames must be an integer in 1..8"),
        (lambda m, p: m.decode(p, num_slices=True), "num_slices must be an integer in 1..192"),
        (lambda m, p: m.decode(p, size=(4.5, 3)), r"must be within .* got \[8, 4.5, 3\]"),
        (lambda m, p: m.decode(p, size=("4", "3")), r"must be within .* got \[8, '4', '3'\]"),
        (lambda m, p: m.decode(p, size=(17, 3)), r"must be within .* got \[8, 17, 3\]"),
        (lambda m, p: m.decode(p, output="int"), "decode: output must be one of"),
        (lambda m, p: m.decode_frames(p, [1], size=(True, 3)), "must be within the decoded"),
        (lambda m, p: m.decode_frames(p, [1], output="int"), "decode_frames: output must be"),
        (lambda m, p: m.decode_region(p, False, 0, 4, 4), "must be integers within 16x24"),
        (lambda m, p: m.decode_region(p, 0, 0, 4, 4, output="int"), "decode_region: output must"),
    ],
)
def test_arguments_are_refused_before_anything_is_decoded(tok, planes, decode, message):
    hook = tok.decoder.register_forward_pre_hook(lambda *_: pytest.fail("the decoder ran"))
    try:
        with pytest.raises(ValueError, match=message):
            decode(tok, planes)
    finally:
        hook.remove()
