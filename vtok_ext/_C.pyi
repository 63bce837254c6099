from typing import Any

import torch

def build_info() -> dict[str, Any]: ...
def evaluate(name: str, x: torch.Tensor, y: torch.Tensor) -> None: ...
def fsq_forward(
    z: torch.Tensor,
    codes: torch.Tensor,
    indices: torch.Tensor,
    levels: list[int],
    channel_dim: int,
    num_codebooks: int,
    context: tuple[int, int],
) -> None: ...
def fsq_backward(
    z: torch.Tensor,
    grad_codes: torch.Tensor,
    grad_z: torch.Tensor,
    levels: list[int],
    channel_dim: int,
    num_codebooks: int,
    context: tuple[int, int],
) -> None: ...
def fsq_decode(
    indices: torch.Tensor,
    codes: torch.Tensor,
    levels: list[int],
    channel_dim: int,
    num_codebooks: int,
    context: tuple[int, int],
) -> None: ...
