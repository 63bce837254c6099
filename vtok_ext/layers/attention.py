"""Single-head self-attention over the H * W positions of each frame.

    out = x + proj(softmax(q k^T / sqrt(C)) v),  q, k, v = 1x1x1 convolutions of norm(x)

Frames do not see each other, so the block needs no streaming state.
Source: VidTok (arXiv 2412.13061), middle block of encoder and decoder.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from vtok_ext.layers.causal_conv3d import fuses, video_conv3d
from vtok_ext.layers.norm_act import norm_act


class FrameAttention(nn.Module):
    """Returns x + attention(norm(x)) for x [B, C, T, H, W], computed frame by frame.

    `causal` decides the names of the parameters, and whether a group norm spans the clip.
    """

    def __init__(self, channels: int, *, norm_type: str = "layernorm", causal: bool = True) -> None:
        super().__init__()
        self.norm = norm_act(channels, norm_type, act=False, across_time=not causal)
        self.q = video_conv3d(channels, channels, 1, causal=causal)
        self.k = video_conv3d(channels, channels, 1, causal=causal)
        self.v = video_conv3d(channels, channels, 1, causal=causal)
        self.proj_out = video_conv3d(channels, channels, 1, causal=causal)

    def forward(self, x: Tensor) -> Tensor:
        """Returns a tensor as x [B, C, T, H, W]."""
        batch, channels, frames, height, width = x.shape

        def tokens(y: Tensor) -> Tensor:  # [B, C, T, H, W] -> [B * T, 1, H * W, C]
            return y.permute(0, 2, 3, 4, 1).reshape(batch * frames, 1, height * width, channels)

        h = self.norm(x)
        mixed = F.scaled_dot_product_attention(
            tokens(self.q(h)), tokens(self.k(h)), tokens(self.v(h))
        )
        mixed = mixed.view(batch, frames, height, width, channels).permute(0, 4, 1, 2, 3)
        if fuses(self.proj_out):
            return self.proj_out(mixed, residual=x)
        return x + self.proj_out(mixed)
