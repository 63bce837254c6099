"""Linear upsampling in segments, its stream, and layers without causality."""

import pytest
import torch
import torch.nn.functional as F

from vtok_ext.layers import GroupNormAct, TemporalDownsample, TemporalUpsample


def video(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def linear_layer(segment: int) -> TemporalUpsample:
    torch.manual_seed(segment)
    layer = TemporalUpsample(4, temporal="replicate", interpolation="linear", segment=segment)
    torch.nn.init.constant_(layer.mix_factor, 0.3)
    return layer


@pytest.mark.parametrize("num_frames", [1, 2, 4, 5, 9])
@pytest.mark.parametrize("segment", [0, 1, 2, 4])
@torch.no_grad()
def test_two_segments(num_frames, segment):
    layer, x = linear_layer(segment), video(2, 4, num_frames, 3, 5)
    parts = [part for part in (x[:, :, :segment], x[:, :, segment:]) if part.shape[2]]
    twice = torch.cat(
        [F.interpolate(p, (2 * p.shape[2], 3, 5), mode="trilinear") for p in parts], dim=2
    )
    padded = torch.cat([twice[:, :, :1]] * 2 + [twice], dim=2)
    convolved = F.conv3d(padded, layer.conv.conv.weight, layer.conv.conv.bias, 1, (0, 1, 1))
    alpha = torch.sigmoid(layer.mix_factor)
    assert torch.allclose(layer(x), alpha * twice + (1 - alpha) * convolved, atol=1e-5)


@pytest.mark.parametrize("segment", [0, 1, 2, 4])
@pytest.mark.parametrize("plan", [[1] * 9, [4, 5], [2, 1, 3, 3], [3, 0, 6], [9]])
@torch.no_grad()
def test_stream_equals_whole_clip(segment, plan):
    layer, x = linear_layer(segment), video(1, 4, 9, 3, 3)
    state, chunks = None, []
    for chunk in x.split(plan, dim=2):
        y, state = layer(chunk, state, return_state=True)
        chunks.append(y)
        assert all(t.untyped_storage().nbytes() == t.nbytes for t in state.values())
    assert sum(y.shape[2] for y in chunks) == 17  # the last frame waits for its successor
    chunks.append(layer(x[:, :, :0], state))
    assert torch.allclose(torch.cat(chunks, dim=2), layer(x), atol=1e-5)


@pytest.mark.parametrize("num_frames", [2, 5])
@torch.no_grad()
def test_layers_without_causality(num_frames):
    x, alpha = video(2, 4, num_frames, 5, 6), torch.sigmoid(torch.tensor(2.0))
    down, up = TemporalDownsample(4, causal=False), TemporalUpsample(4, causal=False)
    padded = F.pad(x, (0, 0, 0, 0, 0, 1))
    convolved = F.conv3d(padded, down.conv.weight, down.conv.bias, (2, 1, 1), (0, 1, 1))
    pooled = F.avg_pool3d(padded, (3, 1, 1), (2, 1, 1))
    assert torch.allclose(down(x), alpha * pooled + (1 - alpha) * convolved, atol=1e-5)
    twice = x.repeat_interleave(2, dim=2)
    convolved = F.conv3d(twice, up.conv.weight, up.conv.bias, padding=1)
    assert torch.allclose(up(x), alpha * twice + (1 - alpha) * convolved, atol=1e-5)
    for layer in (down, up):
        with pytest.raises(ValueError, match="causal=False must be given whole clips"):
            layer(x, return_state=True)
    with pytest.raises(ValueError, match="x must have at least 2 frames with causal=False"):
        down(x[:, :, :1])


def test_refused_options():
    with pytest.raises(ValueError, match="interpolation must be one of .*, got 'cubic'"):
        TemporalUpsample(2, interpolation="cubic")
    with pytest.raises(ValueError, match="segment must be at least 0, got -1"):
        TemporalUpsample(2, segment=-1)


@pytest.mark.parametrize("per_pixel", [True, False])
@torch.no_grad()
def test_group_norm_across_time(per_pixel):
    layer = GroupNormAct(64, act=False, per_pixel=per_pixel, across_time=True)
    x = video(2, 64, 6, 3, 4)
    groups = x.unflatten(1, (32, 2))
    dims = (2, 3) if per_pixel else (2, 3, 4, 5)
    mean = groups.mean(dims, keepdim=True)
    variance = groups.var(dims, unbiased=False, keepdim=True)
    expected = ((groups - mean) / (variance + 1e-6).sqrt()).flatten(1, 2)
    assert torch.allclose(layer(x), expected, atol=1e-4)
