"""The optimisers of a tokenizer: AdamW, or Muon for the matrices within its networks.

Layers that produce the latent and the picture have few rows, whose scale matters by itself, as does
that of the vectors of a codebook, and vectors have no directions to balance: all of these stay with
AdamW.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vtok_ext.training.muon import Muon
from vtok_ext.training.recipe import OptimizerRecipe

_OF_THEIR_OWN_SCALE = {"conv_out", "quantizer"}


def tokenizer_optimizers(
    model: nn.Module, settings: OptimizerRecipe, others: list[nn.Parameter]
) -> dict[str, torch.optim.Optimizer]:
    """Returns "generator", AdamW, and "matrices", Muon, if `settings.muon_lr` is given.

    Args:
        model: its parameters that require gradients are trained.
        settings: learning rates, betas, weight decay (of AdamW).
        others: parameters outside the model, for AdamW.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    options: dict[str, Any] = {
        "lr": settings.lr,
        "betas": tuple(settings.betas),
        "weight_decay": settings.weight_decay,
    }
    if settings.muon_lr is None:
        return {"generator": torch.optim.AdamW([p for _, p in trained] + others, **options)}
    inner = [
        p for name, p in trained if p.dim() >= 2 and _OF_THEIR_OWN_SCALE.isdisjoint(name.split("."))
    ]
    chosen = {id(p) for p in inner}
    rest = [p for _, p in trained if id(p) not in chosen] + others
    return {
        "generator": torch.optim.AdamW(rest, **options),
        "matrices": Muon(inner, lr=settings.muon_lr),
    }
