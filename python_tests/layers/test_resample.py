"""Changes of resolution and the blend, against their plain PyTorch definitions."""

import pytest
import torch
import torch.nn.functional as F

from vtok_ext.layers import (
    AlphaBlender,
    SpatialDownsample,
    SpatialUpsample,
    TemporalDownsample,
    TemporalUpsample,
    alpha_blend,
)
from vtok_ext.layers.spatial_resample import repeat_nearest
from vtok_ext.layers.temporal_resample import mean_of_three


def video(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("num_frames", [1, 2, 3, 6, 7])
@pytest.mark.parametrize("temporal", ["zeros", "replicate"])
def test_temporal_downsample(num_frames, temporal):
    layer = TemporalDownsample(4, temporal=temporal)
    torch.nn.init.constant_(layer.mix_factor, -0.3)
    x = video(2, 4, num_frames, 5, 6)
    assert layer(x).shape == (2, 4, num_frames // 2, 5, 6)
    if num_frames > 1:
        first = x[:, :, :1] if temporal == "replicate" else torch.zeros_like(x[:, :, :1])
        padded = torch.cat([first, x], dim=2)
        conv = layer.conv.conv
        convolved = F.conv3d(padded, conv.weight, conv.bias, (2, 1, 1), (0, 1, 1))
        alpha = torch.sigmoid(layer.mix_factor)
        pooled = F.avg_pool3d(padded, (3, 1, 1), (2, 1, 1))
        assert torch.allclose(layer(x), alpha * pooled + (1 - alpha) * convolved, atol=1e-5)


def test_temporal_upsample():
    layer = TemporalUpsample(4)
    torch.nn.init.constant_(layer.mix_factor, 0.4)
    x = video(2, 4, 3, 5, 6)
    twice = x.repeat_interleave(2, dim=2)
    padded = F.pad(twice, (0, 0, 0, 0, 2, 0))
    convolved = F.conv3d(padded, layer.conv.conv.weight, layer.conv.conv.bias, 1, (0, 1, 1))
    alpha = torch.sigmoid(layer.mix_factor)
    assert torch.allclose(layer(x), alpha * twice + (1 - alpha) * convolved, atol=1e-5)


@pytest.mark.parametrize("layer", [TemporalDownsample, TemporalUpsample])
@pytest.mark.parametrize("plan", [[1] * 7, [2, 4, 1], [3, 4]])
def test_chunks_equal_whole(layer, plan):
    module = layer(4)
    x, state, chunks = video(1, 4, 7, 4, 4), None, []
    for chunk in x.split(plan, dim=2):
        y, state = module(chunk, state, return_state=True)
        chunks.append(y)
    assert torch.allclose(torch.cat(chunks, dim=2), module(x), atol=1e-5)


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (2, 3), (1, 1)])
def test_spatial_downsample_pads_right_and_bottom_only(size):
    layer = SpatialDownsample(4)
    x = video(2, 4, 3, *size)
    frames = F.pad(x.transpose(1, 2).flatten(0, 1), (0, 1, 0, 1))
    if min(size) < 2:
        with pytest.raises(RuntimeError):
            layer(x)
        return
    expected = F.conv2d(frames, layer.conv.weight, layer.conv.bias, stride=2)
    assert torch.allclose(layer(x).transpose(1, 2).flatten(0, 1), expected, atol=1e-5)
    assert layer(x).shape[3:] == (size[0] // 2, size[1] // 2)


def test_spatial_upsample():
    layer = SpatialUpsample(4)
    x = video(2, 4, 3, 5, 6)
    frames = F.interpolate(x.transpose(1, 2).flatten(0, 1), scale_factor=2.0, mode="nearest")
    expected = F.conv2d(frames, layer.conv.weight, layer.conv.bias, padding=1)
    assert torch.allclose(layer(x).transpose(1, 2).flatten(0, 1), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("time", "space"), [(2, 1), (1, 2), (2, 3)])
def test_repeat_nearest(dtype, time, space):
    x = video(2, 3, 4, 5, 6).to(dtype).contiguous(memory_format=torch.channels_last_3d)
    y = repeat_nearest(x, time, space)
    expected = x.repeat_interleave(time, 2).repeat_interleave(space, 3).repeat_interleave(space, 4)
    assert torch.equal(y, expected) and y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    assert repeat_nearest(x[:, :, :1], 2, 1).is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("num_frames", [3, 4, 7])
def test_mean_of_three(num_frames):
    x = video(2, 3, num_frames, 4, 5)
    expected = F.avg_pool3d(x, (3, 1, 1), (2, 1, 1))
    assert torch.allclose(mean_of_three(x), expected, atol=1e-6)
    half = mean_of_three(x.bfloat16())
    assert half.dtype == torch.bfloat16 and torch.allclose(half.float(), expected, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_alpha_blend_keeps_the_dtype(dtype):
    x, y = video(2, 3, 4, seed=1).to(dtype), video(2, 3, 4, seed=2).to(dtype)
    mix_factor = torch.tensor([0.7])
    alpha = torch.sigmoid(mix_factor.double())
    out = alpha_blend(x, y, mix_factor)
    assert out.dtype == dtype
    exact = alpha * x.double() + (1 - alpha) * y.double()
    # One rounding of the result, at most half a unit in the last place of values below 4.
    assert (out.double() - exact).abs().max() <= 2 * torch.finfo(dtype).eps + 1e-7
    assert alpha_blend(x.float(), y, mix_factor).dtype == dtype  # the convolution's dtype decides


def test_alpha_blender_gradients():
    blender = AlphaBlender().double()
    assert blender.mix_factor.tolist() == [2.0]
    x, y = (video(2, 3, seed=s).double().requires_grad_(True) for s in (1, 2))
    assert torch.autograd.gradcheck(
        lambda x, y, m: alpha_blend(x, y, m), (x, y, blender.mix_factor)
    )
    assert torch.equal(blender(x, y), alpha_blend(x, y, blender.mix_factor))
