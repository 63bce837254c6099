"""What a test knows of an op: how to call it and its reference, and with which inputs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """One call: named tensors (shapes and kind) and plain keyword arguments."""

    tensors: dict[str, tuple[int, ...]]
    kwargs: dict[str, Any]

    def __str__(self) -> str:
        shapes = "_".join("x".join(map(str, shape)) for shape in self.tensors.values())
        return shapes + "".join(f"-{value}" for value in self.kwargs.values()).replace(" ", "")


@dataclass(frozen=True)
class OpCase:
    """An op, its reference and how to call both.

    Attributes:
        make: (name, shape, dtype, generator, kwargs) -> tensor; values that stay away from
            discontinuities, so that rounding of inputs to half types cannot flip a result.
        dtypes: floating dtypes that the op takes; float64 on the CPU only.
        differentiable: names of tensors that get a gradient.
        gradient_factor: multiple of the tolerance table granted to gradients, with the reason in
            the case.
        returns_autocast_dtype: results are cast to the dtype of autocast where that is on.
        runs_torch_kernels: on the CPU the op calls torch's own parallel kernels, which hang in a
            forked child unless it works with one thread, as the workers of a DataLoader do.
        raw: name and arguments of raw ops for opcheck.
    """

    name: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    samples: Sequence[Sample]
    make: Callable[..., Tensor]
    dtypes: tuple[torch.dtype, ...] = (
        torch.float32,
        torch.float64,
        torch.float16,
        torch.bfloat16,
    )
    differentiable: tuple[str, ...] = ()
    gradient_factor: float = 1.0
    supports_vmap: bool = False
    returns_autocast_dtype: bool = False
    runs_torch_kernels: bool = False
    raw: Sequence[tuple[str, Callable[[], tuple[Any, ...]]]] = field(default_factory=tuple)

    def __str__(self) -> str:
        return self.name

    def inputs(self, sample: Sample, dtype: torch.dtype, device: str, seed: int = 0):
        """The sample's tensors on `device`."""
        generator = torch.Generator().manual_seed(seed)
        return {
            name: self.make(name, shape, dtype, generator, sample.kwargs).to(device)
            for name, shape in sample.tensors.items()
        }
