"""KVD: kernel distance of generated and real clips in the features of a fixed random network.

    kvd = mean_(i!=j) k(g_i, g_j) + mean_(i!=j) k(r_i, r_j) - 2 mean k(g_i, r_j)
    k(x, y) = (x . y / D + 1)^3

an unbiased estimate of a squared maximum mean discrepancy: zero on average, and possibly negative,
for two sets of one distribution, whatever their number. It needs no pretrained weights, and is not
FVD: numbers of the two have nothing to do with each other, and only those of one version of the
features (`FEATURES`) can be compared.
Source: Binkowski et al. (arXiv 1801.01401, section 4) for the estimate; random features ours.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._clip_set import SetDistance, Videos, check_clips, clips_of, uint8_batches

# Changes with anything that changes a number.
FEATURES = "random-conv3d-1"
_SEED = 20_241_122
_CHANNELS = (3, 32, 64, 128)
_KERNELS = ((3, 5, 5), (3, 3, 3), (3, 3, 3))
_STRIDES = ((1, 2, 2), (2, 2, 2), (2, 2, 2))
NUM_FEATURES = 2 * sum(_CHANNELS[1:])
_NORMAL_95 = 1.959964


def _filters() -> list[Tensor]:
    """Returns the random filters, of unit gain (He et al., arXiv 1502.01852)."""
    generator = torch.Generator().manual_seed(_SEED)
    filters = []
    for inputs, outputs, kernel in zip(_CHANNELS, _CHANNELS[1:], _KERNELS, strict=False):
        weight = torch.randn(outputs, inputs, *kernel, generator=generator)
        filters.append(weight * (2 / weight[0].numel()) ** 0.5)
    return filters


def kvd_features(
    videos: Videos,
    *,
    clip_frames: int | None = None,
    chunks: str = "all",
    batch_size: int = 16,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Returns the features [N, 448] float32, on the CPU, of clips.

    Mean and standard deviation over time and space of every channel of three layers of random
    convolutions with ReLU.

    Args:
        videos: [B, 3, T, H, W] uint8 or float in [-1, 1], or batches of such.
        clip_frames: cut videos into clips of that length; default whole videos.
        chunks: every clip of a video is a sample ("all"), or only the "first".
        batch_size: clips at a time.
        device: where to compute.

    Raises:
        TypeError, ValueError: other videos or options, or not one clip in them.
    """
    return _features_and_sizes(videos, clip_frames, chunks, batch_size, device)[0]


@torch.no_grad()
def _features_and_sizes(
    videos: Videos,
    clip_frames: int | None,
    chunks: str,
    batch_size: int,
    device: torch.device | str,
) -> tuple[Tensor, set[tuple[int, ...]]]:
    """Returns the features [N, 448] of clips, and their sizes (T, H, W)."""
    check_clips("kvd", chunks, clip_frames=clip_frames, batch_size=batch_size)
    filters = [weight.to(device) for weight in _filters()]
    features, sizes = [], set()
    for video in uint8_batches("kvd", videos):
        for clip in clips_of(video, clip_frames or video.shape[2], chunks):
            sizes.add(tuple(clip.shape[2:]))
            features += [_features(p.to(device), filters).cpu() for p in clip.split(batch_size)]
    if not features:
        raise ValueError("kvd: videos must be as long as a clip, got shorter ones")
    return torch.cat(features), sizes


def _features(clips: Tensor, filters: list[Tensor]) -> Tensor:
    x = clips.float() / 127.5 - 1
    statistics = []
    for weight, stride in zip(filters, _STRIDES, strict=True):
        padding = [k // 2 for k in weight.shape[2:]]
        x = F.relu(F.conv3d(x, weight, stride=stride, padding=padding))
        flat = x.flatten(2)
        statistics += [flat.mean(2), flat.std(2, correction=0)]
    return torch.cat(statistics, 1)


def kvd(
    generated: Videos,
    real: Videos,
    *,
    clip_frames: int | None = None,
    chunks: str = "all",
    batch_size: int = 16,
    device: torch.device | str = "cpu",
) -> SetDistance:
    """Returns the KVD of generated to real clips, with its sample counts and 95 % interval.

    Args:
        generated, real: videos, see `kvd_features`; their clips have the same sizes, on which the
            features depend.
        clip_frames, chunks, batch_size, device: see `kvd_features`.

    Raises:
        TypeError, ValueError: as `kvd_features`, clips of other sizes in one set than in the
            other, or fewer than three samples of either kind.

    Deterministic on one device and version of torch.
    """
    (features, sizes), (real_features, real_sizes) = (
        _features_and_sizes(videos, clip_frames, chunks, batch_size, device)
        for videos in (generated, real)
    )
    if sizes != real_sizes:
        raise ValueError(
            f"kvd: generated and real clips must have the same sizes (T, H, W), got "
            f"{sorted(sizes)} and {sorted(real_sizes)}"
        )
    return kernel_distance(features, real_features)


def kernel_distance(
    generated: Tensor,  # [N, D]
    real: Tensor,  # [M, D]
) -> SetDistance:
    """Returns the squared distance of two sets of features, and its 95 % jackknife interval.

    Features are first brought to mean 0 and deviation 1 over the real ones, so that every feature
    counts.

    Args:
        generated, real: N >= 3 and M >= 3 finite features.

    Raises:
        ValueError: other shapes, or features that are not finite.
    """
    for name, features in (("generated", generated), ("real", real)):
        if features.dim() != 2 or len(features) < 3 or features.shape[1] != real.shape[-1]:
            raise ValueError(
                f"kvd: {name} must have at least 3 samples of one kind of features, "
                f"got {list(features.shape)}"
            )
        if not bool(torch.isfinite(features).all()):
            raise ValueError(f"kvd: {name} must have finite features, got NaN or infinity")
    real, generated = real.double(), generated.double()
    mean, deviation = real.mean(0), real.std(0, correction=0)
    # A feature that is the same for all real clips has no scale of its own.
    deviation = torch.where(deviation > 1e-8 * mean.abs().clamp(min=1e-8), deviation, 1.0)
    g, r = ((features - mean) / deviation for features in (generated, real))
    within_g, within_r = (_kernel(x, x).fill_diagonal_(0) for x in (g, r))
    between = _kernel(g, r)
    n, m = len(g), len(r)
    sums = within_g.sum(), within_r.sum(), between.sum()
    value = _estimate(*sums, n, m)
    without_g = _estimate(
        sums[0] - 2 * within_g.sum(1), sums[1], sums[2] - between.sum(1), n - 1, m
    )
    without_r = _estimate(
        sums[0], sums[1] - 2 * within_r.sum(1), sums[2] - between.sum(0), n, m - 1
    )
    variance = sum(
        (count - 1) / count * (left - left.mean()).square().sum()
        for count, left in ((n, without_g), (m, without_r))
    )
    margin = _NORMAL_95 * float(variance) ** 0.5
    return SetDistance(value.item(), value.item() - margin, value.item() + margin, n, m)


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.mT / x.shape[1] + 1) ** 3


def _estimate(within_g: Tensor, within_r: Tensor, between: Tensor, n: int, m: int) -> Tensor:
    """Returns the unbiased estimate from sums over pairs; the diagonals are left out."""
    return within_g / (n * (n - 1)) + within_r / (m * (m - 1)) - 2 * between / (n * m)
