"""Pre-norm transformer blocks over tokens [B, N, D], without dropout.

    TransformerBlock   x += attention(norm1(x));  x += mlp(norm2(x))
    QueryBlock         x += attention(norm1(x), memory);  x += attention(norm2(x));
                       x += mlp(norm3(x))

Attention is softmax(q k^T / sqrt(D / heads) + mask) v per head, through
torch.nn.functional.scaled_dot_product_attention; q, k, v lie one after the other in one projection,
each split into heads contiguously. Parameter names are those of CoordTok's weights.
Source: Dosovitskiy et al. (arXiv 2010.11929) and CoordTok (arXiv 2411.14762).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok_ext.layers.linear import Linear, linear

MLP_RATIO = 4


def _attend(
    query: Tensor,  # [B, N, D]
    key: Tensor,  # [B, M, D]
    value: Tensor,  # [B, M, D]
    num_heads: int,
    mask: Tensor | None,
) -> Tensor:
    """Returns the heads' outputs side by side, [B, N, D]."""

    def heads(x: Tensor) -> Tensor:  # [B, N, D] -> [B, heads, N, D / heads]
        return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)

    mixed = F.scaled_dot_product_attention(
        heads(query), heads(key), heads(value), attn_mask=_in_dtype_of(query, mask)
    )
    return mixed.transpose(1, 2).flatten(2)


def _in_dtype_of(query: Tensor, mask: Tensor | None) -> Tensor | None:
    return mask if mask is None or mask.dtype == torch.bool else mask.to(query.dtype)


class SelfAttention(nn.Module):
    """Returns attention among tokens [B, N, D].

    `mask`, broadcast to [B, heads, N, N]: booleans say which tokens may be seen, numbers are added
    to the logits.
    """

    def __init__(self, dim: int, num_heads: int, *, qkv_bias: bool = True) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Returns a tensor as x [B, N, D]."""
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        return self.proj(_attend(query, key, value, self.num_heads, mask))


class MemoryAttention(nn.Module):
    """Returns what tokens [B, N, D] read from a memory [B, M, D]; without any bias.

    The rows of `in_proj_weight` are [Wq; Wk; Wv]. `mask` is as in SelfAttention, for
    [B, heads, N, M].
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.out_proj = Linear(dim, dim, bias=False)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None = None) -> Tensor:
        """Returns a tensor as x [B, N, D]."""
        if memory is x:
            query, key, value = linear(x, self.in_proj_weight).chunk(3, dim=-1)
        else:
            dim = x.shape[-1]
            query = linear(x, self.in_proj_weight[:dim])
            key, value = linear(memory, self.in_proj_weight[dim:]).chunk(2, dim=-1)
        return self.out_proj(_attend(query, key, value, self.num_heads, mask))


class Mlp(nn.Module):
    """Returns fc2(gelu(fc1(x))), four times as wide inside; `approximate` is that of F.gelu."""

    def __init__(self, dim: int, approximate: str = "none") -> None:
        super().__init__()
        self.approximate = approximate
        self.fc1 = Linear(dim, MLP_RATIO * dim)
        self.fc2 = Linear(MLP_RATIO * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Returns a tensor as x [..., D]."""
        return self.fc2(F.gelu(self.fc1(x), approximate=self.approximate))


class TransformerBlock(nn.Module):
    """Returns tokens [B, N, D] after self-attention and an MLP, each with a residual."""

    def __init__(
        self, dim: int, num_heads: int, *, qkv_bias: bool = True, eps: float = 1e-6
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = SelfAttention(dim, num_heads, qkv_bias=qkv_bias)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Returns a tensor as x [B, N, D]; `mask` as in SelfAttention."""
        x = x + self.attn(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class QueryBlock(nn.Module):
    """Returns queries [B, N, D] that have read a memory [B, M, D], which is not normalised here."""

    def __init__(self, dim: int, num_heads: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.cross_attn = MemoryAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.self_attn = MemoryAttention(dim, num_heads)
        self.norm3 = nn.LayerNorm(dim, eps=eps)
        # Linear layers at positions 0 and 3 of the sequence, as in the released weights.
        self.mlp = nn.Sequential(
            Linear(dim, MLP_RATIO * dim),
            nn.GELU(),
            nn.Identity(),
            Linear(MLP_RATIO * dim, dim),
        )

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None = None) -> Tensor:
        """Returns a tensor as x [B, N, D]; `mask` as in MemoryAttention."""
        x = x + self.cross_attn(self.norm1(x), memory, mask)
        y = self.norm2(x)
        x = x + self.self_attn(y, y)
        return x + self.mlp(self.norm3(x))
