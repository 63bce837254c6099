"""What `vtok eval` measures beside PSNR, SSIM and seams, and only if it is asked to.

LPIPS of frames; FVD and KVD of clips of 16 frames, each video cut from its beginning and the rest
dropped. Clips of one video are no independent samples: intervals are over videos, with fewer than
three of them over clips. Frames arrive in portions; what waits is less than a clip.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vtok_ext.metrics import CodebookCounter
from vtok_ext.metrics._clip_set import CHUNKS, Origins, uint8_batches
from vtok_ext.metrics.fvd import CLIP_FRAMES, frechet_with_interval, fvd_features
from vtok_ext.metrics.i3d import load_i3d
from vtok_ext.metrics.kvd import FEATURES, kernel_distance, kvd_features
from vtok_ext.metrics.lpips_network import LPIPS, published_lpips

# Clips of either kind that a distance of sets needs, and those that FVD's 400 logits do.
_LEAST = {"fvd": 2, "kvd": 3}
_ENOUGH_FOR_FVD = 401


@dataclass(frozen=True)
class MeasureOptions:
    """Which further measures are wanted, and where their weights are.

    Attributes:
        lpips: whether LPIPS is measured.
        lpips_backbone, lpips_heads: files of `published_lpips`; None for torch's cache.
        fvd_weights: file of `load_i3d`; None for no FVD.
        kvd: whether KVD is measured.
        chunks: "all" clips of a video, or the "first" one.
        trust_checkpoint: as for `load_i3d` and `published_lpips`.
    """

    lpips: bool = False
    lpips_backbone: Path | None = None
    lpips_heads: Path | None = None
    fvd_weights: Path | None = None
    kvd: bool = False
    chunks: str = "all"
    trust_checkpoint: bool = False


class ClipSets:
    """Features of generated or decoded clips, and of real ones, for FVD and KVD.

    Args:
        options: what is wanted.
        device: where features are computed.
        paired: whether generated videos were made of the real ones, by a tokenizer.

    Raises:
        ValueError, OSError: the weights of FVD cannot be had.
    """

    def __init__(self, options: MeasureOptions, device: torch.device, paired: bool) -> None:
        if options.chunks not in CHUNKS:
            raise ValueError(
                f"eval: --chunks must be one of {', '.join(CHUNKS)}, got {options.chunks}"
            )
        self.options, self.device, self.paired = options, device, paired
        self._i3d = None
        if options.fvd_weights is not None:
            trusted = options.trust_checkpoint
            self._i3d = load_i3d(options.fvd_weights, trust_checkpoint=trusted).to(device)
        self._features: dict[str, dict[str, list[Tensor]]] = {
            measure: {"generated": [], "real": []}
            for measure, wanted in (("fvd", self._i3d is not None), ("kvd", options.kvd))
            if wanted
        }
        self._origins: dict[str, list[int]] = {"generated": [], "real": []}
        self._sizes: set[tuple[int, ...]] = set()
        self._waiting: dict[str, Tensor] = {}
        self._clips, self._videos = {"generated": 0, "real": 0}, 0  # of the present video, before

    def add(self, kind: str, frames: Tensor) -> None:
        """Returns None after taking the next frames [1, 3, t, H, W] of a video.

        Args:
            kind: "generated" or "real".
            frames: on any device; floats in [-1, 1] are truncated to bytes, as published numbers
                want it.
        """
        if not self._features:
            return
        frames = next(uint8_batches("eval", frames))
        if kind in self._waiting:
            frames = torch.cat([self._waiting[kind], frames], 2)
        while frames.shape[2] >= CLIP_FRAMES:
            clip, frames = frames[:, :, :CLIP_FRAMES], frames[:, :, CLIP_FRAMES:]
            if self.options.chunks == "all" or not self._clips[kind]:
                self._measure(kind, clip)
            self._clips[kind] += 1
        self._waiting[kind] = frames

    def end_video(self) -> None:
        """Returns None after dropping what is left of the present video."""
        self._waiting, self._clips = {}, {"generated": 0, "real": 0}
        self._videos += 1

    def _measure(self, kind: str, clip: Tensor) -> None:
        self._origins[kind].append(self._videos)
        self._sizes.add(tuple(clip.shape[2:]))
        if self._i3d is not None:
            self._features["fvd"][kind].append(fvd_features(clip, self._i3d))
        if self.options.kvd:
            self._features["kvd"][kind].append(kvd_features(clip, device=self.device))

    def result(self) -> dict[str, Any]:
        """Returns by measure its value, interval and sample counts, or why there is none."""
        generated, real = (
            torch.tensor(self._origins[kind], dtype=torch.long) for kind in ("generated", "real")
        )
        origins = Origins(generated, real, self.paired)
        intervals = origins.or_clips()
        facts: dict[str, Any] = {"num_generated": len(generated), "num_real": len(real)}
        facts |= dict(zip(("generated_videos", "real_videos"), origins.num_videos, strict=True))
        facts |= {"clip_sizes": sorted(self._sizes)}
        found: dict[str, Any] = {}
        for measure, sets in self._features.items():
            if min(len(generated), len(real)) < _LEAST[measure]:
                reason = f"needs {_LEAST[measure]} clips of {CLIP_FRAMES} frames of either kind"
                found[measure] = {"value": None, "reason": reason, **facts}
                continue
            distance = frechet_with_interval if measure == "fvd" else kernel_distance
            result = distance(torch.cat(sets["generated"]), torch.cat(sets["real"]), intervals)
            found[measure] = {"value": result.value, "low": result.low, "high": result.high}
            found[measure] |= {"interval_over": "videos" if intervals is origins else "clips"}
            found[measure] |= facts | ({"features": FEATURES} if measure == "kvd" else {})
        return found


class Shared:
    """What all videos of an evaluation have in common.

    Args:
        codebook_size: of a discrete model, else None.
        options: which further measures are wanted.
        device: where they are computed.

    Raises:
        ValueError, OSError: weights cannot be had.
    """

    def __init__(
        self, codebook_size: int | None, options: MeasureOptions, device: torch.device
    ) -> None:
        self.usage = None if codebook_size is None else CodebookCounter(codebook_size)
        self.sets = ClipSets(options, device, paired=True)
        self.lpips: LPIPS | None = None
        if options.lpips:
            files = (options.lpips_backbone, options.lpips_heads)
            trusted = options.trust_checkpoint
            self.lpips = published_lpips(*files, trust_checkpoint=trusted).to(device)

    def count(self, indices: Tensor | None) -> None:
        """Returns None after counting the codes of a discrete model."""
        if self.usage is not None and indices is not None:
            self.usage.update(indices)


def lines_of_sets(sets: dict[str, Any]) -> list[str]:
    """Returns one line per measure of `ClipSets.result`."""
    found = []
    for measure, row in sets.items():
        counts = f"{row['num_generated']} and {row['num_real']} clips of {CLIP_FRAMES} frames"
        if row["value"] is None:
            found.append(f"{measure.upper()}: {row['reason']}, got {counts}")
            continue
        interval = (
            f"95 % interval over {row['interval_over']} {row['low']:.4g} to {row['high']:.4g}"
        )
        found.append(f"{measure.upper()} {row['value']:.4g} ({interval}), {counts}")
        if measure == "fvd" and min(row["num_generated"], row["num_real"]) < _ENOUGH_FOR_FVD:
            found[-1] += f"; far too large with fewer than {_ENOUGH_FOR_FVD}, compare equal counts"
    return found
