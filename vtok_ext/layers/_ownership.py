"""When an activation may be overwritten in place.

Fresh large activations are a large part of the time of a video network on a CPU (page faults):
without gradients, writing into a tensor that only the caller can see saves one of them.
"""

from __future__ import annotations

import torch
from torch import nn

from vtok_ext.layers.causal_conv3d import (
    CausalConv1d,
    CausalConv3d,
    FrameConv2d,
    PixelConv1d,
    VolumeConv3d,
)

# Modules known to return a tensor of their own. A replaced child (an adapter, nn.Identity) or one
# with parametrizations has another class and is therefore left alone.
_RETURNS_FRESH = {
    nn.LayerNorm,
    CausalConv1d,
    CausalConv3d,
    FrameConv2d,
    PixelConv1d,
    VolumeConv3d,
}


def may_overwrite(producer: nn.Module) -> bool:
    """Returns whether what `producer` just returned is invisible to everyone but the caller.

    Not while gradients are recorded, not when a forward hook may have kept the tensor, and not
    under torch.compile, which plans memory by itself.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return all(type(m) in _RETURNS_FRESH and not m._forward_hooks for m in producer.modules())
