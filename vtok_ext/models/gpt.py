"""GPT over the token grids of a discrete tokenizer, one token after the other in raster order.

    p(ids) = prod_n prod_k p(d_nk | d_n1 .. d_n(k-1), ids before n, label)

d_nk are the digits of id n in a mixed radix, `factors`: two softmaxes of 512 classes stand for
one of 262,144, exactly, since the later digit sees the earlier one. With no factors there is one
softmax over all codes. Sampling keeps keys and values of what came before.
Source: GPT-2 (Radford et al. 2019) for the network; digits within a token as in MAGVIT-v2's
factorised prediction (arXiv 2310.05737), here chained instead of independent.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok_ext.layers.kl import Generators
from vtok_ext.layers.transformer import Mlp
from vtok_ext.models._config import ModelConfig
from vtok_ext.models._random import choose
from vtok_ext.models.failed_computation import FailedComputationError
from vtok_ext.models.generator import LatentGenerator

_EPS, _INITIAL_STD = 1e-5, 0.02
_LARGEST = 1 << 40
# The smallest normal number: devices that divide by multiplying need its inverse.
_LEAST_TEMPERATURE = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class GPTConfig(ModelConfig):
    """Configuration of a GPT.

    Attributes:
        codebook_size: number of codes of the tokenizer.
        grid: (t, h, w) of the ids of a clip.
        factors: sizes of the digits of an id, the first one counting fastest; empty for one digit.
        hidden_size, depth, num_heads: of the transformer.
        dropout: of every residual branch, in training; samples have none in any mode.
        num_classes: labels 0 .. num_classes - 1; 1 for an unconditional model.
        class_dropout: share of labels that training replaces by "none", for guidance.
    """

    codebook_size: int = 4096
    grid: tuple[int, ...] = (5, 16, 16)
    factors: tuple[int, ...] = ()
    hidden_size: int = 384
    depth: int = 6
    num_heads: int = 6
    dropout: float = 0.0
    num_classes: int = 1
    class_dropout: float = 0.0

    def __post_init__(self) -> None:
        """Checks every field."""
        for name in ("codebook_size", "hidden_size", "depth", "num_heads", "num_classes"):
            self._require_int(name, 1)
        self._require_ints("grid", 1, _LARGEST, empty=False)
        if len(self.grid) != 3:
            raise self._error("grid", "three integers (t, h, w)")
        self._require_ints("factors", 2, _LARGEST, empty=True)
        if self.factors and math.prod(self.factors) != self.codebook_size:
            raise self._error("factors", f"of product {self.codebook_size}, the codebook")
        if self.hidden_size % self.num_heads:
            raise self._error("hidden_size", f"a multiple of the {self.num_heads} heads")
        for name in ("dropout", "class_dropout"):
            self._require_number(name, 0.0)
            if not getattr(self, name) < 1:
                raise self._error(name, "below 1")

    @property
    def digits(self) -> tuple[int, ...]:
        """Sizes of the digits of an id."""
        return self.factors or (self.codebook_size,)

    @property
    def has_none(self) -> bool:
        """Whether there is a label "none" for guidance."""
        return self.class_dropout > 0


# Sizes of our own; grid, codebook_size and factors are those of the tokenizer.
GPT_PRESETS = {
    "gpt_small": GPTConfig(),
    "gpt_medium": GPTConfig(hidden_size=768, depth=12, num_heads=12),
}


def balanced_factors(levels: tuple[int, ...]) -> tuple[int, ...]:
    """Returns two digits for FSQ levels whose product is over 4,096, none for fewer codes.

    Every digit is the product of neighbouring levels, so that it means some of the channels.

    Args:
        levels: of the quantizer.
    """
    if math.prod(levels) <= 4096 or len(levels) < 2:
        return ()
    splits = [(math.prod(levels[:i]), math.prod(levels[i:])) for i in range(1, len(levels))]
    return min(splits, key=sum)


class _Cache:
    """Keys and values [B, heads, N, D / heads] of one layer, filled from the front."""

    def __init__(self, batch: int, num_heads: int, length: int, width: int, like: Tensor) -> None:
        self.keys = like.new_empty(batch, num_heads, length, width)
        self.values = torch.empty_like(self.keys)
        self.length = 0

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Returns all keys and values so far."""
        end = self.length + key.shape[2]
        self.keys[:, :, self.length : end] = key
        self.values[:, :, self.length : end] = value
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class CausalBlock(nn.Module):
    """Returns tokens [B, N, D] after attention to themselves and earlier ones, and an MLP."""

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.norm1 = nn.LayerNorm(dim, eps=_EPS)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=_EPS)
        self.mlp = Mlp(dim)

    def forward(self, x: Tensor, cache: _Cache | None = None) -> Tensor:
        """Returns a tensor as x; with a cache x is the single token after those in it.

        A cache is for sampling, where nothing is dropped.
        """
        query, key, value = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).chunk(3, dim=-1)
        )
        if cache is not None:
            key, value = cache.append(key, value)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=cache is None)
        drops = self.training and self.dropout > 0 and cache is None
        mixed = self.proj(mixed.transpose(1, 2).flatten(2))
        x = x + (F.dropout(mixed, self.dropout) if drops else mixed)
        changed = self.mlp(self.norm2(x))
        return x + (F.dropout(changed, self.dropout) if drops else changed)


class GPT(LatentGenerator):
    """Returns a GPT; see `LatentGenerator` for saving, loading and what it is trained on."""

    config: GPTConfig
    config_class = GPTConfig
    presets = GPT_PRESETS

    def __init__(self, config: GPTConfig, name: str | None = None) -> None:
        super().__init__(config, name)
        dim = config.hidden_size
        self.num_tokens = math.prod(config.grid)
        # The label is the token in front of the first one.
        self.label_embed = nn.Embedding(config.num_classes + int(config.has_none), dim)
        self.digit_embed = nn.ModuleList(nn.Embedding(size, dim) for size in config.digits)
        self.position_embed = nn.ParameterList(
            nn.Parameter(torch.zeros(size, dim)) for size in config.grid
        )
        self.blocks = nn.ModuleList(
            CausalBlock(dim, config.num_heads, config.dropout) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(dim, eps=_EPS)
        # What the digits before it add to the input of a digit's output layer.
        self.chain_embed = nn.ModuleList(nn.Embedding(size, dim) for size in config.digits[:-1])
        self.heads = nn.ModuleList(nn.Linear(dim, size, bias=False) for size in config.digits)
        self._initialize()

    def _initialize(self) -> None:
        """Sets the weights as GPT-2's: the branches' last layers smaller with the depth."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                last = name.endswith((".proj", ".fc2"))
                scale = (2 * self.config.depth) ** -0.5 if last else 1.0
                nn.init.normal_(module.weight, std=_INITIAL_STD * scale)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for position in self.position_embed:
            nn.init.normal_(position, std=_INITIAL_STD)

    def split(self, ids: Tensor) -> list[Tensor]:
        """Returns the digits of ids, each as ids."""
        digits = []
        for size in self.config.digits:
            digits.append(ids % size)
            ids = ids // size
        return digits

    def join(self, digits: list[Tensor]) -> Tensor:
        """Returns the ids of digits."""
        total, weight = torch.zeros_like(digits[0]), 1
        for digit, size in zip(digits, self.config.digits, strict=True):
            total, weight = total + digit * weight, weight * size
        return total

    def _positions(self) -> Tensor:
        """Returns [N, D]: the sum of a vector for t, h and w each."""
        t, h, w = self.position_embed
        return (t[:, None, None] + h[:, None] + w).flatten(0, 2)

    def _embedded(self, digits: list[Tensor]) -> Tensor:
        embedded = [table(digit) for table, digit in zip(self.digit_embed, digits, strict=True)]
        return torch.stack(embedded).sum(0)

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> list[Tensor]:
        """Returns logits [B, t h w, size] of each digit of each token, given what is before it.

        Args:
            ids: integers [B, t, h, w].
            labels: integers [B]; `num_classes` is "none" where there is one. Default 0.

        Raises:
            ValueError: another grid or number of labels, or ids or labels out of range; those of a
                GPU are not looked at, which would wait for it.
        """
        if ids.is_floating_point() or tuple(ids.shape[1:]) != self.config.grid:
            raise ValueError(
                f"GPT: ids must be integers [B, {', '.join(map(str, self.config.grid))}], "
                f"got {list(ids.shape)} {ids.dtype}"
            )
        if ids.device.type == "cpu" and ids.numel() and not torch.compiler.is_compiling():
            least, most = int(ids.min()), int(ids.max())
            if least < 0 or most >= self.config.codebook_size:
                raise ValueError(
                    f"GPT: ids must be in 0..{self.config.codebook_size - 1}, got {least}..{most}"
                )
        digits = self.split(ids.flatten(1).long())
        if labels is None:
            labels = torch.zeros(len(ids), dtype=torch.long, device=ids.device)
        self.check_labels("GPT", labels, len(ids), self.label_embed.num_embeddings)
        before = [self.label_embed(labels)[:, None], self._embedded([d[:, :-1] for d in digits])]
        x = torch.cat(before, dim=1) + self._positions()
        for block in self.blocks:
            x = block(x)
        return [self._digit_logits(x, k, digits) for k in range(len(digits))]

    def _digit_logits(self, x: Tensor, k: int, digits: list[Tensor]) -> Tensor:
        """Returns the logits of digit k of tokens with hidden state x, given the digits before."""
        for table, digit in zip(self.chain_embed, digits[:k], strict=False):
            x = x + table(digit)
        return self.heads[k](self.norm(x))

    def loss(  # type: ignore[override]
        self,
        latent: Tensor,
        labels: Tensor | None = None,
        generator: Generators = None,
        call: Callable[..., Any] | None = None,
    ) -> Tensor:
        """Returns the negative log likelihood [B] per token, in nats; log(codes) for a guess.

        Args:
            latent: ids, integers [B, t, h, w].
            labels: [B] integers; default 0; in training some are replaced by "none".
            generator: source of replaced labels, or one per sample.
            call: the model as it must be called, such as DistributedDataParallel's; default itself.
        """
        labels = self.training_labels(labels, len(latent), generator)
        digits = self.split(latent.flatten(1).long())
        losses = [
            F.cross_entropy(logits.float().transpose(1, 2), digit, reduction="none").mean(1)
            for logits, digit in zip((call or self)(latent, labels), digits, strict=True)
        ]
        return torch.stack(losses).sum(0)

    @torch.no_grad()
    def sample(
        self,
        num_samples: int = 1,
        *,
        labels: Tensor | None = None,
        guidance: float = 1.0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        generator: Generators = None,
        **options: Any,
    ) -> Tensor:
        """Returns ids int64 [num_samples, t, h, w].

        Args:
            num_samples: B.
            labels: integers [B]; default 0.
            guidance: logits become none + guidance * (label - none); 1 is no guidance, below 0 it
                leads away from the label.
            temperature: divides the logits; 0 takes the likeliest digit.
            top_k: only the k likeliest values of each digit.
            top_p: only the likeliest values of each digit that have this probability together.
            generator: source of randomness, or one per sample, drawn from on its own device.
            **options: none.

        Raises:
            ValueError: a value out of range, or guidance of a model without a "none".
            FailedComputationError: logits are NaN or infinite.
        """
        if options:
            raise ValueError(f"sample: GPT must be given no {sorted(options)}")
        if not math.isfinite(guidance):
            raise ValueError(f"sample: guidance must be finite, got {guidance}")
        if guidance != 1.0 and not self.config.has_none:
            raise ValueError(
                f"sample: guidance must be 1 for a model trained without class_dropout, "
                f"got {guidance}"
            )
        if (
            not 0 <= temperature < math.inf
            or not 0 < top_p <= 1
            or (top_k is not None and top_k < 1)
        ):
            raise ValueError(
                f"sample: temperature must be >= 0, top_p in (0, 1] and top_k >= 1, "
                f"got {temperature}, {top_p} and {top_k}"
            )
        labels = self.checked_labels("sample", labels, num_samples)
        if guidance != 1.0:
            labels = torch.cat([labels, torch.full_like(labels, self.config.num_classes)])
        choose = _Choice(guidance, temperature, top_k, top_p, generator)
        token, positions, ids = self.label_embed(labels), self._positions(), []
        heads = self.config.num_heads
        shape = (len(labels), heads, self.num_tokens, self.config.hidden_size // heads)
        caches = [_Cache(*shape, like=token) for _ in self.blocks]
        for n in range(self.num_tokens):
            x = (token + positions[n])[:, None]
            for block, cache in zip(self.blocks, caches, strict=True):
                x = block(x, cache)
            digits: list[Tensor] = []
            for k in range(len(self.config.digits)):
                chosen = choose(self._digit_logits(x[:, 0], k, digits))
                # Both halves of a guided batch go on with the same digit.
                digits.append(torch.cat([chosen, chosen]) if guidance != 1.0 else chosen)
            ids.append(self.join(digits)[:num_samples])
            token = self._embedded(digits)
        return torch.stack(ids, 1).unflatten(1, self.config.grid)


class _Choice:
    """Draws a digit [B] from logits [B, size]; with guidance the second half is that of "none"."""

    def __init__(
        self,
        guidance: float,
        temperature: float,
        top_k: int | None,
        top_p: float,
        generator: Generators,
    ) -> None:
        self.guidance, self.temperature = guidance, temperature
        self.top_k, self.top_p, self.generator = top_k, top_p, generator

    def __call__(self, logits: Tensor) -> Tensor:
        logits = logits.float()
        if self.guidance != 1.0:
            label, none = logits.chunk(2)
            logits = none + self.guidance * (label - none)
        if not bool(logits.isfinite().all()):
            raise FailedComputationError(
                "sample: logits of GPT must be finite, got NaN or infinity; its weights are "
                "damaged, or guidance is too large for them"
            )
        if self.temperature == 0:
            return logits.argmax(-1)
        # Only the likeliest stays finite when a low temperature makes the others overflow.
        logits = logits - logits.amax(-1, keepdim=True)
        logits = logits / max(self.temperature, _LEAST_TEMPERATURE)
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            values, places = logits.topk(self.top_k)
            logits = torch.full_like(logits, -math.inf).scatter(-1, places, values)
        probabilities = logits.softmax(-1)
        if self.top_p < 1:
            ordered, order = probabilities.sort(-1, descending=True)
            # The first value always stays: nothing is before it.
            ordered = ordered * (ordered.cumsum(-1) - ordered < self.top_p)
            probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered)
        return choose(probabilities, self.generator)
