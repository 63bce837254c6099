"""The distinct convolutions of VidTok 488 and of ProMAG's base, with how often each one runs.

Counted by walking a model on tensors without memory, so that the list follows the model.
"""

from collections import Counter
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import vtok_ext as vt
from vtok_ext.layers import causal_conv3d as layers


@dataclass(frozen=True)
class ConvShape:
    """One convolution: input [B, C, T, H, W], front frames not counted, and its options."""

    channels: int
    columns: int
    frames: int
    height: int
    width: int
    kernel: tuple[int, int, int]
    stride: tuple[int, int, int] = (1, 1, 1)
    front: int = 0
    one_sided: bool = False  # zeros at the right and the bottom only
    upsample: str | None = None  # "space" or "time", before the convolution

    @property
    def name(self) -> str:
        """Readable and unique."""
        kernel, stride = ("x".join(map(str, v)) for v in (self.kernel, self.stride))
        return (
            f"{self.channels}->{self.columns} {self.frames}x{self.height}x{self.width} k{kernel}"
            + (f" s{stride}" if self.stride != (1, 1, 1) else "")
            + (f" front {self.front}" if self.front else "")
            + (f" after 2x {self.upsample}" if self.upsample else "")
        )

    @property
    def repeats(self) -> tuple[int, int]:
        """How often a frame and a row are repeated."""
        return (2 if self.upsample == "time" else 1), (2 if self.upsample == "space" else 1)

    @property
    def spatial_padding(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Zeros around a frame."""
        if self.one_sided:
            return ((0, 1), (0, 1))
        return tuple((k // 2, k // 2) for k in self.kernel[1:])

    @property
    def output(self) -> tuple[int, int, int]:
        """(T', H', W')."""
        time, space = self.repeats
        sizes = (self.frames * time + self.front, self.height * space, self.width * space)
        pads = (0, *(sum(side) for side in self.spatial_padding))
        return tuple(
            (size + pad - k) // s + 1
            for size, pad, k, s in zip(sizes, pads, self.kernel, self.stride, strict=True)
        )

    @property
    def flops(self) -> int:
        """Multiplications and additions of one item, without folding taps on equal values."""
        t, h, w = self.output
        kt, kh, kw = self.kernel
        return 2 * self.channels * self.columns * kt * kh * kw * t * h * w

    @property
    def needed_flops(self) -> int:
        """`flops` with taps on equal values added up: 2 of 3 in time, 4 of 9 in space."""
        if self.upsample == "time":
            return self.flops * 2 // 3
        return self.flops * 4 // 9 if self.upsample == "space" else self.flops


def vidtok_shapes(size: int, num_frames: int = 17) -> Counter[ConvShape]:
    """Convolutions of one encoding and decoding of `num_frames` x size x size frames."""
    found: Counter[ConvShape] = Counter()
    original = layers.causal_conv3d

    def note(x, weight, bias=None, **options):
        kernel, steps = tuple(weight.shape[2:]), options.get("stride", 1)
        steps = (steps, 1, 1) if isinstance(steps, int) else tuple(steps)
        # The model is causal: a buffer ("valid") holds these front frames already.
        front = options.get("front")
        front = max(0, kernel[0] - steps[0]) if front is None else front
        held = front if options.get("temporal") == "valid" else 0
        one_sided = options.get("spatial_padding", "same") == ((0, 1), (0, 1))
        if x.shape[2] > 0:
            sizes = (x.shape[2] - held, x.shape[3], x.shape[4])
            channels = (weight.shape[1], weight.shape[0])
            upsample = options.get("upsample")
            found[ConvShape(*channels, *sizes, kernel, steps, front, one_sided, upsample)] += 1
        return original(x, weight, bias, **options)

    layers.causal_conv3d = note
    try:
        with FakeTensorMode(), torch.no_grad():
            model = vt.create_model("vidtok_fsq_causal_488_262144")
            frames = num_frames + 3  # the model puts three copies of the first frame in front
            model.decoder(model.encoder(torch.empty(1, 3, frames, size, size)))
    finally:
        layers.causal_conv3d = original
    return found


# ProMAG's base has its own widths and two front frames before a temporal stride; a model is not
# needed for the list: widths 128 x (1, 2, 2, 4), two residual blocks per level, 17x128x128.
PROMAG_SHAPES = [
    ConvShape(128, 128, 17, 128, 128, (3, 3, 3), front=2),
    ConvShape(256, 256, 17, 64, 64, (3, 3, 3), front=2),
    ConvShape(256, 256, 17, 32, 32, (3, 3, 3), (2, 1, 1), front=2),
    ConvShape(256, 256, 9, 32, 32, (3, 3, 3), front=2),
    ConvShape(512, 512, 5, 16, 16, (3, 3, 3), front=2),
    ConvShape(512, 16, 5, 16, 16, (1, 1, 1)),
]
