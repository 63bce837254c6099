"""FVD: Frechet distance of the I3D logits of generated and of real clips.

Protocol: uint8 clips of 16 frames, values / 255, shorter side to 224 bilinearly (no antialiasing),
centre crop, to [-1, 1]; 400 logits of an I3D trained on Kinetics-400; Frechet distance in float64.
The network's weights are the caller's: without them there is no FVD, and `kvd` is no substitute.
Source: Unterthiner et al. (arXiv 1812.01717); preprocessing of specification section 10.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._clip_set import Origins, SetDistance, Videos, check_clips, clips_of
from .frechet import frechet_distance
from .i3d import load_i3d

CLIP_FRAMES = 16
_SIZE = 224


def fvd_preprocess(
    video: Tensor,  # [B, 3, T, H, W] uint8
) -> Tensor:
    """Returns [B, 3, T, 224, 224] float32 in [-1, 1], as published FVD numbers are computed.

    Args:
        video: [B, 3, T, H, W] uint8.

    Raises:
        TypeError, ValueError: not that.
    """
    if video.dtype != torch.uint8:
        raise TypeError(f"fvd_preprocess: video must be uint8, got {video.dtype}")
    if video.dim() != 5 or video.shape[1] != 3:
        raise ValueError(f"fvd_preprocess: video must be [B, 3, T, H, W], got {list(video.shape)}")
    batch, _, num_frames, height, width = video.shape
    frames = video.transpose(1, 2).flatten(0, 1).float() / 255
    shorter = min(height, width)
    size = [
        _SIZE if side == shorter else math.ceil(side * _SIZE / shorter) for side in (height, width)
    ]
    frames = F.interpolate(frames, size, mode="bilinear", align_corners=False)
    top, left = ((side - _SIZE) // 2 for side in size)
    frames = frames[:, :, top : top + _SIZE, left : left + _SIZE]
    return ((frames - 0.5) * 2).unflatten(0, (batch, num_frames)).transpose(1, 2)


def fvd_features(
    videos: Videos,
    network: nn.Module,
    *,
    chunks: str = "all",
    batch_size: int = 8,
) -> Tensor:
    """Returns the logits [N, 400] float32, on the CPU, of all clips of 16 frames.

    Args:
        videos: [B, 3, T, H, W] uint8 or float in [-1, 1], or batches of such; T >= 16, what is
            left after the last 16 frames is dropped.
        network: see `load_i3d`, or another of clips as `fvd_preprocess` gives them, whose numbers
            are no FVD; clips go to its device. It runs in eval mode, and has its own mode again
            afterwards.
        chunks: every clip of a video is a sample ("all"), or only the "first".
        batch_size: clips at a time.

    Raises:
        TypeError, ValueError: other videos or options, or not one clip in them.
    """
    return _measured(videos, network, chunks, batch_size)[0]


@torch.no_grad()
def _measured(
    videos: Videos, network: nn.Module, chunks: str, batch_size: int
) -> tuple[Tensor, Tensor]:
    """Returns logits [N, 400] of clips, and their videos [N]."""
    check_clips("fvd", chunks, batch_size=batch_size)
    device = next(network.parameters()).device
    features, origins = [], []
    with _eval_mode(network):
        for clips, numbers in clips_of("fvd", videos, CLIP_FRAMES, chunks):
            origins.append(numbers)
            for part in clips.split(batch_size):
                features.append(network(fvd_preprocess(part.to(device))).float().cpu())
    if not features:
        raise ValueError(f"fvd: videos must have {CLIP_FRAMES} frames or more, got shorter ones")
    return torch.cat(features), torch.cat(origins)


@contextmanager
def _eval_mode(network: nn.Module) -> Iterator[None]:
    """Puts a network into eval mode; each of its modules has its own mode again afterwards."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def fvd(
    generated: Videos,
    real: Videos,
    *,
    weights: str | os.PathLike | nn.Module | None = None,
    chunks: str = "all",
    paired: bool = False,
    batch_size: int = 8,
    num_resamples: int = 100,
    seed: int = 0,
    trust_checkpoint: bool = False,
) -> SetDistance:
    """Returns the FVD of generated to real clips, with its sample counts and an interval.

    The value depends on the number of samples and is too large with few; 2,048 and more of each are
    usual, and only numbers of equal counts can be compared.

    Args:
        generated, real: videos, see `fvd_features`.
        weights: file of `load_i3d`, or a network, see `fvd_features`.
        chunks, batch_size: see `fvd_features`.
        paired: whether generated video i was made of real video i, as by a tokenizer; such videos
            are resampled together.
        num_resamples: bootstrap resamples of the videos of both sets for the interval; 0 for none.
            With fewer than three videos in a set clips are resampled, and the interval speaks of
            further clips of these videos.
        seed: of the resamples.
        trust_checkpoint: see `load_i3d`.

    Raises:
        ValueError: no weights; as `load_i3d` or `fvd_features`; fewer than two clips in a set, or
            paired sets of different counts.
        FileNotFoundError: there is no such file.
    """
    if weights is None:
        raise ValueError(
            "fvd: weights must be the file of an I3D with 400 Kinetics classes "
            "(i3d_pretrained_400.pt), got None; they are not part of this package"
        )
    if not isinstance(weights, nn.Module):
        weights = load_i3d(weights, trust_checkpoint=trust_checkpoint)
    (features, origins), (real_features, real_origins) = (
        _measured(videos, weights, chunks, batch_size) for videos in (generated, real)
    )
    return frechet_with_interval(
        features,
        real_features,
        Origins(origins, real_origins, paired).or_clips(),
        num_resamples=num_resamples,
        seed=seed,
    )


def frechet_with_interval(
    generated: Tensor,  # [N, D]
    real: Tensor,  # [M, D]
    origins: Origins | None = None,
    *,
    num_resamples: int = 100,
    seed: int = 0,
) -> SetDistance:
    """Returns the Frechet distance of features and its 95 % bootstrap interval.

        low, high = d + quantiles of (d* - mean of d*),  d* distances of resampled sets

    It says where distances of other sets of these sizes lie, not what a distance without the bias
    of few samples would be. Resampled sets repeat samples and are further apart than sets of as
    many different ones; their mean is taken off, for else the interval would lie beside the value.

    Args:
        generated, real: features.
        origins: which videos they are of, which are resampled as a whole; default as many as clips.
        num_resamples: 0 for no interval.
        seed: of the resamples.

    Raises:
        ValueError: as `frechet_distance`, or paired sets of different counts.
    """
    if origins is None:
        origins = Origins.of_clips(len(generated), len(real))
    origins.check("fvd")
    value = frechet_distance(generated, real).item()
    low = high = value
    if num_resamples > 0:
        generator = torch.Generator().manual_seed(seed)
        clips_of_g, clips_of_r = (
            [torch.where(numbers == video)[0] for video in numbers.unique()]
            for numbers in (origins.generated, origins.real)
        )
        values = []
        for _ in range(num_resamples):
            chosen = _resampled(clips_of_g, generator)
            other = chosen if origins.paired else _resampled(clips_of_r, generator)
            values.append(frechet_distance(generated[chosen], real[other]))
        distances = torch.stack(values)
        spread = distances - distances.mean()
        ends = spread.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        low, high = max(0.0, value + ends[0]), value + ends[1]
    return SetDistance(value, low, high, len(generated), len(real))


def _resampled(clips: list[Tensor], generator: torch.Generator) -> Tensor:
    """Returns the clips of as many videos as there are, drawn with repetitions."""
    drawn = torch.randint(len(clips), (len(clips),), generator=generator).tolist()
    return torch.cat([clips[video] for video in drawn])
