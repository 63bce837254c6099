"""Loss terms beyond the recorded ones: their rules, their limits, and what they refuse."""

import pytest
import torch

from vtok_ext.training.adversarial import LeCam, adaptive_weight, discriminator_loss, generator_loss
from vtok_ext.training.discriminators import PatchDiscriminator2d, PatchDiscriminator3d
from vtok_ext.training.losses import LossConfig, TokenizerLoss, batches_of_global_steps
from vtok_ext.training.lpips import random_lpips

NARROW = (4, 8, 8, 8, 8)


def pair(seed=0, shape=(2, 3, 3, 32, 32)):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(shape, generator=generator) * 2 - 1 for _ in range(2)]


def plain(**options) -> LossConfig:
    return LossConfig(**{"perceptual_weight": 0.0, "discriminator": "none", **options})


def test_published_start_is_counted_in_batches():
    assert batches_of_global_steps(20001) == LossConfig().discriminator_start == 10001
    assert [batches_of_global_steps(n) for n in (0, 1, 2, 3)] == [0, 1, 1, 2]


@pytest.mark.parametrize("pixel", ["l1", "l2"])
def test_reconstruction_is_summed_over_an_image(pixel):
    x, y = pair()
    weight = torch.zeros(1, requires_grad=True)
    loss, seen = TokenizerLoss(plain(pixel=pixel)).generator_terms(x, y, {}, weight, 0)
    per_element = (x - y).abs() if pixel == "l1" else (x - y).square()
    torch.testing.assert_close(loss, per_element.sum() / (2 * 3))
    torch.testing.assert_close(seen["rec_loss"], per_element.mean())
    assert not any(value.requires_grad for value in seen.values())


def test_logvar_is_the_maximum_likelihood_scale_when_trained():
    """d nll / d logvar = 0 at exp(logvar) = rec."""
    x, y = pair()
    rec = (x - y).abs().mean()
    loss = TokenizerLoss(plain(logvar=float(rec.log())))
    loss.generator_terms(x, y, {}, x, 0)[0].backward()
    assert abs(loss.logvar.grad) < 1e-2
    assert TokenizerLoss(plain(learn_logvar=False)).logvar.requires_grad is False


def test_regularization_terms_are_weighted():
    x, y = pair()
    loss = TokenizerLoss(plain(aux_weight=2.0, kl_weight=0.5))
    base = loss.generator_terms(x, y, {}, x, 0)[0]
    terms = {"aux_loss": torch.tensor(3.0), "kl_loss": torch.tensor(4.0), "entropy": torch.ones(())}
    more = loss.generator_terms(x, y, terms, x, 0)[0]
    torch.testing.assert_close(more - base, torch.tensor(8.0), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", ["2d", "3d"])
def test_adversarial_terms_begin_at_their_batch(kind):
    torch.manual_seed(0)
    x, y = pair(shape=(2, 3, 8, 32, 32))
    config = LossConfig(discriminator=kind, discriminator_width=4, discriminator_start=5)
    loss = TokenizerLoss(config, random_lpips(0, NARROW))
    scale = torch.ones((), requires_grad=True)
    for batch, active in ((4, False), (5, True)):
        seen = loss.generator_terms(x, y * scale, {}, scale, batch)[1]
        assert ("d_weight" in seen) == active
        total, _ = loss.discriminator_terms(x, y, batch)
        assert total.requires_grad == active and (float(total.detach()) != 0) == active
    assert float(loss.lecam.real_mean) != 0  # followed in both batches


def test_adaptive_weight():
    last = torch.tensor([3.0, 4.0], requires_grad=True)
    reconstruction, adversarial = 6 * last.sum(), (last * torch.tensor([0.0, 2.0])).sum()
    weight = adaptive_weight(reconstruction, adversarial, last)
    torch.testing.assert_close(weight, torch.tensor(6 * 2**0.5 / (2 + 1e-4)))
    assert not weight.requires_grad
    tiny = adaptive_weight(reconstruction * 1e6, adversarial * 0, last)
    assert float(tiny) == 1e4
    with pytest.raises(ValueError, match="must require gradients, got a frozen one"):
        adaptive_weight(reconstruction, adversarial, last.detach())


def test_adaptive_weight_of_half_gradients():
    """Those that overflow are told, and with the scale of the loss they neither do nor vanish."""
    last = torch.tensor([3.0, 4.0], requires_grad=True)

    def loss(gradient):  # of each element of `last`, in float16
        return last.half().float().sum() * gradient

    for gradients, scale in (((1e5, 4e4), 2.0**-6), ((1e-5, 1e-8), 2.0**20)):
        weight = adaptive_weight(*map(loss, gradients), last, scale)
        expected = gradients[0] * 2**0.5 / (gradients[1] * 2**0.5 + 1e-4)
        torch.testing.assert_close(weight, torch.tensor(expected), rtol=2e-3, atol=0)
    for gradients in ((1e5, 1.0), (1.0, 1e5)):
        assert adaptive_weight(*map(loss, gradients), last).isnan()


def test_everything_remembered_is_saved():
    torch.manual_seed(0)
    config = plain(discriminator="2d", discriminator_width=4, discriminator_start=0)
    loss, other = TokenizerLoss(config), TokenizerLoss(config)
    x, y = pair()
    loss.discriminator_terms(x, y, 0)
    other.load_state_dict(loss.state_dict())
    names = set(loss.state_dict())
    assert {"logvar", "lecam.real_mean", "lecam.fake_mean"} < names
    assert other.lecam.fake_mean == loss.lecam.fake_mean != 0
    first, second = (m.discriminator_terms(x, y, 1)[0] for m in (loss, other))
    assert torch.equal(first, second)


def test_perceptual_network_is_no_part_of_the_state():
    loss = TokenizerLoss(LossConfig(discriminator="none"), random_lpips(0, NARROW))
    assert not any("lin0" in name for name in loss.state_dict())
    assert [name for name, _ in loss.named_parameters()] == ["logvar"]
    loss.double()
    assert (
        loss._perceptual[0].lin0.model["1"].weight.dtype == torch.float64
    )  # but moves with the rest


def test_lecam_penalises_only_the_wrong_side():
    lecam = LeCam()
    real, fake = torch.full((4,), -1.0), torch.full((4,), 1.0)
    assert float(lecam(real, fake)) == 0  # below and above the averages, which are 0
    assert float(lecam(-real, -fake)) == 2
    for _ in range(2):
        lecam.update(real, fake)
    torch.testing.assert_close(lecam.real_mean, torch.tensor(-(1 - 0.999**2)).double())


def test_discriminator_losses_penalise_both_sides_by_half():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 1.0])
    torch.testing.assert_close(discriminator_loss(real, fake), torch.tensor(0.5 * (0.25 + 1.0)))
    soft = torch.nn.functional.softplus
    expected = 0.5 * (soft(-real).mean() + soft(fake).mean())
    torch.testing.assert_close(discriminator_loss(real, fake, "vanilla"), expected)


def test_generator_losses_differ_in_what_they_average():
    logits = torch.tensor([[4.0, -4.0], [1.0, 1.0]]).view(2, 1, 1, 2)
    expected = torch.nn.functional.softplus(-torch.tensor([0.0, 1.0])).mean()
    torch.testing.assert_close(generator_loss(logits), expected)
    torch.testing.assert_close(generator_loss(logits, cross_entropy=False), torch.tensor(-0.5))


def test_smallest_images_and_clips_give_logits():
    assert PatchDiscriminator2d(2)(torch.zeros(2, 3, 24, 24)).shape == (2, 1, 1, 1)
    assert PatchDiscriminator3d(2)(torch.zeros(2, 3, 1, 2, 1)).shape == (2, 1, 1, 1, 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LossConfig(pixel="l3"), r"loss: pixel must be one of .*, got 'l3'"),
        (lambda: LossConfig(lecam_weight=-1.0), r"loss: lecam_weight must be .*, got -1.0"),
        (lambda: LossConfig(logvar=float("nan")), r"loss: logvar must be finite, got nan"),
        (lambda: TokenizerLoss(LossConfig()), r"perceptual must be a network .* got None"),
        (lambda: discriminator_loss(*pair(), "soft"), r"kind must be one of .*, got 'soft'"),
        (lambda: PatchDiscriminator2d(0), r"width and in_channels must be at least 1, got 0, 3"),
        (
            lambda: PatchDiscriminator2d(4)(torch.zeros(2, 3, 24, 23)),
            r"PatchDiscriminator2d: input must be \[N, 3, H, W\] with H, W >= 24, got .* 24, 23\]",
        ),
        (
            lambda: PatchDiscriminator3d(4)(torch.zeros(1, 3, 8, 8)),
            r"PatchDiscriminator3d: input must be \[B, 3, T, H, W\], got \[1, 3, 8, 8\]",
        ),
        (
            lambda: TokenizerLoss(plain()).discriminator_terms(*pair(), 0),
            r"discriminator must be 2d or 3d for this, got 'none'",
        ),
        (
            lambda: TokenizerLoss(plain()).generator_terms(
                torch.zeros(1, 3, 2, 8, 8), torch.zeros(1, 3, 1, 8, 8), {}, torch.ones(1), 0
            ),
            r"video and reconstruction must be equal \[B, 3, T, H, W\]",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
