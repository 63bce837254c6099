"""Masked autoencoding: trains a SmallViT to say what hidden patches look like.

    loss = mean over hidden patches of |decoder(encoder(visible))_patch - normalised pixels|^2

Source: He et al., "Masked Autoencoders Are Scalable Vision Learners" (arXiv 2111.06377), with its
mask ratio of 0.75 and targets normalised per patch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vtok_ext.layers.kl import Generators
from vtok_ext.layers.transformer import TransformerBlock
from vtok_ext.models.sit_network import sincos_2d
from vtok_ext.models.vision_encoder import SmallViT

_TARGET_EPS = 1e-6


class MaskedAutoencoder(nn.Module):
    """Returns the loss of pictures; the decoder is thrown away after training.

    Args:
        encoder: what is trained; it is not frozen while it is in here, `finish` freezes it again.
        dim, depth, heads: of the decoder.
        mask_ratio: part of the patches that are hidden, in (0, 1).

    Raises:
        ValueError: a mask ratio outside of (0, 1).
    """

    def __init__(
        self,
        encoder: SmallViT,
        *,
        dim: int = 96,
        depth: int = 2,
        heads: int = 3,
        mask_ratio: float = 0.75,
    ) -> None:
        super().__init__()
        if not 0 < mask_ratio < 1:
            raise ValueError(f"MaskedAutoencoder: mask_ratio must be in (0, 1), got {mask_ratio}")
        self.encoder, self.mask_ratio = encoder, mask_ratio
        encoder.frozen = False
        encoder.requires_grad_(True)
        self.embed = nn.Linear(encoder.channels, dim)
        self.hidden = nn.Parameter(0.02 * torch.randn(dim))
        self.blocks = nn.ModuleList(TransformerBlock(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pixels = nn.Linear(dim, 3 * encoder.patch**2)

    def forward(self, images: Tensor, generator: Generators = None) -> Tensor:
        """Returns the mean loss of pictures [B, 3, H, W] in [-1, 1].

        Args:
            images: sizes are multiples of the patch.
            generator: decides which patches are hidden; with one per picture those of a picture do
                not depend on the others of its batch.

        Raises:
            ValueError: pictures of a single patch, of which nothing could be both seen and hidden;
                another number of generators than of pictures.
        """
        patch = self.encoder.patch
        rows, columns = (size // patch for size in images.shape[2:])
        batch, count = images.shape[0], rows * columns
        if count < 2:
            raise ValueError(
                f"MaskedAutoencoder: images must have two patches of {patch} or more, "
                f"got {list(images.shape[2:])}"
            )
        visible = min(max(1, round(count * (1 - self.mask_ratio))), count - 1)
        order = _random_keys(batch, count, generator, images.device).argsort(1)
        seen = self.embed(self.encoder.encode_patches(images, order[:, :visible]))
        hidden = self.hidden.to(seen).expand(batch, count - visible, -1)
        width = seen.shape[-1]
        position = sincos_2d(rows, columns, width).to(seen)[order]
        x = torch.cat([seen, hidden], dim=1) + position
        for block in self.blocks:
            x = block(x)
        predicted = self.pixels(self.norm(x[:, visible:]))
        target = nn.functional.unfold(images, patch, stride=patch).mT  # [B, N, 3 patch^2]
        target = target.gather(1, order[:, visible:, None].expand(-1, -1, target.shape[-1]))
        mean, variance = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
        target = (target - mean) / (variance + _TARGET_EPS).sqrt()
        return (predicted - target).square().mean()

    def finish(self) -> SmallViT:
        """Returns the encoder, frozen and in eval mode."""
        self.encoder.frozen = True
        return self.encoder.requires_grad_(False).eval()


def _random_keys(batch: int, count: int, generator: Generators, device: torch.device) -> Tensor:
    """Returns numbers [batch, count] in [0, 1)."""
    if generator is None:
        return torch.rand(batch, count, device=device)
    if isinstance(generator, torch.Generator):
        keys = torch.rand(batch, count, generator=generator, device=generator.device)
        return keys.to(device)
    if len(generator) != batch:
        raise ValueError(
            f"MaskedAutoencoder: generator must be one per picture ({batch}), got {len(generator)}"
        )
    return torch.stack([torch.rand(count, generator=g, device=g.device) for g in generator]).to(
        device
    )
