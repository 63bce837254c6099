"""Residual tokens of VTok: v_t = g(F(x_t) - F(x_1)) of feature maps, three ways to pool.

    mean       g = mlp(mean over places): the paper's. The mean of a difference is the difference of
               means: whatever moves without changing its colours leaves no trace.
    grid       g = mlp(4 x 4 averages, flattened)
    attention  g = mlp whose first layer is fused with a pool by learned queries, `residual_pool`

Source: VTok (arXiv 2602.04202), second-hand notes; grid and attention are our own.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok_ext.models.sit_network import sincos_2d
from vtok_ext.models.vtok_config import RESIDUAL_GRID, VTokConfig
from vtok_ext.ops.residual_pool import residual_pool

# About half of the variance that enters a GELU leaves it.
_GELU_GAIN = math.sqrt(2)


def _keep_size(layer: nn.Linear, gain: float) -> None:
    """Makes the outputs of a new layer about `gain` times as large as its inputs.

    torch's own weights leave a third of the variance, and behind two such layers residual tokens
    have a tenth of a key token's deviation, little beside what tells frames and slots.
    """
    with torch.no_grad():
        layer.weight.mul_(math.sqrt(3) * gain)
        layer.bias.zero_()


class PooledResidual(nn.Module):
    """Returns mlp(pool(F(x_t)) - pool(F(x_1))), the pool being an average over side x side areas.

    Args:
        channels: C of the features.
        side: 1 for the mean, 4 for the grid.
        dim: D of the tokens.
    """

    def __init__(self, channels: int, side: int, dim: int) -> None:
        super().__init__()
        self.side = side
        layers = nn.Linear(side * side * channels, dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(layers[0], nn.GELU(), layers[1])
        _keep_size(layers[0], 1.0)
        _keep_size(layers[1], _GELU_GAIN)

    def forward(self, frames: Tensor, key: Tensor) -> Tensor:
        """Returns tokens [B, T, D] of features [B, T, C, h, w] and of the key's, [B, C, h, w]."""
        return self.mlp(
            self._pool(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
            - (self._pool(key)[:, None])
        )

    def _pool(self, maps: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(maps, (self.side, self.side)).flatten(1)


class AttentionResidual(nn.Module):
    """Returns linear(gelu(residual_pool(frames, key))).

    Positions begin as sines and cosines of about the size of a normalised feature, so that from the
    first step on a token says where something differs.

    Args:
        channels: C of the features.
        grid: (h, w) of the feature maps.
        num_queries: vectors that are pooled per frame.
        dim: D of the tokens.
    """

    def __init__(self, channels: int, grid: tuple[int, int], num_queries: int, dim: int) -> None:
        super().__init__()
        self.position = nn.Parameter(sincos_2d(*grid, channels).float())
        self.query = nn.Parameter(torch.randn(num_queries, channels))
        width = num_queries * channels
        self.weight = nn.Parameter(torch.empty(dim, width).uniform_(-1, 1) * math.sqrt(3 / width))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.out = nn.Linear(dim, dim)
        _keep_size(self.out, _GELU_GAIN)

    def forward(self, frames: Tensor, key: Tensor) -> Tensor:
        """Returns tokens [B, T, D] of features [B, T, C, h, w] and of the key's, [B, C, h, w]."""
        places = frames.flatten(3).mT, key.flatten(2).mT
        pooled = residual_pool(*places, self.position, self.query, self.weight, self.bias)
        return self.out(F.gelu(pooled))


def build_residual(
    config: VTokConfig, channels: int, grid: tuple[int, int]
) -> PooledResidual | AttentionResidual:
    """Returns the pool that `config.residual_pool` names.

    Args:
        config: of the model.
        channels, grid: of the encoder's feature maps.
    """
    if config.residual_pool == "attention":
        return AttentionResidual(channels, grid, config.num_queries, config.token_dim)
    side = 1 if config.residual_pool == "mean" else RESIDUAL_GRID
    return PooledResidual(channels, side, config.token_dim)
