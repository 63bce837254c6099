"""A short name for a set of weights, so that tokens of one training run are not read by another.

SHA-256 over the names and shapes of all tensors and up to 1024 values of each, evenly spread and
rounded to bfloat16. A copy of the model in bfloat16, on another device or in another process has
the same fingerprint, and so has a model that was converted to float16 (it keeps the one of before;
weights read from a float16 file are others); any optimiser step worth the name gives another. It
identifies, and does not protect against forgery.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

_VALUES_PER_TENSOR = 1024
_DIGITS = 12


@torch.no_grad()
def weights_fingerprint(weights: Mapping[str, Tensor]) -> str:
    """Returns 12 hexadecimal digits; takes some milliseconds, whatever the size."""
    digest = hashlib.sha256()
    samples = []
    for name in sorted(weights):
        value = weights[name].detach()
        digest.update(f"{name}{list(value.shape)}".encode())
        count = min(value.numel(), _VALUES_PER_TENSOR)
        if count:
            # On the CPU: the same positions on every device.
            places = torch.linspace(0, value.numel() - 1, count, dtype=torch.float64).long()
            samples.append(value.reshape(-1)[places.to(value.device)].to(torch.bfloat16))
    if samples:
        sampled = torch.cat([s.to(samples[0].device) for s in samples]).cpu()
        digest.update(sampled.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:_DIGITS]
