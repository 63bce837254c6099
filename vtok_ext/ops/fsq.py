"""Finite scalar quantization: rounds every channel of a latent to one of a few levels.

    half = (levels - 1) * (1 + 1e-3) / 2,  offset = 0.5 for even levels else 0
    shift = atanh(offset / half)
    digit = round_half_even(tanh(z + shift) * half - offset),  code = digit / (levels // 2)
    index = sum_d (digit_d + levels_d // 2) * basis_d,  basis_d = product of the levels before d

Source: Mentzer et al. 2023, "Finite Scalar Quantization: VQ-VAE Made Simple", in VidTok's variant.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vtok_ext import _native
from vtok_ext.ops._dtypes import FLOATING, check_floating
from vtok_ext.ops._library import OpFunction, once_differentiable, register

MAX_CHANNELS = 16
MAX_LEVELS = 256
_INT32_MAX = 2**31 - 1


def index_dtype(levels: Sequence[int]) -> torch.dtype:
    """torch.int32 where every index of the codebook fits, else torch.int64."""
    return torch.int32 if math.prod(levels) - 1 <= _INT32_MAX else torch.int64


def fsq_reference(
    z: Tensor,  # [..., num_codebooks * D, ...]
    levels: Sequence[int],
    *,
    channel_dim: int = -1,
    num_codebooks: int = 1,
) -> tuple[Tensor, Tensor]:
    """Codes and indices in plain PyTorch, the definition of `fsq`; arguments as there."""
    channel_dim = _check_fsq("fsq", z, levels, channel_dim, num_codebooks)
    real = z.dtype if z.dtype == torch.float64 else torch.float32
    x = z.to(real).movedim(channel_dim, -1).unflatten(-1, (num_codebooks, len(levels)))
    count = torch.tensor(levels, dtype=real, device=z.device)
    half_width = count.div(2, rounding_mode="floor")
    half = (count - 1) * (1 + 1e-3) / 2
    offset = torch.where(count % 2 == 0, 0.5, 0.0).to(real)
    bounded = torch.tanh(x + torch.atanh(offset / half)) * half - offset
    digits = bounded + (bounded.round() - bounded).detach()  # straight-through gradient
    codes = (digits / half_width).flatten(-2).movedim(-1, channel_dim).to(z.dtype)
    indices = _digits_to_indices(bounded.detach().round() + half_width, levels)
    return codes, _place_codebooks(indices, channel_dim, num_codebooks)


def _digits_to_indices(digits: Tensor, levels: Sequence[int]) -> Tensor:
    """Index [...] of non-negative digits [..., D]; -1 where a digit is NaN."""
    basis = [math.prod(levels[:d]) for d in range(len(levels))]
    whole = digits.nan_to_num().round().to(torch.int64)
    indices = (whole * torch.tensor(basis, device=digits.device)).sum(-1)
    return indices.masked_fill(digits.isnan().any(-1), -1).to(index_dtype(levels))


def _place_codebooks(indices: Tensor, channel_dim: int, num_codebooks: int) -> Tensor:
    """[..., num_codebooks] -> the codebook dimension where z has its channels, or dropped when it
    is 1."""
    return indices.squeeze(-1) if num_codebooks == 1 else indices.movedim(-1, channel_dim)


def _check_levels(op: str, levels: Sequence[int], num_codebooks: int) -> None:
    if not 1 <= len(levels) <= MAX_CHANNELS:
        raise ValueError(f"{op}: levels must have 1 to {MAX_CHANNELS} entries, got {len(levels)}")
    for count in levels:
        if isinstance(count, bool) or not isinstance(count, int):
            raise TypeError(f"{op}: levels must be integers, got {count!r}")
        if not 2 <= count <= MAX_LEVELS:
            raise ValueError(f"{op}: levels must be in [2, {MAX_LEVELS}], got {count}")
    if math.prod(levels) >= 2**63:
        raise ValueError(
            f"{op}: levels must have a product below 2^63, got {math.prod(levels):.3g}; "
            "split the channels over several codebooks (num_codebooks)"
        )
    if num_codebooks < 1:
        raise ValueError(f"{op}: num_codebooks must be at least 1, got {num_codebooks}")


def _check_fsq(
    op: str, z: Tensor, levels: Sequence[int], channel_dim: int, num_codebooks: int
) -> int:
    """Raises for bad arguments; returns `channel_dim` counted from the front."""
    _check_levels(op, levels, num_codebooks)
    if not isinstance(z, Tensor):
        raise TypeError(f"{op}: z must be a torch.Tensor, got {type(z).__name__}")
    check_floating(op, "z", z)
    if not 1 <= z.dim() <= 6:
        raise ValueError(f"{op}: z must have 1 to 6 dimensions, got {list(z.shape)}")
    if not -z.dim() <= channel_dim < z.dim():
        raise ValueError(f"{op}: channel_dim must be in [{-z.dim()}, {z.dim()}), got {channel_dim}")
    channel_dim %= z.dim()
    if z.shape[channel_dim] != num_codebooks * len(levels):
        raise ValueError(
            f"{op}: z must have {num_codebooks * len(levels)} channels at dimension {channel_dim} "
            f"({num_codebooks} x {len(levels)} levels), got {list(z.shape)}"
        )
    return channel_dim


def _index_shape(shape: Sequence[int], channel_dim: int, num_codebooks: int) -> list[int]:
    middle = [] if num_codebooks == 1 else [num_codebooks]
    return [*shape[:channel_dim], *middle, *shape[channel_dim + 1 :]]


def _empty_outputs(
    z: Tensor, levels: Sequence[int], channel_dim: int, num_codebooks: int
) -> tuple[Tensor, Tensor]:
    shape = _index_shape(z.shape, channel_dim, num_codebooks)
    return torch.empty_like(z), z.new_empty(shape, dtype=index_dtype(levels))


def _forward(
    z: Tensor, levels: list[int], channel_dim: int, num_codebooks: int
) -> tuple[Tensor, Tensor]:
    codes, indices = _empty_outputs(z, levels, channel_dim, num_codebooks)
    _native.module().fsq_forward(
        z, codes, indices, levels, channel_dim, num_codebooks, _native.call_context(z)
    )
    return codes, indices


def _backward(
    z: Tensor, grad_codes: Tensor, levels: list[int], channel_dim: int, num_codebooks: int
) -> Tensor:
    grad_z = torch.empty_like(z)
    if grad_codes.stride() != grad_z.stride():
        grad_codes = torch.empty_like(z).copy_(grad_codes)
    _native.module().fsq_backward(
        z, grad_codes, grad_z, levels, channel_dim, num_codebooks, _native.call_context(z)
    )
    return grad_z


def _decode(
    indices: Tensor, levels: list[int], channel_dim: int, num_codebooks: int, dtype: torch.dtype
) -> Tensor:
    codes = _empty_codes(indices, levels, channel_dim, num_codebooks, dtype)
    _native.module().fsq_decode(
        indices, codes, levels, channel_dim, num_codebooks, _native.call_context(indices)
    )
    return codes


def _empty_codes(
    indices: Tensor, levels: list[int], channel_dim: int, num_codebooks: int, dtype: torch.dtype
) -> Tensor:
    after = channel_dim if num_codebooks == 1 else channel_dim + 1
    channels = num_codebooks * len(levels)
    shape = [*indices.shape[:channel_dim], channels, *indices.shape[after:]]
    return indices.new_empty(shape, dtype=dtype)


_fsq_forward = register(
    "fsq_forward(Tensor z, int[] levels, int channel_dim, int num_codebooks) -> (Tensor, Tensor)",
    _forward,
    _empty_outputs,
)
_fsq_backward = register(
    "fsq_backward(Tensor z, Tensor grad_codes, int[] levels, int channel_dim, int num_codebooks)"
    " -> Tensor",
    _backward,
    lambda z, grad_codes, levels, channel_dim, num_codebooks: torch.empty_like(z),
)
_fsq_decode = register(
    "fsq_decode(Tensor indices, int[] levels, int channel_dim, int num_codebooks, ScalarType dtype)"
    " -> Tensor",
    _decode,
    _empty_codes,
)


class FsqFunction(OpFunction):
    """Saves z only: tanh is recomputed in the backward pass."""

    @staticmethod
    def forward(
        z: Tensor, levels: list[int], channel_dim: int, num_codebooks: int
    ) -> tuple[Tensor, Tensor]:
        """Codes and indices of `z`."""
        return _fsq_forward(z, levels, channel_dim, num_codebooks)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Keeps z and the geometry."""
        z, ctx.levels, ctx.channel_dim, ctx.num_codebooks = inputs
        ctx.save_for_backward(z)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable("fsq")
    def backward(ctx: Any, grad_codes: Tensor | None, grad_indices: None) -> tuple[Any, ...]:
        """Straight-through: the gradient of the bounded value, divided by levels // 2."""
        if grad_codes is None or not ctx.needs_input_grad[0]:
            return None, None, None, None
        (z,) = ctx.saved_tensors
        grad_z = _fsq_backward(z, grad_codes, ctx.levels, ctx.channel_dim, ctx.num_codebooks)
        return grad_z, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], z: Tensor, *geometry: Any) -> Any:
        """A batch dimension is one more token dimension."""
        levels, channel_dim, num_codebooks = geometry
        z = z.movedim(in_dims[0], 0)  # type: ignore[arg-type]
        return FsqFunction.apply(z, levels, channel_dim + 1, num_codebooks), (0, 0)


def fsq(
    z: Tensor,  # [..., num_codebooks * D, ...]
    levels: Sequence[int],
    *,
    channel_dim: int = -1,
    num_codebooks: int = 1,
) -> tuple[Tensor, Tensor]:
    """Codes and codebook indices of a latent, in one pass.

    code = round(tanh(z + shift) * half - offset) / (levels // 2), straight through backwards.
    Equivalent to: fsq_reference(z, levels, channel_dim=channel_dim, num_codebooks=num_codebooks)

    Args:
        z: latent, any real values, 1 to 6 dimensions, any strides; channel c * D + d is channel d
            of codebook c.
        levels: D level counts in [2, 256], D in [1, 16], product below 2^63.
        channel_dim: the dimension of z that holds the channels.
        num_codebooks: independent codebooks that share `levels`.

    Returns:
        codes: as z (shape, dtype, memory format), values k / (levels // 2) in [-1, 1].
        indices: shape of z without the channel dimension (num_codebooks in its place when that is
            over 1), int32, or int64 when the codebook has more than 2^31 entries; in [0, product of
            levels). The first channel is the least significant. A NaN gives a NaN code and the
            index -1.

    Raises:
        ValueError: wrong rank, channel count, levels, channel_dim or num_codebooks.
        TypeError: z or levels of an unsupported dtype.

    float32, float16 and bfloat16 on cpu and cuda, float64 on cpu; half types are computed in
    float32. Deterministic; codes and indices are bitwise equal on every CPU and GPU, gradients on
    every CPU. Differentiable once; supports vmap.

    Source: Mentzer et al. 2023, section 3; VidTok's regulariser.
    """
    if not _native.is_enabled():
        return fsq_reference(z, levels, channel_dim=channel_dim, num_codebooks=num_codebooks)
    channel_dim = _check_fsq("fsq", z, levels, channel_dim, num_codebooks)
    return FsqFunction.apply(z, list(levels), channel_dim, num_codebooks)


def fsq_indices_to_codes_reference(
    indices: Tensor,  # [...] or [..., num_codebooks, ...]
    levels: Sequence[int],
    *,
    channel_dim: int = -1,
    num_codebooks: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Codes in plain PyTorch, the definition of `fsq_indices_to_codes`: same arguments and
    errors."""
    channel_dim = _check_indices(indices, levels, channel_dim, num_codebooks, dtype)
    rest = indices.unsqueeze(-1) if num_codebooks == 1 else indices.movedim(channel_dim, -1)
    real = dtype if dtype == torch.float64 else torch.float32
    channels = []
    for count in levels:
        channels.append(((rest % count) - count // 2).to(real) / (count // 2))
        rest = rest.div(count, rounding_mode="floor")
    codes = torch.stack(channels, -1).flatten(-2)  # [..., num_codebooks * D]
    return codes.movedim(-1, channel_dim).to(dtype)


def _check_indices(
    indices: Tensor, levels: Sequence[int], channel_dim: int, num_codebooks: int, dtype: torch.dtype
) -> int:
    """Raises for bad arguments; returns `channel_dim` of the codes, counted from the front."""
    op = "fsq_indices_to_codes"
    _check_levels(op, levels, num_codebooks)
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: indices must be int32 or int64, got {indices.dtype}")
    if dtype not in FLOATING or (indices.is_cuda and dtype == torch.float64):
        raise TypeError(
            f"{op}: dtype must be a floating type of {indices.device.type}, got {dtype}"
        )
    rank = indices.dim() + (1 if num_codebooks == 1 else 0)
    if not 1 <= rank <= 6:
        raise ValueError(
            f"{op}: codes must have 1 to 6 dimensions, got indices {list(indices.shape)}"
        )
    if not -rank <= channel_dim < rank:
        raise ValueError(f"{op}: channel_dim must be in [{-rank}, {rank}), got {channel_dim}")
    channel_dim %= rank
    if num_codebooks > 1 and indices.shape[channel_dim] != num_codebooks:
        raise ValueError(
            f"{op}: indices must have {num_codebooks} codebooks at dimension {channel_dim}, "
            f"got {list(indices.shape)}"
        )
    return channel_dim


def fsq_indices_to_codes(
    indices: Tensor,  # [...] or [..., num_codebooks, ...]
    levels: Sequence[int],
    *,
    channel_dim: int = -1,
    num_codebooks: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Codes of codebook indices: exactly the codes that `fsq` returned with those indices.

    code_d = (index // basis_d mod levels_d - levels_d // 2) / (levels_d // 2)
    Equivalent to: fsq_indices_to_codes_reference(indices, levels, ...)

    Args:
        indices: int32 or int64 in [0, product of levels), checked on the CPU; on CUDA an index
            outside gives meaningless codes.
        levels, num_codebooks: as in `fsq`.
        channel_dim: where the result has its channels.
        dtype: of the codes.

    Returns:
        codes [..., num_codebooks * D, ...] with the channels at `channel_dim`, in [-1, 1].

    Raises:
        ValueError: wrong rank, levels or codebook count, or (CPU) an index outside the codebook.
        TypeError: indices or dtype of an unsupported type.

    Deterministic; not differentiable. Source: Mentzer et al. 2023, section 3.
    """
    channel_dim = _check_indices(indices, levels, channel_dim, num_codebooks, dtype)
    if indices.numel() and indices.is_cpu and not torch.compiler.is_compiling():
        low, high = (int(bound) for bound in torch.aminmax(indices))
        if low < 0 or high >= math.prod(levels):
            raise ValueError(
                f"fsq_indices_to_codes: indices must be in [0, {math.prod(levels)}), "
                f"got values in [{low}, {high}]"
            )
    if not _native.is_enabled():
        return fsq_indices_to_codes_reference(
            indices, levels, channel_dim=channel_dim, num_codebooks=num_codebooks, dtype=dtype
        )
    return _fsq_decode(indices, list(levels), channel_dim, num_codebooks, dtype)


def fsq_codes_to_indices(
    codes: Tensor,  # [..., num_codebooks * D, ...]
    levels: Sequence[int],
    *,
    channel_dim: int = -1,
    num_codebooks: int = 1,
) -> Tensor:
    """Codebook indices of codes that `fsq` or `fsq_indices_to_codes` returned, in any floating
    dtype.

    index = sum_d (round(code_d * (levels_d // 2)) + levels_d // 2) * basis_d. Rounding to nearest
    makes it right where code * (levels // 2) is not a whole number in floating point (26 levels,
    say).

    Args and Returns: as the codes and indices of `fsq`. Raises: as `fsq`.
    """
    channel_dim = _check_fsq("fsq_codes_to_indices", codes, levels, channel_dim, num_codebooks)
    x = codes.double().movedim(channel_dim, -1).unflatten(-1, (num_codebooks, len(levels)))
    half_width = torch.tensor([count // 2 for count in levels], device=codes.device)
    indices = _digits_to_indices((x * half_width).round() + half_width, levels)
    return _place_codebooks(indices, channel_dim, num_codebooks)
