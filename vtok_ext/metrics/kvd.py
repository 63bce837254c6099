"""KVD: kernel distance of generated and real clips in the features of a fixed random network.

    kvd = mean k(g_i, g_j) + mean k(r_i, r_j) - 2 mean k(g_i, r_j)
    k(x, y) = (x . y / D + 1)^3

over pairs of clips of different videos: an unbiased estimate of a squared maximum mean discrepancy.
It is zero on average, and possibly negative, for two sets of one distribution, whatever their
number. Where video i of one set was made of video i of the other, such pairs are left out of the
last mean too. It needs no pretrained weights, and is not FVD: numbers of the two have nothing to do
with each other, and only those of one version of the features (`FEATURES`) and of clips of one size
can be compared.
Source: Binkowski et al. (arXiv 1801.01401, section 4) for the estimate; random features ours.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ._clip_set import LEAST_VIDEOS, Origins, SetDistance, Videos, check_clips, clips_of

# Changes with anything that changes a number.
FEATURES = "random-conv3d-2"
_SEED = 20_241_122
_CHANNELS = (3, 32, 64, 128)
_KERNELS = ((3, 5, 5), (3, 3, 3), (3, 3, 3))
_STRIDES = ((1, 2, 2), (2, 2, 2), (2, 2, 2))
NUM_FEATURES = 2 * sum(_CHANNELS[1:])
# Clips of noise that set the scale of the features.
_NOISE_CLIPS, _NOISE_SIZE = 128, (8, 32, 32)
_NORMAL_95 = 1.959964


def _filters() -> list[Tensor]:
    """Returns the random filters, of unit gain (He et al., arXiv 1502.01852)."""
    generator = torch.Generator().manual_seed(_SEED)
    filters = []
    for inputs, outputs, kernel in zip(_CHANNELS, _CHANNELS[1:], _KERNELS, strict=False):
        weight = torch.randn(outputs, inputs, *kernel, generator=generator)
        filters.append(weight * (2 / weight[0].numel()) ** 0.5)
    return filters


@lru_cache
def _scale() -> tuple[Tensor, Tensor]:
    """Returns mean and deviation [448] of the features of noise of many colours, contrasts, sizes.

    A scale taken of the clips that are compared would make the estimate depend on their number.
    """
    generator = torch.Generator().manual_seed(_SEED + 1)
    colours = torch.rand(_NOISE_CLIPS, 3, 1, 1, 1, generator=generator) - 0.5
    clips = colours.expand(-1, -1, *_NOISE_SIZE)
    for grid in ((1, 3, 3), (2, 8, 8), (8, 32, 32)):
        noise = torch.randn(_NOISE_CLIPS, 3, *grid, generator=generator)
        contrasts = 0.4 * torch.rand(_NOISE_CLIPS, 1, 1, 1, 1, generator=generator)
        clips = clips + contrasts * F.interpolate(noise, _NOISE_SIZE, mode="trilinear")
    features = _statistics(clips.clamp(-1, 1), _filters()).double()
    return features.mean(0), features.std(0)


def kvd_features(
    videos: Videos,
    *,
    clip_frames: int | None = None,
    chunks: str = "all",
    batch_size: int = 16,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Returns the features [N, 448] float64, on the CPU, of clips.

    Mean and standard deviation over time and space of every channel of three layers of random
    convolutions with ReLU, on the scale of those of clips of noise: mean 0, deviation 1.

    Args:
        videos: [B, 3, T, H, W] uint8 or float in [-1, 1], or batches of such.
        clip_frames: cut videos into clips of that length; default whole videos.
        chunks: every clip of a video is a sample ("all"), or only the "first".
        batch_size: clips at a time.
        device: where to compute.

    Raises:
        TypeError, ValueError: other videos or options, or not one clip in them.
    """
    return _measured(videos, clip_frames, chunks, batch_size, device)[0]


@torch.no_grad()
def _measured(
    videos: Videos,
    clip_frames: int | None,
    chunks: str,
    batch_size: int,
    device: torch.device | str,
) -> tuple[Tensor, Tensor, set[tuple[int, ...]]]:
    """Returns features [N, 448] of clips, their videos [N], and their sizes (T, H, W)."""
    check_clips("kvd", chunks, clip_frames=clip_frames, batch_size=batch_size)
    filters = [weight.to(device) for weight in _filters()]
    mean, deviation = _scale()
    features, origins, sizes = [], [], set()
    for clips, numbers in clips_of("kvd", videos, clip_frames, chunks):
        sizes.add(tuple(clips.shape[2:]))
        origins.append(numbers)
        for part in clips.split(batch_size):
            found = _statistics(part.to(device).float() / 127.5 - 1, filters)
            features.append((found.cpu().double() - mean) / deviation)
    if not features:
        raise ValueError("kvd: videos must be as long as a clip, got shorter ones")
    return torch.cat(features), torch.cat(origins), sizes


def _statistics(x: Tensor, filters: list[Tensor]) -> Tensor:
    """Returns [N, 448] of clips [N, 3, T, H, W] in [-1, 1]."""
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
    paired: bool = False,
    batch_size: int = 16,
    device: torch.device | str = "cpu",
) -> SetDistance:
    """Returns the KVD of generated to real clips, with its sample counts and 95 % interval.

    The interval is a jackknife's over videos; with fewer than three in a set it is one over clips,
    and speaks of further clips of these videos.

    Args:
        generated, real: videos, see `kvd_features`; their clips have the same sizes, on which the
            features depend.
        clip_frames, chunks, batch_size, device: see `kvd_features`.
        paired: whether generated video i was made of real video i, as by a tokenizer.

    Raises:
        TypeError, ValueError: as `kvd_features`, clips of other sizes in one set than in the
            other, paired sets of different counts, or fewer than three clips of either kind.

    Deterministic on one device and version of torch.
    """
    (features, origins, sizes), (real_features, real_origins, real_sizes) = (
        _measured(videos, clip_frames, chunks, batch_size, device) for videos in (generated, real)
    )
    if sizes != real_sizes:
        raise ValueError(
            f"kvd: generated and real clips must have the same sizes (T, H, W), got "
            f"{sorted(sizes)} and {sorted(real_sizes)}"
        )
    origin = Origins(origins, real_origins, paired).or_clips()
    return kernel_distance(features, real_features, origin)


def kernel_distance(
    generated: Tensor,  # [N, D]
    real: Tensor,  # [M, D]
    origins: Origins | None = None,
) -> SetDistance:
    """Returns the squared distance of two sets of features, and its 95 % jackknife interval.

    Args:
        generated, real: finite features.
        origins: which videos they are of, at least three in each set; default as many as clips.

    Raises:
        ValueError: other shapes or counts, or features that are not finite.
    """
    for name, features in (("generated", generated), ("real", real)):
        if features.dim() != 2 or len(features) < 3 or features.shape[1] != real.shape[-1]:
            raise ValueError(
                f"kvd: {name} must have at least 3 samples of one kind of features, "
                f"got {list(features.shape)}"
            )
        if not bool(torch.isfinite(features).all()):
            raise ValueError(f"kvd: {name} must have finite features, got NaN or infinity")
    if origins is None:
        origins = Origins.of_clips(len(generated), len(real))
    origins.check("kvd")
    if min(origins.num_videos) < LEAST_VIDEOS:
        raise ValueError(
            f"kvd: origins must be {LEAST_VIDEOS} videos of either kind, got {origins.num_videos}"
        )
    paired = origins.paired
    g, r = generated.double(), real.double()
    of_g, of_r = (
        F.one_hot(o.unique(return_inverse=True)[1]).double()
        for o in (origins.generated, origins.real)
    )
    within_g = _Pairs(g, g, of_g, of_g, skip_own=True)
    within_r = _Pairs(r, r, of_r, of_r, skip_own=True)
    between = _Pairs(g, r, of_g, of_r, skip_own=paired)
    value = float(within_g.mean() + within_r.mean() - 2 * between.mean())
    without_g = within_g.means_without(rows=True, columns=True)
    without_r = within_r.means_without(rows=True, columns=True)
    if paired:
        left = [without_g + without_r - 2 * between.means_without(rows=True, columns=True)]
    else:
        left = [
            without_g + within_r.mean() - 2 * between.means_without(rows=True),
            within_g.mean() + without_r - 2 * between.means_without(columns=True),
        ]
    variance = sum(
        (len(values) - 1) / len(values) * (values - values.mean()).square().sum() for values in left
    )
    margin = _NORMAL_95 * float(variance) ** 0.5
    return SetDistance(value, value - margin, value + margin, len(g), len(r))


class _Pairs:
    """Sums of the kernel over pairs of clips, by pairs of videos.

    Args:
        x, y: features [N, D] and [M, D].
        of_x, of_y: [N, V] and [M, W], one where a clip is of a video.
        skip_own: whether pairs of one video do not count.
    """

    def __init__(self, x: Tensor, y: Tensor, of_x: Tensor, of_y: Tensor, skip_own: bool) -> None:
        self.sums = of_x.mT @ (x @ y.mT / x.shape[1] + 1) ** 3 @ of_y
        self.counts = of_x.sum(0)[:, None] * of_y.sum(0)
        if skip_own:
            self.sums.fill_diagonal_(0)
            self.counts.fill_diagonal_(0)

    def mean(self) -> Tensor:
        """Returns the mean over pairs."""
        return self.sums.sum() / self.counts.sum()

    def means_without(self, *, rows: bool = False, columns: bool = False) -> Tensor:
        """Returns the means [V or W] without video v's row, its column or both.

        Both only where pairs of one video do not count.
        """
        sums, counts = (
            table.sum() - (table.sum(1) if rows else 0) - (table.sum(0) if columns else 0)
            for table in (self.sums, self.counts)
        )
        return sums / counts
