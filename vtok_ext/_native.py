"""The only importer of the compiled module `_C`, and the switch between it and the references.

`VTOK_NATIVE=0` in the environment makes every op run its plain PyTorch reference.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

from vtok_ext._version import __version__

try:
    from vtok_ext import _C
except ImportError as error:
    raise ImportError(
        "vtok_ext: the compiled module vtok_ext._C must be installed, got "
        f"'{error}'. Run `pip install .` in the source folder."
    ) from error

if _C.build_info()["version"] != __version__:
    raise ImportError(
        f"vtok_ext: the compiled module must be version {__version__}, got "
        f"{_C.build_info()['version']} from {_C.__file__}. Run `pip install .` again."
    )

_active: ModuleType = _C
_enabled = os.environ.get("VTOK_NATIVE", "1") != "0"


def module() -> Any:
    """The compiled module in use."""
    return _active


def is_enabled() -> bool:
    """Whether ops run compiled kernels; False after `VTOK_NATIVE=0`."""
    return _enabled


def is_cuda_emulated() -> bool:
    """Whether CUDA kernels run on CPU tensors, as tests of them do."""
    return _active is not _C and _active.build_info()["cuda_emulation"]


@contextmanager
def use_module(replacement: ModuleType) -> Iterator[None]:
    """Runs ops on another build of the compiled module, such as the CUDA emulation, for a while."""
    global _active
    previous, _active = _active, replacement
    try:
        yield
    finally:
        _active = previous


def call_context(tensor: torch.Tensor) -> tuple[int, int]:
    """(number of CPU threads, CUDA stream handle) for a kernel that works on `tensor`."""
    if tensor.is_cuda:
        return 1, torch.cuda.current_stream(tensor.device).cuda_stream
    return torch.get_num_threads(), 0


def build_info() -> dict[str, Any]:
    """What the compiled module is and which kernels run.

    Returns:
        version, compiler, cuda_version and cuda_architectures (None without CUDA), cuda_emulation,
        cpu_isa (the instruction set chosen on this machine), openmp, native (False when
        `VTOK_NATIVE=0` forces the references), torch (its version).
    """
    return {**_active.build_info(), "native": _enabled, "torch": torch.__version__}
