"""Chooses the precision in which this CPU trains faster, by measuring it."""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F

# bfloat16 must win clearly, as it costs a little accuracy.
_WORTHWHILE_RATIO = 0.8


def faster_training_dtype() -> torch.dtype | None:
    """Returns torch.bfloat16 if this CPU convolves clearly faster in it, else None for float32.

    Decided by timing a small convolution forward and backward in both, about 0.1 s: CPUs without
    bfloat16 instructions emulate it, sometimes much more slowly.
    """
    try:
        ratio = _convolution_seconds(torch.bfloat16) / _convolution_seconds(torch.float32)
    except RuntimeError:  # this torch has no bfloat16 convolution for this CPU
        return None
    return torch.bfloat16 if ratio < _WORTHWHILE_RATIO else None


def _convolution_seconds(dtype: torch.dtype) -> float:
    """Returns the time of one 3x3 convolution of 16 channels with its gradients, best of three."""
    generator = torch.Generator().manual_seed(0)
    video = torch.randn(1, 16, 9, 96, 96, generator=generator).to(dtype)
    video = video.contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    weight = torch.randn(16, 16, 1, 3, 3, generator=generator).to(dtype).requires_grad_()
    best = float("inf")
    for _ in range(4):  # the first run sets up oneDNN
        start = time.perf_counter()
        F.conv3d(video, weight, padding=(0, 1, 1)).sum().backward()
        best = min(best, time.perf_counter() - start)
    return best
