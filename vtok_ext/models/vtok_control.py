"""Control tokens beside LoRA: rows of the frozen word table that are trained nevertheless.

    embedding(id) + embedding_change[id],  logit(id) + <state, output_change[id]>

A pretrained language model has no <vision> or <user>: rows that are added for them are nearly equal
to one another, and adapters of its layers cannot tell them apart. Changes are zero at the start.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class ControlTokens(nn.Module):
    """Changes to the rows of some ids.

    Args:
        ids: of control tokens, in any order; duplicates count once.
        width: H of the language model.
    """

    ids: Tensor

    def __init__(self, ids: Iterable[int], width: int) -> None:
        super().__init__()
        self.register_buffer("ids", torch.tensor(sorted(set(ids))), persistent=False)
        self.embedding_change = nn.Parameter(torch.zeros(len(self.ids), width))
        self.output_change = nn.Parameter(torch.zeros(len(self.ids), width))

    def embedded(
        self,
        words: Tensor,  # [..., H]
        ids: Tensor,  # [...]
    ) -> Tensor:
        """Returns the embeddings [..., H] of ids, changed."""
        is_control = (ids[..., None] == self.ids).to(self.embedding_change.dtype)
        return words + (is_control @ self.embedding_change).to(words.dtype)

    def logits(
        self,
        words: Tensor,  # [..., V]
        states: Tensor,  # [..., H]
    ) -> Tensor:
        """Returns the logits [..., V] of states, changed."""
        change = states @ self.output_change.mT.to(states.dtype)
        return words.index_add(-1, self.ids, change.to(words.dtype))
