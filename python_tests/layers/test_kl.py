"""The KL posterior against torch.distributions."""

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from vtok_ext.layers import kl_posterior


def test_mean_and_divergence():
    moments = torch.randn(3, 8, 2, 4, 5, generator=torch.Generator().manual_seed(0))
    latent, losses = kl_posterior(moments)
    mean, logvar = moments.chunk(2, dim=1)
    assert torch.equal(latent, mean)
    exact = kl_divergence(Normal(mean, (0.5 * logvar).exp()), Normal(0.0, 1.0)).sum() / 3
    assert torch.allclose(losses["kl_loss"], exact, rtol=1e-5)


def test_samples_have_the_posterior_moments():
    moments = torch.cat([torch.full((1, 1, 40000), 0.5), torch.full((1, 1, 40000), -1.0)], dim=1)
    latent, _ = kl_posterior(moments, sample=True, generator=torch.Generator().manual_seed(0))
    # Standard errors: 0.6065 / 200 = 0.003 and 0.6065 / 283 = 0.002; five of each.
    assert abs(latent.mean() - 0.5) < 0.015 and abs(latent.std() - 0.6065) < 0.011


def test_extreme_log_variances_are_clamped():
    moments = torch.tensor([0.0, 0.0, 1e4, -1e4]).view(1, 4, 1).requires_grad_(True)
    latent, losses = kl_posterior(moments, sample=True)
    assert latent.isfinite().all() and losses["kl_loss"].isfinite()
    losses["kl_loss"].backward()
    assert moments.grad.isfinite().all()


def test_half_moments_give_half_means_and_float32_samples():
    moments = torch.zeros(1, 4, 3, dtype=torch.bfloat16)
    latent, losses = kl_posterior(moments)
    assert latent.dtype == torch.bfloat16 and losses["kl_loss"].dtype == torch.float32
    assert kl_posterior(moments, sample=True)[0].dtype == torch.float32


def test_double_moments_stay_double():
    moments = torch.randn(1, 4, 3, dtype=torch.float64)
    latent, losses = kl_posterior(moments, sample=True)
    assert latent.dtype == losses["kl_loss"].dtype == torch.float64
    mean, logvar = moments.chunk(2, dim=1)
    exact = kl_divergence(Normal(mean, (0.5 * logvar).exp()), Normal(0.0, 1.0)).sum()
    assert torch.allclose(losses["kl_loss"], exact, rtol=1e-12)


def test_one_generator_per_sample():
    """A sample's noise does not depend on the others of its batch."""
    moments = torch.randn(3, 4, 2, 3, 3)

    def latent(rows):
        generators = [torch.Generator().manual_seed(row) for row in rows]
        return kl_posterior(moments[list(rows)], sample=True, generator=generators)[0]

    assert torch.equal(latent(range(3))[1:], latent(range(1, 3)))
    with pytest.raises(ValueError, match="generator must be one per sample of 3, got 1"):
        kl_posterior(moments, sample=True, generator=[torch.Generator()])
