"""VQ: the nearest vector of a learned codebook.

    index = argmin_j |z - e_j|^2,  code = e_index,  d code / d z = 1
    aux   = codebook_loss + commitment_weight * mean (z - sg(code))^2

The codebook follows gradients of codebook_loss = mean (sg(z) - code)^2, or moving averages of the
latents assigned to each vector (codebook_loss is then 0):

    n_j <- decay n_j + (1 - decay) count_j,  m_j <- decay m_j + (1 - decay) sum_j z
    e_j = m_j / n_j

Source: van den Oord et al. 2017, "Neural Discrete Representation Learning" (arXiv 1711.00937),
section 3 and appendix A.1.
"""

from __future__ import annotations

import torch
from torch import Tensor, distributed, nn

from vtok_ext.layers._auxiliary_loss import code_use
from vtok_ext.layers._straight_through import straight_through

CODEBOOKS = ("gradient", "ema")
# Distances are computed for so many tokens at a time that their matrix has at most 2^24 entries:
# 64 MB, whatever the size of the codebook and the clip.
_LARGEST_MATRIX = 2**24
# Keeps a vector that nothing was assigned to where it is (Laplace smoothing of the counts).
_SMOOTHING = 1e-5


class VQ(nn.Module):
    """Replaces the vector of channels at every position by the nearest one of a codebook.

    Args:
        codebook_size: N vectors.
        dim: D, channels of the latent.
        codebook: "gradient" or "ema".
        restart_dead: in training, move vectors whose moving count falls below `dead_count` onto
            random latents of the batch.
        channel_dim: the dimension of the input that holds the channels; 1 for [B, C, T, H, W].
        commitment_weight: weight of mean (z - sg(code))^2.
        decay: of the moving averages.
        dead_count: assignments per batch below which a vector is dead.

    The codebook starts uniform in +-1 / N, see also `start_from`. Moving averages, an "ema"
    codebook among them, stay float32 in a layer of half precision. With torch.distributed, moving
    averages and restarts are those of all ranks, which must call the layer equally often.

    Raises:
        ValueError: a size below 1, another kind of codebook, or a decay outside [0, 1).
    """

    codebook: Tensor  # [N, D]
    count: Tensor  # [N]
    total: Tensor  # [N, D]

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        *,
        codebook: str = "gradient",
        restart_dead: bool = False,
        channel_dim: int = 1,
        commitment_weight: float = 0.25,
        decay: float = 0.99,
        dead_count: float = 0.01,
    ) -> None:
        super().__init__()
        if codebook_size < 1 or dim < 1:
            raise ValueError(
                f"VQ: codebook_size and dim must be at least 1, got {codebook_size}, {dim}"
            )
        if codebook not in CODEBOOKS:
            raise ValueError(f"VQ: codebook must be one of {CODEBOOKS}, got {codebook!r}")
        if not 0 <= decay < 1:
            raise ValueError(f"VQ: decay must be in [0, 1), got {decay}")
        self.codebook_size, self.dim, self.channel_dim = codebook_size, dim, channel_dim
        self.commitment_weight, self.decay, self.dead_count = commitment_weight, decay, dead_count
        self.restart_dead, self.follows_averages = restart_dead, codebook == "ema"
        vectors = torch.empty(codebook_size, dim).uniform_(-1 / codebook_size, 1 / codebook_size)
        if self.follows_averages:
            self.register_buffer("codebook", vectors)
            self.register_buffer("total", vectors.clone())
        else:
            self.codebook = nn.Parameter(vectors)
        if self.follows_averages or restart_dead:
            self.register_buffer("count", torch.ones(codebook_size))

    @property
    def restarts_parameters(self) -> bool:
        """Whether a forward pass in training may move vectors that an optimiser trains too."""
        return self.restart_dead and not self.follows_averages

    def forward(
        self, z: Tensor, step: int = 0, compute_loss: bool | None = None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Codes, indices and losses.

        In training mode with gradients enabled, the moving averages take a step.

        Args:
            z: [B, D, ...] floating (channels at `channel_dim`).
            step: not used; the other quantizers anneal a weight by it.
            compute_loss: whether to compute the auxiliary loss; by default in training mode only.

        Returns:
            codes as z, int32 indices [B, ...], -1 where z has a NaN, and float32 scalars:
                aux_loss: what to minimise.
                codebook_loss, commitment: its terms before they are weighted.
                codebook_use, codebook_perplexity: of this process's tokens.

        Raises:
            ValueError, TypeError: z is not floating or has other than D channels.
        """
        if not z.is_floating_point():
            raise TypeError(f"VQ: z must be floating, got {z.dtype}")
        self._check_channels(z)
        rows = z.movedim(self.channel_dim, -1)
        tokens = rows.reshape(-1, self.dim).float()
        nearest = self._nearest(tokens)
        vectors = self.codebook.float()[nearest]
        losses = {}
        if self.training if compute_loss is None else compute_loss:
            losses = self._losses(tokens, vectors, nearest)
        if self.training and torch.is_grad_enabled():
            self._learn(tokens.detach(), nearest)
        found = vectors.detach().view(rows.shape).movedim(-1, self.channel_dim).to(z.dtype)
        nearest = nearest.masked_fill(tokens.isnan().any(1), -1)
        indices = nearest.view(rows.shape[:-1]).int()
        return straight_through(z, found), indices, losses

    def indices_to_codes(self, indices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Codes [B, D, ...] of indices [B, ...].

        Raises:
            TypeError, ValueError: indices are not integers, or (CPU) outside 0..N - 1.
        """
        if indices.is_floating_point() or indices.dtype == torch.bool:
            raise TypeError(f"VQ: indices must be integers, got {indices.dtype}")
        # Elsewhere the values would be waited for, and a graph would break.
        if indices.numel() and indices.is_cpu and not torch.compiler.is_compiling():
            low, high = (int(bound) for bound in torch.aminmax(indices))
            if low < 0 or high >= self.codebook_size:
                raise ValueError(
                    f"VQ: indices must lie in 0..{self.codebook_size - 1}, got {low}..{high}"
                )
        return self.codebook[indices.long()].detach().to(dtype).movedim(-1, self.channel_dim)

    @torch.no_grad()
    def start_from(self, z: Tensor) -> None:
        """Puts the vectors on N different latents, drawn with torch's generator.

        Vectors near 0 must first be carried to the latents: with gradients by the sum of the
        learning rates, which in a short training is less than the latents are wide.

        Args:
            z: [B, D, ...] with at least N positions.

        Raises:
            ValueError: z has other than D channels, or fewer than N positions.
        """
        self._check_channels(z)
        tokens = z.movedim(self.channel_dim, -1).reshape(-1, self.dim)
        if len(tokens) < self.codebook_size:
            raise ValueError(
                f"VQ: z must have at least {self.codebook_size} positions to start from, "
                f"got {len(tokens)}"
            )
        chosen = torch.randperm(len(tokens))[: self.codebook_size].to(tokens.device)
        self.codebook.copy_(tokens[chosen])
        if self.follows_averages:
            self.total.copy_(tokens[chosen])
        if self.follows_averages or self.restart_dead:
            self.count.fill_(1)

    def _check_channels(self, z: Tensor) -> None:
        if z.shape[self.channel_dim] != self.dim:
            raise ValueError(
                f"VQ: z must have {self.dim} channels in dimension {self.channel_dim}, "
                f"got {list(z.shape)}"
            )

    def _apply(self, fn, recurse=True):
        """Moves and converts as any module, but rounds no moving average to half precision: a step
        of 1 - decay = 0.01 is lost to the 8 bits of bfloat16."""
        precise = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in self.named_buffers(recurse=False):
            if buffer.itemsize < precise[name].itemsize:
                setattr(self, name, precise[name].to(buffer.device))
        return self

    @torch.no_grad()
    def _nearest(self, tokens: Tensor) -> Tensor:
        """Returns int64 [n], the nearest vector of each token [n, D]."""
        with torch.autocast(tokens.device.type, enabled=False):
            vectors = self.codebook.float()
            # |z - e|^2 without |z|^2, which is the same for all vectors.
            half_norms = vectors.square().sum(1) / 2
            rows = max(1, _LARGEST_MATRIX // self.codebook_size)
            found = [(half_norms - part @ vectors.T).argmin(1) for part in tokens.split(rows)]
        return torch.cat(found)

    def _losses(self, tokens: Tensor, vectors: Tensor, nearest: Tensor) -> dict[str, Tensor]:
        commitment = (tokens - vectors.detach()).square().mean()
        codebook_loss = torch.zeros((), device=tokens.device)
        if not self.follows_averages:
            codebook_loss = (tokens.detach() - vectors).square().mean()
        return {
            "aux_loss": codebook_loss + self.commitment_weight * commitment,
            "codebook_loss": codebook_loss,
            "commitment": commitment,
            **code_use(nearest, self.codebook_size),
        }

    @torch.no_grad()
    def _learn(self, tokens: Tensor, nearest: Tensor) -> None:
        """One step of the moving averages, and restarts."""
        if not (self.follows_averages or self.restart_dead):
            return
        count = tokens.new_zeros(self.codebook_size)
        count.index_add_(0, nearest, torch.ones_like(tokens[:, 0]))
        _sum_over_ranks(count)
        self.count.mul_(self.decay).add_(count, alpha=1 - self.decay)
        if self.follows_averages:
            total = torch.zeros_like(self.total, dtype=tokens.dtype).index_add_(0, nearest, tokens)
            _sum_over_ranks(total)
            self.total.mul_(self.decay).add_(total, alpha=1 - self.decay)
            num_tokens = self.count.sum()
            smooth = (self.count + _SMOOTHING) / (num_tokens + self.codebook_size * _SMOOTHING)
            self.codebook.copy_(self.total / (smooth * num_tokens).unsqueeze(1))
        if self.restart_dead and tokens.shape[0]:
            self._restart(tokens)

    def _restart(self, tokens: Tensor) -> None:
        """Moves dead vectors onto random tokens, the same ones on every rank."""
        dead = self.count < self.dead_count
        chosen = tokens[torch.randint(tokens.shape[0], (self.codebook_size,), device=tokens.device)]
        if distributed.is_available() and distributed.is_initialized():
            distributed.broadcast(chosen, src=0)
        self.codebook.copy_(torch.where(dead.unsqueeze(1), chosen, self.codebook))
        self.count.copy_(torch.where(dead, torch.ones_like(self.count), self.count))
        if self.follows_averages:
            self.total.copy_(torch.where(dead.unsqueeze(1), chosen, self.total))

    def extra_repr(self) -> str:
        """Size and kind, for printing."""
        kind = "ema" if self.follows_averages else "gradient"
        return f"{self.codebook_size}, {self.dim}, codebook={kind!r}"


def _sum_over_ranks(x: Tensor) -> None:
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(x)
