"""Which parameters get which optimiser: AdamW, or Muon for the matrices within a network.

Layers that produce the latent and the picture have few rows, whose scale matters by itself, as does
that of embeddings and of the vectors of a codebook, and vectors have no directions to balance: all
of these stay with AdamW.
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
    inner = [
        p
        for name, p in _trained(model)
        if p.dim() >= 2 and _OF_THEIR_OWN_SCALE.isdisjoint(name.split("."))
    ]
    return _optimizers("generator", model, settings, inner, others)


def transformer_optimizers(
    model: nn.Module, settings: OptimizerRecipe
) -> dict[str, torch.optim.Optimizer]:
    """Returns "model", AdamW, and "matrices", Muon, if `settings.muon_lr` is given.

    Muon gets the matrices of numbered layers, as those of a stack of blocks are.

    Args:
        model: its parameters that require gradients are trained.
        settings: learning rates, betas, weight decay (of AdamW).
    """
    inner = [
        p
        for name, p in _trained(model)
        if p.dim() == 2 and any(part.isdigit() for part in name.split("."))
    ]
    return _optimizers("model", model, settings, inner, [])


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def _optimizers(
    name: str,
    model: nn.Module,
    settings: OptimizerRecipe,
    inner: list[nn.Parameter],
    others: list[nn.Parameter],
) -> dict[str, torch.optim.Optimizer]:
    """Returns AdamW called `name`, and "matrices", Muon of `inner`, if the settings want it."""
    chosen = {id(p) for p in inner} if settings.muon_lr is not None else set()
    rest = [p for _, p in _trained(model) if id(p) not in chosen] + others
    options: dict[str, Any] = {"betas": tuple(settings.betas), "lr": settings.lr}
    adamw = torch.optim.AdamW(rest, weight_decay=settings.weight_decay, **options)
    found: dict[str, torch.optim.Optimizer] = {name: adamw}
    if settings.muon_lr is not None:
        found["matrices"] = Muon(inner, lr=settings.muon_lr)
    return found
