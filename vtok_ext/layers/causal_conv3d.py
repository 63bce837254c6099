"""Convolutions of video tensors [B, C, T, H, W]: causal in time, zero padded in space.

    y[t] = sum_k w[k] * x[st * t + k - p],  p = kt - st frames in front, none at the back

`video_conv3d` and `pixel_conv1d` give the causal layer or its centred, zero padded counterpart.

Three parameter shapes of one operation, so that a network stays in channels_last_3d memory
throughout: `CausalConv3d` [O, I, kt, kh, kw], `CausalConv1d` [O, I, kt] run as (kt, 1, 1), and
`FrameConv2d` [O, I, kh, kw] run as (1, kh, kw). All of them call `ops.causal_conv3d`.
Source: VidTok (arXiv 2412.13061), section 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok_ext.layers._hooks import has_hooks
from vtok_ext.layers._state import owned
from vtok_ext.ops._causal_conv3d_cpu import repeat_nearest
from vtok_ext.ops._causal_conv3d_geometry import SpatialPadding, make_geometry
from vtok_ext.ops.causal_conv3d import ACTIVATIONS, Blend, causal_conv3d, check_stream

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


def _check_padding_mode(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> None:
    if module.padding_mode != "zeros":
        raise ValueError(
            f"{type(module).__name__}: padding_mode must be 'zeros', got {module.padding_mode!r}"
        )


class FrameConv2d(nn.Conv2d):
    """2-D convolution of every frame of [B, C, T, H, W]; parameters of nn.Conv2d, zero padding.

    Equivalent to: `nn.Conv2d` on the frames flattened to [B * T, C, H, W].
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _check_padding_mode(self)

    def forward(self, x: Tensor, **options: Any) -> Tensor:  # type: ignore[override]
        """Returns [B, O, T, H', W'] of [B, I, T, H, W]; options of the op that are not sizes."""
        options.setdefault("spatial_padding", _both_sides(self.padding))
        return causal_conv3d(
            x,
            self.weight.unsqueeze(2),
            self.bias,
            stride=(1, *self.stride),
            dilation=(1, *self.dilation),
            groups=self.groups,
            temporal="valid",
            **options,
        )


class PixelConv1d(nn.Conv1d):
    """1-D convolution over time of every pixel, with no padding or the centred one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _check_padding_mode(self)

    def forward(self, x: Tensor, **options: Any) -> Tensor:  # type: ignore[override]
        """Returns [B, O, T', H, W] of [B, I, T, H, W]; options of the op that are not sizes."""
        options.setdefault("temporal", _centred_or_valid(self.padding[0]))
        return causal_conv3d(
            x,
            self.weight[..., None, None],
            self.bias,
            stride=(self.stride[0], 1, 1),
            dilation=(self.dilation[0], 1, 1),
            groups=self.groups,
            **options,
        )


class VolumeConv3d(nn.Conv3d):
    """3-D convolution of [B, C, T, H, W]; in time with no padding or the centred one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _check_padding_mode(self)

    def forward(self, x: Tensor, **options: Any) -> Tensor:  # type: ignore[override]
        """Returns [B, O, T', H', W'] of [B, I, T, H, W]; options of the op that are not sizes."""
        options.setdefault("temporal", _centred_or_valid(self.padding[0]))
        options.setdefault("spatial_padding", _both_sides(self.padding[1:]))
        return causal_conv3d(
            x,
            self.weight,
            self.bias,
            stride=self.stride,
            dilation=self.dilation,
            groups=self.groups,
            **options,
        )


def _both_sides(padding: Any) -> tuple[tuple[int, int], ...]:
    return tuple((size, size) for size in padding)


def _centred_or_valid(padding: Any) -> str:
    return "same" if padding > 0 else "valid"


def is_plain(module: nn.Module) -> bool:
    """Whether calling `module` does nothing but its forward: no hook, adapter or other class."""
    return type(module) in (VolumeConv3d, PixelConv1d, FrameConv2d) and not has_hooks(module)


def fuses(module: nn.Module) -> bool:
    """Whether `module` is a convolution that adds a residual itself, unseen by hooks."""
    if type(module) in (CausalConv3d, CausalConv1d):
        return not has_hooks(module) and is_plain(module.conv)  # type: ignore[arg-type]
    return is_plain(module)


class _CausalConv(nn.Module):
    """Options, streaming state, and a child `conv` that holds the parameters.

    The child's class carries the released parameter shape; the extra level `.conv` in the
    state_dict is that of the released weights. The layer is a fusion unit with its child: what
    follows the convolution is fused unless the child is hooked or replaced (an adapter).
    """

    conv: VolumeConv3d | PixelConv1d
    out_channels: int

    def _set_options(
        self,
        kernel: tuple[int, ...],
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        temporal: str = "zeros",
        front: int | None = None,
        spatial_padding: SpatialPadding = "same",
        upsample: str | None = None,
        activation: str | None = None,
    ) -> None:
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"causal_conv3d: activation must be one of {ACTIVATIONS}, got {activation!r}"
            )
        self.geometry = make_geometry(
            kernel, stride, dilation, groups, temporal, front, spatial_padding, upsample
        )
        self.kernel, self.kernel_frames, self.stride = kernel, kernel[0], self.geometry.stride_t
        self.temporal, self.front, self.spatial_padding = temporal, front, spatial_padding
        self.upsample, self.activation = upsample, activation

    def pad(self, x: Tensor, state: Tensor | None = None, return_state: bool = False) -> Tensor:
        """Returns [B, C, p + T, H, W], the frames that the convolution consumes.

        Frames that `upsample="time"` repeats are repeated here.
        """
        g = self.geometry
        state = check_stream(x, self.kernel, g, self.temporal, state, return_state)
        frames = repeat_nearest(x, g.repeat_time, 1)
        if self.temporal not in TEMPORAL_PADDINGS or (state is None and x.shape[2] == 0):
            return frames  # nothing to add, or a stream that has not started
        return pad_front(frames, g.front, state, self.temporal)

    def num_outputs(self, num_padded: int) -> int:
        """Returns how many frames come out of `num_padded` padded ones."""
        return self.geometry._replace(repeat_time=1).num_frames(self.kernel, num_padded, 0)

    def carry(self, padded: Tensor) -> Tensor:
        """Returns the state: an owned copy of the frames that later windows still need."""
        if padded.shape[2] == 0:
            return padded.new_empty([*padded.shape[:2], 0, 0, 0])
        return owned(padded[:, :, self.stride * self.num_outputs(padded.shape[2]) :])

    def convolve(self, padded: Tensor) -> Tensor:
        """Returns the convolution of frames as `pad` returns them, without what follows it."""
        g = self.geometry
        if is_plain(self.conv):
            return self.conv(
                padded,
                temporal="same" if self.temporal == "same" else "valid",
                spatial_padding=self.spatial_padding,
                upsample="space" if g.repeat_space > 1 else None,
            )
        if self.num_outputs(padded.shape[2]) == 0:
            weight_shape = [self.out_channels, 0, *self.kernel]  # an adapter may not say
            empty = padded.new_empty(g.output_shape(padded.shape, weight_shape, 0))
            return empty + 0 * padded.sum()  # with gradients: zeros
        frames = repeat_nearest(padded, 1, g.repeat_space)
        if not isinstance(self.spatial_padding, str):  # else the child pads
            frames = F.pad(frames, (g.left, g.right, g.top, g.bottom))
        return self.conv(frames)

    def forward(
        self,
        x: Tensor,
        state: Tensor | None = None,
        return_state: bool = False,
        *,
        residual: Tensor | None = None,
        blend: Blend | None = None,
    ):
        """Returns y, or `(y, state)` with `return_state=True`; residual and blend as the op's."""
        if is_plain(self.conv):
            return self.conv(
                x,
                temporal=self.temporal,
                front=self.front,
                spatial_padding=self.spatial_padding,
                upsample=self.upsample,
                activation=self.activation,
                state=state,
                return_state=return_state,
                residual=residual,
                blend=blend,
            )
        padded = self.pad(x, state, return_state)
        y = self.convolve(padded)
        if residual is not None:
            y = y + residual.to(y.dtype)
        if self.activation == "silu":
            y = F.silu(y)
        if blend is not None:
            mix = torch.sigmoid(blend[1].to(torch.promote_types(y.dtype, torch.float32)))
            y = torch.lerp(y.to(mix.dtype), blend[0].to(mix.dtype), mix).to(y.dtype)
        return (y, self.carry(padded)) if return_state else y


class CausalConv3d(_CausalConv):
    """Returns a 3-D convolution that sees the current and earlier frames only.

    `y, state = layer(x, state, return_state=True)` continues a stream: equal to one call on the
    concatenated chunks whatever their lengths. `state=None` starts a clip.

    Equivalent to (stride 1): `F.conv3d(F.pad(x, (pw, pw, ph, ph, kt - 1, 0)), weight, bias)`.

    Args:
        in_channels, out_channels: C of input and output.
        kernel_size: k, or (kt, kh, kw); kh and kw odd for spatial_padding="same".
        stride, dilation: in time, or (t, h, w); 1 <= stride in time <= (kt - 1) * dilation + 1.
        groups, temporal, front, spatial_padding, upsample, activation: as in `causal_conv3d`.
        bias: whether a bias is learned.

    Input [B, C_in, T, H, W] and output [B, C_out, T', H', W'] of `causal_conv3d`, floating, any
    device: floor(T / stride), H and W with an integer stride and the other options as they are.
    `forward` takes `residual` and `blend` of the op. Parameters: `conv.weight`, `conv.bias`.

    Raises:
        ValueError: kernel, stride, padding or another option outside the above; a state of another
            shape.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int, int] = 3,
        stride: int | tuple[int, int, int] = 1,
        *,
        dilation: int | tuple[int, int, int] = 1,
        groups: int = 1,
        temporal: str = "zeros",
        front: int | None = None,
        spatial_padding: SpatialPadding = "same",
        upsample: str | None = None,
        activation: str | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        kernel = (kernel_size,) * 3 if isinstance(kernel_size, int) else tuple(kernel_size)
        if len(kernel) != 3 or min(kernel) < 1:
            raise ValueError(f"causal_conv3d: kernel_size must be (kt, kh, kw), got {kernel}")
        self._set_options(
            *(kernel, stride, dilation, groups, temporal),
            *(front, spatial_padding, upsample, activation),
        )
        g = self.geometry
        if g.stride_t > g.reach(kernel)[0]:
            raise ValueError(
                f"causal_conv3d: stride in time must be in 1..{g.reach(kernel)[0]}, "
                f"got {g.stride_t}"
            )
        self.out_channels = out_channels
        self.conv = VolumeConv3d(
            in_channels,
            out_channels,
            kernel,
            stride=g.stride,
            # The child of an adapter pads by itself; sides that differ are padded by this layer.
            padding=(g.back, g.top, g.left) if isinstance(spatial_padding, str) else (g.back, 0, 0),
            dilation=g.dilation,
            groups=groups,
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
        self._set_options((kernel_size, 1, 1), temporal=temporal)
        self.out_channels = out_channels
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
