"""Normalisation, residual blocks and attention against their plain PyTorch definitions."""

import pytest
import torch
import torch.nn.functional as F

from vtok_ext.layers import (
    FrameAttention,
    GroupNormAct,
    NormAct,
    ResidualBlock1d,
    ResidualBlock2d,
    ResidualBlock3d,
    norm_act,
)


def video(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def shake(module: torch.nn.Module) -> torch.nn.Module:
    """Returns `module` with random parameters, so that zero initialisation hides nothing."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


@pytest.mark.parametrize("act", [True, False])
def test_layer_norm_over_channels(act):
    layer = shake(NormAct(6, act=act))
    x = video(2, 6, 3, 4, 5)
    y = F.layer_norm(x.movedim(1, -1), (6,), layer.norm.weight, layer.norm.bias, 1e-6)
    expected = y.movedim(-1, 1)
    assert torch.allclose(layer(x), F.silu(expected) if act else expected, atol=1e-6)


@pytest.mark.parametrize("act", [True, False])
@pytest.mark.parametrize("per_pixel", [True, False])
def test_group_norm_statistics(act, per_pixel):
    layer = shake(GroupNormAct(64, act=act, per_pixel=per_pixel))
    x = video(2, 64, 3, 4, 5)
    groups = x.unflatten(1, (32, 2))
    dims = (2,) if per_pixel else (2, 4, 5)
    mean = groups.mean(dims, keepdim=True)
    variance = groups.var(dims, unbiased=False, keepdim=True)
    y = ((groups - mean) / (variance + 1e-6).sqrt()).flatten(1, 2)
    y = y * layer.weight.view(-1, 1, 1, 1) + layer.bias.view(-1, 1, 1, 1)
    # With two channels per pixel the variance may be tiny: ill conditioned, hence the tolerance.
    assert torch.allclose(layer(x), F.silu(y) if act else y, atol=1e-3)


def test_rms_norms():
    x = video(2, 64, 3, 4, 5)
    layer = shake(NormAct(64, norm="rms"))
    expected = F.rms_norm(x.movedim(1, -1), (64,), layer.norm.weight, 1e-6).movedim(-1, 1)
    assert torch.allclose(layer(x), F.silu(expected), atol=1e-5)
    layer = shake(GroupNormAct(64, act=False, subtract_mean=False))
    groups = x.unflatten(1, (32, 2))
    y = groups / (groups.square().mean((2, 4, 5), keepdim=True) + 1e-6).sqrt()
    expected = y.flatten(1, 2) * layer.weight.view(-1, 1, 1, 1) + layer.bias.view(-1, 1, 1, 1)
    assert torch.allclose(layer(x), expected, atol=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: NormAct(32),
        lambda: NormAct(32, norm="rms"),
        lambda: GroupNormAct(32),
        lambda: GroupNormAct(32, subtract_mean=False),
        lambda: GroupNormAct(32, across_time=True),
    ],
    ids=["layer", "rms", "group", "group_rms", "across_time"],
)
def test_norms_return_the_buffer_of_a_convolution(make):
    layer, x, state = shake(make()), video(1, 32, 2, 3, 5), video(1, 32, 2, 3, 5, seed=1)
    y = layer(x)
    for options, front in (
        ({}, torch.zeros_like(state)),
        ({"temporal": "replicate"}, y[:, :, :1].expand(-1, -1, 2, -1, -1)),
        ({"state": state}, state),
    ):
        buffer = layer(x, front=2, border=(1, 2), **options)
        expected = F.pad(torch.cat([front, y], 2), (0, 2, 0, 1))
        assert torch.allclose(buffer, expected, atol=1e-6)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_norm_act_runs_the_hooks_of_its_norm(norm):
    """Through the module that carries the hook, with the same result."""
    layer, x, seen = shake(NormAct(32, norm=norm)), video(1, 32, 2, 3, 5), []
    expected = layer(x, front=1, border=(1, 0))
    layer.norm.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    assert torch.allclose(layer(x, front=1, border=(1, 0)), expected, atol=1e-6)
    assert seen == [(1, 2, 3, 5, 32)]


def test_norms_refuse_what_they_do_not_have():
    with pytest.raises(ValueError, match="norm must be .*, got 'group'"):
        NormAct(8, norm="group")
    with pytest.raises(ValueError, match="subtract_mean must be True .*, got False"):
        GroupNormAct(32, across_time=True, subtract_mean=False)


def test_norm_act_keeps_the_dtype_of_autocast():
    layer, x = NormAct(8), video(1, 8, 2, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert layer(x).dtype == torch.float32


def test_norm_act_does_not_touch_its_input():
    x = video(1, 8, 2, 3, 3)
    copy = x.clone()
    for layer in (NormAct(8), NormAct(8, act=False)):
        with torch.no_grad():
            layer(x)
        assert torch.equal(x, copy)


def test_replaced_norm_is_not_overwritten():
    """With nn.Identity in place of the norm, the activation must not be written into the input."""
    layer, x = NormAct(8), video(1, 8, 2, 3, 3)
    layer.norm = torch.nn.Identity()
    copy = x.clone()
    with torch.no_grad():
        assert torch.equal(layer(x), F.silu(copy))
    assert torch.equal(x, copy)


@pytest.mark.parametrize("norm_type", ["layernorm", "groupnorm"])
def test_residual_2d(norm_type):
    for out_channels in (32, 64):
        block = shake(ResidualBlock2d(32, out_channels, norm_type=norm_type))
        assert (block.nin_shortcut is None) == (out_channels == 32)
        x = video(2, 32, 3, 5, 4)
        h = F.conv3d(block.norm1(x), block.conv1.weight[:, :, None], block.conv1.bias, 1, (0, 1, 1))
        h = F.conv3d(block.norm2(h), block.conv2.weight[:, :, None], block.conv2.bias, 1, (0, 1, 1))
        skip = x if block.nin_shortcut is None else block.nin_shortcut(x)
        assert torch.allclose(block(x), skip + h, atol=1e-4)


def test_residual_1d_starts_as_the_identity():
    x = video(2, 8, 3, 5, 4)
    assert torch.equal(ResidualBlock1d(8)(x), x)


@pytest.mark.parametrize("block", [ResidualBlock1d, ResidualBlock3d])
@pytest.mark.parametrize("temporal", ["zeros", "replicate"])
def test_temporal_residual_blocks_in_chunks(block, temporal):
    module = shake(block(8, temporal=temporal))
    x, state, chunks = video(2, 8, 6, 4, 5), None, []
    for chunk in x.split([1, 3, 2], dim=2):
        y, state = module(chunk, state, return_state=True)
        chunks.append(y)
        assert set(state) == {"conv1", "conv2"}
    assert torch.allclose(torch.cat(chunks, dim=2), module(x), atol=1e-4)


@pytest.mark.parametrize("block", [ResidualBlock1d, ResidualBlock3d])
def test_in_place_addition_leaves_the_input_alone(block):
    module, x = shake(block(8)), video(1, 8, 3, 4, 5)
    copy, expected = x.clone(), module(x)
    with torch.no_grad():
        assert torch.allclose(module(x), expected, atol=1e-5)
    assert torch.equal(x, copy)


def test_attention_is_per_frame():
    block = shake(FrameAttention(8))
    x = video(2, 8, 3, 4, 5)
    h = block.norm(x)
    q, k, v = (
        F.conv3d(h, c.conv.weight, c.conv.bias).permute(0, 2, 3, 4, 1).flatten(2, 3)
        for c in (block.q, block.k, block.v)
    )
    weights = torch.softmax(q @ k.transpose(-1, -2) / 8**0.5, dim=-1)
    mixed = (weights @ v).unflatten(2, (4, 5)).permute(0, 4, 1, 2, 3)
    expected = x + F.conv3d(mixed, block.proj_out.conv.weight, block.proj_out.conv.bias)
    assert torch.allclose(block(x), expected, atol=1e-5)


def test_unknown_norm():
    with pytest.raises(ValueError, match="norm_type must be one of .*, got 'batchnorm'"):
        norm_act(8, "batchnorm")
    with pytest.raises(ValueError, match="channels must be a multiple of 32 for groupnorm, got 48"):
        norm_act(48, "groupnorm")
