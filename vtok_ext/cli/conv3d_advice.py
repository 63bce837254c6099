"""What is known of 3-D convolution in this torch, and which path this package takes.

Users of networks on plain torch.nn.Conv3d meet these; `causal_conv3d` runs kernels of its own on
CUDA and oneDNN on CPUs, and its definition (VTOK_NATIVE=0) computes in float32, so that none of
them touches it. Sources: issues 163539, 166643 and 174051 of pytorch/pytorch.
"""

from __future__ import annotations

from typing import Any

import torch

from vtok_ext._native import build_info

_DEFINITION = "its definition in plain torch (VTOK_NATIVE=0): slow"


def conv3d_state() -> dict[str, Any]:
    """Returns this package's path and what is known of the installed torch and cuDNN."""
    cudnn = torch.backends.cudnn.version() if torch.version.cuda else None
    on_cuda, on_cpu = paths(build_info(), torch.backends.mkldnn.is_available())
    return {
        "path_on_cuda": on_cuda,
        "path_on_cpu": on_cpu,
        "cudnn": cudnn,
        "known_of_torch_conv3d": known_problems(torch.__version__, cudnn),
    }


def paths(build: dict[str, Any], has_onednn: bool) -> tuple[str, str]:
    """Returns what runs a causal convolution on CUDA and on a CPU.

    Args:
        build: as `build_info()`.
        has_onednn: whether this torch has oneDNN.
    """
    if not build["native"]:
        return _DEFINITION, _DEFINITION
    has_kernels = build["cuda_version"] is not None
    on_cuda = "kernels of vtok_ext, no cuDNN" if has_kernels else "none: built without CUDA"
    return on_cuda, "oneDNN through torch" if has_onednn else "torch without oneDNN: slow"


def known_problems(torch_version: str, cudnn: int | None) -> list[str]:
    """Returns the published problems of bfloat16 `torch.nn.Conv3d` in this pair on CUDA.

    Args:
        torch_version: such as "2.9.1+cu128".
        cudnn: as `torch.backends.cudnn.version()`, 91002 for 9.10.2; None without CUDA.
    """
    if cudnn is None:
        return []
    release = tuple(int(part) for part in torch_version.split("+")[0].split(".")[:2])
    problems = []
    if 90800 <= cudnn < 91100 and release < (2, 9):
        problems.append(
            "wrong results of large bfloat16 convolutions were reported with cuDNN 9.8 to 9.10 "
            "(pytorch issue 163539)"
        )
    if release == (2, 9) and cudnn < 91500:
        problems.append(
            "torch 2.9 does not give bfloat16 convolutions to cuDNN before 9.15: several times the "
            "memory, reported up to 20 times slower (pytorch issues 166643, 174051); cuDNN 9.15 or "
            "torch 2.10 help"
        )
    return problems
