from typing import Any

import torch

def build_info() -> dict[str, Any]: ...
def evaluate(name: str, x: torch.Tensor, y: torch.Tensor) -> None: ...
def causal_conv3d_gemm(
    source: torch.Tensor,
    state: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    other: torch.Tensor | None,
    mix_factor: torch.Tensor | None,
    out: torch.Tensor,
    preactivation: torch.Tensor | None,
    partial: torch.Tensor | None,
    axes: list[tuple[int, int, int, int, int, int]],
    options: tuple[int, bool, bool, bool, int, int],
    context: tuple[int, int],
) -> None: ...
def causal_conv3d_weight_gradient(
    source: torch.Tensor,
    state: torch.Tensor | None,
    grad: torch.Tensor,
    grad_weight: torch.Tensor,
    grad_bias: torch.Tensor | None,
    partial: torch.Tensor,
    axes: list[tuple[int, int, int, int, int, int]],
    options: tuple[int, bool, bool, int, int],
    context: tuple[int, int],
) -> None: ...
def causal_conv3d_gemm_plan(
    positions: int,
    columns: int,
    groups: int,
    depth: int,
    is_half: bool,
    tf32: bool,
    may_split: bool,
    device_index: int,
) -> tuple[int, int]: ...
def causal_conv3d_weight_gradient_plan(
    positions: int,
    columns: int,
    groups: int,
    depth: int,
    is_half: bool,
    tf32: bool,
    device_index: int,
) -> tuple[int, int]: ...
def causal_conv3d_weight_gradient_splits(
    positions: int, columns: int, groups: int, depth: int, tile: int, device_index: int
) -> int: ...
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
def fsq_entropy_factors(
    z: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    entropy: torch.Tensor | None,
    commitment: torch.Tensor | None,
    indices: torch.Tensor | None,
    levels: list[int],
    num_low: int,
    inverse_temperature: float,
    context: tuple[int, int],
) -> None: ...
def fsq_entropy_backward(
    z: torch.Tensor,
    grad_low: torch.Tensor | None,
    grad_high: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
    grad_commitment: torch.Tensor | None,
    grad_z: torch.Tensor,
    levels: list[int],
    num_low: int,
    inverse_temperature: float,
    context: tuple[int, int],
) -> None: ...
def fsq_entropy_clamped_forward(
    low: torch.Tensor, high: torch.Tensor, entropy: torch.Tensor, context: tuple[int, int]
) -> None: ...
def fsq_entropy_clamped_backward(
    low: torch.Tensor,
    high: torch.Tensor,
    grad_entropy: torch.Tensor,
    grad_low: torch.Tensor,
    grad_high: torch.Tensor,
    context: tuple[int, int],
) -> None: ...
def fsq_entropy_average_forward(
    average: torch.Tensor, partial_entropy: torch.Tensor, context: tuple[int, int]
) -> None: ...
def fsq_entropy_average_backward(
    average: torch.Tensor,
    grad_entropy: torch.Tensor,
    grad_average: torch.Tensor,
    context: tuple[int, int],
) -> None: ...
def alpha_blend_forward(
    a: torch.Tensor,
    b: torch.Tensor,
    mix_factor: torch.Tensor,
    out: torch.Tensor,
    is_logit: bool,
    context: tuple[int, int],
) -> None: ...
def alpha_blend_backward(
    grad_out: torch.Tensor,
    a: torch.Tensor | None,
    b: torch.Tensor | None,
    mix_factor: torch.Tensor,
    grad_a: torch.Tensor | None,
    grad_b: torch.Tensor | None,
    grad_mix_factor: torch.Tensor | None,
    partials: torch.Tensor | None,
    is_logit: bool,
    context: tuple[int, int],
) -> None: ...
def temporal_resample_forward(
    x: torch.Tensor,
    carried: torch.Tensor | None,
    front: torch.Tensor | None,
    y: torch.Tensor | None,
    mix_factor: torch.Tensor | None,
    out: torch.Tensor,
    timing: list[int],
    context: tuple[int, int],
) -> None: ...
def temporal_resample_backward(
    grad_out: torch.Tensor,
    x: torch.Tensor | None,
    carried: torch.Tensor | None,
    y: torch.Tensor | None,
    mix_factor: torch.Tensor | None,
    grad_x: torch.Tensor | None,
    grad_carried: torch.Tensor | None,
    grad_front: torch.Tensor | None,
    grad_y: torch.Tensor | None,
    grad_mix_factor: torch.Tensor | None,
    partials: torch.Tensor | None,
    timing: list[int],
    context: tuple[int, int],
) -> None: ...
def triplane_gather_forward(
    plane_xy: torch.Tensor,
    plane_yt: torch.Tensor,
    plane_xt: torch.Tensor,
    coords: torch.Tensor,
    axis_x: torch.Tensor | None,
    axis_y: torch.Tensor | None,
    grid: list[int],
    reduce: str,
    out: torch.Tensor,
    context: tuple[int, int],
) -> None: ...
def triplane_gather_workspace(
    plane_xy: torch.Tensor, num_frames: int, num_points: int, reduce: str
) -> int: ...
def triplane_gather_backward(
    grad_out: torch.Tensor,
    plane_xy: torch.Tensor,
    plane_yt: torch.Tensor,
    plane_xt: torch.Tensor,
    coords: torch.Tensor,
    axis_x: torch.Tensor | None,
    axis_y: torch.Tensor | None,
    grid: list[int],
    reduce: str,
    grad_xy: torch.Tensor | None,
    grad_yt: torch.Tensor | None,
    grad_xt: torch.Tensor | None,
    grad_coords: torch.Tensor | None,
    workspace: torch.Tensor,
    context: tuple[int, int],
) -> None: ...
def norm_act_workspace(
    shape: list[int], kind: int, num_groups: int, backward: bool, device_index: int
) -> int: ...
def norm_act_forward(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    state: torch.Tensor | None,
    y: torch.Tensor,
    stats: torch.Tensor | None,
    workspace: torch.Tensor,
    options: tuple[int, int, float, bool, int, bool],
    context: tuple[int, int],
) -> None: ...
def norm_act_backward(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    stats: torch.Tensor | None,
    grad_x: torch.Tensor | None,
    grad_weight: torch.Tensor | None,
    grad_bias: torch.Tensor | None,
    workspace: torch.Tensor,
    options: tuple[int, int, float, bool, int, bool],
    context: tuple[int, int],
) -> None: ...
def residual_pool_forward(
    frames: torch.Tensor,
    key: torch.Tensor,
    position: torch.Tensor,
    query: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    out: torch.Tensor,
    pooled: torch.Tensor,
    log_sum: torch.Tensor,
    partials: torch.Tensor | None,
    context: tuple[int, int],
) -> None: ...
def residual_pool_backward(
    frames: torch.Tensor,
    key: torch.Tensor,
    position: torch.Tensor,
    query: torch.Tensor,
    log_sum: torch.Tensor,
    grad_pooled: torch.Tensor,
    mean_grad: torch.Tensor,
    grad_frames: torch.Tensor | None,
    grad_key: torch.Tensor | None,
    grad_position: torch.Tensor | None,
    grad_query: torch.Tensor | None,
    attention: torch.Tensor,
    partials: torch.Tensor | None,
    context: tuple[int, int],
) -> None: ...
