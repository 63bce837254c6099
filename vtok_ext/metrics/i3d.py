"""I3D, an Inception network inflated to three dimensions, with the 400 logits of Kinetics.

    conv 7 / 2, pool, conv 1, conv 3, pool, 3b 3c, pool, 4b .. 4f, pool, 5b 5c, mean, conv 1

Parameter names are those of the published weights converted from TensorFlow, "same" padding
included: zeros, more of them behind, also in front of max pools.
Source: Carreira and Zisserman (arXiv 1705.07750); specification section 10.
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_LOGITS = 400
_BATCH_NORM_EPS = 1e-5
# Output channels: 1x1x1; bottleneck and 3x3x3, twice; after the pool.
_INCEPTIONS = {
    "3b": (64, 96, 128, 16, 32, 32),
    "3c": (128, 128, 192, 32, 96, 64),
    "4b": (192, 96, 208, 16, 48, 64),
    "4c": (160, 112, 224, 24, 64, 64),
    "4d": (128, 128, 256, 24, 64, 64),
    "4e": (112, 144, 288, 32, 64, 64),
    "4f": (256, 160, 320, 32, 128, 128),
    "5b": (256, 160, 320, 32, 128, 128),
    "5c": (384, 192, 384, 48, 128, 128),
}
# Kernel and stride (time, space) of the pool in front of a stage.
_POOLS = {
    "2b": ((1, 3), (1, 2)),
    "3b": ((1, 3), (1, 2)),
    "4b": ((3, 3), (2, 2)),
    "5b": ((2, 2), (2, 2)),
}


def _same_padding(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """Returns x padded by zeros so that ceil(size / stride) windows fit."""
    pads: list[int] = []
    for size, k, s in reversed(list(zip(x.shape[2:], kernel, stride, strict=True))):
        total = max(k - s if size % s == 0 else k - size % s, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads)


def _max_pool(x: Tensor, kernel: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    k, s = ((pair[0], pair[1], pair[1]) for pair in (kernel, stride))
    return F.max_pool3d(_same_padding(x, k, s), k, s)


class _Unit(nn.Module):
    """Returns relu(norm(conv(x))) of x [B, C, T, H, W]; the logits have neither, but a bias."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, last=False) -> None:
        super().__init__()
        self.kernel, self.stride = (kernel,) * 3, (stride,) * 3
        self.conv3d = nn.Conv3d(inputs, outputs, kernel, stride=stride, bias=last)
        if not last:
            self.bn = nn.BatchNorm3d(outputs, eps=_BATCH_NORM_EPS)
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv3d(_same_padding(x, self.kernel, self.stride))
        return x if self.last else F.relu(self.bn(x))


class _Inception(nn.Module):
    """Returns the channels of four branches side by side."""

    def __init__(self, inputs: int, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.b0 = _Unit(inputs, channels[0], 1)
        self.b1a, self.b1b = _Unit(inputs, channels[1], 1), _Unit(channels[1], channels[2], 3)
        self.b2a, self.b2b = _Unit(inputs, channels[3], 1), _Unit(channels[3], channels[4], 3)
        self.b3b = _Unit(inputs, channels[5], 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.b3b(_max_pool(x, (3, 3), (1, 1)))
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), pooled], 1)


class I3D(nn.Module):
    """Returns logits [B, 400] of clips [B, 3, T, 224, 224] in [-1, 1], T >= 9; see `load_i3d`."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv3d_1a_7x7 = _Unit(3, 64, 7, 2)
        self.Conv3d_2b_1x1 = _Unit(64, 64, 1)
        self.Conv3d_2c_3x3 = _Unit(64, 192, 3)
        width = 192
        for name, channels in _INCEPTIONS.items():
            self.add_module(f"Mixed_{name}", _Inception(width, channels))
            width = channels[0] + channels[2] + channels[4] + channels[5]
        self.logits = _Unit(width, NUM_LOGITS, 1, last=True)

    def forward(self, video: Tensor) -> Tensor:
        """Returns the logits of video, averaged over time."""
        if video.dim() != 5 or video.shape[1] != 3 or tuple(video.shape[3:]) != (224, 224):
            raise ValueError(f"I3D: video must be [B, 3, T, 224, 224], got {list(video.shape)}")
        if video.shape[2] < 9:  # two steps are left of at least nine frames
            raise ValueError(f"I3D: video must have 9 frames or more, got {video.shape[2]}")
        x = _max_pool(self.Conv3d_1a_7x7(video), *_POOLS["2b"])
        x = self.Conv3d_2c_3x3(self.Conv3d_2b_1x1(x))
        for name in _INCEPTIONS:
            if name in _POOLS:
                x = _max_pool(x, *_POOLS[name])
            x = self.get_submodule(f"Mixed_{name}")(x)
        return self.logits(F.avg_pool3d(x, (2, 7, 7), 1)).mean(dim=(2, 3, 4))


def load_i3d(path: str | os.PathLike, *, trust_checkpoint: bool = False) -> I3D:
    """Returns the network with the weights of a file, in eval mode.

    Args:
        path: `i3d_pretrained_400.pt` of the published FVD code, or a .safetensors file with the
            same names. Nothing is downloaded, and nothing in the file is executed.
        trust_checkpoint: read a pickled file with torch < 2.6, whose `weights_only` loading can be
            made to run code (CVE-2025-32434).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds other tensors, or is a pickled one that this torch cannot read safely.
    """
    from vtok_ext.models._checkpoint import read_checkpoint

    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"load_i3d: weights must be a file of I3D with 400 classes (i3d_pretrained_400.pt), "
            f"got none at {os.fspath(path)!r}"
        )
    weights = read_checkpoint(os.fspath(path), trust_checkpoint, op="load_i3d")
    network = I3D()
    own = network.state_dict()
    wrong = [
        name
        for name in {**own, **weights}
        if name not in own or name not in weights or own[name].shape != weights[name].shape
    ]
    if wrong:
        raise ValueError(
            f"load_i3d: {os.fspath(path)!r} must hold the {len(own)} tensors of I3D, got "
            f"{len(wrong)} missing, unknown or misshapen ones ({', '.join(sorted(wrong)[:3])})"
        )
    network.load_state_dict(weights)
    return network.eval().requires_grad_(False)
