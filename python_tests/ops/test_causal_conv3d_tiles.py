"""Every kernel of the convolution on CUDA: each tile in each format, aligned or not, split or not,
forwards and for both gradients."""

import pytest
import torch
from helpers import assert_close, in_float64

import vtok_ext as vt
from vtok_ext import _native
from vtok_ext.ops import _causal_conv3d_cuda as cuda
from vtok_ext.ops.causal_conv3d import causal_conv3d_reference

NUM_TILES = 10
# float32 without tensor cores has only the tiles from 128 x 64 on, unaligned loads too.
SMALL_TILES = (2, 3, 4)
WARPGROUP_TILES = (5, 6, 7, 8, 9)  # wgmma of sm_90a: half formats, aligned loads
HALF = (torch.bfloat16, torch.float16)
# tf32 rounds both factors to 11 bits (4.9e-4); errors of the products average out.
TF32_FACTOR = 300.0


@pytest.fixture
def kernels(backend):
    if not backend.is_cuda_kernel:
        pytest.skip("kernels of CUDA")
    return backend


def skip_missing(dtype, tf32, tile, aligned):
    """Skips where the format or the machine has no such tile."""
    if tile in WARPGROUP_TILES:
        if dtype not in HALF or not aligned:
            pytest.skip("this format has no such tile")
        if not _native.is_cuda_emulated() and torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("needs a Hopper GPU")
    elif tile not in SMALL_TILES and ((dtype == torch.float32 and not tf32) or not aligned):
        pytest.skip("this format has no such tile")


def video(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


FORMATS = [
    pytest.param(torch.bfloat16, False, id="bf16"),
    pytest.param(torch.float16, False, id="fp16"),
    pytest.param(torch.float32, True, id="tf32"),
    pytest.param(torch.float32, False, id="fp32"),
]


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("channels, groups", [(16, 1), (16, 2), (13, 1), (13, 2)])
@pytest.mark.parametrize("tile", range(NUM_TILES))
@pytest.mark.parametrize("dtype, tf32", FORMATS)
def test_every_tile(dtype, tf32, tile, channels, groups, splits, kernels, monkeypatch):
    """138 positions and 70 channels: more than one tile of most shapes, and a multiple of none.
    13 channels have no aligned vector: in one group zeros are added, in two they are read one by
    one."""
    skip_missing(dtype, tf32, tile, aligned=channels % 8 == 0 or groups == 1)
    monkeypatch.setattr(cuda, "forced_tile", tile)
    monkeypatch.setattr(cuda, "forced_splits", splits)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
    columns = 20 if tile == 4 else 70
    x = video(2, channels * groups, 3, 23, 1, dtype=dtype).to(kernels.device)
    weight = (video(columns, channels, 3, 3, 1) / (9 * channels) ** 0.5).to(dtype)
    weight, bias = weight.to(kernels.device), video(columns, dtype=dtype).to(kernels.device)
    residual = video(2, columns, 3, 23, 1, dtype=dtype, seed=1).to(kernels.device)
    options = {"residual": residual, "activation": "silu", "groups": groups}
    for temporal in ("zeros", "replicate"):  # a plain source and another
        expected = causal_conv3d_reference(x, weight, bias, temporal=temporal, **options)
        actual = vt.causal_conv3d(x, weight, bias, temporal=temporal, **options)
        assert_close(actual, expected, temporal, TF32_FACTOR if tf32 else 2.0)


@pytest.mark.parametrize("blends", [False, True])
@pytest.mark.parametrize("tile", range(NUM_TILES))
@pytest.mark.parametrize("dtype", HALF, ids=["bf16", "fp16"])
def test_stores_of_eight_channels(dtype, tile, blends, kernels, monkeypatch):
    """88 channels, at most a tile and a half and no multiple of 32, and more than one step in k;
    the layout that lanes exchange their channels for."""
    skip_missing(dtype, False, tile, aligned=True)
    monkeypatch.setattr(cuda, "forced_tile", tile)
    monkeypatch.setattr(cuda, "forced_splits", 1)
    x = video(1, 40, 2, 11, 7, dtype=dtype).to(kernels.device)
    weight = (video(88, 40, 3, 3, 3) / 33).to(dtype).to(kernels.device)
    bias = video(88, dtype=dtype).to(kernels.device)
    residual, other = (
        video(1, 88, 2, 11, 7, dtype=dtype, seed=s).to(kernels.device) for s in (1, 2)
    )
    options = {"activation": "silu", "residual": residual}
    if blends:
        options["blend"] = (other, torch.tensor([0.3], device=kernels.device))
    expected = causal_conv3d_reference(x, weight, bias, **options)
    assert_close(vt.causal_conv3d(x, weight, bias, **options), expected, "y", 2.0)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("channels", [(16, 72), (13, 70), (64, 8), (24, 136)])
@pytest.mark.parametrize("tile", range(5))
@pytest.mark.parametrize("dtype, tf32", FORMATS)
def test_every_gradient_tile(dtype, tf32, tile, channels, groups, kernels, monkeypatch):
    """330 positions: several steps of every tile in each of two splits."""
    aligned = groups == 1 or (channels[0] % 8 == 0 and channels[1] // groups % 8 == 0)
    if tile >= 2:
        skip_missing(dtype, tf32, WARPGROUP_TILES[0], aligned)
    elif tile == 0 and ((dtype == torch.float32 and not tf32) or not aligned):
        pytest.skip("this format has no such tile")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
    monkeypatch.setattr(cuda, "_weight_gradient_plan", lambda *_: (tile, 2))
    x = video(2, channels[0] * groups, 3, 11, 5, dtype=dtype).to(kernels.device)
    weight = (video(channels[1], channels[0], 3, 3, 1) / 30).to(dtype).to(kernels.device)
    bias = video(channels[1], dtype=dtype).to(kernels.device)
    leaves = [x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    direction = video(2, channels[1], 3, 11, 5, dtype=dtype, seed=1).to(kernels.device)
    expected = causal_conv3d_reference(*leaves, groups=groups)
    expected = torch.autograd.grad(expected, leaves, direction)
    actual = torch.autograd.grad(vt.causal_conv3d(*leaves, groups=groups), leaves, direction)
    for name, a, e in zip(("x", "weight", "bias"), actual, expected, strict=True):
        assert_close(a, e, f"grad_{name}", TF32_FACTOR if tf32 else 4.0)


@pytest.mark.parametrize("tiles", [(3, 2, 4), WARPGROUP_TILES], ids=["mma", "wgmma"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_chunks_or_tiles(dtype, tiles, kernels, monkeypatch):
    """A stream never splits its sums, so that every tile and any chunks give the same bits."""
    skip_missing(dtype, False, tiles[0], aligned=True)
    x = video(1, 16, 5, 6, 7, dtype=dtype).to(kernels.device)
    weight = video(24, 16, 3, 3, 3, dtype=dtype).to(kernels.device)
    results = []
    for tile, plan in zip(tiles, ([5], [1, 3, 1], [2, 3], [4, 1], [1, 4]), strict=False):
        monkeypatch.setattr(cuda, "forced_tile", tile)
        state, chunks = None, []
        for chunk in x.split(plan, 2):
            y, state = vt.causal_conv3d(chunk, weight, state=state, return_state=True)
            chunks.append(y)
        results.append(torch.cat(chunks, 2))
    assert all(torch.equal(results[0], result) for result in results[1:])


def test_the_plan_splits_small_grids_only(kernels):
    module, sizes = _native.module(), (8, 1, 27 * 512)
    for may_split in (True, False):
        small = module.causal_conv3d_gemm_plan(64, *sizes, True, False, may_split, 0)
        large = module.causal_conv3d_gemm_plan(10**7, *sizes, True, False, may_split, 0)
        assert (small[1] > 1) == may_split and large[1] == 1


def test_slices_are_read_in_place(kernels):
    """Any strides with neighbouring channels: a slice in time, height and width."""
    large = video(2, 16, 6, 7, 9).contiguous(memory_format=torch.channels_last_3d)
    x = large.to(kernels.device)[:, :, 1:4, 2:6, 1:8]
    weight = video(8, 16, 3, 3, 3).to(kernels.device)
    assert cuda._channels_side_by_side(x) is x
    assert_close(vt.causal_conv3d(x, weight), causal_conv3d_reference(x, weight), "y", 2.0)


def test_tf32_rounds_and_float32_does_not(kernels, monkeypatch):
    x, weight = video(1, 16, 2, 4, 4).to(kernels.device), video(8, 16, 3, 3, 3).to(kernels.device)
    exact = causal_conv3d_reference(in_float64(x), in_float64(weight))
    errors = []
    for tf32 in (True, False):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
        difference = in_float64(vt.causal_conv3d(x, weight)) - exact
        errors.append((difference.abs().max() / exact.abs().max()).item())
    assert 1e-5 < errors[0] < 6e-4 and errors[1] < 2e-6
