"""Frechet distance of two sets of features, each taken for a normal distribution, in float64.

    d = |m_a - m_b|^2 + tr(C_a) + tr(C_b) - 2 tr sqrt(sqrt(C_a) C_b sqrt(C_a))

m are means, C unbiased covariances. Source: Heusel et al. (arXiv 1706.08500, equation 6) and
Unterthiner et al. (arXiv 1812.01717).
"""

from __future__ import annotations

import torch
from torch import Tensor


def frechet_distance(
    a: Tensor,  # [N, D]
    b: Tensor,  # [M, D]
) -> Tensor:
    """Returns the Frechet distance, a float64 scalar >= 0.

    With fewer than D samples the covariances are singular, and the distance is far too large: it
    falls as samples are added. Compare only numbers of equal counts.

    Args:
        a, b: features of N >= 2 and M >= 2 samples, finite.

    Raises:
        ValueError: other shapes, or features that are not finite.

    Deterministic; any device.
    """
    for name, features in (("a", a), ("b", b)):
        if features.dim() != 2 or features.shape[0] < 2 or features.shape[1] != a.shape[-1]:
            raise ValueError(
                f"frechet_distance: {name} must be [N >= 2, D] of one D, got {list(features.shape)}"
            )
        if not bool(torch.isfinite(features).all()):
            raise ValueError(f"frechet_distance: {name} must be finite, got NaN or infinity")
    a, b = a.double(), b.double()
    mean = (a.mean(0) - b.mean(0)).square().sum()
    cov_a, cov_b = _covariance(a), _covariance(b)
    root = _square_root(cov_a)
    # The product is symmetric up to rounding, which may make small eigenvalues negative.
    product = root @ cov_b @ root
    mixed = torch.linalg.eigvalsh((product + product.mT) / 2).clamp(min=0).sqrt().sum()
    return (mean + cov_a.trace() + cov_b.trace() - 2 * mixed).clamp(min=0)


def _covariance(features: Tensor) -> Tensor:
    centred = features - features.mean(0)
    return centred.mT @ centred / (features.shape[0] - 1)


def _square_root(matrix: Tensor) -> Tensor:
    """Returns the symmetric root of a positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.mT
