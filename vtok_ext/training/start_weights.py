"""How a tokenizer that is trained from random weights starts.

    published   torch's defaults, as the published trainings: every convolution of a VidTok shrinks
                what depends on its input and adds a constant, which becomes the larger part of a
                small latent; the positional tables of a CoordTok are noise
    scaled      VidTok: convolutions keep the variance (normal weights of variance 1 / inputs, no
                bias), and the last layer of every residual branch is 0: the network starts as the
                few layers between the branches
    sinusoidal  CoordTok: its positional tables begin as sines and cosines of t, x and y, as large
                as the noise, so that neighbours begin alike; they are trained as before

Measured on a VidTok of 0.4 M parameters (4x4x4, FSQ of 4,096 codes, procedural clips of 32 px):
after 78 steps of 4 clips the mean squared error is 0.115 published, 0.093 scaled; the variance of
the videos is 0.133. Learning a single clip by heart takes as long either way. A CoordTok of 0.9 M
parameters has 0.28 dB more after 2,400 steps of 8 clips with `sinusoidal`; see the study coordtok.
Source: LeCun et al. 1998 for the variance; Goyal et al. (arXiv 1706.02677) for branches that start
at 0; Vaswani et al. (arXiv 1706.03762) for sines and cosines, here with periods that fit the axis.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok_ext.layers.attention import FrameAttention
from vtok_ext.layers.residual import ResidualBlock1d, ResidualBlock2d, ResidualBlock3d
from vtok_ext.layers.unblended import VolumeResidualBlock
from vtok_ext.models.coordtok import CoordTok
from vtok_ext.models.vidtok import VidTok
from vtok_ext.training.recipe import STARTS

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@torch.no_grad()
def start(model: Any, how: str, generator: torch.Generator | None = None) -> None:
    """Returns None with the random weights of `model` replaced; see the module.

    Args:
        model: of random weights; a VidTok for "scaled", a CoordTok for "sinusoidal".
        how: "published", which changes nothing, "scaled" or "sinusoidal".
        generator: that weights are drawn with; the default one if there is none.

    Raises:
        ValueError: another model, or another `how`.
    """
    if how not in STARTS:
        raise ValueError(f"start: how must be one of {STARTS}, got {how!r}")
    if how == "published":
        return
    wanted = VidTok if how == "scaled" else CoordTok
    if not isinstance(model, wanted):
        raise ValueError(
            f"start: model must be a {wanted.__name__} for {how!r}, got {type(model).__name__}"
        )
    if isinstance(model, CoordTok):
        _sinusoidal(model)
    else:
        _scaled(model, generator)


def _scaled(model: VidTok, generator: torch.Generator | None) -> None:
    """Makes the convolutions keep the variance and silences the residual branches."""
    for module in model.modules():
        if isinstance(module, _CONVOLUTIONS):
            inputs = module.weight[0].numel()
            nn.init.normal_(module.weight, 0.0, 1 / math.sqrt(inputs), generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for last in _ends_of_branches(model):
        for parameter in last.parameters():
            nn.init.zeros_(parameter)


def _sinusoidal(model: CoordTok) -> None:
    """Makes the positional tables sines and cosines."""
    memory, points = model.config.memory_grid(), model.config.point_grid()
    for table, grid in (
        (model.encoder.encoder.pos_emb, memory),
        (model.encoder.cross_pos_emb, memory),
        (model.decoder.transformer.pos_embed, points),
    ):
        waves = _grid_waves(grid, table.shape[-1]).view_as(table)
        # The square of a sine and that of its cosine have the mean 1/2.
        size = 1.0 if grid is memory else table.shape[-1] ** -0.5
        table.copy_(waves * math.sqrt(2) * size)


def _grid_waves(grid: tuple[int, ...], dim: int) -> Tensor:
    """Returns [*grid, dim]: a part of the channels for each of the axes t, x and y."""
    other = dim // 6 * 2  # whole pairs; t has the rest
    parts = []
    for axis, (length, width) in enumerate(zip(grid, (dim - 2 * other, other, other), strict=True)):
        shape = [1, 1, 1, width]
        shape[axis] = length
        parts.append(_waves(length, width).view(shape).expand(*grid, width))
    return torch.cat(parts, dim=-1)


def _waves(length: int, dim: int) -> Tensor:
    """Returns [length, dim]: sines, cosines; their periods go from 4 steps to 16 lengths."""
    pairs = dim // 2
    powers = torch.arange(pairs) / max(pairs - 1, 1)
    angles = math.pi / 2 * torch.arange(length)[:, None] * (4.0 * length) ** -powers
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, dim % 2))


def _ends_of_branches(model: nn.Module) -> list[nn.Module]:
    """Returns the layers whose result is added to what goes past them."""
    blocks = (ResidualBlock1d, ResidualBlock2d, ResidualBlock3d, VolumeResidualBlock)
    found: list[nn.Module] = [m.conv2 for m in model.modules() if isinstance(m, blocks)]
    return found + [m.proj_out for m in model.modules() if isinstance(m, FrameAttention)]
