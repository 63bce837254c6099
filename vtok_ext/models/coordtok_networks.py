"""The two networks of CoordTok: a clip to three planes, and points of the planes to patches.

    encoder  patches of the clip -> transformer -> memory; blocks of the learned planes -> tokens
             that read the memory and each other -> blocks of the planes
    decoder  features of points + positional vectors -> transformer over the points -> patches

Parameter names and shapes are those of the released weights.
Source: Jang et al., CoordTok (arXiv 2411.14762), specification sections 3 to 6.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok_ext.layers.linear import Linear
from vtok_ext.layers.transformer import QueryBlock, TransformerBlock
from vtok_ext.models.coordtok_config import PLANE_AXES, CoordTokConfig

Planes = dict[str, Tensor]
# Blocks of the video's and of the points' transformer have another eps than the query transformer:
# the released weights were trained with those defaults.
_EPS, _QUERY_EPS = 1e-5, 1e-6


class PatchEmbedding(nn.Module):
    """Returns a token [B, N, D] per patch of a picture or video [B, C, ...], in raster order."""

    def __init__(self, channels: int, dim: int, patch: tuple[int, ...]) -> None:
        super().__init__()
        convolution = nn.Conv3d if len(patch) == 3 else nn.Conv2d
        self.proj = convolution(channels, dim, patch, stride=patch)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Returns the tokens of x."""
        return self.proj(x).flatten(2).transpose(1, 2)


class VideoTransformer(nn.Module):
    """Returns tokens [B, N, D] of a video [B, 3, T, H, W]; a class token takes part and is dropped.

    `visible` [B, N], if given, says which tokens others may see.
    """

    def __init__(self, config: CoordTokConfig) -> None:
        super().__init__()
        dim, heads = config.enc_embed_dim, config.enc_num_heads
        self.patch_embed = PatchEmbedding(3, dim, config.enc_patch_size)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.pos_emb = nn.Parameter(torch.randn(1, math.prod(config.memory_grid()), dim))
        self.layers = nn.ModuleList(
            TransformerBlock(dim, heads, qkv_bias=False, eps=_EPS)
            for _ in range(config.enc_patch_num_layers)
        )
        self.norm = nn.LayerNorm(dim, eps=_EPS)

    def forward(self, video: Tensor, visible: Tensor | None = None) -> Tensor:
        """Returns the tokens of the video."""
        x = self.patch_embed(video)
        x = x + self.pos_emb.to(x.dtype)
        x = torch.cat([self.cls_token.to(x.dtype).expand(x.shape[0], -1, -1), x], dim=1)
        if visible is not None:  # the class token always is
            visible = F.pad(visible, (1, 0), value=True)[:, None, None]
        for layer in self.layers:
            x = layer(x, visible)
        return self.norm(x[:, 1:])


class QueryTransformer(nn.Module):
    """Returns queries [B, N, D] that have read a memory [B, M, D]; `mask` as in QueryBlock."""

    def __init__(self, dim: int, num_layers: int, num_heads: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            QueryBlock(dim, num_heads, eps=_QUERY_EPS) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(dim, eps=_QUERY_EPS)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None = None) -> Tensor:
        """Returns a tensor as x."""
        for layer in self.layers:
            x = layer(x, memory, mask)
        return self.norm(x)


class Encoder(nn.Module):
    """Returns the planes of videos [B, 3, T, H, W] of the configured shape.

    `queries` are the learned planes; `num_frames` [B], if given, how many frames of each clip are
    real, the rest holding PADDING_VALUE.
    """

    def __init__(self, config: CoordTokConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.enc_embed_dim
        self.encoder = VideoTransformer(config)
        self.cross_pos_emb = nn.Parameter(torch.randn(1, math.prod(config.memory_grid()), dim))
        for plane in PLANE_AXES:
            patch, channels = config.plane_patch(plane), config.latent_channels
            self.add_module(f"patch_embeds_{plane}", PatchEmbedding(channels, dim, patch))
            self.add_module(f"projectors_{plane}", Linear(dim, math.prod(patch) * channels))
        self.transformer = QueryTransformer(dim, config.enc_num_layers, config.enc_num_heads)

    def forward(self, video: Tensor, queries: Planes, num_frames: Tensor | None = None) -> Planes:
        """Returns {"xy": [B, Rx, Ry, C], "yt": [B, Rt, Ry, C], "xt": [B, Rt, Rx, C]}."""
        visible, mask = self._masks(num_frames)
        memory = self.encoder(video, visible)
        memory = memory + self.cross_pos_emb.to(memory.dtype)
        tokens = [
            getattr(self, f"patch_embeds_{plane}")(queries[plane].permute(0, 3, 1, 2))
            for plane in PLANE_AXES
        ]
        x = torch.cat(tokens, dim=1).expand(memory.shape[0], -1, -1)
        x = self.transformer(x, memory, mask)
        parts = x.split([part.shape[1] for part in tokens], dim=1)
        return {
            plane: self._unpatchify(getattr(self, f"projectors_{plane}")(part), plane)
            for plane, part in zip(PLANE_AXES, parts, strict=True)
        }

    def _masks(self, num_frames: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Returns which tokens of the video are visible [B, N], and the mask [B, 1, 1, N]."""
        if num_frames is None:
            return None, None
        moments, rows, columns = self.config.memory_grid()
        frames = self.config.enc_patch_size[0]
        moment = torch.arange(moments, device=num_frames.device).repeat_interleave(rows * columns)
        if self.config.padding_mask == "true":  # a patch with any real frame is seen
            visible = moment * frames < num_frames[:, None]
            return visible, visible[:, None, None]
        # A patch with any padded frame counts as padded, and gets 1 more on its logits.
        padded = moment >= num_frames[:, None] // frames
        return None, padded[:, None, None].float()

    def _unpatchify(self, tokens: Tensor, plane: str) -> Tensor:
        """Returns the plane [B, rows, columns, C] of projected tokens [B, L, cells * C]."""
        rows, columns = self.config.query_grid(plane)
        if self.config.unpatchify == "square_root":
            rows = columns = math.isqrt(rows * columns)
        x = tokens.unflatten(2, (*self.config.plane_patch(plane), self.config.latent_channels))
        x = x.unflatten(1, (rows, columns)).transpose(2, 3)
        return x.reshape(tokens.shape[0], *self.config.plane_shape(plane))


class PointTransformer(nn.Module):
    """Returns points [B, N, D] that have seen each other, from their features [B, N, 3 C].

    `rows` [N] or [B, N] are the points' rows in the positional table, flattened over t, x and y.
    """

    def __init__(self, config: CoordTokConfig) -> None:
        super().__init__()
        dim = config.dec_embed_dim
        self.pos_embed = nn.Parameter(torch.randn(1, *config.point_grid(), dim) * dim**-0.5)
        self.patch_embed = nn.Linear(3 * config.latent_channels, dim)
        self.layers = nn.ModuleList(
            TransformerBlock(dim, config.dec_num_heads, eps=_EPS)
            for _ in range(config.dec_num_layers)
        )
        self.norm = nn.LayerNorm(dim, eps=_EPS)

    def forward(self, features: Tensor, rows: Tensor) -> Tensor:
        """Returns the points."""
        x = self.patch_embed(features)
        x = x + F.embedding(rows, self.pos_embed.flatten(0, 3)).to(x.dtype)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class Decoder(nn.Module):
    """Returns the patches [B, N, dt * dx * dy * 3] of points; arguments as in PointTransformer."""

    def __init__(self, config: CoordTokConfig) -> None:
        super().__init__()
        self.transformer = PointTransformer(config)
        self.projector = Linear(config.dec_embed_dim, 3 * math.prod(config.dec_patch_size))

    def forward(self, features: Tensor, rows: Tensor) -> Tensor:
        """Returns the patches: frames, rows, columns, colours, in row-major order."""
        return self.projector(self.transformer(features, rows))
