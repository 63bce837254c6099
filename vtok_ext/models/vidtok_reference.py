"""VidTok as published, in plain PyTorch on the same parameters: oracle and baseline of `VidTok`.

    encode(encoder, config, x)   raw latent of frames, without the padding in front of the clip
    decode(decoder, config, z)   all f * T frames of a latent

`model.set_backend("reference")` runs it. The op sequence is the published one: frames and pixels
are rearranged into batches for 2-D and 1-D convolutions, padding is joined to copies, upsampled
frames are stored, and nothing is left out that turns out not to matter. Only the caches of the
chunked mode are missing. Whole clips; hooks of layers do not run, their parameters are read.
Source: microsoft/VidTok, releases 1.0 and 1.1; Tang et al. (arXiv 2412.13061).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok_ext.layers.norm_act import GroupNormAct, NormAct

if TYPE_CHECKING:
    from vtok_ext.models.vidtok import Decoder, Encoder
    from vtok_ext.models.vidtok_config import VidTokConfig


def encode(encoder: Encoder, config: VidTokConfig, x: Tensor) -> Tensor:
    """Returns the raw latent [B, zc, T / f, H / s, W / s] of frames x [B, 3, T, H, W]."""
    run = _Published(config)
    x = run.conv_3d(encoder.conv_in, x)
    for space, time in zip(encoder.down, encoder.down_temporal, strict=True):
        x = run.blocks(space, time, x)
        if space.downsample is not None:
            x = run.space_down(space.downsample, x)
        if time.downsample is not None:
            x = run.time_down(time.downsample, x)
    return run.end(encoder, run.middle(encoder.mid, x))


def decode(decoder: Decoder, config: VidTokConfig, z: Tensor) -> Tensor:
    """Returns the frames [B, 3, f T, s H, s W] of a latent z [B, C, T, H, W]."""
    run = _Published(config)
    x = run.middle(decoder.mid, run.conv_3d(decoder.conv_in, z))
    stages = list(zip(decoder.up, decoder.up_temporal, strict=True))
    for space, time in reversed(stages):
        x = run.blocks(space, time, x)
        if space.upsample is not None:
            x = run.space_up(space.upsample, x)
        if time.upsample is not None:
            x = run.time_up(time.upsample, x)
    return run.end(decoder, x)


def _swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def _wide(x: Tensor) -> Tensor:
    """`x` in float32, float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _inner(conv: nn.Module) -> Any:
    """The convolution that holds the parameters: causal layers have a child."""
    return getattr(conv, "conv", conv)


def _frames(x: Tensor) -> Tensor:
    """[B, C, T, H, W] -> [B * T, C, H, W], a copy."""
    return x.permute(0, 2, 1, 3, 4).flatten(0, 1).contiguous()


def _pixels(x: Tensor) -> Tensor:
    """[B, C, T, H, W] -> [B * H * W, C, T], a copy."""
    return x.permute(0, 3, 4, 1, 2).flatten(0, 2).contiguous()


def _layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    y = F.layer_norm(x.movedim(1, -1), norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    return y.movedim(-1, 1)


class _Published:
    """The published layers, as functions of ours and their input."""

    def __init__(self, config: VidTokConfig) -> None:
        self.causal, self.linear = config.causal, config.interpolation == "linear"
        self.replicate = config.version == "1.1"

    def norm(self, norm: NormAct | GroupNormAct, x: Tensor) -> Tensor:
        """Normalises x [N, C, ...]; group statistics over all that follows C."""
        if isinstance(norm, NormAct):
            return _layer_norm(norm.norm, x)  # type: ignore[arg-type]
        return F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)

    def norm_3d(self, norm: NormAct | GroupNormAct, x: Tensor) -> Tensor:
        """Normalises x [B, C, T, H, W]; groups of causal models frame by frame."""
        if isinstance(norm, NormAct) or not self.causal:
            return self.norm(norm, x)
        y = self.norm(norm, _frames(x))
        return y.unflatten(0, (x.shape[0], -1)).permute(0, 2, 1, 3, 4)

    def norm_1d(self, norm: NormAct | GroupNormAct, x: Tensor) -> Tensor:
        """Normalises x [N, C, T]; groups of causal models frame by frame."""
        if isinstance(norm, NormAct) or not self.causal:
            return self.norm(norm, x)
        y = self.norm(norm, x.transpose(1, 2).flatten(0, 1))
        return y.unflatten(0, (x.shape[0], -1)).transpose(1, 2)

    def pad_time(self, x: Tensor, num_frames: int) -> Tensor:
        """x [B, C, T, ...] behind frames of zeros, or copies of its first one."""
        if num_frames == 0:
            return x
        first = x[:, :, :1] if self.replicate else torch.zeros_like(x[:, :, :1])
        return torch.cat([first] * num_frames + [x], dim=2)

    def conv_3d(self, conv: nn.Module, x: Tensor) -> Tensor:
        """A convolution of stride 1 or 2 in time; padded in front or on both sides."""
        inner = _inner(conv)
        kernel, stride = inner.kernel_size, inner.stride
        rows, columns = kernel[1] // 2, kernel[2] // 2
        if not self.causal:
            frames = kernel[0] // 2 if stride[0] == 1 else 0
            return F.conv3d(x, inner.weight, inner.bias, stride, (frames, rows, columns))
        x = self.pad_time(x, kernel[0] - stride[0])
        x = F.pad(x, (columns, columns, rows, rows))
        return F.conv3d(x, inner.weight, inner.bias, stride)

    def conv_1d(self, conv: nn.Module, x: Tensor) -> Tensor:
        """A convolution over time of x [N, C, T]."""
        inner = _inner(conv)
        if not self.causal:
            return F.conv1d(x, inner.weight, inner.bias, 1, inner.kernel_size[0] // 2)
        return F.conv1d(self.pad_time(x, inner.kernel_size[0] - 1), inner.weight, inner.bias)

    @staticmethod
    def conv_2d(conv: Any, x: Tensor, stride: int = 1) -> Tensor:
        """A convolution of frames x [N, C, H, W]; padded on both sides at stride 1."""
        padding = conv.kernel_size[0] // 2 if stride == 1 else 0
        return F.conv2d(x, conv.weight, conv.bias, stride, padding)

    def blocks(self, space: Any, time: Any, x: Tensor) -> Tensor:
        """The pairs of a 2-D and a 1-D block of one level."""
        for block_2d, block_1d in zip(space.block, time.block, strict=True):
            batch = x.shape[0]
            x = self.block_2d(block_2d, _frames(x))
            x = x.unflatten(0, (batch, -1)).permute(0, 2, 1, 3, 4)
            size = x.shape[3:]
            x = self.block_1d(block_1d, _pixels(x))
            x = x.unflatten(0, (batch, *size)).permute(0, 3, 4, 1, 2).contiguous()
        return x

    def block_2d(self, block: Any, x: Tensor) -> Tensor:
        """Residual block of frames."""
        h = self.conv_2d(block.conv1, _swish(self.norm(block.norm1, x)))
        h = self.conv_2d(block.conv2, _swish(self.norm(block.norm2, h)))
        return (x if block.nin_shortcut is None else self.conv_2d(block.nin_shortcut, x)) + h

    def block_1d(self, block: Any, x: Tensor) -> Tensor:
        """Residual block of pixels."""
        h = self.conv_1d(block.conv1, _swish(self.norm_1d(block.norm1, x)))
        return x + self.conv_1d(block.conv2, _swish(self.norm_1d(block.norm2, h)))

    def block_3d(self, block: Any, x: Tensor) -> Tensor:
        """Residual block of videos."""
        h = self.conv_3d(block.conv1, _swish(self.norm_3d(block.norm1, x)))
        return x + self.conv_3d(block.conv2, _swish(self.norm_3d(block.norm2, h)))

    def middle(self, middle: Any, x: Tensor) -> Tensor:
        """Block, attention within frames, block."""
        x = self.block_3d(middle.block_1, x)
        attention = middle.attn_1
        h = self.norm_3d(attention.norm, x)
        q, k, v = (
            self.conv_3d(conv, h).permute(0, 2, 3, 4, 1).flatten(2, 3).contiguous()
            for conv in (attention.q, attention.k, attention.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v).unflatten(2, x.shape[3:])
        x = x + self.conv_3d(attention.proj_out, mixed.permute(0, 4, 1, 2, 3))
        return self.block_3d(middle.block_2, x)

    def end(self, network: Any, x: Tensor) -> Tensor:
        """The last norm and convolution."""
        return self.conv_3d(network.conv_out, _swish(self.norm_3d(network.norm_out, x)))

    def space_down(self, layer: Any, x: Tensor) -> Tensor:
        """Half the height and width; padding at the right and the bottom only."""
        y = self.conv_2d(layer.conv, F.pad(_frames(x), (0, 1, 0, 1)), 2)
        return y.unflatten(0, (x.shape[0], -1)).permute(0, 2, 1, 3, 4)

    def space_up(self, layer: Any, x: Tensor) -> Tensor:
        """Twice the height and width."""
        y = _frames(x)
        y = F.interpolate(_wide(y), scale_factor=2.0, mode="nearest").to(y.dtype)
        return self.conv_2d(layer.conv, y).unflatten(0, (x.shape[0], -1)).permute(0, 2, 1, 3, 4)

    def time_down(self, layer: Any, x: Tensor) -> Tensor:
        """Half the frames: mean of three, blended with a convolution."""
        alpha = torch.sigmoid(layer.mix_factor)
        if self.causal:
            padded = self.pad_time(x, 1)
        else:
            padded = x = F.pad(x, (0, 0, 0, 0, 0, 1))
        mean = F.avg_pool3d(_wide(padded), (3, 1, 1), (2, 1, 1)).to(x.dtype)
        return alpha * mean + (1 - alpha) * self.conv_3d(layer.conv, x)

    def time_up(self, layer: Any, x: Tensor) -> Tensor:
        """Twice the frames, blended with a convolution of them."""
        alpha = torch.sigmoid(layer.mix_factor)
        if self.linear:
            parts = (x[:, :, : layer.segment], x[:, :, layer.segment :])
            x = torch.cat([self.double(part, "trilinear") for part in parts if part.shape[2]], 2)
        else:
            x = self.double(x, "nearest")
        return alpha * x + (1 - alpha) * self.conv_3d(layer.conv, x)

    @staticmethod
    def double(x: Tensor, mode: str) -> Tensor:
        """Interpolates in time, half types in float32."""
        return F.interpolate(_wide(x), scale_factor=(2.0, 1.0, 1.0), mode=mode).to(x.dtype)
