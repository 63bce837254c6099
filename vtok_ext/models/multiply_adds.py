"""Multiply-adds of a model, counted by running it on tensors without memory.

Convolutions and attention are counted, element-wise work is not. Publications write "FLOPs" for
either unit; one multiply-add is two floating point operations.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch

from vtok_ext.models._config import ModelConfig


def count_multiply_adds(
    model_class: Any,  # a VideoTokenizer
    config: ModelConfig,
    num_frames: int,
    height: int,
    width: int,
) -> int:
    """Returns the multiply-adds of encoding and decoding one clip, padding included.

    The network is counted as it is written, without what a fast path may save. Deterministic;
    takes about half a second and no memory to speak of.

    Args:
        model_class, config: the model.
        num_frames, height, width: T, H, W of the clip; padded as `encode` does by default.
    """
    return _count(model_class, config, num_frames, height, width)


def _conv3d_flops(x_shape: Any, weight_shape: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    """Floating point operations of `causal_conv3d` from the shapes of its tensors; upsampled pixels
    count although the op folds them."""
    return 2 * math.prod(out_shape[0]) * math.prod(weight_shape[1:])


@functools.lru_cache(maxsize=256)
def _count(model_class, config, num_frames: int, height: int, width: int) -> int:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        model = model_class(config).eval().requires_grad_(False)
        return multiply_adds_of(lambda: model.run_networks(1, num_frames, height, width))


@torch.no_grad()
def multiply_adds_of(run: Callable[[], Any]) -> int:
    """Returns the multiply-adds of the convolutions and attention that `run` does."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    own_ops = {torch.ops.vtok_ext.causal_conv3d_forward: _conv3d_flops}
    # Attention as its definition: matrix products, which the counter knows on every device.
    with (
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False, custom_mapping=own_ops) as counter,
    ):
        run()
    return counter.get_total_flops() // 2
