"""What is special about temporal_resample: torch's own pooling and interpolation as second oracles,
exact streams, gradients by finite differences, what is kept for the backward pass, errors."""

import pytest
import torch
import torch.nn.functional as F

from vtok_ext.ops.temporal_resample import (
    temporal_downsample_blend,
    temporal_upsample,
    temporal_upsample_blend,
)
from vtok_ext.ops.temporal_timing import carried_frames

LINEAR = {"interpolation": "linear"}


def video(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return x.contiguous(memory_format=torch.channels_last_3d) if len(shape) == 5 else x


@pytest.mark.parametrize("num_frames", [1, 2, 3, 8])
@pytest.mark.parametrize("padding", ["zeros", "replicate", "none", "zeros_behind"])
def test_mean_equals_torch_pooling(num_frames, padding, backend):
    x = video(2, 5, num_frames, 3, 4)
    zero, first = torch.zeros_like(x[:, :, :1]), x[:, :, :1]
    parts = {"zeros": [zero, x], "replicate": [first, x], "none": [x], "zeros_behind": [x, zero]}
    padded = torch.cat(parts[padding], 2)
    if padded.shape[2] < 3:
        expected = x[:, :, :0]
    else:
        expected = F.avg_pool3d(padded, (3, 1, 1), (2, 1, 1))
    always = torch.full((1,), 200.0).to(backend.device)  # alpha = 1
    y = torch.zeros_like(expected).to(backend.device)
    out = temporal_downsample_blend(x.to(backend.device), y, always, padding=padding)
    torch.testing.assert_close(out.cpu(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("segment", [0, 1, 2, 4, 7])
def test_linear_equals_torch_interpolation(segment, backend):
    x = video(2, 5, 7, 3, 4)
    parts = [p for p in (x[:, :, :segment], x[:, :, segment:]) if p.shape[2]]
    scale = (2, 1, 1)
    expected = torch.cat([F.interpolate(p, scale_factor=scale, mode="trilinear") for p in parts], 2)
    out = temporal_upsample(x.to(backend.device), segment=segment, **LINEAR)
    torch.testing.assert_close(out.cpu(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_nearest_copies_bits(dtype):
    x = video(2, 5, 3, 3, 4, dtype=dtype)
    x[0, 0, 0, 0, 0], x[0, 0, 1, 0, 0] = torch.inf, torch.nan
    front = video(2, 5, 2, 3, 4, dtype=dtype, seed=1)
    out = temporal_upsample(x, front=front)
    expected = torch.cat([front, x.repeat_interleave(2, 2)], 2)
    assert torch.equal(out.nan_to_num(7), expected.nan_to_num(7)) and out.dtype == dtype
    assert torch.equal(temporal_upsample(x, num_front=2)[:, :, :2], torch.zeros_like(front))
    assert out.is_contiguous(memory_format=torch.channels_last_3d)
    assert temporal_upsample(x.contiguous()).is_contiguous()


@pytest.mark.parametrize("segment", [0, 1, 2, 4])
@pytest.mark.parametrize("plan", [[1] * 9, [9], [3, 1, 5], [1, 0, 2, 6], [2, 2, 5], [8, 1]])
@pytest.mark.parametrize("empty_end", [False, True])
def test_linear_stream_is_bitwise_the_whole(segment, plan, empty_end):
    x = video(2, 3, 9, 2, 2)
    whole = temporal_upsample(x, segment=segment, **LINEAR)
    chunks = list(x.split(plan, 2)) + ([x[:, :, :0]] if empty_end else [])
    carried, current, out = None, segment, []
    for number, chunk in enumerate(chunks):
        final = number == len(chunks) - 1
        options = {**LINEAR, "segment": current, "carried": carried, "final": final}
        out.append(temporal_upsample(chunk, **options))
        seen = chunk.shape[2] + (0 if carried is None else carried.shape[2])
        carried = carried_frames(chunk, current, carried)
        current = 0 if seen >= current else current
    assert torch.equal(torch.cat(out, 2), whole)


@pytest.mark.parametrize("plan", [[1] * 7, [3, 4], [2, 2, 3]])
def test_downsample_stream_is_bitwise_the_whole(plan):
    x, mix_factor = video(2, 3, 7, 2, 2), video(1)
    y = video(2, 3, 3, 2, 2, seed=1)
    whole = temporal_downsample_blend(x, y, mix_factor)
    carried, out, done = torch.zeros_like(x[:, :, :1]), [], 0
    for chunk in x.split(plan, 2):
        count = (carried.shape[2] + chunk.shape[2] - 1) // 2
        part = y[:, :, done : done + count]
        out.append(temporal_downsample_blend(chunk, part, mix_factor, carried=carried))
        carried = torch.cat([carried, chunk], 2)[:, :, 2 * count :]
        done += count
    assert torch.equal(torch.cat(out, 2), whole)


@pytest.mark.parametrize(
    "function, frames, options",
    [
        (temporal_downsample_blend, (5, 2, None), {}),
        (temporal_downsample_blend, (6, 3, None), {"padding": "replicate"}),
        (temporal_downsample_blend, (4, 2, 2), {}),
        (temporal_downsample_blend, (4, 2, None), {"padding": "zeros_behind"}),
        (temporal_upsample_blend, (3, 6, None), {}),
        (temporal_upsample_blend, (5, 10, None), {**LINEAR, "segment": 2}),
        (temporal_upsample_blend, (3, 6, 1), {**LINEAR, "final": False}),
        (temporal_upsample_blend, (3, 6, 2), {**LINEAR, "segment": 3, "final": False}),
    ],
)
def test_gradcheck_of_blends(function, frames, options):
    counts = (*frames[:2], frames[2] or 0)
    x, y, carried = (
        video(2, 2, n, 2, 1, dtype=torch.float64, seed=n).requires_grad_() for n in counts
    )
    mix_factor = video(1, dtype=torch.float64).requires_grad_()
    if frames[2] is None:
        assert torch.autograd.gradcheck(
            lambda x, y, m: function(x, y, m, **options), (x, y, mix_factor)
        )
    else:
        assert torch.autograd.gradcheck(
            lambda x, y, m, c: function(x, y, m, carried=c, **options),
            (x, y, mix_factor, carried),
        )


@pytest.mark.parametrize(
    "options",
    [{}, {"num_front": 4, "front": "replicate"}, {**LINEAR, "segment": 2, "num_front": 2}],
)
def test_gradcheck_of_upsample(options):
    x = video(2, 2, 4, 2, 1, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: temporal_upsample(x, **options), (x,))


def test_gradcheck_of_a_stream():
    """Through carried and front frames: truncation in time is the caller's choice."""
    tensors = [
        video(1, 2, n, 2, 1, dtype=torch.float64, seed=n).requires_grad_() for n in (3, 1, 2)
    ]
    assert torch.autograd.gradcheck(
        lambda x, c, f: temporal_upsample(x, carried=c, front=f, **LINEAR), tensors
    )


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
def test_only_the_gradients_asked_for(needed, backend):
    tensors = [video(2, 8, 5, 4, 4, seed=1), video(2, 8, 10, 4, 4, seed=2), video(1, seed=3)]
    tensors = [t.to(backend.device) for t in tensors]
    grad = video(2, 8, 10, 4, 4, seed=4).to(backend.device)
    everything = [t.clone().requires_grad_() for t in tensors]
    expected = torch.autograd.grad(temporal_upsample_blend(*everything), everything, grad)
    leaves = [t.clone().requires_grad_(i in needed) for i, t in enumerate(tensors)]
    actual = torch.autograd.grad(
        temporal_upsample_blend(*leaves), [leaves[i] for i in needed], grad
    )
    for i, gradient in zip(needed, actual, strict=True):
        assert torch.equal(gradient, expected[i])


def test_backward_keeps_no_upsampled_frames():
    """Upsampling saves nothing, the blend x and y (and neither when the factor is fixed)."""
    x, y = video(1, 2, 3, 4, 4).requires_grad_(), video(1, 2, 6, 4, 4)
    up = temporal_upsample(x, num_front=2)  # torch 2.4 drops what is saved along with the result
    assert [t for t in up.grad_fn.saved_tensors if t is not None] == []
    blend = temporal_upsample_blend(x, y, torch.zeros(1, requires_grad=True))
    shapes = [list(t.shape) for t in blend.grad_fn.saved_tensors if t is not None]
    assert shapes == [list(x.shape), list(y.shape), []]
    blend = temporal_upsample_blend(x, y, torch.zeros(1))
    assert [list(t.shape) for t in blend.grad_fn.saved_tensors if t is not None] == [[]]


def test_gradients_do_not_depend_on_threads():
    before = torch.get_num_threads()
    x, y, grad = (video(1, 16, n, 40, 40, seed=n) for n in (5, 10, 10))
    results = []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            leaves = [t.clone().requires_grad_() for t in (x, y, video(1))]
            out = temporal_upsample_blend(*leaves, segment=1, **LINEAR)
            results.append(torch.autograd.grad(out, leaves, grad))
    finally:
        torch.set_num_threads(before)
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


@pytest.mark.parametrize("num_frames", [3, 40])
def test_factor_gradient_adds_every_pixel_once(num_frames, backend):
    x = torch.ones(1, 3, num_frames, 61, 60).to(backend.device)
    y = -torch.ones(1, 3, 2 * num_frames, 61, 60).to(backend.device)
    factor = torch.zeros(1).to(backend.device).requires_grad_()
    temporal_upsample_blend(x, y, factor).backward(torch.ones_like(y))
    assert factor.grad.item() == y.numel() / 2  # alpha (1 - alpha) (value - y) = 1 / 2 each


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtype_of_y_decides(dtype):
    x, y = video(1, 4, 4, 2, 2), video(1, 4, 2, 2, 2, seed=1).to(dtype)
    for factor in (torch.zeros(1), torch.zeros(1, dtype=dtype), torch.zeros(()).double()):
        out = temporal_downsample_blend(x, y, factor)
        assert out.dtype == dtype
        assert torch.equal(out, temporal_downsample_blend(x.to(dtype), y, factor))


def test_mixed_memory_formats(backend):
    x, y = video(2, 5, 3, 4, 6).contiguous(), video(2, 5, 6, 4, 6, seed=1)
    x, y, factor = (t.to(backend.device) for t in (x, y, video(1)))
    out = temporal_upsample_blend(x, y, factor)
    assert out.stride() == y.stride()
    assert torch.equal(out, temporal_upsample_blend(x, y.contiguous(), factor))


def test_errors_name_argument_requirement_and_value():
    x, y, m = video(1, 2, 4, 3, 3), video(1, 2, 2, 3, 3), torch.zeros(1)
    down, up, blend = temporal_downsample_blend, temporal_upsample, temporal_upsample_blend
    for function, arguments, kwargs, error, message in (
        (down, (x[0], y, m), {}, ValueError, r"x must be \[B, C, T, H, W\], got \[2, 4, 3, 3\]"),
        (down, (x, x, m), {}, ValueError, r"y must have 2 frames, got 4 \(\[1, 2, 4, 3, 3\]\)"),
        (down, (x, y[:, :1], m), {}, ValueError, r"y must be \[1, 2, T, 3, 3\], got \[1, 1, 2, 3"),
        (down, (x, y, torch.zeros(2)), {}, ValueError, "mix_factor must have one element on cpu"),
        (down, (x, y, 0.5), {}, TypeError, "mix_factor must be a floating tensor, got 0.5"),
        (down, (x, y, m), {"padding": "same"}, ValueError, "padding must be one of .*, got 'same'"),
        (down, (x, y, m), {"carried": x[..., :1]}, ValueError, "carried must be"),
        (down, (x.int(), y, m), {}, TypeError, "x must be float32, .* on cpu, got torch.int32"),
        (up, (x,), {"interpolation": "cubic"}, ValueError, "interpolation must be one of"),
        (up, (x,), {"segment": 1}, ValueError, "segment and carried must be absent with 'nearest'"),
        (up, (x,), {"segment": -1, **LINEAR}, ValueError, "segment must be at least 0, got -1"),
        (
            up,
            (x,),
            {"carried": y, **LINEAR},
            ValueError,
            "carried must have 1 to 1 frames .*, got 2",
        ),
        (
            up,
            (x,),
            {"carried": y, "segment": 1, **LINEAR},
            ValueError,
            "carried must have 1 to 0 frames",
        ),
        (up, (x,), {"num_front": 5}, ValueError, r"num_front must be in 0\.\.4, got 5"),
        (up, (x,), {"front": "same"}, ValueError, "front must be one of .*, got 'same'"),
        (up, (x,), {"front": y[..., :1]}, ValueError, "front must be"),
        (
            up,
            (x[:, :, :0],),
            {"front": "replicate", "num_front": 2},
            ValueError,
            "front must be 'zeros' or a tensor unless x begins a clip",
        ),
        (blend, (x, y, m), {}, ValueError, "y must have 8 frames, got 2"),
        (blend, (x, y.to("meta"), m), {}, ValueError, "y must be on cpu, got meta"),
    ):
        op = "temporal_downsample" if function is down else "temporal_upsample"
        with pytest.raises(error, match=f"{op}: " + message):
            function(*arguments, **kwargs)
