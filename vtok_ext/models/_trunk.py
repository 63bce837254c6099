"""A tokenizer without its latent convolutions, which sees and gives features instead of latents.

    trunk.encode_chunk(video)     what `encoder.conv_out` would get
    trunk.decode_chunk(features)  what the decoder makes of them in place of `decoder.conv_in`'s

All rules of the model about frames in front, dropped frames and streams stay in force.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import Tensor, nn

from vtok_ext.layers._state import owned

Module = TypeVar("Module", bound=nn.Module)


class _Through(nn.Module):
    """Returns its input; stands where a causal convolution was."""

    def forward(self, x: Tensor, state: Tensor | None = None, return_state: bool = False):
        """Returns x, or `(x, state)`, a state of no frames."""
        return (x, owned(x[:, :, :0])) if return_state else x


def with_children(module: Module, **children: nn.Module) -> Module:
    """Returns a copy of a module with some children replaced; all others are shared with it."""
    shallow = copy.copy(module)
    # copy.copy shares the dict of children; nothing of `module` may change.
    shallow.__dict__["_modules"] = {**module._modules, **children}
    return shallow


def trunk(model: Any) -> Any:
    """Returns `model` without latent convolutions; takes microseconds and shares its weights."""
    return with_children(
        model,
        encoder=with_children(model.encoder, conv_out=_Through()),
        decoder=with_children(model.decoder, conv_in=_Through()),
    )
