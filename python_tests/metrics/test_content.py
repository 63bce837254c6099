"""Dynamics and detail of single videos, and LPIPS of pairs."""

import pytest
import torch

import vtok_ext as vt
from vtok_ext.data.procedural import procedural_clip
from vtok_ext.metrics.lpips_network import random_lpips


def test_dynamics_of_known_videos():
    still = torch.full((2, 3, 4, 5, 6), 40, dtype=torch.uint8)
    blinking = still.clone()
    blinking[1, :, 1::2] = 91  # by 51 / 255 = 0.2, every frame
    found = vt.metrics.video_dynamics(blinking)
    torch.testing.assert_close(found, torch.tensor([0.0, 0.04]))
    as_float = blinking.float() / 127.5 - 1
    torch.testing.assert_close(vt.metrics.video_dynamics(as_float), found)


def test_detail_of_known_videos():
    """A step from 0 to 1 has gradient 4 in the two columns beside it."""
    video = torch.zeros(1, 3, 2, 8, 10, dtype=torch.uint8)
    video[..., 5:] = 255
    found = vt.metrics.sobel_frequency(video)
    torch.testing.assert_close(found, torch.tensor([4 * 2 / 8]))
    torch.testing.assert_close(vt.metrics.sobel_frequency(video.transpose(3, 4)), found)
    assert vt.metrics.sobel_frequency(video[..., :5]).item() == 0
    gray = video[:, :1]
    torch.testing.assert_close(vt.metrics.sobel_frequency(gray), found)


def test_both_rise_with_speed_and_detail():
    video = procedural_clip(17, 48, 48, seed=3)[None]
    fast = video[:, :, ::4]
    assert vt.metrics.video_dynamics(fast) > 2 * vt.metrics.video_dynamics(video)
    blurred = torch.nn.functional.avg_pool3d(video.float(), (1, 5, 5), 1, (0, 2, 2)) / 127.5 - 1
    assert vt.metrics.sobel_frequency(blurred) < vt.metrics.sobel_frequency(video)


def test_lpips_of_videos():
    network = random_lpips(0, (4, 8, 8, 8, 8))
    source = procedural_clip(3, 32, 24, seed=1)[None]
    noisy = (source.int() + torch.randint(-40, 40, source.shape)).clamp(0, 255).to(torch.uint8)
    frames = vt.metrics.lpips(noisy, source, network=network, per_frame=True)
    assert frames.shape == (1, 3) and bool((frames > 0).all())
    mean = vt.metrics.lpips(noisy, source, network=network)
    torch.testing.assert_close(mean, frames.mean())
    assert vt.metrics.lpips(source, source, network=network) == 0
    a, b = (v[:, :, 1].float() / 127.5 - 1 for v in (noisy, source))
    torch.testing.assert_close(network(a, b).flatten(), frames[:, 1])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: vt.metrics.video_dynamics(torch.zeros(1, 3, 1, 8, 8)), ValueError, "T >= 2"),
        (
            lambda: vt.metrics.video_dynamics(torch.zeros(1, 3, 2, 8, 8).int()),
            TypeError,
            "uint8 or",
        ),
        (lambda: vt.metrics.sobel_frequency(torch.zeros(1, 3, 1, 2, 8)), ValueError, "H >= 3"),
        (lambda: vt.metrics.sobel_frequency(torch.zeros(1, 2, 1, 8, 8)), ValueError, "3 or 1"),
        (
            lambda: vt.metrics.lpips(*[torch.zeros(1, 3, 1, 15, 16)] * 2),
            ValueError,
            "videos must be .B, 3, T, >= 16, >= 16.",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
