"""What is done to every block of a model at once: recomputation and compilation.

A block is a residual block, an attention or a transformer block; whole models are left alone,
because the adaptive weight asks for the gradient of the last layer only and must not go through
everything for it.
"""

from __future__ import annotations

import functools

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from vtok_ext.layers import (
    FrameAttention,
    ResidualBlock1d,
    ResidualBlock2d,
    ResidualBlock3d,
    SpatialDownsample,
    SpatialUpsample,
    TemporalDownsample,
    TemporalUpsample,
)
from vtok_ext.layers._hooks import same_forward
from vtok_ext.layers.transformer import QueryBlock, TransformerBlock
from vtok_ext.layers.volume import VolumeBlock, VolumeDown, VolumeUp
from vtok_ext.models.gpt import CausalBlock
from vtok_ext.models.sit_network import SiTBlock
from vtok_ext.models.vtok_decoder import DecoderBlock

BLOCKS = (
    ResidualBlock1d,
    ResidualBlock2d,
    ResidualBlock3d,
    VolumeBlock,
    FrameAttention,
    TransformerBlock,
    QueryBlock,
    SiTBlock,
    CausalBlock,
    DecoderBlock,
)
# Changes of resolution read their parameters by themselves too; recomputing them saves nothing.
_RESAMPLING = (
    SpatialDownsample,
    SpatialUpsample,
    TemporalDownsample,
    TemporalUpsample,
    VolumeDown,
    VolumeUp,
)
# Blocks of a class share their code and differ in shape and width: that many versions of it.
_COMPILED_VERSIONS = 128


def blocks(model: nn.Module) -> list[nn.Module]:
    """Returns the blocks of a model in order of their names."""
    return [module for module in model.modules() if isinstance(module, BLOCKS)]


def sharding_units(model: nn.Module) -> list[nn.Module]:
    """Returns the smallest modules that `fully_shard` may divide, inner ones first.

    Nobody but a unit itself reads its parameters, hence nobody meets divided ones.
    """
    modules = reversed(list(model.modules()))
    return [module for module in modules if isinstance(module, (*BLOCKS, *_RESAMPLING))]


def recompute_activations(model: nn.Module) -> int:
    """Returns how many blocks now keep their input only and are run again in the backward pass."""
    found = blocks(model)
    for block in found:
        forward = functools.partial(_recomputed, block, block.forward)
        block.forward = same_forward(block, forward)
    return len(found)


def _recomputed(block: nn.Module, forward, *args, **options):
    if not (block.training and torch.is_grad_enabled()):
        return forward(*args, **options)
    return checkpoint(forward, *args, use_reentrant=False, **options)


def compile_blocks(model: nn.Module, backend: str = "inductor") -> int:
    """Returns how many blocks are now compiled, each when it is first called.

    Args:
        model: its blocks are changed in place; names and state stay.
        backend: of torch.compile.
    """
    import torch._dynamo

    config = torch._dynamo.config
    config.cache_size_limit = max(config.cache_size_limit, _COMPILED_VERSIONS)
    found = blocks(model)
    for block in found:
        block.compile(backend=backend)
    return len(found)
