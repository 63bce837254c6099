"""What is special about causal_conv3d: known answers, streams in any chunks, gradients against
float64, errors, and that the path a model takes makes no copies."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

import vtok_ext as vt
from vtok_ext.ops import _causal_conv3d_cpu as cpu
from vtok_ext.ops import _causal_conv3d_function as causal_conv3d_function
from vtok_ext.ops import _causal_conv3d_onednn as onednn
from vtok_ext.ops._causal_conv3d_geometry import make_geometry
from vtok_ext.ops._causal_conv3d_onednn import is_small
from vtok_ext.ops.causal_conv3d import causal_conv3d_reference

LAYOUT = torch.channels_last_3d


def video(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def moving_sum(frames, weight, **options):
    """The convolution of scalars in time, as a list."""
    x = torch.tensor(frames, dtype=torch.float32).view(1, 1, -1, 1, 1)
    w = torch.tensor(weight, dtype=torch.float32).view(1, 1, -1, 1, 1)
    return vt.causal_conv3d(x, w, **options).flatten().tolist()


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, [300, 430, 543, 654]),  # zeros, two in front
        ({"temporal": "replicate"}, [333, 433, 543, 654]),
        ({"temporal": "same"}, [430, 543, 654, 65]),
        ({"temporal": "valid"}, [543, 654]),
        ({"stride": 2}, [430, 654]),  # one in front
        ({"stride": 2, "temporal": "replicate"}, [433, 654]),
        ({"stride": 2, "front": 2}, [300, 543]),
        ({"front": 1}, [430, 543, 654]),
        ({"dilation": 2}, [300, 400, 530, 640]),
        ({"dilation": 2, "temporal": "replicate"}, [333, 433, 533, 643]),
        ({"upsample": "time"}, [300, 330, 433, 443, 544, 554, 655, 665]),
        ({"upsample": "time", "temporal": "replicate"}, [333, 333, 433, 443, 544, 554, 655, 665]),
    ],
)
def test_temporal_padding(options, expected):
    """The newest frame has the weight 100."""
    assert moving_sum([3, 4, 5, 6], [1, 10, 100], **options) == expected


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, [[12, 21, 16], [27, 45, 33], [24, 39, 28]]),
        ({"spatial_padding": ((0, 0), (0, 0))}, [[45]]),
        ({"spatial_padding": ((0, 1), (0, 1)), "stride": (1, 2, 2)}, [[45]]),
        ({"spatial_padding": ((1, 0), (0, 1))}, [[21, 16], [45, 33]]),
        ({"spatial_padding": ((0, 2), (1, 0))}, [[27, 45], [24, 39], [15, 24]]),
        (
            {"upsample": "space", "stride": (1, 2, 2)},
            [[4, 10, 16], [18, 33, 42], [36, 60, 69]],
        ),
    ],
)
def test_spatial_padding(options, expected):
    """Sums over 3x3 windows of the numbers 1 to 9."""
    x = torch.arange(1.0, 10.0).view(1, 1, 1, 3, 3)
    y = vt.causal_conv3d(x, torch.ones(1, 1, 1, 3, 3), **options)
    assert y[0, 0, 0].tolist() == expected


def test_epilogue():
    """In the documented order: bias, residual, activation, blend."""
    x = torch.full((1, 1, 1, 1, 1), 2.0)
    y = vt.causal_conv3d(
        x,
        torch.full((1, 1, 1, 1, 1), 3.0),
        torch.tensor([-5.0]),
        residual=torch.full_like(x, 1.5),
        activation="silu",
        blend=(torch.full_like(x, 10.0), torch.tensor([1.0])),
    )
    p, mix = torch.tensor(2.5), torch.sigmoid(torch.tensor(1.0))
    assert y.item() == pytest.approx((mix * 10 + (1 - mix) * p * torch.sigmoid(p)).item(), rel=1e-6)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("upsample", ["space", "time"])
@pytest.mark.parametrize("temporal", ["zeros", "replicate"])
def test_folded_upsampling(upsample, temporal, groups, batch, monkeypatch):
    """The CPU adds up taps of large inputs only; here of small ones, with and without a state."""
    x = video(batch, 8, 3, 4, 5, dtype=torch.float64)
    weight, bias = video(6, 8 // groups, 3, 3, 3, dtype=torch.float64), video(6).double()
    options = {"upsample": upsample, "temporal": temporal, "groups": groups}
    monkeypatch.setattr(cpu, "FOLDING_PAYS_POSITIONS", 0)
    sizes = ((3, 3, 3), 1, 1, groups, temporal, None, "same", upsample)
    assert cpu._folds(x.shape, weight, None, make_geometry(*sizes))
    whole = causal_conv3d_reference(x, weight, bias, **options)
    assert torch.allclose(vt.causal_conv3d(x, weight, bias, **options), whole, atol=1e-10)
    chunked, _ = run_in_chunks(x, weight, bias, [1, 2], {}, **options)
    assert torch.allclose(chunked, whole, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_weights_are_folded_for_chunks_as_for_their_clip(dtype):
    """Folded weights are rounded once more: a chunk that is too small to fold had other ones."""
    weight = torch.zeros(8, 8, 3, 3, 3, dtype=dtype)
    g = make_geometry((3, 3, 3), 1, 1, 1, "zeros", None, "same", "time")
    for side in (16, 32, 64):
        folds = {
            cpu._folds((b, 8, t, side, side), weight, 2, g) for b in (1, 2) for t in (1, 3, 40)
        }
        assert len(folds) == 1, side
    sizes = {cpu._folds((1, 8, t, 16, 16), weight.float(), 2, g) for t in (1, 40)}
    assert sizes == {False, True}  # in float32 nothing is rounded: what pays may decide


@pytest.mark.parametrize("stride", [1, 2])
def test_one_frame_doubled_in_space(stride, monkeypatch):
    """Kernel (1, 3, 3): a transposed convolution where that pays, unless frames are left out."""
    x = video(2, 8, 4, 4, 5, dtype=torch.float64)
    weight, bias = video(6, 8, 1, 3, 3, dtype=torch.float64), video(6).double()
    options = {"upsample": "space", "stride": stride}
    monkeypatch.setattr(cpu, "FOLDING_PAYS_POSITIONS", 0)
    expected = causal_conv3d_reference(x, weight, bias, **options)
    assert torch.allclose(vt.causal_conv3d(x, weight, bias, **options), expected, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kernel", "options"),
    [
        ((1, 3, 3), {"upsample": "space"}),
        ((3, 3, 3), {"upsample": "time"}),
        ((3, 3, 1), {"upsample": "time", "temporal": "replicate"}),
        ((3, 5, 3), {"upsample": "time", "spatial_padding": ((1, 1), (0, 0))}),
        # Not folded: an adjoint with another stride, and a padding that is not even.
        ((3, 3, 3), {"upsample": "time", "stride": (1, 2, 2)}),
        ((3, 3, 3), {"upsample": "time", "spatial_padding": ((1, 0), (1, 1))}),
        ((3, 3, 3), {"upsample": "space"}),
    ],
)
def test_gradients_of_folded_upsampling(kernel, options, dtype, monkeypatch):
    x, weight = video(2, 6, 3, 5, 6, dtype=dtype), video(8, 6, *kernel, dtype=dtype, seed=1) / 4
    leaves = [leaf.requires_grad_() for leaf in (x, weight, video(8, dtype=dtype, seed=2))]
    double = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = causal_conv3d_reference(*double, **options)
    direction = video(*expected.shape, dtype=dtype, seed=3)
    right = torch.autograd.grad(expected, double, direction.double())
    monkeypatch.setattr(cpu, "FOLDING_PAYS_POSITIONS", 0)
    found = torch.autograd.grad(vt.causal_conv3d(*leaves, **options), leaves, direction)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    assert found[0].is_contiguous(memory_format=LAYOUT)
    for a, b in zip(found, right, strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"dilation": 2}, {"groups": 2}])
@pytest.mark.parametrize("size", [2, 6, 20])
def test_heavy_weights(size, options, dtype):
    """96 channels on pictures so small that a weight is moved as little as can be: see the Note."""
    x = video(1, 96, 3, size, size, dtype=dtype)
    weight = video(96, 96 // options.get("groups", 1), 3, 3, 3, dtype=dtype, seed=1) / 50
    bias = video(96, dtype=dtype, seed=2)
    leaves = [leaf.requires_grad_() for leaf in (x, weight, bias)]
    double = [leaf.detach().double().requires_grad_() for leaf in leaves]
    y, expected = vt.causal_conv3d(*leaves, **options), causal_conv3d_reference(*double, **options)
    direction = video(*y.shape, dtype=dtype, seed=3)
    found = torch.autograd.grad(y, leaves, direction)
    right = torch.autograd.grad(expected, double, direction.double())
    assert y.is_contiguous(memory_format=LAYOUT) and found[0].is_contiguous(memory_format=LAYOUT)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for got, want in zip((y, *found), (expected, *right), strict=True):
        assert (got - want).abs().max() <= tolerance * want.abs().max()


def with_factor(outputs):
    """Arguments of the op: a blend has a factor, too."""
    blend = {"blend": (outputs["blend"], torch.tensor([0.3]))} if "blend" in outputs else {}
    return {**outputs, **blend}


def run_in_chunks(x, weight, bias, plan, outputs, **options):
    """Results of one stream, concatenated; `outputs` holds tensors of the output's shape."""
    state, chunks, first, done = None, [], 0, 0
    for length in plan:
        chunk = x[:, :, first : first + length]
        first += length
        y = vt.causal_conv3d(chunk, weight, bias, state=state, return_state=True, **options)[0]
        size = y.shape[2]
        more = with_factor({name: t[:, :, done : done + size] for name, t in outputs.items()})
        y, state = vt.causal_conv3d(
            chunk, weight, bias, state=state, return_state=True, **options, **more
        )
        assert state.untyped_storage().nbytes() == state.nbytes  # owned, not a view
        done += size
        chunks.append(y)
    return torch.cat(chunks, 2), state


@st.composite
def streams(draw):
    kernel = (draw(st.integers(1, 4)), draw(st.sampled_from([1, 3])), 1)
    dilation = draw(st.integers(1, 2))
    reach = (kernel[0] - 1) * dilation + 1
    channels = draw(st.sampled_from([1, 3, 8]))
    return {
        "kernel": kernel,
        "plan": draw(st.lists(st.integers(0, 5), min_size=1, max_size=6)),
        "channels": channels,
        "batch": draw(st.integers(1, 2)),
        "options": {
            "stride": (draw(st.integers(1, reach)), *draw(st.tuples(*[st.integers(1, 2)] * 2))),
            "groups": draw(st.sampled_from([1, 4])) if channels == 8 else 1,
            "dilation": dilation,
            "temporal": draw(st.sampled_from(["zeros", "replicate"])),
            "front": draw(st.one_of(st.none(), st.integers(0, reach - 1))),
            "upsample": draw(st.sampled_from([None, "space", "time"])),
            "activation": draw(st.sampled_from([None, "silu"])),
        },
        "outputs": draw(st.sets(st.sampled_from(["residual", "blend"]))),
    }


@settings(max_examples=150, deadline=None)
@given(streams())
def test_any_chunks_equal_the_whole_clip(stream):
    """Results and gradients, through the state, of a random plan of chunks."""
    size, frames = stream["batch"], sum(stream["plan"])
    x = video(size, stream["channels"], frames, 3, 2, dtype=torch.float64).requires_grad_()
    options, outputs = stream["options"], {}
    channels = stream["channels"] // options["groups"]
    weight = video(4, channels, *stream["kernel"], dtype=torch.float64).requires_grad_()
    bias = video(4, dtype=torch.float64).requires_grad_()
    whole = vt.causal_conv3d(x, weight, bias, **options)
    if stream["outputs"]:
        for seed, name in enumerate(sorted(stream["outputs"]), 1):
            outputs[name] = video(*whole.shape, dtype=torch.float64, seed=seed).requires_grad_()
        whole = vt.causal_conv3d(x, weight, bias, **options, **with_factor(outputs))
    leaves = [x, weight, bias, *outputs.values()]
    chunked, _ = run_in_chunks(x, weight, bias, stream["plan"], outputs, **options)
    assert torch.allclose(chunked, whole, rtol=1e-12, atol=1e-12)
    direction = video(*whole.shape, dtype=torch.float64, seed=2)
    expected = torch.autograd.grad(whole, leaves, direction)
    for a, e in zip(torch.autograd.grad(chunked, leaves, direction), expected, strict=True):
        assert torch.allclose(a, e, rtol=1e-10, atol=1e-12)


def test_a_stream_without_frames_has_not_started(backend):
    x = video(1, 4, 3, 4, 4).to(backend.device)
    weight = video(4, 4, 3, 3, 3).to(backend.device)
    options = {"temporal": "replicate", "return_state": True}
    y, state = vt.causal_conv3d(x[:, :, :0], weight, **options)
    assert y.shape == (1, 4, 0, 4, 4) and state.shape == (1, 4, 0, 0, 0)
    y, state = vt.causal_conv3d(x, weight, state=state, **options)
    assert torch.equal(y, vt.causal_conv3d(x, weight, temporal="replicate"))
    assert torch.equal(state, x[:, :, 1:])


def test_valid_continues_from_a_buffer(backend):
    """What a producer of padded buffers does: it passes front frames, and gets the next ones."""
    x, weight = video(1, 8, 5, 4, 4).to(backend.device), video(8, 8, 3, 3, 3).to(backend.device)
    whole = vt.causal_conv3d(x, weight)
    buffer = torch.cat([torch.zeros_like(x[:, :, :2]), x[:, :, :3]], 2)
    first, state = vt.causal_conv3d(buffer, weight, temporal="valid", return_state=True)
    assert torch.equal(state, x[:, :, 1:3])
    second = vt.causal_conv3d(torch.cat([state, x[:, :, 3:]], 2), weight, temporal="valid")
    assert torch.allclose(torch.cat([first, second], 2), whole, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 3, 0, 4, 4), (1, 3, 1, 4, 4)])
def test_zero_frames_have_gradients(shape, backend):
    x = video(*shape).to(backend.device).requires_grad_()
    weight = video(4, 3, 3, 3, 3).to(backend.device).requires_grad_()
    y = vt.causal_conv3d(x, weight, stride=2)
    assert y.shape == (1, 4, 0, 4, 4)
    for leaf, grad in zip((x, weight), torch.autograd.grad(y.sum(), (x, weight)), strict=True):
        assert torch.equal(grad, torch.zeros_like(leaf))


@pytest.mark.parametrize("stride, front", [(1, None), (2, None), (2, 2)])
@pytest.mark.parametrize("temporal", ["zeros", "replicate"])
def test_gradcheck(stride, front, temporal):
    x = video(1, 2, 3, 3, 2, dtype=torch.float64).requires_grad_()
    weight = video(2, 2, 3, 3, 1, dtype=torch.float64).requires_grad_()
    bias = video(2, dtype=torch.float64).requires_grad_()
    mix = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    options = {"stride": stride, "front": front, "temporal": temporal, "activation": "silu"}
    shape = vt.causal_conv3d(x, weight, **options).shape
    other = video(*shape, dtype=torch.float64, seed=3).requires_grad_()
    residual = video(*shape, dtype=torch.float64, seed=4).requires_grad_()

    def function(x, weight, bias, residual, other, mix):
        return vt.causal_conv3d(x, weight, bias, residual=residual, blend=(other, mix), **options)

    assert torch.autograd.gradcheck(function, (x, weight, bias, residual, other, mix))


def test_gradient_of_the_state():
    x = video(1, 2, 2, 3, 2, dtype=torch.float64).requires_grad_()
    state = video(1, 2, 2, 3, 2, dtype=torch.float64, seed=1).requires_grad_()
    weight = video(2, 2, 3, 3, 1, dtype=torch.float64)

    def function(x, state):
        return vt.causal_conv3d(x, weight, state=state, return_state=True)

    assert torch.autograd.gradcheck(function, (x, state))


@pytest.mark.parametrize("frozen", [{"weight"}, {"bias"}, {"x", "weight"}, {"x", "bias"}])
def test_gradients_of_some(frozen, backend, monkeypatch):
    """As with all; the gradient of a weight, as much work as the convolution, only if it trains."""
    function, calls = causal_conv3d_function._causal_conv3d_weight_gradient, []
    monkeypatch.setattr(
        causal_conv3d_function,
        "_causal_conv3d_weight_gradient",
        lambda *arguments: calls.append(1) or function(*arguments),
    )
    tensors = {"x": video(1, 8, 3, 4, 4), "weight": video(8, 8, 3, 3, 3), "bias": video(8)}
    tensors = {name: t.to(backend.device).requires_grad_() for name, t in tensors.items()}
    y = vt.causal_conv3d(**tensors, activation="silu")
    everything = dict(zip(tensors, torch.autograd.grad(y.sum(), tensors.values()), strict=True))
    calls.clear()
    for name in frozen:
        tensors[name] = tensors[name].detach()
    trained = {name: t for name, t in tensors.items() if name not in frozen}
    found = torch.autograd.grad(
        vt.causal_conv3d(**tensors, activation="silu").sum(), trained.values()
    )
    assert len(calls) == ("weight" in trained)
    for name, grad in zip(trained, found, strict=True):
        assert torch.allclose(grad, everything[name], rtol=1e-5, atol=1e-4)


def test_what_came_before_an_activation_is_kept_for_gradients_only(monkeypatch):
    forward, kept = causal_conv3d_function._causal_conv3d_forward, []
    monkeypatch.setattr(
        causal_conv3d_function,
        "_causal_conv3d_forward",
        lambda *arguments: kept.append(arguments[9]) or forward(*arguments),
    )
    x, weight, mix = video(1, 4, 2, 4, 4), video(4, 4, 1, 1, 1), torch.zeros(1)
    vt.causal_conv3d(x, weight, activation="silu", blend=(x, mix))
    vt.causal_conv3d(x, weight.requires_grad_(), blend=(x, mix)).sum().backward()
    assert kept == [False, False]
    vt.causal_conv3d(x, weight, activation="silu").sum().backward()
    vt.causal_conv3d(x, weight, blend=(x, mix.requires_grad_())).sum().backward()
    assert kept[2:] == [True, True]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, LAYOUT])
def test_gradients_in_any_layout_are_taken(memory_format, backend):
    x, weight = video(2, 8, 2, 4, 4).to(backend.device), video(8, 8, 3, 3, 3).to(backend.device)
    x.requires_grad_()
    y = vt.causal_conv3d(x, weight)
    direction = video(*y.shape, seed=1).to(y.device)
    (grad,) = torch.autograd.grad(y, x, direction.contiguous(memory_format=memory_format))
    (expected,) = torch.autograd.grad(causal_conv3d_reference(x, weight), x, direction)
    assert torch.allclose(grad, expected, atol=1e-4)
    assert grad.is_contiguous(memory_format=LAYOUT)


@pytest.mark.parametrize("channels", [3, 16])
def test_small_batches_take_another_path_with_the_same_result(channels):
    """See Note [Small batches on the CPU]."""
    x = video(1, channels, 5, 8, 9).contiguous(memory_format=LAYOUT)
    assert is_small(x) and not is_small(x.double())
    weight = video(6, channels, 3, 3, 3)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    y, expected = vt.causal_conv3d(x, weight), causal_conv3d_reference(x, weight)
    assert torch.allclose(y, expected, atol=1e-4)
    direction = video(*y.shape, seed=3)
    found = torch.autograd.grad(y, leaves, direction)
    for a, e in zip(found, torch.autograd.grad(expected, leaves, direction), strict=True):
        assert torch.allclose(a, e, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "channels, options",
    [
        (8, {}),
        (8, {"stride": 2, "temporal": "replicate"}),
        (64, {"bias": True}),
        (64, {"dilation": 2, "temporal": "valid"}),
        (64, {"stride": 2}),
        (64, {"groups": 2}),
        (64, {"temporal": "same"}),
        (64, {"temporal": "same", "dilation": 4, "bias": True}),  # an outer tap sees 3 of 7 frames
    ],
)
def test_kernels_along_time_against_float64(channels, options, dtype):
    """See Note [Kernels along time on the CPU]."""
    check_against_float64((2, channels, 7, 4, 3), (3, 1, 1), dtype, dict(options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(6, 8), (7, 5), (2, 3)])
@pytest.mark.parametrize(
    "channels, kernel, options",
    [
        (64, (1, 3, 3), {"spatial_padding": ((0, 1), (0, 1)), "bias": True}),
        (64, (1, 3, 3), {}),
        (64, (1, 5, 3), {"stride": (1, 3, 2), "bias": True}),
        (64, (1, 3, 3), {"stride": (1, 1, 2)}),
        (64, (1, 1, 1), {}),
        (64, (1, 3, 3), {"groups": 2}),
        (8, (1, 3, 3), {}),
    ],
)
def test_steps_within_frames_against_float64(channels, kernel, options, size, dtype):
    """See Note [Steps within frames on the CPU]."""
    options = {"stride": (1, 2, 2), **options}
    check_against_float64((2, channels, 3, *size), kernel, dtype, options)


@pytest.mark.parametrize(
    "size, kernel, options",
    [
        ((1, 64, 2, 16, 16), (3, 3, 3), {"temporal": "same"}),
        ((2, 32, 2, 8, 8), (3, 5, 5), {"temporal": "same"}),
        ((1, 32, 2, 8, 8), (3, 3, 3), {"temporal": "same", "groups": 2}),
        ((1, 32, 4, 8, 8), (5, 3, 3), {"temporal": "same", "stride": (1, 2, 2)}),
        ((1, 32, 3, 8, 8), (5, 1, 1), {"temporal": "same", "stride": (1, 2, 2)}),
        ((1, 32, 3, 8, 1), (3, 3, 3), {"stride": (1, 2, 2)}),
        ((1, 32, 5, 8, 1), (1, 5, 5), {"stride": (1, 2, 2)}),  # as images
        ((1, 32, 5, 1, 8), (3, 5, 5), {"temporal": "valid"}),
    ],
)
def test_few_frames_against_float64(size, kernel, options):
    """See Note [Padding of few frames on the CPU]."""
    fill_freed_memory()
    check_against_float64(size, kernel, torch.bfloat16, dict(options))


def test_few_frames_behind_a_step_in_time():
    """Also in float32: in a process whose C library fills memory, as glibc's does when asked."""
    script = """
import torch
import vtok_ext as vt
from vtok_ext.ops.causal_conv3d import causal_conv3d_reference

options = {"temporal": "same", "stride": 2}
for frames in (5, 6, 7):
    x, weight = torch.randn(2, 16, frames, 6, 4), torch.randn(16, 16, 7, 3, 3).requires_grad_()
    y, double = vt.causal_conv3d(x, weight, **options), weight.detach().double().requires_grad_()
    expected = causal_conv3d_reference(x.double(), double, **options)
    (found,) = torch.autograd.grad(y, weight, torch.ones_like(y))
    (right,) = torch.autograd.grad(expected, double, torch.ones_like(expected))
    assert (found - right).abs().max() <= 1e-5 * right.abs().max(), frames
"""
    environment = {**os.environ, "MALLOC_PERTURB_": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_padding_that_is_written_is_little(monkeypatch):
    """Frames with room for two windows are read in place."""
    padded = []
    real = onednn._write_short_padding
    monkeypatch.setattr(
        onednn,
        "_write_short_padding",
        lambda frames, *rest: (
            padded.append(real(frames, *rest)[0] is not frames) or real(frames, *rest)
        ),
    )
    for frames in (2, 3):
        x = video(1, 16, frames, 8, 8, dtype=torch.bfloat16)
        weight = video(16, 16, 3, 3, 3, dtype=torch.bfloat16).requires_grad_()
        vt.causal_conv3d(x, weight, temporal="same").float().sum().backward()
    assert padded == [True, False]


@pytest.mark.parametrize(
    "size, kernel, options",
    [
        ((1, 24, 5, 6, 8), (3, 1, 1), {"dilation": 2}),  # as lines of 48
        ((1, 20, 3, 6, 33), (1, 3, 3), {"dilation": (1, 2, 1)}),  # as images
        ((1, 40, 3, 6, 48), (3, 3, 3), {"dilation": (1, 2, 2)}),
    ],
)
def test_odd_channels_against_float64(size, kernel, options):
    """See Note [Odd channels on the CPU]."""
    fill_freed_memory()
    check_against_float64(size, kernel, torch.bfloat16, dict(options))


def fill_freed_memory():
    """Frees memory full of NaN, so that reading memory that was never written shows."""
    tensors = [torch.full((1 << bits,), float("nan")) for bits in range(4, 22) for _ in range(8)]
    del tensors


def check_against_float64(size, kernel, dtype, options):
    """Compares results and all gradients."""
    channels = size[1]
    x = video(*size, dtype=dtype).contiguous(memory_format=LAYOUT).requires_grad_()
    weight = video(channels, channels // options.get("groups", 1), *kernel, dtype=dtype, seed=1)
    bias = video(channels, dtype=dtype, seed=2) if options.pop("bias", False) else None
    leaves = [leaf.requires_grad_() for leaf in (x, weight, bias) if leaf is not None]
    y = vt.causal_conv3d(x, weight, bias, **options)
    double = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = causal_conv3d_reference(*double, **options)
    direction = video(*y.shape, dtype=dtype, seed=3)
    found = [y, *torch.autograd.grad(y, leaves, direction)]
    right = [expected, *torch.autograd.grad(expected, double, direction.double())]
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-6
    for a, b in zip(found, right, strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max()


COPIES = {"aten::copy_", "aten::clone", "aten::contiguous", "aten::cat", "aten::constant_pad_nd"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kernel", [(3, 3, 3), (1, 3, 3), (3, 1, 1), (1, 1, 1)])
def test_native_path_copies_nothing(kernel, batch, dtype):
    """A buffer with its front frames goes to oneDNN as it is, and comes back in its layout."""
    x = video(batch, 16, 6, 16, 16, dtype=dtype).contiguous(memory_format=LAYOUT)
    weight = video(16, 16, *kernel, dtype=dtype).contiguous(memory_format=LAYOUT)
    residual = video(batch, 16, 7 - kernel[0], 16, 16, dtype=dtype).contiguous(memory_format=LAYOUT)
    bias = video(16, dtype=dtype)
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as profiler:
        y = vt.causal_conv3d(
            x, weight, bias, temporal="valid", residual=residual, activation="silu"
        )
    assert y.is_contiguous(memory_format=LAYOUT)
    called = {event.key for event in profiler.key_averages()}
    assert not called & COPIES
    assert any("convolution" in name for name in called)  # the profiler did look inside


def test_onednn_can_be_switched_off():
    """As by torch for its own convolutions."""
    x, weight = video(1, 8, 3, 8, 8), video(8, 8, 3, 3, 3)
    expected = causal_conv3d_reference(x, weight)
    with torch.backends.mkldnn.flags(enabled=False), profile() as profiler:
        y = vt.causal_conv3d(x, weight)
    called = {event.key for event in profiler.key_averages()}
    assert any("conv" in name for name in called)
    assert not any("mkldnn" in name for name in called)
    assert torch.allclose(y, expected, atol=1e-4)


def test_autocast_decides_the_dtype():
    x, weight = video(1, 8, 3, 4, 4), video(8, 8, 3, 3, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = vt.causal_conv3d(x, weight, residual=x, return_state=True)
        again = vt.causal_conv3d(x, weight, state=state)
        assert vt.causal_conv3d(x.double(), weight.double()).dtype == torch.float64
    assert y.dtype == state.dtype == again.dtype == torch.bfloat16


def call(x=(1, 4, 3, 5, 6), weight=(4, 4, 3, 3, 3), bias=None, **options):
    bias = None if bias is None else torch.zeros(bias)
    return vt.causal_conv3d(torch.zeros(x), torch.zeros(weight), bias, **options)


@pytest.mark.parametrize(
    "error, message, options",
    [
        (
            ValueError,
            r"x must be \[B, C, T, H, W\], C >= 1, got \[4, 3, 5, 6\]",
            {"x": (4, 3, 5, 6)},
        ),
        (
            ValueError,
            r"weight must be \[O, C / groups, kt, kh, kw\], got \[4, 4, 3\]",
            {"weight": (4, 4, 3)},
        ),
        (
            ValueError,
            r"weight must be \[O, 4, kt, kh, kw\] for x .*, got \[4, 3,",
            {"weight": (4, 3, 3, 3, 3)},
        ),
        (ValueError, r"bias must be \[4\], got \[5\]", {"bias": 5}),
        (
            ValueError,
            r"stride must be an integer >= 1 \(in time\) or three .*, got 0",
            {"stride": 0},
        ),
        (ValueError, r"dilation must be .*, got \(1, 2\)", {"dilation": (1, 2)}),
        (ValueError, "stride must be an integer .*, got True", {"stride": True}),
        (ValueError, r"dilation must be .*, got \(1, True, 1\)", {"dilation": (1, True, 1)}),
        (
            ValueError,
            "spatial_padding must be .*True",
            {"spatial_padding": ((True, 1), (1, 1))},
        ),
        (
            ValueError,
            "front must be None or 0 .*, got False",
            {"temporal": "valid", "front": False},
        ),
        (ValueError, "groups must be an integer >= 1, got 0", {"groups": 0}),
        (ValueError, "groups must divide the channels of x and weight, got 3", {"groups": 3}),
        (ValueError, "temporal must be one of .*, got 'reflect'", {"temporal": "reflect"}),
        (ValueError, r"front must be in 0\.\.2, .*, got 3", {"front": 3}),
        (
            ValueError,
            'front must be None with temporal="same", got 1',
            {"temporal": "same", "front": 1},
        ),
        (
            ValueError,
            'front must be None or 0 with temporal="valid", got 1',
            {"temporal": "valid", "front": 1},
        ),
        (
            ValueError,
            'odd number of frames with temporal="same", got 2',
            {"weight": (4, 4, 2, 3, 3), "temporal": "same"},
        ),
        (ValueError, r"odd height and width .*, got \[3, 2, 3\]", {"weight": (4, 4, 3, 2, 3)}),
        (
            ValueError,
            "spatial_padding must be \"same\" or .*, got 'full'",
            {"spatial_padding": "full"},
        ),
        (
            ValueError,
            r"spatial_padding must be .*, got \(\(0, 1\),\)",
            {"spatial_padding": ((0, 1),)},
        ),
        (ValueError, "spatial_padding must be .*, got 1", {"spatial_padding": 1}),
        (ValueError, r"spatial_padding must be .*, got \(1, 1\)", {"spatial_padding": (1, 1)}),
        (ValueError, r"spatial_padding must be .*-1", {"spatial_padding": ((0, 0), (-1, 0))}),
        (ValueError, "stride must be an integer .*, got 2.0", {"stride": 2.0}),
        (TypeError, "residual must be a torch.Tensor, got float", {"residual": 1.0}),
        (TypeError, "state must be a torch.Tensor, got int", {"state": 0}),
        (
            TypeError,
            "mix_factor must be a torch.Tensor, got float",
            {"blend": (torch.zeros(1, 4, 3, 5, 6), 0.3)},
        ),
        (ValueError, "upsample must be one of .*, got 'both'", {"upsample": "both"}),
        (ValueError, "activation must be one of .*, got 'relu'", {"activation": "relu"}),
        (
            ValueError,
            r"state must be \[1, 4, 2, 5, 6\], got \[1, 4, 1, 5, 6\]",
            {"state": torch.zeros(1, 4, 1, 5, 6)},
        ),
        (
            ValueError,
            r"state must be \[1, 4, 1\.\.2, 5, 6\]",
            {"state": torch.zeros(1, 4, 3, 5, 6), "stride": 2},
        ),
        (
            ValueError,
            'state must be None with temporal="same"',
            {"temporal": "same", "return_state": True},
        ),
        (
            ValueError,
            'state must be None with temporal="valid"',
            {"temporal": "valid", "state": torch.zeros(1, 4, 2, 5, 6)},
        ),
        (
            ValueError,
            'return_state must be False with temporal="valid" and upsample="time"',
            {"temporal": "valid", "upsample": "time", "return_state": True},
        ),
        (
            TypeError,
            "state must be torch.float32 as x, got torch.int64",
            {"state": torch.zeros(1, 4, 2, 5, 6, dtype=torch.int64)},
        ),
        (
            ValueError,
            "stride in time must be at most 3 for a stream, got 4",
            {"stride": 4, "return_state": True},
        ),
        (
            ValueError,
            r"residual must have the output's shape \[1, 4, 3, 5, 6\]",
            {"residual": torch.zeros(1, 4, 3, 5, 5)},
        ),
        (
            TypeError,
            "residual must be torch.float32 as x, got torch.bfloat16",
            {"residual": torch.zeros(1, 4, 3, 5, 6).bfloat16()},
        ),
        (
            TypeError,
            r"blend must be \(tensor, mix_factor\), got Tensor",
            {"blend": torch.zeros(1, 4, 3, 5, 6)},
        ),
        (
            ValueError,
            r"mix_factor must be one floating element, got \[2\]",
            {"blend": (torch.zeros(1, 4, 3, 5, 6), torch.zeros(2))},
        ),
        (
            ValueError,
            "x must be as large as the kernel",
            {"x": (1, 4, 3, 2, 2), "spatial_padding": ((0, 0), (0, 0))},
        ),
    ],
)
@pytest.mark.parametrize("native", [True, False])
def test_errors(error, message, options, native, monkeypatch):
    monkeypatch.setattr("vtok_ext._native._enabled", native)
    with pytest.raises(error, match=f"causal_conv3d: .*{message}"):
        call(**options)


def test_dtype_errors():
    x, weight = torch.zeros(1, 4, 3, 5, 6), torch.zeros(4, 4, 3, 3, 3)
    with pytest.raises(TypeError, match="weight must be torch.float32 as x, got torch.float16"):
        vt.causal_conv3d(x, weight.half())
    with pytest.raises(TypeError, match="x must be float32, .*, got torch.int64"):
        vt.causal_conv3d(x.long(), weight.long())
    with pytest.raises(TypeError, match="x must be a torch.Tensor, got list"):
        vt.causal_conv3d([1.0], weight)
