"""Causal convolution under test: paddings, streams, upsampling, epilogues, odd sizes."""

import torch
from op_case import OpCase, Sample

from vtok_ext.ops.causal_conv3d import causal_conv3d, causal_conv3d_reference


def _with_blend(function):
    def causal_conv3d_samples(x, weight, bias=None, other=None, mix_factor=None, **kwargs):
        blend = None if other is None else (other, mix_factor)
        return function(x, weight, bias, blend=blend, **kwargs)

    return causal_conv3d_samples


def _make(name, shape, dtype, generator, kwargs):
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    if name == "weight":
        values = values / (shape[1] * shape[2] * shape[3] * shape[4]) ** 0.5
    return values.to(dtype)


def _sample(x, weight, *, bias=True, out=None, blend=False, state=None, **kwargs):
    tensors = {"x": x, "weight": weight}
    if bias:
        tensors["bias"] = (weight[0],)
    if out is not None and blend:
        tensors.update(other=out, mix_factor=(1,))
    elif out is not None:
        tensors["residual"] = out
    if state is not None:
        tensors["state"] = (*x[:2], state, *x[3:])
    return Sample(tensors, kwargs)


# Sizes are small, because the emulation runs each of them with every kernel; channels are those of
# pictures and latents (3, 4..16), one more than a vector, and more than one tile of 64 columns.
_SAMPLES = [
    _sample((2, 16, 3, 5, 6), (16, 16, 3, 3, 3)),
    _sample((1, 3, 4, 5, 7), (16, 3, 3, 3, 3), bias=False),  # first layer
    _sample((2, 16, 3, 4, 5), (3, 16, 3, 3, 3), temporal="replicate"),  # last layer
    _sample((1, 8, 5, 3, 4), (8, 8, 3, 3, 3), stride=2, front=2),  # ProMAG
    _sample((1, 8, 5, 3, 4), (9, 8, 3, 3, 3), stride=2, temporal="replicate"),
    _sample((1, 6, 5, 3, 2), (6, 6, 3, 1, 1), out=(1, 6, 5, 3, 2), activation="silu"),
    _sample((1, 8, 2, 7, 6), (8, 8, 1, 3, 3), out=(1, 8, 2, 7, 6)),
    _sample(
        (2, 8, 2, 6, 7),
        (4, 8, 1, 3, 3),
        stride=(1, 2, 2),
        spatial_padding=((0, 1), (0, 1)),
    ),
    _sample((1, 5, 3, 3, 5), (7, 5, 1, 1, 1), temporal="same"),
    _sample((1, 4, 4, 3, 5), (6, 4, 3, 3, 3), temporal="same", bias=False),
    _sample((1, 4, 5, 3, 3), (6, 4, 3, 3, 3), temporal="valid"),
    _sample((1, 8, 2, 3, 4), (8, 8, 3, 3, 3), state=2, activation="silu"),
    _sample((2, 8, 2, 3, 4), (8, 8, 3, 3, 3), state=1, stride=2),
    _sample((1, 8, 3, 3, 3), (4, 8, 3, 3, 3), upsample="space", out=(1, 4, 3, 6, 6)),
    _sample((1, 8, 3, 3, 3), (8, 8, 3, 3, 3), upsample="time", out=(1, 8, 6, 3, 3), blend=True),
    _sample((1, 8, 4, 5, 4), (6, 4, 2, 5, 3), groups=2, dilation=(2, 1, 2), activation="silu"),
    _sample((1, 24, 1, 1, 1), (70, 24, 3, 3, 3)),
    _sample((1, 4, 1, 3, 3), (4, 4, 3, 3, 3), stride=2),  # no frame comes out
    _sample((0, 4, 2, 3, 3), (4, 4, 3, 3, 3)),
]

CAUSAL_CONV3D = OpCase(
    name="causal_conv3d",
    function=_with_blend(causal_conv3d),
    reference=_with_blend(causal_conv3d_reference),
    samples=_SAMPLES,
    make=_make,
    differentiable=("x", "weight", "bias", "residual", "other", "mix_factor", "state"),
    # A weight's gradient sums over all positions, in another order than torch; before an
    # activation or a blend half gradients are rounded once more.
    gradient_factor=4.0,
    returns_autocast_dtype=True,
    runs_torch_kernels=True,
    raw=(
        (
            "causal_conv3d_forward",
            lambda: (
                *(torch.randn(1, 4, 3, 4, 5), torch.randn(6, 4, 3, 3, 3), torch.randn(6)),
                *(torch.randn(1, 4, 2, 4, 5), None, None, None),
                *([1, 1, 1, 1, 1, 1, 1, 2, 0, 1, 1, 1, 1, 1, 1, 0], True, True, True),
            ),
        ),
        (
            "causal_conv3d_input_gradient",
            lambda: (
                *(torch.randn(1, 6, 3, 4, 5), torch.randn(6, 4, 3, 3, 3), [1, 4, 3, 4, 5], 2),
                [1, 1, 1, 1, 1, 1, 1, 2, 0, 1, 1, 1, 1, 1, 1, 0],
            ),
        ),
        (
            "causal_conv3d_weight_gradient",
            lambda: (
                *(torch.randn(1, 6, 3, 4, 5), torch.randn(1, 4, 3, 4, 5)),
                *(torch.randn(6, 4, 3, 3, 3), None, True),
                [1, 1, 1, 1, 1, 1, 1, 2, 0, 1, 1, 1, 1, 1, 1, 0],
            ),
        ),
    ),
)
