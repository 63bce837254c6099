"""PSNR and SSIM: recorded reference values, closed forms, grouping, ranges and refusals."""

import importlib.util
import json
import math

import pytest
import torch

from vtok_ext import metrics

METRICS = [metrics.psnr, metrics.ssim]


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    source = torch.rand((2, 3, 19, 24, 32), generator=generator) * 2 - 1
    noise = 0.1 * torch.randn(source.shape, generator=generator)
    return (source + noise).clamp(-1, 1), source


@pytest.mark.parametrize("size", [48, 400])
def test_recorded_reference_values(parity_dir, size):
    """400 pixels also pin the pooling rule, 26 dB the position of epsilon."""
    path = parity_dir / "check_vidtok.py"
    spec = importlib.util.spec_from_file_location("check_vidtok", path)
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    expected = json.loads((parity_dir / "vidtok" / "units.json").read_text())[f"metric{size}"]
    a, b = recipe.metric_pair(size)
    # float32 sums of 10^5 values; the order of summation is not the reference's.
    psnr, ssim = (metric(a, b, value_range=(0, 1)).item() for metric in METRICS)
    assert psnr == pytest.approx(expected["psnr"], rel=1e-5)
    assert ssim == pytest.approx(expected["ssim"], rel=1e-5)
    identical = metrics.psnr(a, a, value_range=(0, 1)).item()
    assert identical == pytest.approx(expected["psnr_identical"], abs=1e-4)


def test_psnr_of_a_constant_difference():
    source = torch.zeros(1, 3, 2, 4, 4)
    for difference in (0.02, 0.2, 1.0):
        expected = -20 * math.log10(difference / 2)
        actual = metrics.psnr(source + difference, source).item()
        assert actual == pytest.approx(expected, abs=1e-3)


def test_ssim_of_identical_and_unrelated_videos(pair):
    reconstruction, source = pair
    assert metrics.ssim(source, source).item() == pytest.approx(1, abs=1e-6)
    unrelated = metrics.ssim(source.flip(-1), source).item()
    assert abs(unrelated) < 0.2 < metrics.ssim(reconstruction, source).item() < 1


def test_ssim_by_the_definition():
    """One window, one channel: the sums written out in float64."""
    generator = torch.Generator().manual_seed(1)
    a, b = torch.rand((2, 1, 1, 1, 11, 11), generator=generator).unbind(0)
    offset = torch.arange(11, dtype=torch.float64) - 5
    weights = torch.exp(-(offset[:, None] ** 2 + offset[None] ** 2) / 4.5)
    weights /= weights.sum()
    x, y = a[0, 0, 0].double(), b[0, 0, 0].double()
    mx, my = (weights * x).sum(), (weights * y).sum()
    vx, vy = (weights * x * x).sum() - mx**2, (weights * y * y).sum() - my**2
    cov = (weights * x * y).sum() - mx * my
    expected = (2 * mx * my + 1e-4) * (2 * cov + 9e-4)
    expected /= (mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4)
    actual = metrics.ssim(a, b, value_range=(0, 1)).item()
    assert actual == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("metric", METRICS)
def test_mean_over_frames_of_any_grouping(metric, pair):
    """19 frames are two groups of 16 + 3, which must weigh by their frames."""
    reconstruction, source = pair
    frames = metric(reconstruction, source, per_frame=True)
    assert frames.shape == (2, 19)
    alone = torch.stack(
        [metric(reconstruction[:, :, t : t + 1], source[:, :, t : t + 1]) for t in range(19)]
    )
    torch.testing.assert_close(frames.mean(0), alone)
    torch.testing.assert_close(metric(reconstruction, source), frames.mean())


@pytest.mark.parametrize("metric", METRICS)
def test_value_ranges_agree(metric, pair):
    reconstruction, source = pair
    in_bytes = [((video + 1) * 127.5).round().to(torch.uint8) for video in pair]
    expected = metric(*[video.float() / 127.5 - 1 for video in in_bytes])
    torch.testing.assert_close(metric(*in_bytes), expected, rtol=1e-4, atol=1e-4)
    in_units = metric((reconstruction + 1) / 2, (source + 1) / 2, value_range=(0, 1))
    torch.testing.assert_close(in_units, metric(reconstruction, source), rtol=1e-4, atol=1e-4)


def test_only_the_reconstruction_is_clamped(pair):
    _, source = pair
    bright = torch.full_like(source, 1.0)
    torch.testing.assert_close(metrics.psnr(bright + 5, source), metrics.psnr(bright, source))


def test_half_precision_is_computed_in_float32(pair):
    reconstruction, source = (video.bfloat16() for video in pair)
    value = metrics.psnr(reconstruction, source)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, metrics.psnr(reconstruction.float(), source.float()))


VIDEO = torch.zeros(1, 3, 2, 16, 16)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("a", "b", "options", "error", "words"),
    [
        (VIDEO[0], VIDEO[0], {}, ValueError, r"must be \[B, C, T, H, W\], got \[3, 2, 16, 16\]"),
        (VIDEO, VIDEO[:, :, :1], {}, ValueError, "source must have the shape of reconstruction"),
        (VIDEO[:, :, :0], VIDEO[:, :, :0], {}, ValueError, "must have pixels"),
        (VIDEO.byte(), VIDEO, {}, TypeError, "uint8 if and only if"),
        (VIDEO.int(), VIDEO.int(), {}, TypeError, "must be uint8 or floating, got torch.int32"),
        (VIDEO, VIDEO, {"value_range": (1, 0)}, ValueError, "low < high"),
        (VIDEO.byte(), VIDEO.byte(), {"value_range": (0, 1)}, ValueError, "None for uint8"),
    ],
)
def test_wrong_arguments(metric, a, b, options, error, words):
    with pytest.raises(error, match=words):
        metric(a, b, **options)


def test_ssim_of_frames_smaller_than_its_window():
    small = torch.zeros(1, 3, 1, 10, 40)
    with pytest.raises(ValueError, match=r"at least 11x11, got \[10, 40\]"):
        metrics.ssim(small, small)
