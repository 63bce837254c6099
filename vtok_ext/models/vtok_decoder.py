"""The reconstruction decoder of VTok: a video transformer with flow matching on pixels.

    x_t = t x1 + (1 - t) noise,  the network says x1 from x_t, t and the tokens,
    velocity = (x1 - x_t) / (1 - t),  loss = mean of |said x1 - x1|^2

The loss is that of the velocity, |velocity - (x1 - noise)|^2, with weight (1 - t)^2: without it,
times near the clip, where x_t tells it anyway, would count up to 400 times as much as those where
only the tokens do. Predicting the clip instead of the velocity lets a narrow network do it: noise
has as many dimensions as a patch has numbers, clips have fewer.
Tokens are read by cross-attention, each with the frame and slot that it belongs to. The residual
tokens nearest to the frames of a patch are added to it besides: found by attention alone, they were
not used at all after thousands of steps. Any number of frames and any size.
Training draws times nearer to noise than uniform ones, t = u / (4 - 3 u): where the clip shows
through the noise, nothing is learnt of the tokens.
Source: Lipman et al. (arXiv 2210.02747); blocks as in DiT (arXiv 2212.09748) and SiT (arXiv
2401.08740); predicting x1 as in Li and He (arXiv 2511.13720). It stands where VTok puts a frozen
video model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok_ext.layers.transformer import MemoryAttention, Mlp, SelfAttention
from vtok_ext.models import _video_input as video_input
from vtok_ext.models.ode import sample_ode
from vtok_ext.models.sit_network import TimestepEmbedder, modulate, sincos_1d, unpatchify
from vtok_ext.models.transport import Transport, noise_like
from vtok_ext.models.vtok_config import VTokConfig
from vtok_ext.models.vtok_layout import PADDING

# Training times end here: velocities at 1 - t are errors of x1 divided by it, and the last of up to
# 20 steps begins before. Rows and columns are told as parts of this many, whatever the size.
_LAST_TIME, _SPAN = 0.95, 32.0
# Of the training times, s in u / (s - (s - 1) u): Esser et al. (arXiv 2403.03206), section 5.3.2.
_TIME_SHIFT = 4.0
_EPS = 1e-6
# A frame or distance behind all others.
_FAR = 2**40
Generators = Sequence[torch.Generator] | torch.Generator | None


class DecoderBlock(nn.Module):
    """Returns patches [B, N, D] after self-attention, reading of tokens, and an MLP; shift, scale
    and gate of the first and last come from a condition [B, D] and are zero at the start."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.dim = dim
        self.attn = SelfAttention(dim, num_heads)
        self.read_norm = nn.LayerNorm(dim, eps=_EPS)
        self.read = MemoryAttention(dim, num_heads)
        self.mlp = Mlp(dim, "tanh")
        self.modulation = nn.Linear(dim, 6 * dim)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, condition: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        """Returns a tensor as x.

        Args:
            x: [B, N, D].
            condition: [B, D].
            memory: tokens [B, L, D].
            mask: [B, 1, 1, L], True where there is a token.
        """
        parts = self.modulation(F.silu(condition)).chunk(6, dim=-1)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        y = modulate(F.layer_norm(x, (self.dim,), eps=_EPS), shift1, scale1)
        x = x + gate1[:, None] * self.attn(y)
        x = x + self.read(self.read_norm(x), memory, mask)
        y = modulate(F.layer_norm(x, (self.dim,), eps=_EPS), shift2, scale2)
        return x + gate2[:, None] * self.mlp(y)


class VTokDecoder(nn.Module):
    """Turns tokens and noise into a clip; see the module.

    Args:
        config: of the model.
    """

    def __init__(self, config: VTokConfig) -> None:
        super().__init__()
        dim, self.patch = config.decoder_dim, tuple(config.decoder_patch)
        self.key_tokens, self.dim = config.key_tokens, dim
        self.transport = Transport("linear", "velocity")
        values = 3 * math.prod(self.patch)
        self.embed = nn.Linear(values, dim)
        self.token_embed = nn.Linear(config.latent_dim, dim)
        self.slot_embed = nn.Embedding(config.key_tokens + 1, dim)
        self.token_norm = nn.LayerNorm(dim, eps=_EPS)
        self.motion = nn.Linear(self.patch[0] * dim, dim)
        self.time_embed = TimestepEmbedder(dim)
        self.blocks = nn.ModuleList(
            DecoderBlock(dim, config.decoder_heads) for _ in range(config.decoder_depth)
        )
        self.norm = nn.LayerNorm(dim, eps=_EPS)
        self.out = nn.Linear(dim, values)

    def predict(
        self,
        x: Tensor,  # [B, 3, T, H, W]
        t: Tensor,  # [B]
        tokens: Tensor,  # [B, L, D]
        positions: Tensor,  # [B, L, 2]
    ) -> Tensor:
        """Returns the expected clip, as x, whose sizes are multiples of the patch.

        Args:
            x: clips on their way from noise.
            t: their times in [0, 1].
            tokens: as the model's latent.
            positions: frame and slot of each token, -1 where there is none.
        """
        grid = tuple(size // part for size, part in zip(x.shape[2:], self.patch, strict=True))
        patches = self.embed(_patches(x, self.patch)) + self._places(grid, x)
        memory = self.token_embed(tokens) + self.slot_embed(positions[..., 1].clamp(min=0))
        memory = self.token_norm(memory + self._waves(positions[..., 0]).to(memory))
        mask = (positions[..., 0] != PADDING)[:, None, None]
        motion = self._residuals_of_frames(memory, positions, x.shape[2])
        motion = self.motion(motion.unflatten(1, (grid[0], -1)).flatten(2))  # [B, t, D]
        patches = patches + motion.repeat_interleave(grid[1] * grid[2], dim=1)
        condition = self.time_embed(t)
        for block in self.blocks:
            patches = block(patches, condition, memory, mask)
        return unpatchify(self.out(self.norm(patches)), grid, self.patch)

    def _residuals_of_frames(self, memory: Tensor, positions: Tensor, num_frames: int) -> Tensor:
        """Returns [B, T, D]: for every frame the nearest residual token of its segment, or 0."""
        if memory.shape[1] == 0:
            return memory.new_zeros(len(memory), num_frames, memory.shape[-1])
        frames, slots = positions.long().unbind(-1)
        frames = frames.masked_fill(frames == PADDING, _FAR)
        # A segment goes from the first frame of its tokens to that of the next one.
        segments = ((slots == 0).cumsum(1) - 1).clamp(min=0)  # [B, L]
        starts = torch.full_like(frames, _FAR).scatter_reduce(1, segments, frames, "amin")
        at = torch.arange(num_frames, device=frames.device)[:, None]
        segment = (starts[:, None] <= at).sum(-1, keepdim=True) - 1  # [B, T, 1]
        usable = (slots == self.key_tokens)[:, None] & (segments[:, None] == segment)
        distance = (at - frames[:, None]).abs().masked_fill(~usable, _FAR)  # [B, T, L]
        nearest = distance.argmin(-1, keepdim=True)
        found = memory.gather(1, nearest.expand(-1, -1, memory.shape[-1]))
        return found * usable.any(-1, keepdim=True)

    def _waves(self, values: Tensor) -> Tensor:
        """Returns sines and cosines [..., D] of numbers."""
        return sincos_1d(values.flatten(), self.dim).view(*values.shape, self.dim)

    def _places(self, grid: tuple[int, ...], like: Tensor) -> Tensor:
        """Returns [N, D]: waves of the first frame, the row and the column of every patch."""
        frames = torch.arange(grid[0], device=like.device) * self.patch[0]
        axes = [self._waves(frames)]
        # Rows and columns are shifted far apart, so that one set of waves serves all three.
        for axis, count in enumerate(grid[1:], start=1):
            at = (torch.arange(count, device=like.device) + 0.5) * (_SPAN / count)
            axes.append(self._waves(at + 1000 * axis))
        t, y, x = axes
        places = t[:, None, None] + y[None, :, None] + x[None, None]
        return places.flatten(0, 2).to(like)

    def loss(
        self,
        video: Tensor,  # [B, 3, T, H, W]
        tokens: Tensor,  # [B, L, D]
        positions: Tensor,  # [B, L, 2]
        generators: Generators = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns the mean loss, and the expected clip as `video` at the times that were drawn.

        Args:
            video: in [-1, 1].
            tokens, positions: as for `predict`.
            generators: sources of times and noise: one per clip, one for all, or torch's.
        """
        clip = self._padded(video)
        t, noise = self._draw(clip, generators)
        t = t / (_TIME_SHIFT - (_TIME_SHIFT - 1) * t) * _LAST_TIME
        expected = self.predict(self.transport.interpolate(t, noise, clip), t, tokens, positions)
        loss = (expected.float() - clip).square().mean()
        frames, height, width = video.shape[2:]
        return loss, expected[:, :, :frames, :height, :width]

    def _draw(self, clip: Tensor, generators: Generators) -> tuple[Tensor, Tensor]:
        """Returns times [B] in [0, 1] and noise as `clip`."""
        if generators is None or isinstance(generators, torch.Generator):
            return self.transport.draw(clip, generators)
        parts = [
            self.transport.draw(one, generator)
            for one, generator in zip(clip.split(1), generators, strict=True)
        ]
        times, noise = zip(*parts, strict=True)
        return torch.cat(times), torch.cat(noise)

    @torch.no_grad()
    def sample(
        self,
        tokens: Tensor,  # [B, L, D]
        positions: Tensor,  # [B, L, 2]
        num_frames: int,
        size: tuple[int, int],
        *,
        num_steps: int,
        generator: torch.Generator,
    ) -> Tensor:
        """Returns clips [B, 3, T, H, W]: equal-length Euler steps, the last of which ends at x1.

        Args:
            tokens, positions: as for `predict`.
            num_frames, size: T and (H, W).
            num_steps: calls of the network.
            generator: source of the noise.
        """
        shape = [
            -(-wanted // part) * part
            for wanted, part in zip((num_frames, *size), self.patch, strict=True)
        ]
        noise = noise_like(tokens.new_empty(tokens.shape[0], 3, *shape), generator)

        def network(x: Tensor, t: Tensor) -> Tensor:
            return _velocity(self.predict(x, t, tokens, positions), x, t)

        clip = sample_ode(self.transport, network, noise, method="euler", num_steps=num_steps)
        return clip[:, :, :num_frames, : size[0], : size[1]]

    def _padded(self, video: Tensor) -> Tensor:
        video = video_input.pad_tail(video, self.patch[0], 0)
        bottom, right = -video.shape[3] % self.patch[1], -video.shape[4] % self.patch[2]
        return video_input.repeat_border(video, bottom, right)


def _patches(video: Tensor, patch: tuple[int, ...]) -> Tensor:
    """Returns patches [B, N, pt * ph * pw * 3] in raster order, channels last; see `unpatchify`."""
    x = video
    for axis, size in zip((2, 4, 6), patch, strict=True):
        x = x.unflatten(axis, (-1, size))
    # [B, 3, T, pt, H, ph, W, pw]
    return x.permute(0, 2, 4, 6, 3, 5, 7, 1).flatten(4).flatten(1, 3)


def _velocity(data: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """Returns the velocity from x at times t [B] towards `data`."""
    left = (1 - t).clamp(min=1 - _LAST_TIME).to(x)
    return (data - x) / left.view(-1, 1, 1, 1, 1)
