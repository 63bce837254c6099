"""The network of SiT: a transformer over the patches of a latent, told time and class.

    c = mlp([cos(t f) | sin(t f)]) + label(y),  f_k = 10000^(-k / 128)
    x += gate1 attention((1 + scale1) norm(x) + shift1)
    x += gate2 mlp((1 + scale2) norm(x) + shift2)

shift, scale and gate are a linear layer of silu(c) (adaptive layer norm, zero at the start).
Parameter names and shapes are those of the released weights.
Source: DiT (Peebles and Xie, arXiv 2212.09748), SiT (arXiv 2401.08740), specification section 9.1.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok_ext.layers.transformer import Mlp, SelfAttention

_EPS = 1e-6
_NUM_FREQUENCIES, _LONGEST_PERIOD = 128, 10000.0


class TimestepEmbedder(nn.Module):
    """Returns vectors [B, D] of times t [B] in [0, 1], which are used as they are."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(2 * _NUM_FREQUENCIES, dim), nn.SiLU(), nn.Linear(dim, dim)
        )

    def forward(self, t: Tensor) -> Tensor:
        """Returns the vectors of t."""
        steps = torch.arange(_NUM_FREQUENCIES, dtype=torch.float32, device=t.device)
        angles = t.float()[:, None] * torch.exp(
            steps * (-math.log(_LONGEST_PERIOD) / _NUM_FREQUENCIES)
        )
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(waves.to(self.mlp.get_parameter("0.weight").dtype))


class LabelEmbedder(nn.Module):
    """Returns vectors [B, D] of labels [B]; where there is a "none", the last row stands for it."""

    def __init__(self, num_classes: int, dim: int, has_none: bool) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + int(has_none), dim)

    def forward(self, labels: Tensor) -> Tensor:
        """Returns the vectors of labels."""
        return self.embedding_table(labels)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Returns x [B, N, D] scaled by 1 + scale and shifted, both [B, D]."""
    return x * (1 + scale[:, None]) + shift[:, None]


class _Modulation(nn.Sequential):
    """Returns `count` vectors [B, D] of a condition [B, D]."""

    def __init__(self, dim: int, count: int) -> None:
        super().__init__(nn.SiLU(), nn.Linear(dim, count * dim))
        self.count = count

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        return super().forward(condition).chunk(self.count, dim=-1)


class SiTBlock(nn.Module):
    """Returns tokens [B, N, D] after attention and an MLP that a condition [B, D] modulates."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.dim = dim
        self.attn = SelfAttention(dim, num_heads)
        self.mlp = Mlp(dim, "tanh")
        self.adaLN_modulation = _Modulation(dim, 6)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Returns a tensor as x."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition)
        y = modulate(F.layer_norm(x, (self.dim,), eps=_EPS), shift1, scale1)
        x = x + gate1[:, None] * self.attn(y)
        y = modulate(F.layer_norm(x, (self.dim,), eps=_EPS), shift2, scale2)
        return x + gate2[:, None] * self.mlp(y)


class FinalLayer(nn.Module):
    """Returns the patches [B, N, P] of tokens [B, N, D] under a condition [B, D]."""

    def __init__(self, dim: int, num_outputs: int) -> None:
        super().__init__()
        self.dim = dim
        self.linear = nn.Linear(dim, num_outputs)
        self.adaLN_modulation = _Modulation(dim, 2)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Returns the patches of x."""
        shift, scale = self.adaLN_modulation(condition)
        return self.linear(modulate(F.layer_norm(x, (self.dim,), eps=_EPS), shift, scale))


def unpatchify(
    patches: Tensor,  # [B, N, p1 * ... * pn * C]
    grid: tuple[int, ...],
    patch: tuple[int, ...],
) -> Tensor:
    """Returns [B, C, g1 * p1, ..., gn * pn] of patches in raster order, channels last in each."""
    n = len(grid)
    x = patches.unflatten(1, grid).unflatten(-1, (*patch, -1))
    # [B, g1..gn, p1..pn, C] -> [B, C, g1, p1, ..., gn, pn]
    pairs = [axis for i in range(n) for axis in (1 + i, 1 + n + i)]
    x = x.permute(0, 1 + 2 * n, *pairs)
    return x.reshape(x.shape[0], x.shape[1], *(g * p for g, p in zip(grid, patch, strict=True)))


def sincos_1d(positions: Tensor, dim: int) -> Tensor:
    """Returns [N, dim] float64 of positions [N]: dim / 2 sines, then cosines, of fixed periods."""
    steps = torch.arange(dim // 2, dtype=torch.float64, device=positions.device)
    frequencies = _LONGEST_PERIOD ** (-steps / (dim / 2))
    angles = positions.double()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def sincos_2d(rows: int, columns: int, dim: int) -> Tensor:
    """Returns [rows * columns, dim] float32: half the channels tell the column, half the row."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    halves = [sincos_1d(index.flatten(), dim // 2) for index in (column, row)]
    return torch.cat(halves, dim=1).float()
