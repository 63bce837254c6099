"""Changes of resolution and the blend, against their plain PyTorch definitions."""

import pytest
import torch
import torch.nn.functional as F
from helpers import needs_one_graph

from vtok_ext.layers import (
    AlphaBlender,
    SpatialDownsample,
    SpatialUpsample,
    TemporalDownsample,
    TemporalUpsample,
)
from vtok_ext.layers.spatial_resample import repeat_nearest
from vtok_ext.ops.alpha_blend import alpha_blend


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


def linear_layer(segment: int, temporal: str = "replicate") -> TemporalUpsample:
    torch.manual_seed(segment)
    layer = TemporalUpsample(4, temporal=temporal, interpolation="linear", segment=segment)
    torch.nn.init.constant_(layer.mix_factor, 0.3)
    return layer


PLANS = [[1] * 9, [4, 5], [2, 1, 3, 3], [9], [3, 0, 6]]


@pytest.mark.parametrize("segment", [0, 1, 2, 4])
@pytest.mark.parametrize(
    ("temporal", "plan"),
    [("zeros", [0, 9])] + [(temporal, p) for temporal in ("zeros", "replicate") for p in PLANS],
)
@torch.no_grad()
def test_linear_stream_equals_whole_clip(segment, plan, temporal):
    """Frames come as soon as they are final; the call that asks for no state returns the rest."""
    layer = linear_layer(segment, temporal)
    x, state, chunks, seen = video(1, 4, 9, 4, 4), None, [], 0
    for chunk in x.split(plan, dim=2):
        y, state = layer(chunk, state, return_state=True)
        seen += chunk.shape[2]
        chunks.append(y)
        waiting = int(seen not in (0, segment))
        assert sum(c.shape[2] for c in chunks) == 2 * seen - waiting
        assert all(t.untyped_storage().nbytes() == t.nbytes for t in state.values())
    chunks.append(layer(x[:, :, :0], state))
    assert torch.allclose(torch.cat(chunks, dim=2), layer(x), atol=1e-5)


@torch.no_grad()
def test_last_chunk_of_a_linear_stream_may_bring_frames():
    layer = linear_layer(2)
    x = video(1, 4, 7, 4, 4)
    first, state = layer(x[:, :, :5], return_state=True)
    assert torch.allclose(torch.cat([first, layer(x[:, :, 5:], state)], 2), layer(x), atol=1e-5)


@torch.no_grad()
def test_chained_linear_streams():
    """The segment rule through two doublings: 1, then 2 frames of the first latent."""
    layers = [linear_layer(1), linear_layer(2)]
    latent = video(1, 4, 5, 3, 3)
    states, frames = [None, None], []
    for chunk in latent.split([1, 2, 2], dim=2):
        for i, layer in enumerate(layers):
            chunk, states[i] = layer(chunk, states[i], return_state=True)
        frames.append(chunk)
    rest = latent[:, :, :0]
    for layer, state in zip(layers, states, strict=True):
        rest = layer(rest, state)
    frames.append(rest)
    whole = layers[1](layers[0](latent))
    assert torch.allclose(torch.cat(frames, dim=2), whole, atol=1e-5)


@pytest.mark.parametrize("interpolation", ["nearest", "linear"])
def test_upsample_with_a_hooked_convolution(interpolation):
    """A child that someone watches is called as a module; the result is that of the fused path."""
    layer = TemporalUpsample(4, interpolation=interpolation, segment=1)
    x = video(1, 4, 5, 4, 4)
    expected, expected_state = layer(x, return_state=True)
    seen = []
    layer.conv.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
    y, state = layer(x, return_state=True)
    assert seen == [torch.Size([1, 4, y.shape[2], 4, 4])]
    assert torch.allclose(y, expected, atol=1e-6) and state.keys() == expected_state.keys()
    assert all(torch.equal(state[name], expected_state[name]) for name in state)


def test_state_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"state must be \[1, 2, 2, 3, 3\], got \[1, 2, 1, 3, 3\]"):
        TemporalUpsample(2)(video(1, 2, 1, 3, 3), {"conv": video(1, 2, 1, 3, 3)})


@pytest.mark.parametrize("layer", [TemporalDownsample, TemporalUpsample])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layers_keep_half_types(layer, dtype):
    module = layer(4).to(dtype)
    x = video(1, 4, 4, 4, 4).to(dtype).contiguous(memory_format=torch.channels_last_3d)
    y = module(x)
    assert y.dtype == dtype
    if dtype == torch.bfloat16:  # torch's float16 convolution on the CPU leaves channels_last
        assert y.is_contiguous(memory_format=torch.channels_last_3d)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(4)(x.float()).dtype == torch.bfloat16


@needs_one_graph
@pytest.mark.parametrize("build", [TemporalDownsample, TemporalUpsample, linear_layer])
def test_layers_compile_without_a_break(build):
    layer = build(4)
    x = video(1, 4, 5, 4, 4).requires_grad_()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    grads = []
    for function in (layer, compiled):
        y, state = function(x, None, True)
        loss = y.square().sum()
        grads.append(torch.autograd.grad(loss, [x, *layer.parameters()]))
    assert all(torch.allclose(a, b, atol=1e-4, rtol=1e-4) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (2, 3), (1, 1)])
def test_spatial_downsample_pads_right_and_bottom_only(size):
    layer = SpatialDownsample(4)
    x = video(2, 4, 3, *size)
    frames = F.pad(x.transpose(1, 2).flatten(0, 1), (0, 1, 0, 1))
    if min(size) < 2:
        with pytest.raises(ValueError, match="x must be as large as the kernel"):
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


def test_alpha_blender_strategies():
    a, b = video(2, 3, 4, 2, 2, seed=1), video(2, 3, 4, 2, 2, seed=2)
    fixed = AlphaBlender(0.25, strategy="fixed")
    assert not list(fixed.parameters()) and list(fixed.state_dict()) == ["mix_factor"]
    assert torch.allclose(fixed(a, b), 0.25 * a + 0.75 * b)
    images = torch.tensor([[True, False, False, True], [False] * 4])
    blender = AlphaBlender(0.5, strategy="learned_with_images")
    out = blender(a, b, images)
    alpha = torch.sigmoid(torch.tensor(0.5))
    assert torch.equal(out[0, :, [0, 3]], a[0, :, [0, 3]])
    assert torch.allclose(out[1], alpha * a[1] + (1 - alpha) * b[1])
    per_channel = AlphaBlender(shape=(3, 1, 1, 1))
    torch.nn.init.normal_(per_channel.mix_factor)
    alpha = torch.sigmoid(per_channel.mix_factor)
    assert torch.allclose(per_channel(a, b), alpha * a + (1 - alpha) * b)
    with pytest.raises(ValueError, match="AlphaBlender: strategy must be one of .*, got 'mean'"):
        AlphaBlender(strategy="mean")
    with pytest.raises(ValueError, match=r"a fixed alpha must be in \[0, 1\], got 2.0"):
        AlphaBlender(2.0, strategy="fixed")
