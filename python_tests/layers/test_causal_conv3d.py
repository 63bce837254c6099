"""Causal convolutions against nn.functional, and chunked against whole."""

import pytest
import torch
import torch.nn.functional as F

from vtok_ext.layers import CausalConv1d, CausalConv3d, FrameConv2d
from vtok_ext.layers.causal_conv3d import PixelConv1d, VolumeConv3d


def video(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def front(x: torch.Tensor, count: int, temporal: str) -> torch.Tensor:
    first = x[:, :, :1] if temporal == "replicate" else torch.zeros_like(x[:, :, :1])
    return torch.cat([first] * count + [x], dim=2)


@pytest.mark.parametrize("temporal", ["zeros", "replicate"])
@pytest.mark.parametrize(
    ("kernel", "stride"),
    [(1, 1), (3, 1), (3, 2), ((3, 1, 1), 2), ((1, 3, 3), 1), ((2, 5, 3), 2), ((4, 3, 3), 3)],
)
def test_equals_padded_convolution(kernel, stride, temporal):
    taps = (kernel,) * 3 if isinstance(kernel, int) else kernel
    layer = CausalConv3d(4, 6, kernel, stride, temporal=temporal)
    x = video(2, 4, 5, 7, 6)
    expected = F.conv3d(
        front(x, taps[0] - stride, temporal),
        layer.conv.weight,
        layer.conv.bias,
        stride=(stride, 1, 1),
        padding=(0, taps[1] // 2, taps[2] // 2),
    )
    y = layer(x)
    assert y.shape == (2, 6, 5 // stride, 7, 6)
    assert torch.allclose(y, expected, atol=1e-5)


@pytest.mark.parametrize("temporal", ["zeros", "replicate"])
def test_1d_equals_conv1d_at_every_pixel(temporal):
    layer = CausalConv1d(4, 6, 3, temporal=temporal)
    x = video(2, 4, 5, 3, 2)
    pixels = front(x, 2, temporal).permute(0, 3, 4, 1, 2).flatten(0, 2)
    expected = F.conv1d(pixels, layer.conv.weight, layer.conv.bias)
    expected = expected.unflatten(0, (2, 3, 2)).permute(0, 3, 4, 1, 2)
    assert torch.allclose(layer(x), expected, atol=1e-5)


@pytest.mark.parametrize(("stride", "padding"), [(1, 1), (2, 0)])
def test_2d_equals_conv2d_of_every_frame(stride, padding):
    layer = FrameConv2d(4, 6, 3, stride=stride, padding=padding)
    x = video(2, 4, 5, 9, 8)
    expected = torch.stack(
        [F.conv2d(f, layer.weight, layer.bias, stride, padding) for f in x.unbind(2)], dim=2
    )
    assert torch.allclose(layer(x), expected, atol=1e-5)
    image = video(1, 4, 1, 9, 8)
    with torch.no_grad():  # See Note [Small batches on the CPU]
        y = F.conv2d(image[:, :, 0], layer.weight, layer.bias, stride, padding)
        assert torch.allclose(layer(image)[:, :, 0], y, atol=1e-5)
    sliced = video(2, 4, 7, 9, 8).contiguous(memory_format=torch.channels_last_3d)[:, :, 1:4]
    assert torch.allclose(layer(sliced), layer(sliced.contiguous()), atol=1e-5)


@pytest.mark.parametrize("plan", [[1] * 8, [2, 1, 5], [8], [3, 3, 2]])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (1, 1), ((4, 1, 1), 2)])
@pytest.mark.parametrize("temporal", ["zeros", "replicate"])
def test_chunks_equal_whole(plan, kernel, stride, temporal):
    layer = CausalConv3d(4, 6, kernel, stride, temporal=temporal)
    x, state, chunks = video(2, 4, 8, 5, 6), None, []
    for chunk in x.split(plan, dim=2):
        y, state = layer(chunk, state, return_state=True)
        chunks.append(y)
        assert state.untyped_storage().nbytes() == state.nbytes  # owned, not a view
    assert torch.allclose(torch.cat(chunks, dim=2), layer(x), atol=1e-5)


def test_gradients():
    torch.manual_seed(0)
    layer = CausalConv3d(2, 3, 3).double()
    x = video(1, 2, 3, 4, 4).double().requires_grad_(True)
    state = video(1, 2, 2, 4, 4, seed=1).double().requires_grad_(True)
    assert torch.autograd.gradcheck(layer, (x, state))
    layer = CausalConv3d(2, 3, 3, 2, temporal="replicate").double()
    assert torch.autograd.gradcheck(layer, (x,))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((4, 4, 2), {}, r"weight must have odd height and width .*, got \[2, 2, 2\]"),
        ((4, 4, (3, 3)), {}, r"kernel_size must be .*, got \(3, 3\)"),
        ((4, 4, 3, 4), {}, r"stride in time must be in 1\.\.3, got 4"),
        ((4, 4, 3), {"temporal": "reflect"}, "temporal must be one of .*, got 'reflect'"),
    ],
)
def test_bad_arguments(arguments, options, message):
    with pytest.raises(ValueError, match=f"causal_conv3d: {message}"):
        CausalConv3d(*arguments, **options)


def test_bad_state():
    layer = CausalConv3d(4, 4)
    for shape in ((1, 4, 2, 5, 6), (2, 4, 1, 5, 6), (2, 4, 2, 5), (2, 4, 2, 5, 7)):
        with pytest.raises(ValueError, match=r"state must be \[2, 4, 2, 5, 6\], got"):
            layer(video(2, 4, 1, 5, 6), video(*shape))
    layer = CausalConv3d(4, 4, stride=2)
    with pytest.raises(ValueError, match=r"state must be \[2, 4, 1\.\.2, 5, 6\], got \[2, 4, 3, 5"):
        layer(video(2, 4, 1, 5, 6), video(2, 4, 3, 5, 6))


def test_hooked_child_streams_as_a_plain_one():
    """No whole-clip convolution is streamed; a chunk without outputs has gradients, zeros."""
    centred = CausalConv3d(4, 4, temporal="same")
    layer = CausalConv3d(4, 4, stride=2)
    for module in (centred.conv, layer.conv):
        module.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match='state must be None with temporal="same"'):
        centred(video(1, 4, 3, 4, 4), return_state=True)
    x = video(1, 4, 1, 4, 4).requires_grad_()
    y = layer(x)
    assert y.shape == (1, 4, 0, 4, 4)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.zeros_like(x))


@pytest.mark.parametrize("layer", [FrameConv2d, PixelConv1d, VolumeConv3d])
def test_other_padding_modes_are_refused(layer):
    assert layer(4, 4, 3, padding=1).padding_mode == "zeros"
    message = f"{layer.__name__}: padding_mode must be 'zeros', got 'reflect'"
    with pytest.raises(ValueError, match=message):
        layer(4, 4, 3, padding=1, padding_mode="reflect")
