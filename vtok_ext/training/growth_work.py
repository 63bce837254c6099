"""What a training step of a tokenizer costs, so that trainings can be compared at equal work.

a part that trains          3 x its forward pass: forward, gradient of the input, of the weights
frozen, gradients pass      2 x
frozen, nothing passes      1 x
"""

from __future__ import annotations

from typing import Any

import torch

from vtok_ext.models._trunk import trunk
from vtok_ext.models.multiply_adds import multiply_adds_of
from vtok_ext.models.promag_grown import Grown


def step_multiply_adds(model: Any, num_frames: int, height: int, width: int) -> int:
    """Returns the multiply-adds of a training step on one clip.

    Of a grown model the encoder of its base runs twice, on all and on every second frame, and
    gradients pass through the base's decoder.

    Args:
        model: a grid tokenizer all of whose parameters train, or a grown one.
        num_frames, height, width: T = 1 + k f and multiples of s.
    """
    whole = multiply_adds_of(lambda: model.run_networks(1, num_frames, height, width))
    if not isinstance(model, Grown):
        return 3 * whole
    base, weight = trunk(model.base), next(model.parameters())
    video = weight.new_zeros(1, model.video_channels, num_frames, height, width)
    features: list[torch.Tensor] = []
    encoding = multiply_adds_of(lambda: features.append(base.encode_chunk(video)))
    if model.config.use_subsampled:
        encoding += multiply_adds_of(lambda: base.encode_chunk(video[:, :, ::2]))
    decoding = multiply_adds_of(lambda: base.decode_chunk(features[0]))
    return encoding + 2 * decoding + 3 * (whole - encoding - decoding)
