"""CoordTok's training loss: which points are drawn and what their patches are compared with."""

import pytest
import torch

from vtok_ext.models.coordtok_config import CoordTokConfig
from vtok_ext.models.coordtok_sampling import video_patches
from vtok_ext.training.coordtok_loss import PointLoss, PointLossConfig, draw_points
from vtok_ext.training.lpips import random_lpips

MODEL = CoordTokConfig(
    video_shape=(8, 32, 48),
    enc_patch_size=(2, 16, 16),
    latent_resolution=(8, 8, 8),
    latent_patch_size=(4, 4, 4),
    dec_patch_size=(1, 8, 8),
)
FRAMES = PointLossConfig(sampling="frames", num_points=48, perceptual_weight=1.0)


@pytest.fixture
def video():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(2, 3, 8, 32, 48, generator=generator) * 2 - 1


@pytest.fixture(scope="module")
def lpips():
    return random_lpips(0, (4, 4, 8, 8, 8))


def test_pixel_term_is_a_mean_per_clip_summed_over_the_batch(video):
    loss = PointLoss(PointLossConfig(num_points=20), MODEL)
    points = draw_points(loss.config, MODEL, torch.tensor([8, 3]))
    assert points.shape == (2, 20, 3) and points[1, :, 0].max() < 3
    off = torch.tensor([0.5, 0.25]).view(2, 1, 1)
    patches = video_patches(video, points, MODEL.dec_patch_size) + off
    total, terms = loss(patches, video, points)
    torch.testing.assert_close(total, torch.tensor(0.25 + 0.0625))
    torch.testing.assert_close(terms["pixel_loss"], torch.tensor((0.25 + 0.0625) / 2))


def test_perceptual_term_sums_over_the_drawn_frames(video, lpips):
    loss = PointLoss(FRAMES, MODEL, lpips)
    points = draw_points(FRAMES, MODEL, torch.tensor([8, 8]))
    assert points.shape == (2, 48, 3)  # two frames of 4 x 6 patches
    other = video.flip(1)
    patches = video_patches(other, points, MODEL.dec_patch_size)
    total, _ = loss(patches, video, points)
    drawn = points[:, ::24, 0]  # [B, 2]
    expected = torch.zeros(())
    for b in range(2):
        x, z = video[b, :, drawn[b]].transpose(0, 1), other[b, :, drawn[b]].transpose(0, 1)
        expected = expected + (x - z).square().mean() + lpips(z, x).sum()
    torch.testing.assert_close(total, expected)


def test_a_short_clip_gives_its_frames_again():
    """What is drawn of a clip does not depend on the others."""
    drawn = [
        draw_points(FRAMES, MODEL, torch.tensor([8, other]), [torch.Generator() for _ in range(2)])
        for other in (8, 1)
    ]
    assert drawn[1].shape == (2, 48, 3) and (drawn[1][1, :, 0] == 0).all()
    assert torch.equal(drawn[0][0], drawn[1][0])


def test_gradient_reaches_patches_through_both_terms(video, lpips):
    points = draw_points(FRAMES, MODEL, torch.tensor([8, 8]))
    start = video_patches(video.roll(1, 2), points, MODEL.dec_patch_size)
    gradients = []
    for weight in (0.0, 1.0):
        config = PointLossConfig(sampling="frames", num_points=48, perceptual_weight=weight)
        patches = start.clone().requires_grad_()
        PointLoss(config, MODEL, lpips)(patches, video, points)[0].backward()
        gradients.append(patches.grad)
    assert gradients[0].abs().sum() > 0
    assert not torch.allclose(*gradients)


def test_published_dropout_is_an_option(video, lpips):
    config = PointLossConfig("frames", 48, perceptual_weight=1.0, perceptual_dropout=0.5)
    points = draw_points(config, MODEL, torch.tensor([8, 8]))
    patches = video_patches(video.flip(3), points, MODEL.dec_patch_size)
    with_dropout, plain = PointLoss(config, MODEL, lpips), PointLoss(FRAMES, MODEL, lpips)
    values = torch.stack([with_dropout(patches, video, points)[0] for _ in range(200)])
    assert values.std() > 0
    expected = plain(patches, video, points)[0]
    assert abs(values.mean() - expected) < 4 * values.std() / 200**0.5
    assert torch.equal(plain(patches, video, points)[0], expected)


def test_dropout_of_a_clip_comes_from_its_generator(video, lpips):
    config = PointLossConfig("frames", 48, perceptual_weight=1.0, perceptual_dropout=0.5)
    points = draw_points(config, MODEL, torch.tensor([8, 8]))
    patches = video_patches(video.flip(3), points, MODEL.dec_patch_size)
    loss = PointLoss(config, MODEL, lpips)

    def value(clips, *seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return loss(patches[clips], video[clips], points[clips], generators)[0]

    state = torch.get_rng_state()
    both = value(slice(2), 5, 6)
    assert torch.equal(both, value(slice(2), 5, 6)) and not torch.equal(both, value(slice(2), 5, 7))
    torch.testing.assert_close(both, value(slice(1), 5) + value(slice(1, 2), 6))
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(ValueError, match="generators must divide 4 images equally, got 3"):
        value(slice(2), 5, 6, 7)


@pytest.mark.parametrize(
    ("config", "model", "message"),
    [
        ({"sampling": "both"}, {}, "loss: sampling must be one of"),
        ({"num_points": 0}, {}, "loss: num_points must be an integer >= 1, got 0"),
        ({"num_points": 1.5}, {}, "loss: num_points must be an integer >= 1, got 1.5"),
        ({"num_points": True}, {}, "loss: num_points must be an integer >= 1, got True"),
        ({"perceptual_weight": 1.0}, {}, "loss: perceptual_weight must be .* and 0 for sampling"),
        *(
            (
                {"sampling": "frames", "num_points": 24, "perceptual_weight": weight},
                {},
                f"loss: perceptual_weight must be finite and >= 0, .* got {weight}",
            )
            for weight in (-1.0, float("nan"), float("inf"))
        ),
        (
            {"perceptual_dropout": 0.5},
            {},
            "loss: perceptual_dropout must be 0 with perceptual_weight 0, got 0.5",
        ),
        ({"perceptual_dropout": 1.0}, {}, r"loss: perceptual_dropout must be in \[0, 1\), got 1.0"),
        ({"sampling": "frames", "num_points": 30}, {}, "must be a multiple of 24, .* got 30"),
        (
            {"sampling": "frames", "num_points": 24},
            {"dec_patch_size": (2, 8, 8)},
            "loss: sampling must be 'patches' for a model whose patches have 2 frames",
        ),
        (
            {"sampling": "frames", "num_points": 24, "perceptual_weight": 1.0},
            {},
            "PointLoss: perceptual must be a network for perceptual_weight 1.0, got None",
        ),
    ],
)
def test_settings_that_do_not_fit(config, model, message):
    with pytest.raises(ValueError, match=message):
        PointLoss(PointLossConfig(**config), MODEL.replace(**model))
