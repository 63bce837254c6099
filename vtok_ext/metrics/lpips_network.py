"""LPIPS: the distance of two images in the features of a VGG16.

    d(a, b) = sum_l mean_hw sum_c w_lc (f_l(a) / |f_l(a)| - f_l(b) / |f_l(b)|)_c^2

f_l are the activations after relu1_2, 2_2, 3_3, 4_3 and 5_3, |.| is the norm over channels, w_l a
learned 1x1 convolution. Source: Zhang et al., "The unreasonable effectiveness of deep features as a
perceptual metric" (arXiv 1801.03924), section 3; names and constants as in VidTok (specification
section 7), whose checkpoints hold them under `loss.perceptual_loss`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VGG16_CHANNELS = (64, 128, 256, 512, 512)
# Numbers of the convolutions in torchvision's `vgg16().features`, by block; a tap follows each.
_BLOCKS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
# ImageNet mean and deviation for images in [-1, 1], rounded as published.
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
_EPS = 1e-10
_BACKBONE_FILE = "vgg16-397923af.pth"
_BACKBONE_SHA256_START = "397923af"  # torchvision puts the start of the hash in the file name
_HEADS_MD5 = "d507d7349b931f0638a25a48a722f98a"


class LPIPS(nn.Module):
    """Returns distances [N, 1, 1, 1] of images a, b [N, 3, H, W] in [-1, 1]; H, W >= 16.

    Frozen and always in eval mode. Random until weights are loaded: use `published_lpips` or
    `random_lpips`.

    Args:
        channels: of the five blocks.
    """

    def __init__(self, channels: Sequence[int] = VGG16_CHANNELS) -> None:
        super().__init__()
        if len(channels) != len(_BLOCKS) or min(channels) < 1:
            raise ValueError(f"LPIPS: channels must be five counts >= 1, got {list(channels)}")
        self.scaling_layer = _Scaling()
        self.net = nn.Module()
        previous = 3
        for i, (block, width) in enumerate(zip(_BLOCKS, channels, strict=True), 1):
            layers = nn.ModuleDict()
            for number in block:
                layers[str(number)] = nn.Conv2d(previous, width, 3, padding=1)
                previous = width
            self.net.add_module(f"slice{i}", layers)
            self.add_module(f"lin{i - 1}", _Head(width))
        self.requires_grad_(False)
        super().train(False)

    def train(self, mode: bool = True) -> LPIPS:
        """Returns itself, unchanged: the distance is the same in training."""
        return self

    def features(self, images: Tensor) -> list[Tensor]:
        """Returns the five taps [N, C_l, H / 2^l, W / 2^l] of images [N, 3, H, W] in [-1, 1]."""
        x, taps = self.scaling_layer(images), []
        for i in range(len(_BLOCKS)):
            if i:
                x = F.max_pool2d(x, 2)
            for convolution in self.net.get_submodule(f"slice{i + 1}").values():  # type: ignore
                x = F.relu(convolution(x))
            taps.append(x)
        return taps

    def forward(
        self,
        a: Tensor,  # [N, 3, H, W]
        b: Tensor,  # [N, 3, H, W]
        *,
        dropout: float = 0.0,
        generators: Sequence[torch.Generator] | None = None,
    ) -> Tensor:
        """Returns float32 distances [N, 1, 1, 1].

        Args:
            a, b: [N, 3, H, W] in [-1, 1].
            dropout: rate at which each squared difference is dropped in front of its head, the
                others being scaled up; for the reference that trains with 0.5.
            generators: of the images' device, for the dropout of as many equal runs of images;
                default the global one for all.

        Raises:
            ValueError: shapes differ or are too small, or generators do not divide N.
        """
        if a.shape != b.shape or a.dim() != 4 or a.shape[1] != 3 or min(a.shape[2:]) < 16:
            raise ValueError(
                f"LPIPS: images must be two equal [N, 3, H, W] with H, W >= 16, "
                f"got {list(a.shape)} and {list(b.shape)}"
            )
        if generators is not None and (not generators or len(a) % len(generators)):
            raise ValueError(
                f"LPIPS: generators must divide {len(a)} images equally, got {len(generators)}"
            )
        total = torch.zeros(a.shape[0], 1, 1, 1, device=a.device)
        for i, (x, y) in enumerate(zip(self.features(a), self.features(b), strict=True)):
            difference = (_unit(x.float()) - _unit(y.float())).square()
            weight = self.get_parameter(f"lin{i}.model.1.weight")
            if dropout > 0:
                difference = _dropped(difference, dropout, generators)
            total = total + (difference * weight).sum(1, True).mean((2, 3), True)
        return total


class _Scaling(nn.Module):
    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.tensor(_SHIFT).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(_SCALE).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.shift) / self.scale


class _Head(nn.Module):
    """Weight [1, C, 1, 1] under the published name `model.1.weight`; its dropout is never on."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"1": nn.Conv2d(channels, 1, 1, bias=False)})


def _dropped(x: Tensor, rate: float, generators: Sequence[torch.Generator] | None) -> Tensor:
    """Returns x [N, ...] after dropout, with one generator for each of equal parts of N."""
    if generators is None:
        return F.dropout(x, rate)
    draws = [
        torch.rand(part.shape, generator=generator, device=x.device)
        for part, generator in zip(x.chunk(len(generators)), generators, strict=True)
    ]
    return x * (torch.cat(draws) >= rate) / (1 - rate)


def _unit(x: Tensor) -> Tensor:
    # The gradient of a norm at zero is not a number: a pixel without any activation has one of 0.
    squares = x.square().sum(1, True)
    norm = torch.where(squares > 0, squares, 1.0).sqrt() * (squares > 0)
    return x / (norm + _EPS)


def random_lpips(seed: int = 0, channels: Sequence[int] = VGG16_CHANNELS) -> LPIPS:
    """Returns an LPIPS whose weights come from a seed: for tests, it measures nothing known.

    Args:
        seed: of the weights; the global generator is left alone.
        channels: of the five blocks.
    """
    network = LPIPS(channels)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.zero_()
            elif parameter.shape[0] == 1:  # a head: the published ones are not negative either
                parameter.copy_(noise.abs() / parameter.shape[1])
            else:  # keeps the size of activations (He et al., arXiv 1502.01852)
                parameter.copy_(noise * (2 / parameter[0].numel()) ** 0.5)
    return network


def published_lpips(
    backbone: str | os.PathLike | None = None,
    heads: str | os.PathLike | None = None,
    *,
    trust_checkpoint: bool = False,
) -> LPIPS:
    """Returns LPIPS with the ImageNet VGG16 of torchvision and the published heads.

    Nothing is downloaded.

    Args:
        backbone: torchvision's VGG16 weights, .pth or .safetensors; default torchvision's cache,
            `torch.hub.get_dir()/checkpoints/vgg16-397923af.pth`, whose hash is verified.
        heads: the file `vgg.pth` of LPIPS 0.1; default `vgg.pth` or `vgg_lpips.pth` in the same
            cache, or the one inside an installed `lpips` package, whose hash is verified.
        trust_checkpoint: read a given pickled file with torch < 2.6, whose `weights_only` loading
            can be made to run code (CVE-2025-32434).

    Raises:
        FileNotFoundError: a file is absent; the message says where it was looked for.
        ValueError: a file holds other tensors, one of the caches is damaged, or a given file is a
            pickled one that this torch cannot read safely.
    """
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    network = LPIPS()
    backbone_file = _find("backbone", backbone, [cache / _BACKBONE_FILE])
    if backbone is None:
        _check_hash(backbone_file, "sha256", _BACKBONE_SHA256_START)
    places = [cache / "vgg.pth", cache / "vgg_lpips.pth", *_installed_heads()]
    heads_file = _find("heads", heads, places)
    if heads is None:
        _check_hash(heads_file, "md5", _HEADS_MD5)
    read = _read_tensors(backbone_file, trusted=trust_checkpoint or backbone is None)
    weights = {
        f"net.slice{i}.{number}.{kind}": read.get(f"features.{number}.{kind}")
        for i, block in enumerate(_BLOCKS, 1)
        for number in block
        for kind in ("weight", "bias")
    }
    _load(network, weights, backbone_file)
    read = _read_tensors(heads_file, trusted=trust_checkpoint or heads is None)
    names = [f"lin{i}.model.1.weight" for i in range(len(_BLOCKS))]
    _load(network, {name: read.get(name) for name in names}, heads_file)
    return network


def _installed_heads() -> list[Path]:
    found = importlib.util.find_spec("lpips")
    folders = (found.submodule_search_locations or []) if found else []
    return [Path(folder) / "weights" / "v0.1" / "vgg.pth" for folder in folders]


def _find(what: str, given: str | os.PathLike | None, places: list[Path]) -> Path:
    candidates = places if given is None else [Path(given)]
    for path in candidates:
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"published_lpips: {what} must be a file, got none at {', '.join(map(str, candidates))}; "
        f"give its path, or train with perceptual_weight 0, which needs none"
    )


def _check_hash(path: Path, algorithm: str, start: str) -> None:
    digest = hashlib.new(algorithm, path.read_bytes(), usedforsecurity=False).hexdigest()
    if not digest.startswith(start):
        raise ValueError(
            f"published_lpips: {path} must have {algorithm} {start}..., got {digest}: it is "
            "damaged or another file; give a path to use it nevertheless"
        )


def _read_tensors(path: Path, trusted: bool) -> Mapping[str, Tensor]:
    from vtok_ext.models._checkpoint import read_checkpoint

    return read_checkpoint(str(path), trusted, op="published_lpips")


def _load(network: LPIPS, weights: Mapping[str, Tensor | None], path: Path) -> None:
    own = network.state_dict()
    for name, value in weights.items():
        if value is None or value.shape != own[name].shape:
            got = "none" if value is None else list(value.shape)
            raise ValueError(
                f"published_lpips: {path} must hold {list(own[name].shape)} for {name}, got {got}"
            )
        own[name].copy_(value)
