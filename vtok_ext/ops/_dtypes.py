"""Which dtypes the ops take, and what autocast says about them."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def check_floating(op: str, name: str, tensor: Tensor) -> None:
    """Raises unless `tensor` has a dtype that the kernels of its device take."""
    if tensor.dtype not in FLOATING or (tensor.is_cuda and tensor.dtype == torch.float64):
        allowed = "float32, float16 or bfloat16" + ("" if tensor.is_cuda else " or float64")
        raise TypeError(
            f"{op}: {name} must be {allowed} on {tensor.device.type}, got {tensor.dtype}"
        )


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype of autocast on "cpu", "cuda", ... where it is on; None elsewhere, as on "meta"."""
    known = device_type in ("cpu", "cuda") or torch.amp.is_autocast_available(device_type)
    if not known or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def without_autocast(device_type: str) -> AbstractContextManager:
    """Switches autocast off where it is on, for torch's own ops inside a raw op: the public
    function has decided on the dtype."""
    if autocast_dtype(device_type) is None:
        return nullcontext()
    return torch.autocast(device_type, enabled=False)
