"""AlphaBlender: a learned convex combination of two tensors.

    out = a * x + (1 - a) * y,  a = sigmoid(mix_factor)

Source: VidTok (arXiv 2412.13061), section 3.2: x is the branch without parameters.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# sigmoid(2) = 0.88: training starts near plain pooling or repetition, the convolution fades in.
INITIAL_MIX_FACTOR = 2.0


def alpha_blend(
    x: Tensor,  # [...]
    y: Tensor,  # [...], as x
    mix_factor: Tensor,  # [1]
) -> Tensor:
    """Returns sigmoid(mix_factor) * x + (1 - sigmoid(mix_factor)) * y in the dtype of `y`.

    Computed in float32 for half tensors. `mix_factor` has rank 1, so that written out as a product
    it would promote a half tensor to float32 from there on; hence the explicit cast.
    """
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    return torch.lerp(y.to(dtype), x.to(dtype), torch.sigmoid(mix_factor.to(dtype))).to(y.dtype)


class AlphaBlender(nn.Module):
    """Returns `alpha_blend(x, y, mix_factor)`; `mix_factor` [1] is learned and starts at 2."""

    def __init__(self) -> None:
        super().__init__()
        self.mix_factor = nn.Parameter(torch.tensor([INITIAL_MIX_FACTOR]))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns a * x + (1 - a) * y in the dtype of `y`."""
        return alpha_blend(x, y, self.mix_factor)
