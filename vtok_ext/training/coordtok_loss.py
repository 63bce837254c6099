"""The training loss of CoordTok: random points of each clip, and the perceptual distance of frames.

    L = sum_b mean_{n, v} (z - x)^2  +  w sum_{b, f} LPIPS(z_f, x_f)

z are decoded and x true patches of the N points drawn per clip b, v their values and f the frames
that the points make up. Both sums run over the clips of a batch, as the reference's do: the loss
grows with the batch, and the perceptual term with the number of frames.

    step 1   single patches of real frames, w = 0
    step 2   all patches of some real frames, w = 1; of a shorter clip some frames again

Source: CoordTok (arXiv 2411.14762), specification section 8.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtok_ext.models._video_input import is_integer
from vtok_ext.models.coordtok_config import CoordTokConfig
from vtok_ext.models.coordtok_points import patches_to_video
from vtok_ext.models.coordtok_sampling import random_frame_points, random_points, video_patches

SAMPLING = ("patches", "frames")


@dataclass(frozen=True)
class PointLossConfig:
    """Which points are decoded and what is minimised; the defaults are the published first step.

    Attributes:
        sampling: "patches" draws single patches with replacement; "frames" draws whole frames
            without, which needs patches of one frame.
        num_points: decoded points per clip; for "frames" a multiple of the patches per frame. A
            clip of fewer frames gives some of them again.
        perceptual_weight: of LPIPS, for "frames" only; 1 in the published second step.
        perceptual_dropout: of LPIPS' heads: 0.5 is what the reference trains with, unintended; 0
            is LPIPS as its authors use it.
    """

    sampling: str = "patches"
    num_points: int = 1024
    perceptual_weight: float = 0.0
    perceptual_dropout: float = 0.0

    def __post_init__(self) -> None:
        """Checks every field."""
        if self.sampling not in SAMPLING:
            raise ValueError(f"loss: sampling must be one of {SAMPLING}, got {self.sampling!r}")
        if not is_integer(self.num_points) or self.num_points < 1:
            raise ValueError(f"loss: num_points must be an integer >= 1, got {self.num_points}")
        most = math.inf if self.sampling == "frames" else 0.0
        if self.perceptual_weight != 0 and not 0 < self.perceptual_weight < most:
            raise ValueError(
                "loss: perceptual_weight must be finite and >= 0, and 0 for sampling 'patches', "
                f"which make up no picture, got {self.perceptual_weight}"
            )
        if not 0 <= self.perceptual_dropout < 1:
            raise ValueError(
                f"loss: perceptual_dropout must be in [0, 1), got {self.perceptual_dropout}"
            )
        if self.perceptual_dropout and not self.perceptual_weight:
            raise ValueError(
                "loss: perceptual_dropout must be 0 with perceptual_weight 0, "
                f"got {self.perceptual_dropout}"
            )

    def check_model(self, config: CoordTokConfig) -> None:
        """Raises ValueError if these points cannot be drawn for a model of `config`."""
        if self.sampling == "patches":
            return
        t, x, y = config.point_grid()
        if config.dec_patch_size[0] != 1:
            raise ValueError(
                "loss: sampling must be 'patches' for a model whose patches have "
                f"{config.dec_patch_size[0]} frames, got 'frames'"
            )
        if self.num_points % (x * y) or self.num_points > t * x * y:
            raise ValueError(
                f"loss: num_points must be a multiple of {x * y}, the patches of a frame, up to "
                f"{t * x * y}, got {self.num_points}"
            )


def draw_points(
    loss: PointLossConfig,
    model: CoordTokConfig,
    num_frames: Tensor,  # [B]
    generators: Sequence[torch.Generator] | None = None,
) -> Tensor:
    """Returns the points [B, N, 3] of a batch, counted in patches (t, x, y), int64.

    Args:
        loss, model: what to draw for which model.
        num_frames: real frames of each clip.
        generators: one per clip; default the global CPU one for all.

    Raises:
        ValueError: a clip is shorter than a patch.
    """
    grid, frames = model.point_grid(), model.dec_patch_size[0]
    wanted = loss.num_points // (grid[1] * grid[2])
    drawn = []
    for i, count in enumerate(num_frames.split(1)):
        generator = None if generators is None else generators[i]
        if loss.sampling == "patches":
            drawn.append(random_points(count, loss.num_points, grid, frames, generator))
        else:
            drawn.append(random_frame_points(count, wanted, grid, generator))
    return torch.cat(drawn)


class PointLoss:
    """Loss of decoded patches, see the module.

    Args:
        config: weights and choices.
        model: configuration of the tokenizer.
        perceptual: an `LPIPS`, for a perceptual weight.

    Raises:
        ValueError: these points cannot be drawn for this model, or LPIPS is missing.
    """

    def __init__(
        self,
        config: PointLossConfig,
        model: CoordTokConfig,
        perceptual: Callable[..., Tensor] | None = None,
    ) -> None:
        config.check_model(model)
        if config.perceptual_weight > 0 and perceptual is None:
            raise ValueError(
                "PointLoss: perceptual must be a network for perceptual_weight "
                f"{config.perceptual_weight}, got None"
            )
        self.config, self.model, self.perceptual = config, model, perceptual

    def __call__(
        self,
        patches: Tensor,  # [B, N, dt * dx * dy * 3]
        video: Tensor,  # [B, 3, T, H, W]
        points: Tensor,  # [B, N, 3]
        generators: Sequence[torch.Generator] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns what is minimised, and detached scalars for the log.

        Args:
            patches: decoded patches of `points`.
            video: the clips in [-1, 1]; H and W as in the model's `video_shape`, T any.
            points: as `draw_points` returns them.
            generators: one per clip, for `perceptual_dropout`; default the global one for all.
        """
        targets = video_patches(video, points, self.model.dec_patch_size).float()
        patches = patches.float()
        per_clip = (patches - targets).square().mean(dim=(1, 2))
        loss = per_clip.sum()
        seen = {"pixel_loss": per_clip.mean()}
        if self.config.perceptual_weight > 0:
            distance = self._distance(patches, targets, generators)
            loss = loss + self.config.perceptual_weight * distance.sum()
            seen["perceptual_loss"] = distance.mean()
        return loss, {name: value.detach() for name, value in seen.items()}

    def _distance(
        self,
        patches: Tensor,  # [B, N, dt * dx * dy * 3]
        targets: Tensor,  # as patches
        generators: Sequence[torch.Generator] | None,
    ) -> Tensor:
        """Returns LPIPS of every frame, [B * frames]."""
        assert self.perceptual is not None  # checked at construction
        _, x, y = self.model.point_grid()
        counts = (patches.shape[1] // (x * y), x, y)

        def frames(values: Tensor) -> Tensor:
            video = patches_to_video(values, counts, self.model.dec_patch_size)
            return video.transpose(1, 2).flatten(0, 1)

        options: dict[str, Any] = {}
        if self.config.perceptual_dropout:
            options["dropout"] = self.config.perceptual_dropout
            if generators is not None:
                options["generators"] = [_on_device(g, patches.device) for g in generators]
        return self.perceptual(frames(patches), frames(targets), **options).flatten()


def _on_device(generator: torch.Generator, device: torch.device) -> torch.Generator:
    """Returns a generator of `device` with a seed from another: masks are slow to draw on a CPU."""
    seed = int(torch.randint(2**62, (), generator=generator))
    return torch.Generator(device).manual_seed(seed)
