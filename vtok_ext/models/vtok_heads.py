"""What turns a language model's state into the next visual token, three ways.

    flow   velocity of a token on its way from noise, told the state; loss |v - (x1 - noise)|^2
    mse    the token itself, loss |x - x1|^2: averages over all futures that fit (the ablation)
    codes  a distribution over FSQ's codes, cross-entropy

Tokens are normalised by stored statistics, and targets take no gradient: the tokenizer's residual
is trained as well, and constant tokens would be the easiest to predict. Guidance other than 1
wants states in two halves: told the text, and told none.
Source: the per-token diffusion loss of Li et al. (arXiv 2406.11838), here with flow matching;
VTok (arXiv 2602.04202) leaves open how its visual states are trained. Guidance: Ho and Salimans
(arXiv 2207.12598).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok_ext.models._random import choose
from vtok_ext.models.failed_computation import FailedComputationError
from vtok_ext.models.sit_network import TimestepEmbedder
from vtok_ext.models.transport import Transport
from vtok_ext.models.vtok_decoder import Generators

HEADS = ("flow", "mse", "codes")
# Steps of the flow head: with gradients for the decoder's loss, where two pass on what the state
# knows, and when generating.
TRAINING_STEPS, SAMPLING_STEPS = 2, 8


def normal_rows(counts: Sequence[int], width: int, like: Tensor, generators: Generators) -> Tensor:
    """Returns noise [sum of counts, width], `counts[i]` rows of it from generator i.

    Args:
        counts: rows per sample.
        width: numbers per row.
        like: dtype and device.
        generators: one per sample, one for all, or torch's global one.
    """
    if generators is None:
        return torch.randn(sum(counts), width, dtype=like.dtype, device=like.device)
    if isinstance(generators, torch.Generator):
        return _normal(sum(counts), width, generators).to(like)
    rows = [
        _normal(count, width, generator)
        for count, generator in zip(counts, generators, strict=True)
    ]
    return torch.cat(rows).to(like)


def guided(both: Tensor, guidance: float) -> Tensor:
    """Returns none + guidance * (text - none) [n, ...] of predictions [2n, ...], text's first."""
    if guidance == 1:
        return both
    text, none = both.chunk(2)
    return none + guidance * (text - none)


def _normal(count: int, width: int, generator: torch.Generator) -> Tensor:
    return torch.randn(count, width, generator=generator, device=generator.device)


class _Block(nn.Module):
    """Returns x + mlp(norm(x) (1 + scale) + shift), told a condition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.condition = nn.Linear(width, 2 * width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.condition(F.silu(condition)).chunk(2, dim=-1)
        return x + self.mlp(self.norm(x) * (1 + scale) + shift)


class FlowHead(nn.Module):
    """A small flow-matching network per token.

    Args:
        state_dim: of the language model's states.
        token_dim: D.
        width, depth: of the network.
    """

    def __init__(self, state_dim: int, token_dim: int, width: int, depth: int) -> None:
        super().__init__()
        self.token_dim, self.transport = token_dim, Transport("linear", "velocity")
        self.embed = nn.Linear(token_dim, width)
        self.time = TimestepEmbedder(width)
        self.state = nn.Linear(state_dim, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(depth))
        self.out = nn.Linear(width, token_dim)

    def velocity(self, x: Tensor, t: Tensor, states: Tensor) -> Tensor:
        """Returns [n, D] for tokens x [n, D] at times t [n] and states [n, H]."""
        condition = self.time(t) + self.state(states)
        y = self.embed(x)
        for block in self.blocks:
            y = block(y, condition)
        return self.out(y)

    def loss(
        self, states: Tensor, targets: Tensor, counts: Sequence[int], generators: Generators
    ) -> Tensor:
        """Returns the mean loss.

        Args:
            states: [n, H].
            targets: normalised tokens [n, D].
            counts: tokens per sample.
            generators: see `normal_rows`.
        """
        noise = normal_rows(counts, self.token_dim + 1, targets, generators)
        # The normal distribution's own function makes a uniform time of a normal number.
        t = torch.special.ndtr(noise[:, -1])
        return self.transport.loss(
            lambda x, time: self.velocity(x, time, states), targets, t=t, x0=noise[:, :-1]
        ).mean()

    def predict(
        self, states: Tensor, noise: Tensor, num_steps: int, guidance: float = 1.0
    ) -> Tensor:
        """Returns tokens [n, D] after Euler steps from noise [n, D]; gradients pass."""
        x, copies = noise, 1 if guidance == 1 else 2
        for step in range(num_steps):
            t = torch.full((len(states),), step / num_steps, device=x.device)
            velocity = self.velocity(x.repeat(copies, 1), t, states)
            x = x + guided(velocity, guidance) / num_steps
        return x


class MseHead(nn.Module):
    """The expected token; arguments as for FlowHead, noise and steps are not used."""

    def __init__(self, state_dim: int, token_dim: int, width: int, depth: int) -> None:
        super().__init__()
        self.token_dim = token_dim
        layers: list[nn.Module] = [nn.Linear(state_dim, width)]
        for _ in range(depth):
            layers += [nn.SiLU(), nn.Linear(width, width)]
        self.mlp = nn.Sequential(*layers, nn.SiLU(), nn.Linear(width, token_dim))

    def loss(
        self, states: Tensor, targets: Tensor, counts: Sequence[int], generators: Generators
    ) -> Tensor:
        """Returns the mean squared error."""
        return (self.mlp(states) - targets).square().mean()

    def predict(
        self, states: Tensor, noise: Tensor, num_steps: int, guidance: float = 1.0
    ) -> Tensor:
        """Returns the expected tokens [n, D]."""
        return guided(self.mlp(states), guidance)


class CodeHead(nn.Module):
    """Logits over the codes of FSQ.

    Args:
        state_dim: of the language model's states.
        codes: [K, len(levels)], the numbers that each id stands for.
    """

    codes: Tensor

    def __init__(self, state_dim: int, codes: Tensor) -> None:
        super().__init__()
        self.logits = nn.Linear(state_dim, codes.shape[0])
        self.register_buffer("codes", codes, persistent=False)

    def loss(self, states: Tensor, indices: Tensor) -> Tensor:
        """Returns the mean cross-entropy of ids [n] at states [n, H]."""
        return F.cross_entropy(self.logits(states).float(), indices.long())

    def expected(self, states: Tensor) -> Tensor:
        """Returns the mean codes [n, len(levels)]; gradients pass."""
        return self.logits(states).softmax(-1) @ self.codes

    def choose(
        self,
        states: Tensor,
        temperature: float,
        generator: torch.Generator | None,
        guidance: float = 1.0,
    ) -> Tensor:
        """Returns ids [n]: the likeliest at temperature 0, else drawn.

        Raises:
            FailedComputationError: logits are NaN or infinite.
        """
        logits = guided(self.logits(states).float(), guidance)
        if not bool(logits.isfinite().all()):
            raise FailedComputationError(
                "generate: the model must give finite logits of codes, got NaN or infinity"
            )
        if temperature == 0:
            return logits.argmax(-1)
        return choose((logits / temperature).softmax(-1), generator)
