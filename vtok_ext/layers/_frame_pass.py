"""Layers of one item without gradients on a CPU: in place, in chunks of frames, in own memory.

    x += conv2(norm_act(conv1(norm_act(x))))    x, both norms and conv1 in buffers that are reused

A network walks through a level with a few frames at a time. What a causal convolution needs of the
chunk before is read where it was written, in the buffer of that chunk; no state is copied.

Note [Passes in place]
Functional layers allocate every activation; at 17x128x128 that is 5 million page faults, a quarter
of the time. Here every page is touched once, the activations of a chunk stay in the cache, and
the peak is that of a chunk. A layer's parameters are read outside its `forward`, hence only while
nobody could tell: `runs_in_place` says no with gradients, under torch.compile and torch.jit.trace,
with hooks, a replaced `forward`, parametrizations, replaced classes (adapters), modes that watch
operations (counters of products know PyTorch's), another device or dtype.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok_ext.layers._hooks import has_hooks
from vtok_ext.layers._state import State, owned
from vtok_ext.layers.attention import FrameAttention
from vtok_ext.layers.causal_conv3d import (
    CausalConv1d,
    CausalConv3d,
    FrameConv2d,
    PixelConv1d,
    VolumeConv3d,
)
from vtok_ext.layers.norm_act import NormAct
from vtok_ext.layers.residual import ResidualBlock1d, ResidualBlock2d, ResidualBlock3d
from vtok_ext.layers.spatial_resample import SpatialDownsample, SpatialUpsample
from vtok_ext.layers.temporal_resample import TemporalDownsample, TemporalUpsample
from vtok_ext.ops._accumulate_cpu import (
    add_conv3d,
    is_available,
    norm_act_into,
    transposed_weight,
    upsampled_conv3d,
)
from vtok_ext.ops._dtypes import autocast_dtype

_LAYOUT = torch.channels_last_3d
_KNOWN = {
    *(CausalConv1d, CausalConv3d, FrameConv2d, PixelConv1d, VolumeConv3d),
    *(NormAct, nn.LayerNorm, nn.ModuleList, FrameAttention),
    *(ResidualBlock1d, ResidualBlock2d, ResidualBlock3d),
    *(SpatialDownsample, SpatialUpsample, TemporalDownsample, TemporalUpsample),
}
# Bytes of the largest activation of a chunk; see Note [Passes in place]. Measured at 17x128x128.
CHUNK_BYTES = 32 << 20


def takes(x: Tensor) -> bool:
    """Returns whether `x` has memory to work in; a rehearsal of a pass puts another answer here."""
    return type(x) is Tensor


def runs_in_place(network: nn.Module, x: Tensor, containers: Collection[type]) -> bool:
    """Returns whether a pass of `network` over `x` may run in place, see Note [Passes in place].

    Args:
        network: of known layers within `containers`, classes that do nothing but call those.
        x: its input.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if not takes(x) or x.device.type != "cpu" or x.numel() == 0:
        return False
    if type(x) is Tensor and torch._C._len_torch_dispatch_stack():
        return False
    first = next(network.parameters())
    dtype = autocast_dtype("cpu") or x.dtype
    if not is_available(dtype) or first.dtype not in (dtype, torch.float32):
        return False
    return all(
        (type(m) in _KNOWN or type(m) in containers)
        and not has_hooks(m)
        and not getattr(m, "parametrizations", None)
        for m in network.modules()
    ) and all(type(p) is nn.Parameter and p.device.type == "cpu" for p in network.parameters())


class Pool:
    """Buffers that are handed out as [1, C, T, H, W] in channels_last_3d memory and come back."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._free: list[Tensor] = []
        self._taken: dict[int, Tensor] = {}  # by address

    def empty(self, channels: int, frames: int, height: int, width: int) -> Tensor:
        """Returns a buffer without meaningful values."""
        count = channels * frames * height * width
        fitting = [flat for flat in self._free if count <= flat.numel() <= 4 * count]
        if fitting:
            flat = min(fitting, key=Tensor.numel)
            self._free = [other for other in self._free if other is not flat]
        else:
            flat = torch.empty(count, dtype=self.dtype, device="cpu")
        buffer = flat[:count].view(1, frames, height, width, channels).permute(0, 4, 1, 2, 3)
        self._taken[buffer.data_ptr()] = flat
        return buffer

    def zeros(self, channels: int, frames: int, height: int, width: int) -> Tensor:
        """Returns a buffer of zeros, to which convolutions are added."""
        return self.empty(channels, frames, height, width).zero_()

    def give(self, *buffers: Tensor) -> None:
        """Takes buffers back; tensors that did not come from here are left alone."""
        for buffer in buffers:
            flat = self._taken.pop(buffer.data_ptr(), None)
            if flat is not None:
                self._free.append(flat)

    def let_go(self, buffer: Tensor) -> None:
        """Forgets a buffer: its memory is freed with the last reference to it."""
        self._taken.pop(buffer.data_ptr(), None)

    def take_back(self) -> None:
        """Takes back all buffers."""
        self._free += self._taken.values()
        self._taken.clear()


class FramePass:
    """Passes of items, one by one, through a network: buffers and weights in one dtype, which all
    share, and the state of the stream of one.

    Args:
        dtype: of all activations.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.pool = Pool(dtype)
        self.dtype = dtype
        self._weights: dict[int, tuple[Tensor, Tensor | None]] = {}
        self._taps: dict[int, list[Tensor]] = {}
        self.begin(None)

    def begin(self, previous: State | None) -> None:
        """Goes on to the next item; what is left of the one before has been copied.

        Args:
            previous: the network's state after the preceding chunk of a stream, None at its start.
        """
        self.pool.take_back()
        self.previous = previous
        self.following: dict[str, Tensor] = {}  # maybe views of buffers
        self._held: dict[str, Tensor] = {}  # buffers whose last frames the next chunk reads

    def before(self, name: str, x: Tensor, fewest: int, most: int) -> Tensor | None:
        """Returns the `fewest` to `most` frames that the state called `name` has, None at the start
        of a stream; ValueError where they do not fit in front of `x` [1, C, T, H, W]."""
        if self.previous is None:
            return None
        if name not in self.previous:
            names = sorted(self.previous)[:4]
            raise ValueError(f"streaming state: must have an entry {name!r}, got {names}")
        frames = self.previous[name]
        expected = [*x.shape[:2], frames.shape[2], *x.shape[3:]]
        if list(frames.shape) != expected or not fewest <= frames.shape[2] <= most:
            expected[2] = most
            raise ValueError(
                f"streaming state: {name} must be {expected}, got {list(frames.shape)}"
            )
        return frames

    def num_frames(self, channels: int, height: int, width: int) -> int:
        """Returns how many frames a chunk should have."""
        size = torch.finfo(self.dtype).bits // 8
        return max(1, CHUNK_BYTES // (channels * height * width * size))

    def weights(self, conv: nn.Module) -> tuple[Tensor, Tensor | None]:
        """Returns weight [O, C, kt, kh, kw] and bias of a convolution in the pass's dtype."""
        conv = conv.conv if isinstance(conv, CausalConv1d | CausalConv3d) else conv
        if id(conv) not in self._weights:
            weight: Tensor = conv.weight  # type: ignore[assignment]
            bias: Tensor | None = conv.bias  # type: ignore[assignment]
            if weight.dim() == 3:
                weight = weight[..., None, None]
            elif weight.dim() == 4:
                weight = weight.unsqueeze(2)
            bias = None if bias is None else bias.to(self.dtype)
            self._weights[id(conv)] = (weight.to(self.dtype), bias)
        return self._weights[id(conv)]

    def taps(self, conv: nn.Module) -> list[Tensor]:
        """Returns the weights [O, C, 1, kh, kw] of a convolution for every frame that it sees."""
        if id(conv) not in self._taps:
            weight, _ = self.weights(conv)
            self._taps[id(conv)] = [tap.contiguous() for tap in weight.split(1, 2)]
        return self._taps[id(conv)]

    def add_conv(
        self, out: Tensor, x: Tensor, conv: nn.Module, stride: Sequence[int] = (1, 1, 1)
    ) -> None:
        """Adds `conv` of frames that have their front to `out`; zeros around a frame at stride 1
        in space."""
        weight, bias = self.weights(conv)
        same = (0, weight.shape[3] // 2, weight.shape[4] // 2) if stride[1] == 1 else (0, 0, 0)
        add_conv3d(out, x, weight, bias, stride, same)

    def norm(self, norm: NormAct, x: Tensor) -> Tensor:
        """Returns `norm(x)` in a buffer."""
        buffer = self.pool.empty(*x.shape[1:])
        self._norm_into(buffer, x, norm)
        return buffer

    @staticmethod
    def _norm_into(buffer: Tensor, x: Tensor, norm: NormAct, *front) -> None:
        inner: nn.LayerNorm = norm.norm  # type: ignore[assignment]
        norm_act_into(buffer, x, inner.weight, inner.bias, "layer", norm.act, inner.eps, *front)

    def norm_with_front(
        self, name: str, norm: NormAct, conv: CausalConv1d | CausalConv3d, x: Tensor
    ) -> Tensor:
        """Returns `norm(x)` behind the front frames of `conv`, whose state is called `name`.

        The buffer belongs to the pass: the next call of that name reads its last frames.
        """
        channels, frames, height, width = x.shape[1:]
        front, held = conv.geometry.front, self._held.get(name)
        if held is None:
            state = self.before(name, x, front, front)
        else:
            state = held[:, :, held.shape[2] - front :]
        buffer = self.pool.empty(channels, front + frames, height, width)
        self._norm_into(buffer, x, norm, front, conv.temporal == "replicate", state)
        if held is not None:
            self.pool.give(held)
        self._held[name] = buffer
        self.following[name] = buffer[:, :, frames:]
        return buffer

    def block_2d(self, block: ResidualBlock2d, x: Tensor) -> Tensor:
        """Returns the block's output: `x` itself, or where the width changes another buffer."""
        channels = block.conv1.out_channels
        h = self.norm(block.norm1, x)  # type: ignore[arg-type]
        y = self.pool.zeros(channels, *x.shape[2:])
        self.add_conv(y, h, block.conv1)
        self.pool.give(h)
        h = self.norm(block.norm2, y)  # type: ignore[arg-type]
        self.pool.give(y)
        if block.nin_shortcut is not None:
            skip = self.pool.zeros(channels, *x.shape[2:])
            self.add_conv(skip, x, block.nin_shortcut)
            x = skip
        self.add_conv(x, h, block.conv2)
        self.pool.give(h)
        return x

    def temporal_block(
        self, name: str, block: ResidualBlock1d | ResidualBlock3d, x: Tensor
    ) -> None:
        """Adds the block's branch to `x`."""
        conv1: CausalConv1d = block.conv1  # type: ignore[assignment]
        conv2: CausalConv1d = block.conv2  # type: ignore[assignment]
        h = self.norm_with_front(f"{name}.conv1", block.norm1, conv1, x)  # type: ignore[arg-type]
        y = self.pool.zeros(*x.shape[1:])
        self.add_conv(y, h, conv1)
        h = self.norm_with_front(f"{name}.conv2", block.norm2, conv2, y)  # type: ignore[arg-type]
        self.pool.give(y)
        self.add_conv(x, h, conv2)

    def attention(self, block: FrameAttention, x: Tensor) -> None:
        """Adds the attention within each frame to `x`."""
        channels, frames, height, width = x.shape[1:]
        h = self.norm(block.norm, x)  # type: ignore[arg-type]
        projected = [self.pool.zeros(*x.shape[1:]) for _ in range(3)]
        for y, conv in zip(projected, (block.q, block.k, block.v), strict=True):
            self.add_conv(y, h, conv)
        q, k, v = (
            y.permute(0, 2, 3, 4, 1).view(frames, 1, height * width, channels) for y in projected
        )
        mixed = F.scaled_dot_product_attention(q, k, v)
        mixed = mixed.view(1, frames, height, width, channels).permute(0, 4, 1, 2, 3)
        self.add_conv(x, mixed, block.proj_out)
        self.pool.give(h, *projected)

    def space_down(self, out: Tensor, layer: SpatialDownsample, x: Tensor) -> None:
        """Adds the halved `x` to `out`; zeros at the right and the bottom only, hence a copy."""
        channels, frames, height, width = x.shape[1:]
        bottom, right = 1 - height % 2, 1 - width % 2
        buffer = self.pool.empty(channels, frames, height + bottom, width + right)
        buffer[:, :, :, height:] = 0
        buffer[..., width:] = 0
        buffer[:, :, :, :height, :width] = x
        self.add_conv(out, buffer, layer.conv, (1, 2, 2))
        self.pool.give(buffer)

    def space_up(self, layer: SpatialUpsample, x: Tensor) -> Tensor:
        """Returns `x` doubled in height and width."""
        key = -id(layer)
        if key not in self._weights:
            weight, bias = self.weights(layer.conv)
            self._weights[key] = (transposed_weight(weight), bias)
        return upsampled_conv3d(x, *self._weights[key])

    def release(self, prefix: str, keep_state: bool) -> None:
        """Takes back the buffers of layers that have seen their last chunk of the pass."""
        for name in [name for name in self._held if name.startswith(prefix)]:
            if keep_state:
                self.following[name] = owned(self.following[name])
            else:
                del self.following[name]
            self.pool.give(self._held.pop(name))

    def state(self) -> dict[str, Tensor]:
        """Returns the state after this chunk: copies that keep no buffer alive."""
        return {name: owned(frames) for name, frames in self.following.items()}
