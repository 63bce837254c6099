"""AlphaBlender: a learned or fixed convex combination of two tensors.

    out = alpha * a + (1 - alpha) * b,  alpha = sigmoid(mix_factor), or mix_factor when fixed

Source: Blattmann et al. 2023, "Stable Video Diffusion" (the three strategies); VidTok
(arXiv 2412.13061), section 3.2: a is the branch without parameters.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vtok_ext.ops.alpha_blend import STRATEGIES, alpha_blend

# sigmoid(2) = 0.88: training starts near plain pooling or repetition, the convolution fades in.
INITIAL_MIX_FACTOR = 2.0


class AlphaBlender(nn.Module):
    """Returns `alpha_blend(a, b, mix_factor)` with its own factor `mix_factor`.

    Args:
        mix_factor: initial value, a logit; alpha itself, in [0, 1], with strategy "fixed".
        strategy: "learned"; "fixed": the factor is a buffer; "learned_with_images": alpha is 1 at
            frames that belong to images.
        shape: of the factor; (1,) for one, (C, 1, 1, 1) per channel or (T, 1, 1) per frame of
            [B, C, T, H, W].

    Raises:
        ValueError: an unknown strategy, or a fixed alpha outside [0, 1].
    """

    mix_factor: Tensor

    def __init__(
        self,
        mix_factor: float = INITIAL_MIX_FACTOR,
        *,
        strategy: str = "learned",
        shape: tuple[int, ...] = (1,),
    ) -> None:
        super().__init__()
        if strategy not in STRATEGIES:
            raise ValueError(
                f"AlphaBlender: strategy must be one of {STRATEGIES}, got {strategy!r}"
            )
        factor = torch.full(shape, float(mix_factor))
        self.strategy = strategy
        if strategy != "fixed":
            self.mix_factor = nn.Parameter(factor)
            return
        if not 0 <= mix_factor <= 1:
            raise ValueError(f"AlphaBlender: a fixed alpha must be in [0, 1], got {mix_factor}")
        self.register_buffer("mix_factor", factor)

    def forward(
        self,
        a: Tensor,  # [...]
        b: Tensor,  # [...], as a
        image_only: Tensor | None = None,  # [B, T] bool
    ) -> Tensor:
        """Returns alpha * a + (1 - alpha) * b in the dtype of `b`; see `alpha_blend`."""
        return alpha_blend(a, b, self.mix_factor, strategy=self.strategy, image_only=image_only)

    def extra_repr(self) -> str:
        """Strategy and shape, for printing."""
        return f"strategy={self.strategy!r}, shape={tuple(self.mix_factor.shape)}"
