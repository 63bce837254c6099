"""Convolutions of video tensors [B, C, T, H, W]: causal in time, zero padded in space.

    y[t] = sum_k w[k] * x[st * t + k - p],  p = kt - st frames in front, none at the back

`video_conv3d` and `pixel_conv1d` give the causal layer or its centred, zero padded counterpart.

Three parameter shapes of one operation, so that a network stays in channels_last_3d memory
throughout: `CausalConv3d` [O, I, kt, kh, kw], `CausalConv1d` [O, I, kt] run as (kt, 1, 1), and
`FrameConv2d` [O, I, kh, kw] run as (1, kh, kw). Source: VidTok (arXiv 2412.13061), section 3.2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok_ext.layers._convolution import conv2d_frames, conv3d
from vtok_ext.layers._state import owned

TEMPORAL_PADDINGS = ("zeros", "replicate")


def pad_front(x: Tensor, num_frames: int, state: Tensor | None, temporal: str) -> Tensor:
    """Returns `x` [B, C, T, H, W] with the frames a causal kernel needs in front of it.

    These are `state`, the frames carried over from the preceding chunk; or at the start of a clip
    `num_frames` frames of zeros or copies of the first frame.
    """
    if state is not None:
        return torch.cat([state.to(x.dtype), x], dim=2)
    if num_frames == 0:
        return x
    if temporal == "zeros":
        return F.pad(x, (0, 0, 0, 0, num_frames, 0))
    return torch.cat([x[:, :, :1]] * num_frames + [x], dim=2)


def check_temporal(op: str, temporal: str) -> None:
    """Raises ValueError unless `temporal` names a padding mode."""
    if temporal not in TEMPORAL_PADDINGS:
        raise ValueError(f"{op}: temporal must be one of {TEMPORAL_PADDINGS}, got {temporal!r}")


class FrameConv2d(nn.Conv2d):
    """2-D convolution of every frame of [B, C, T, H, W]; parameters of nn.Conv2d, zero padding.

    Equivalent to: `nn.Conv2d` on the frames flattened to [B * T, C, H, W].
    """

    def forward(self, x: Tensor) -> Tensor:
        """Returns [B, O, T, H', W'] of [B, I, T, H, W]."""
        return conv2d_frames(x, self.weight, self.bias, self.stride, self.padding)  # type: ignore[arg-type]


class PixelConv1d(nn.Conv1d):
    """1-D convolution over time of every pixel, with the zero padding it was made with."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns [B, O, T', H, W] of [B, I, T, H, W]."""
        padding = (self.padding[0], 0, 0)
        return conv3d(x, self.weight[..., None, None], self.bias, padding=padding)  # type: ignore[arg-type]


class VolumeConv3d(nn.Conv3d):
    """3-D convolution of [B, C, T, H, W] with the zero padding it was made with."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns [B, O, T', H', W'] of [B, I, T, H, W]."""
        return conv3d(x, self.weight, self.bias, self.stride, self.padding)  # type: ignore[arg-type]


class _CausalConv(nn.Module):
    """Front padding, streaming state, and a child `conv` that convolves the padded frames.

    The child's class carries the released parameter shape; the extra level `.conv` in the
    state_dict is that of the released weights.
    """

    conv: VolumeConv3d | PixelConv1d
    kernel_frames: int
    stride: int
    temporal: str

    def pad(self, x: Tensor, state: Tensor | None = None) -> Tensor:
        """Returns [B, C, p + T, H, W], the frames that `conv` consumes."""
        if state is not None:
            self._check_state(x, state)
        return pad_front(x, self.kernel_frames - self.stride, state, self.temporal)

    def _check_state(self, x: Tensor, state: Tensor) -> None:
        batch, channels, _, height, width = x.shape
        fewest, most = self.kernel_frames - self.stride, self.kernel_frames - 1
        if (
            state.dim() != 5
            or (*state.shape[:2], *state.shape[3:]) != (batch, channels, height, width)
            or not fewest <= state.shape[2] <= most
        ):
            frames = most if fewest == most else f"{fewest}..{most}"
            raise ValueError(
                f"causal_conv3d: state must be [{batch}, {channels}, {frames}, {height}, {width}], "
                f"got {list(state.shape)}"
            )

    def num_outputs(self, num_padded: int) -> int:
        """Returns how many frames come out of `num_padded` padded ones."""
        return max(0, (num_padded - self.kernel_frames) // self.stride + 1)

    def carry(self, padded: Tensor) -> Tensor:
        """Returns the state: an owned copy of the frames that later windows still need."""
        return owned(padded[:, :, self.stride * self.num_outputs(padded.shape[2]) :])

    def convolve(self, padded: Tensor) -> Tensor:
        """Returns `conv(padded)`; no frames when there are fewer than one window."""
        if self.num_outputs(padded.shape[2]) == 0:
            batch, _, _, height, width = padded.shape
            return padded.new_empty((batch, self.conv.out_channels, 0, height, width))
        return self.conv(padded)

    def forward(self, x: Tensor, state: Tensor | None = None, return_state: bool = False):
        """Returns y, or `(y, state)` with `return_state=True`."""
        padded = self.pad(x, state)
        y = self.convolve(padded)
        return (y, self.carry(padded)) if return_state else y


class CausalConv3d(_CausalConv):
    """Returns a 3-D convolution that sees the current and earlier frames only.

    `y, state = layer(x, state, return_state=True)` continues a stream: equal to one call on the
    concatenated chunks whatever their lengths. `state=None` starts a clip.

    Equivalent to (stride 1): `F.conv3d(F.pad(x, (pw, pw, ph, ph, kt - 1, 0)), weight, bias)`.

    Args:
        in_channels, out_channels: C of input and output.
        kernel_size: k, or (kt, kh, kw) with odd kh and kw.
        stride: temporal stride, 1 <= stride <= kt.
        temporal: what precedes the first frame: "zeros", or "replicate" for copies of it.
        bias: whether a bias is learned.

    Input [B, C_in, T, H, W] and output [B, C_out, floor(T / stride), H, W], floating, any device.

    Raises:
        ValueError: kernel, stride or padding mode outside the above; a state of another shape.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int, int] = 3,
        stride: int = 1,
        *,
        temporal: str = "zeros",
        bias: bool = True,
    ) -> None:
        super().__init__()
        kernel = (kernel_size,) * 3 if isinstance(kernel_size, int) else tuple(kernel_size)
        if len(kernel) != 3 or min(kernel) < 1 or kernel[1] % 2 == 0 or kernel[2] % 2 == 0:
            raise ValueError(
                f"causal_conv3d: kernel_size must be (kt, kh, kw), kh and kw odd, got {kernel}"
            )
        if not 1 <= stride <= kernel[0]:
            raise ValueError(f"causal_conv3d: stride must be in 1..{kernel[0]}, got {stride}")
        check_temporal("causal_conv3d", temporal)
        self.kernel_frames, self.stride, self.temporal = kernel[0], stride, temporal
        self.conv = VolumeConv3d(
            in_channels,
            out_channels,
            kernel,
            stride=(stride, 1, 1),
            padding=(0, kernel[1] // 2, kernel[2] // 2),
            bias=bias,
        )


class CausalConv1d(_CausalConv):
    """Returns a causal convolution over time at every pixel; weight [O, I, kt].

    Streaming and padding as `CausalConv3d`, of which it is the kernel (kt, 1, 1).
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 3, *, temporal: str = "zeros"
    ) -> None:
        super().__init__()
        check_temporal("causal_conv1d", temporal)
        self.kernel_frames, self.stride, self.temporal = kernel_size, 1, temporal
        self.conv = PixelConv1d(in_channels, out_channels, kernel_size)


def video_conv3d(
    in_channels: int,
    out_channels: int,
    kernel_size: int = 3,
    *,
    temporal: str = "zeros",
    causal: bool = True,
) -> CausalConv3d | VolumeConv3d:
    """Returns a CausalConv3d, or with `causal=False` one centred and zero padded in time too."""
    if causal:
        return CausalConv3d(in_channels, out_channels, kernel_size, temporal=temporal)
    return VolumeConv3d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)


def pixel_conv1d(
    channels: int, kernel_size: int = 3, *, temporal: str = "zeros", causal: bool = True
) -> CausalConv1d | PixelConv1d:
    """Returns a CausalConv1d, or with `causal=False` one centred and zero padded."""
    if causal:
        return CausalConv1d(channels, channels, kernel_size, temporal=temporal)
    return PixelConv1d(channels, channels, kernel_size, padding=kernel_size // 2)
