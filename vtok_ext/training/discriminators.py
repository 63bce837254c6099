"""PatchGAN discriminators: one logit per patch of a frame (2-D) or of a clip (3-D).

    conv, LeakyReLU, 3 x [conv without bias, batch norm, LeakyReLU], conv to one channel

Source: Isola et al., "Image-to-image translation with conditional adversarial networks" (arXiv
1611.07004), section 3.2.2; widths, strides, names and initialisation as in VidTok (specification
section 7), whose checkpoints hold them under `loss.discriminator`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

_SLOPE = 0.2
_INIT_DEVIATION = 0.02


class _PatchDiscriminator(nn.Module):
    """Base of both: `_conv` and `_norm` are the layer types, `_strides` those of five layers."""

    _conv: type[nn.Module]
    _norm: type[nn.Module]
    _kernel: int
    _strides: tuple[Any, ...]
    _dimensions: int
    _layout: str
    _smallest: int  # of H and W: each layer must leave a pixel

    def __init__(self, width: int = 64, in_channels: int = 3) -> None:
        super().__init__()
        name = type(self).__name__
        if width < 1 or in_channels < 1:
            raise ValueError(
                f"{name}: width and in_channels must be at least 1, got {width}, {in_channels}"
            )
        self.in_channels = in_channels
        widths = [in_channels, width, 2 * width, 4 * width, 8 * width, 1]
        layers: list[nn.Module] = []
        for i, stride in enumerate(self._strides):
            normed = 0 < i < len(self._strides) - 1
            convolution = self._conv(
                widths[i], widths[i + 1], self._kernel, stride=stride, padding=1, bias=not normed
            )
            layers.append(convolution)
            if normed:
                layers.append(self._norm(widths[i + 1]))
            if i < len(self._strides) - 1:
                layers.append(nn.LeakyReLU(_SLOPE, inplace=True))
        self.main = nn.Sequential(*layers)
        self.main.apply(self._initialize)

    def _initialize(self, module: nn.Module) -> None:
        if isinstance(module, self._conv):
            nn.init.normal_(module.weight, 0.0, _INIT_DEVIATION)  # type: ignore[arg-type]
        elif isinstance(module, self._norm):
            nn.init.normal_(module.weight, 1.0, _INIT_DEVIATION)  # type: ignore[arg-type]
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits, one channel; see the class."""
        fits = x.dim() == self._dimensions and x.shape[1] == self.in_channels
        if not fits or min(x.shape[-2:]) < self._smallest:
            layout = self._layout.replace("C,", f"{self.in_channels},")
            raise ValueError(f"{type(self).__name__}: input must be {layout}, got {list(x.shape)}")
        return self.main(x)


class PatchDiscriminator2d(_PatchDiscriminator):
    """Returns logits [N, 1, h, w] of images [N, C, H, W]; a logit sees 70 x 70 pixels; H, W >= 24.

    Args:
        width: channels of the first layer; doubled three times.
        in_channels: C.

    Raises:
        ValueError: a size below 1, or an input of another shape.
    """

    _conv, _norm, _kernel = nn.Conv2d, nn.BatchNorm2d, 4
    _strides = (2, 2, 2, 1, 1)
    _dimensions, _layout, _smallest = 4, "[N, C, H, W] with H, W >= 24", 24


class PatchDiscriminator3d(_PatchDiscriminator):
    """Returns logits [B, 1, t, h, w] of clips [B, C, T, H, W].

    Args:
        width: channels of the first layer; doubled three times.
        in_channels: C.

    Raises:
        ValueError: a size below 1, or an input of another shape.
    """

    _conv, _norm, _kernel = nn.Conv3d, nn.BatchNorm3d, 3
    _strides = (2, 2, (1, 2, 2), 1, 1)
    _dimensions, _layout, _smallest = 5, "[B, C, T, H, W]", 1
