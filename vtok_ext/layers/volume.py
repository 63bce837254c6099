"""Causal 3x3x3 layers of a MAGVIT-v2 style network; tensors are [B, C, T, H, W].

    VolumeBlock       x + conv(norm_act(conv(norm_act(x)))), a 1x1x1 shortcut where widths differ
    VolumeDown        3x3x3 convolution of stride (1 or 2, 1 or 2, 1 or 2) behind two front frames
    VolumeUp          3x3x3 convolution of every value repeated in time, in space, or in both

Two zero frames precede a clip in every convolution, also in one of stride 2: 17 frames give 9, then
5. Doubling the frame rate drops the first duplicate at once: 1 + n frames give 1 + 2 n, and the
convolution behind it pads what is left. Source: MAGVIT-v2 (arXiv 2310.05737) for causal
convolutions; ProMAG (arXiv 2501.05442) for two front frames and for dropping as one goes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vtok_ext.layers._ownership import may_overwrite
from vtok_ext.layers._state import State, StateFlow
from vtok_ext.layers.causal_conv3d import CausalConv3d
from vtok_ext.ops._causal_conv3d_cpu import repeat_nearest

NormFactory = Callable[[int], nn.Module]


class VolumeBlock(nn.Module):
    """Returns [B, C_out, T, H, W] from [B, C_in, T, H, W], mixed over space and time.

    Args:
        in_channels, out_channels: widths.
        norm: returns the normalisation with SiLU of that many channels.
    """

    def __init__(self, in_channels: int, out_channels: int, norm: NormFactory, kt: int = 3) -> None:
        super().__init__()
        self.norm1 = norm(in_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels, (kt, 3, 3))
        self.norm2 = norm(out_channels)
        self.conv2 = CausalConv3d(out_channels, out_channels, (kt, 3, 3))
        self.nin_shortcut = (
            CausalConv3d(in_channels, out_channels, 1) if in_channels != out_channels else None
        )

    def forward(self, x: Tensor, state: State | None = None, return_state: bool = False):
        """Returns y [B, C_out, T, H, W], or `(y, state)` with `return_state=True`."""
        flow = StateFlow(state, return_state)
        h = flow("conv1", self.conv1, self.norm1(x))
        h = flow("conv2", self.conv2, self.norm2(h))
        skip = x if self.nin_shortcut is None else self.nin_shortcut(x)
        if may_overwrite(self.conv2) and h.dtype == skip.dtype:
            return flow.result(h.add_(skip))
        return flow.result(skip + h)


class VolumeDown(CausalConv3d):
    """Returns [B, C, ceil(T / st), ceil(H / s), ceil(W / s)]; streams as its convolution.

    Args:
        channels: C.
        time, space: st and s, 1 or 2.
    """

    def __init__(self, channels: int, *, time: int, space: int, kt: int = 3) -> None:
        super().__init__(channels, channels, (kt, 3, 3), (time, space, space), front=kt - 1)


class RepeatFrames(nn.Module):
    """Returns every frame `factor` times, at the start of a clip the first one once.

    Args:
        factor: 1 or 2.
    """

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def forward(
        self,
        x: Tensor,  # [B, C, T, H, W]
        starts: bool,
    ) -> Tensor:
        """Returns [B, C, factor T, H, W], without the first factor - 1 frames if a clip starts."""
        repeated = repeat_nearest(x, self.factor, 1)
        return repeated[:, :, self.factor - 1 :] if starts and self.factor > 1 else repeated


class VolumeUp(nn.Module):
    """Returns [B, C, st T - (st - 1), s H, s W], without the frame dropped at a clip's start.

    The next chunk of a stream, which is given a state, keeps all of its st T frames.

    Args:
        channels: C.
        time, space: st and s, 1 or 2.
    """

    def __init__(self, channels: int, *, time: int, space: int, kt: int = 3) -> None:
        super().__init__()
        self.repeat = RepeatFrames(time)
        upsample = "space" if space == 2 else None
        self.conv = CausalConv3d(channels, channels, (kt, 3, 3), upsample=upsample)

    def forward(self, x: Tensor, state: Tensor | None = None, return_state: bool = False):
        """Returns the enlarged x, or `(y, state)` with `return_state=True`."""
        return self.conv(self.repeat(x, state is None), state, return_state)

    def start_as_repetition(self) -> None:
        """Returns None with the convolution being the identity."""
        start_as_identity(self.conv)


@torch.no_grad()
def start_as_identity(conv: CausalConv3d) -> None:
    """Returns None with an odd kernel that passes its middle position of the present frame."""
    for parameter in conv.parameters():
        nn.init.zeros_(parameter)
    weight = conv.conv.weight  # [C, C, kt, kh, kw]
    weight[:, :, -1, weight.shape[3] // 2, weight.shape[4] // 2] = torch.eye(weight.shape[0])
