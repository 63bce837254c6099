"""Nearest upsampling by 2 and a kernel of 3 as smaller kernels on the values before upsampling.

Two neighbouring outputs see only two different values along the axis; taps on equal values are
added up. With weights w0, w1, w2 and x[-1] before x[0]:

    space, padding 1   y[2q] = w0 x[q-1] + (w1 + w2) x[q],  y[2q+1] = (w0 + w1) x[q] + w2 x[q+1]
    time, 2 in front   y[2q] = (w0 + w1) x[q-1] + w2 x[q],  y[2q+1] = w0 x[q-1] + (w1 + w2) x[q]

In space 36 products per four outputs become 16, in time 3 per output 2. Half weights are added in
float32 and rounded once.

Seen from x, a value goes to four outputs along the axis. The gradient of x is a convolution with
stride 2 of the gradient of y, and that of the weight the one of its four taps, added up:

    dx[q] = w2 dy[2q + o] + (w1 + w2) dy[2q + o + 1] + (w0 + w1) dy[2q + o + 2] + w0 dy[2q + o + 3]

with o = 0 in time and -1 in space.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vtok_ext.ops._causal_conv3d_geometry import Geometry


def folds(weight: Tensor, state_frames: int | None, g: Geometry) -> bool:
    """Whether the convolution has the form above: 3 taps, step 1, and just that padding.

    In time a chunk and its whole clip fold, or neither does: half results are those of the clip.
    """
    kernel = weight.shape[2:]
    front = g.front if state_frames is None else state_frames
    in_time = g.repeat_time == 2 and (kernel[0], g.stride_t, g.dilation_t) == (3, 1, 1)
    if in_time:
        return front == g.front == 2 and g.back == 0 and g.repeat_space == 1
    steps = (*g.stride[1:], *g.dilation[1:])
    pads = (g.top, g.bottom, g.left, g.right)
    return g.repeat_space == 2 and (*kernel[1:], *steps, *pads) == (3, 3, *(1,) * 8)


def _fold_axis(weight: Tensor, axis: int, first_pair: str) -> tuple[Tensor, Tensor]:
    """Returns the two taps of the even and of the odd outputs; `first_pair` shares a value in one
    of them: the first two taps in the "even" or in the "odd" ones."""
    w0, w1, w2 = weight.unbind(axis)
    first, last = torch.stack([w0 + w1, w2], axis), torch.stack([w0, w1 + w2], axis)
    return (first, last) if first_pair == "even" else (last, first)


def folded_weight(
    weight: Tensor,  # [O, C / groups, kt, kh, kw]
    g: Geometry,
) -> Tensor:
    """Returns [groups, phases, O / groups, C / groups, 2, kh, kw] (time, 2 phases) or
    [..., kt, 2, 2] (space, 4 phases: row major)."""
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if g.repeat_time == 2:
        phases = list(_fold_axis(wide, 2, "even"))
    else:
        rows = _fold_axis(wide, 3, "odd")
        phases = [part for row in rows for part in _fold_axis(row, 4, "odd")]
    stacked = torch.stack([p.unflatten(0, (g.groups, -1)) for p in phases], 1)
    return stacked.to(weight.dtype)


def four_taps(weight: Tensor, axes: Sequence[int]) -> Tensor:
    """Returns `weight` with [w2, w1 + w2, w0 + w1, w0] for three taps along `axes`."""
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    for axis in axes:
        w0, w1, w2 = wide.unbind(axis)
        wide = torch.stack([w2, w1 + w2, w0 + w1, w0], axis)
    return wide.to(weight.dtype)


def folds_gradients(weight: Tensor, g: Geometry) -> bool:
    """Whether gradients of a whole clip that `folds` have the form above, too: no other strides."""
    kernel = weight.shape[2:]
    if g.repeat_space == 2:
        return g.groups == 1 and kernel[0] == 1 and g.stride_t == 1 and g.front == g.back == 0
    is_even = g.top == g.bottom < kernel[1] and g.left == g.right < kernel[2]
    return g.groups == 1 and is_even and g.stride[1:] == g.dilation[1:] == (1, 1)


def adjoint(weight: Tensor, g: Geometry) -> tuple[Tensor, Geometry, tuple[int, int, int]]:
    """Returns the convolution of the gradient of y [B, O, T', H', W'] that gives the one of x.

    In time its first frame belongs to the one before the clip.

    Returns:
        (weight [C, O, ...], geometry, equal padding).
    """
    plain = g._replace(front=0, back=0, top=0, bottom=0, left=0, right=0)
    plain = plain._replace(repeat_time=1, repeat_space=1, replicate=0)
    if g.repeat_space == 2:
        taps = four_taps(weight, (3, 4))
        return taps.transpose(0, 1), plain._replace(stride_h=2, stride_w=2), (0, 1, 1)
    taps = four_taps(weight, (2,)).flip(3, 4)
    padding = (2, weight.shape[3] - 1 - g.top, weight.shape[4] - 1 - g.left)
    return taps.transpose(0, 1), plain._replace(stride_t=2), padding


def weight_gradient_of_adjoint(
    grad: Tensor,  # [C, O, ...], of the weight of `adjoint`
    g: Geometry,
) -> Tensor:
    """Returns the gradient of the weight [O, C, kt, kh, kw]."""
    grad = grad.transpose(0, 1)
    grad = grad.flip(3, 4) if g.repeat_time == 2 else grad
    for axis in (3, 4) if g.repeat_space == 2 else (2,):
        k0, k1, k2, k3 = grad.unbind(axis)
        grad = torch.stack([k2 + k3, k1 + k2, k0 + k1], axis)
    return grad


def folded_geometry(g: Geometry) -> Geometry:
    """The geometry of the smaller kernels on the values before upsampling.

    In space it makes one row and column more than a phase needs: see `unfold`.
    """
    return g._replace(front=g.front // g.repeat_time, repeat_time=1, repeat_space=1)


def unfold(
    y: Tensor,  # [B, groups * phases * O / groups, T, H, W] in channels_last_3d memory
    out: Tensor,  # [B, O, T', H', W'], written
    g: Geometry,
) -> None:
    """Puts the phases, which are channels of `y`, at their outputs.

    Phase r of an axis in space begins at row r of `y`: its windows start one value later.
    """
    if g.repeat_time == 2:
        phases = y.unflatten(1, (g.groups, 2, -1))
        for r in (0, 1):
            out[:, :, r::2].unflatten(1, (g.groups, -1)).copy_(phases[:, :, r])
        return
    height, width = out.shape[3] // 2, out.shape[4] // 2
    phases = y.unflatten(1, (g.groups, 4, -1))
    for r in (0, 1):
        for s in (0, 1):
            part = phases[:, :, 2 * r + s, :, :, r : r + height, s : s + width]
            out[:, :, :, r::2, s::2].unflatten(1, (g.groups, -1)).copy_(part)
