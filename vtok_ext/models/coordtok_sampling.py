"""Points that CoordTok is trained on, and their targets.

    step 1   single patches of real frames, drawn independently with replacement
    step 2   all patches of some real frames, drawn without replacement
Source: CoordTok (arXiv 2411.14762), specification section 8.2, whose order of draws is followed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def random_points(
    num_frames: Tensor,  # [B]
    num_points: int,
    grid: Sequence[int],
    patch_frames: int,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Returns patches [B, num_points, 3] drawn one by one, with replacement, from real frames.

    The first step of the published training; `video_patches` are their targets.

    Args:
        num_frames: real frames of each clip, at least `patch_frames`.
        num_points: points per clip.
        grid: patches of the whole clip along t, x and y.
        patch_frames: frames per patch.
        generator: source of the draws; default the global CPU one.

    Raises:
        ValueError: a clip has fewer frames than a patch.
    """
    if int(num_frames.min()) < patch_frames:
        raise ValueError(
            f"random_points: num_frames must be at least {patch_frames}, the frames of a patch, "
            f"got {int(num_frames.min())}"
        )

    def draw(sizes: Sequence[int]) -> Tensor:
        axes = [torch.randint(size, (num_points,), generator=generator) for size in sizes]
        return torch.stack(axes, dim=-1)

    counts = (num_frames // patch_frames).tolist()
    return torch.stack([draw((count, *grid[1:])) for count in counts]).to(num_frames.device)


def random_frame_points(
    num_frames: Tensor,  # [B]
    num_frames_drawn: int,
    grid: Sequence[int],
    generator: torch.Generator | None = None,
) -> Tensor:
    """Returns all patches [B, num_frames_drawn * Gx * Gy, 3] of some frames, drawn without
    replacement: the second step of the published training, for patches of one frame.

    A clip of fewer frames gives all of them, and then some again, so that what is drawn of it does
    not depend on the others; the reference cannot batch such clips.

    Args:
        num_frames: real frames of each clip, at least one.
        num_frames_drawn: frames per clip.
        grid, generator: as in `random_points`.
    """
    x, y = torch.arange(grid[1]), torch.arange(grid[2])

    def draw(count: int) -> Tensor:
        rounds = -(-num_frames_drawn // count)
        orders = [torch.randperm(count, generator=generator) for _ in range(rounds)]
        t = torch.cat(orders)[:num_frames_drawn]
        return torch.stack(torch.meshgrid(t, x, y, indexing="ij"), dim=-1).flatten(0, 2)

    points = [draw(count) for count in num_frames.tolist()]
    return torch.stack(points).to(num_frames.device)


def video_patches(
    video: Tensor,  # [B, 3, T, H, W]
    points: Tensor,  # [B, N, 3], patches
    patch: Sequence[int],  # (dt, dx, dy)
) -> Tensor:
    """Returns the patches [B, N, dt * dx * dy * 3] of a video; what a decoder's should be."""
    offsets = torch.meshgrid(
        *(torch.arange(size, device=video.device) for size in patch), indexing="ij"
    )
    t, x, y = (points[..., axis, None] * patch[axis] + offsets[axis].flatten() for axis in range(3))
    batch = torch.arange(video.shape[0], device=video.device)[:, None, None]
    return video.permute(0, 2, 3, 4, 1)[batch, t, x, y].flatten(2)
