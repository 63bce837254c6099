"""temporal_resample: half or twice as many frames, blended with the output of a convolution.

    down     alpha * avg_pool3d(pad(x), (3, 1, 1), (2, 1, 1)) + (1 - alpha) * y
    nearest  alpha * interpolate(x, "nearest") + (1 - alpha) * y
    linear   alpha * interpolate(x, "trilinear"), the first frame apart, + (1 - alpha) * y

Providers: eager (the published formula), compiled (torch.compile of it), native (this package).
"""

import pytest
import torch
import torch.nn.functional as F
from harness import QUICK, Case, measure
from shapes import RESAMPLE_SHAPES

import vtok_ext as vt
from vtok_ext import _native
from vtok_ext.ops.temporal_timing import downsample_timing, upsample_timing

SHAPES = RESAMPLE_SHAPES[:1] if QUICK else RESAMPLE_SHAPES
DTYPES = [torch.float32, torch.bfloat16]


def resample(x, mode):
    """The branch without parameters as published."""
    if mode == "down":
        return F.avg_pool3d(F.pad(x, (0, 0, 0, 0, 1, 0)), (3, 1, 1), (2, 1, 1))
    if mode == "nearest":
        return F.interpolate(x, scale_factor=(2, 1, 1), mode="nearest")
    parts = [x[:, :, :1], x[:, :, 1:]]
    scale = (2, 1, 1)
    return torch.cat([F.interpolate(p, scale_factor=scale, mode="trilinear") for p in parts], 2)


class EagerStep:
    """The published formula forward and backward, every large result in a buffer made beforehand;
    pooling and interpolation through the variants of torch's ops that take one."""

    def __init__(self, mode, x, y, mix_factor, grad):
        self.mode, self.x, self.y, self.mix_factor, self.grad = mode, x, y, mix_factor, grad
        self.out, self.value, self.work, self.grad_y = (torch.empty_like(y) for _ in range(4))
        self.grad_x = torch.empty_like(x)
        self.padded = self.grad_padded = None
        if mode == "down":
            self.padded = F.pad(x, (0, 0, 0, 0, 1, 0))
            # torch's pooling writes as if its output were contiguous, whatever strides it has.
            contiguous = torch.contiguous_format
            self.value = torch.empty_like(y, memory_format=contiguous)
            self.grad_padded = torch.empty_like(self.padded, memory_format=contiguous)
        # The first frame of a clip is interpolated apart from the rest.
        cuts = [(0, 1), (1, x.shape[2])] if mode == "linear" else [(0, x.shape[2])]
        self.parts = [(slice(i, j), slice(2 * i, 2 * j), j - i) for i, j in cuts]

    def resample(self):
        """value = the resampled frames."""
        aten, size = torch.ops.aten, list(self.x.shape[3:])
        if self.mode == "down":
            self.padded[:, :, 1:].copy_(self.x)
            aten.avg_pool3d.out(self.padded, [3, 1, 1], [2, 1, 1], out=self.value)
            return
        for source, target, count in self.parts:
            frames, out = self.x[:, :, source], self.value[:, :, target]
            if self.mode == "nearest":
                aten.upsample_nearest3d.out(frames, [2 * count, *size], out=out)
            else:
                aten.upsample_trilinear3d.out(frames, [2 * count, *size], False, out=out)

    def resample_backward(self):
        """grad_x from `work`, the gradient of the resampled frames."""
        aten, (batch, channels, _, *size) = torch.ops.aten, self.x.shape
        if self.mode == "down":
            options = ([3, 1, 1], [2, 1, 1], [0, 0, 0], False, True, None)
            aten.avg_pool3d_backward.grad_input(
                self.work, self.padded, *options, grad_input=self.grad_padded
            )
            return
        for source, target, count in self.parts:
            sizes = ([2 * count, *size], [batch, channels, count, *size])
            grad, grad_x = self.work[:, :, target], self.grad_x[:, :, source]
            if self.mode == "nearest":
                aten.upsample_nearest3d_backward.grad_input(grad, *sizes, grad_input=grad_x)
            else:
                aten.upsample_trilinear3d_backward.grad_input(
                    grad, *sizes, False, grad_input=grad_x
                )

    def forward(self):
        alpha = torch.sigmoid(self.mix_factor).to(self.x.dtype)
        self.resample()
        torch.mul(self.value, alpha, out=self.out)
        torch.mul(self.y, 1 - alpha, out=self.work)
        self.out.add_(self.work)

    def __call__(self):
        self.forward()
        alpha = torch.sigmoid(self.mix_factor).to(self.x.dtype)
        torch.mul(self.grad, 1 - alpha, out=self.grad_y)
        torch.mul(self.grad, self.value, out=self.work)
        grad_alpha = self.work.sum()
        torch.mul(self.grad, self.y, out=self.work)
        grad_alpha = grad_alpha - self.work.sum()
        torch.mul(self.grad, alpha, out=self.work)
        self.resample_backward()
        return grad_alpha.float() * (alpha * (1 - alpha))


class NativeStep:
    """The kernels called on buffers made beforehand."""

    def __init__(self, mode, x, y, mix_factor, grad):
        self.arguments = x, y, mix_factor, grad
        self.out, self.grad_x, self.grad_y = (torch.empty_like(t) for t in (y, x, y))
        self.grad_factor = torch.empty_like(mix_factor)
        self.partials = mix_factor.new_empty(y.numel() // 256 + 1)
        if mode == "down":
            timing = downsample_timing(x, None, "zeros")
        else:
            timing = upsample_timing(x, mode, int(mode == "linear"), None, True)
        self.timing, self.context = list(map(int, timing)), _native.call_context(x)

    def forward(self):
        x, y, factor, _ = self.arguments
        _native.module().temporal_resample_forward(
            x, None, None, y, factor, self.out, self.timing, self.context
        )

    def __call__(self):
        self.forward()
        x, y, factor, grad = self.arguments
        gradients = (self.grad_x, None, None, self.grad_y, self.grad_factor)
        _native.module().temporal_resample_backward(
            grad, x, None, y, factor, *gradients, self.partials, self.timing, self.context
        )


def make_eager(mode):
    def eager(x, y, mix_factor):
        alpha = torch.sigmoid(mix_factor).to(x.dtype)
        return alpha * resample(x, mode) + (1 - alpha) * y

    return eager


def make_native(mode):
    if mode == "down":
        return vt.temporal_downsample_blend
    options = {"interpolation": mode, "segment": 1} if mode == "linear" else {}
    return lambda x, y, mix_factor: vt.temporal_upsample_blend(x, y, mix_factor, **options)


def inputs(shape, dtype, device):
    """x, y, a gradient of the result, and the factor."""
    frames = shape.shape[2] // 2 if shape.mode == "down" else 2 * shape.shape[2]
    out = (*shape.shape[:2], frames, *shape.shape[3:])
    tensors = [torch.randn(s, device=device).to(dtype) for s in (shape.shape, out, out)]
    x, y, grad = (t.contiguous(memory_format=torch.channels_last_3d) for t in tensors)
    return x, y, grad, torch.randn(1, device=device)


def check(actual, expected, dtype):
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    assert (actual - expected).float().abs().max() <= tolerance * expected.float().abs().max()


def dtypes_of(shape, device):
    """avg_pool3d does not know bfloat16 on every CPU build of torch."""
    return [torch.float32] if shape.mode == "down" and device == "cpu" else DTYPES


CASES = [(shape, dtype) for shape in SHAPES for dtype in DTYPES]
IDS = [f"{shape.name}-{str(dtype).removeprefix('torch.')}" for shape, dtype in CASES]


@pytest.mark.parametrize("shape, dtype", CASES, ids=IDS)
def bench_temporal_resample_forward(shape, dtype, device, record, benchmark):
    if dtype not in dtypes_of(shape, device):
        pytest.skip("the eager pooling does not support this dtype here")
    x, y, _, mix_factor = inputs(shape, dtype, device)
    eager, native = make_eager(shape.mode), make_native(shape.mode)
    check(native(x, y, mix_factor), eager(x, y, mix_factor), dtype)
    compiled = torch.compile(make_eager(shape.mode), fullgraph=True)
    eager_step = EagerStep(shape.mode, x, y, mix_factor, y)
    native_step = NativeStep(shape.mode, x, y, mix_factor, y)
    for step in (eager_step, native_step):
        step.forward()
        check(step.out, eager(x, y, mix_factor), dtype)
    out = torch.empty_like(y)

    @torch.compile(fullgraph=True)
    def compiled_into(x, y, mix_factor, out):
        out.copy_(eager(x, y, mix_factor))

    providers = {
        ("eager", "preallocated"): eager_step.forward,
        ("compiled", "preallocated"): lambda: compiled_into(x, y, mix_factor, out),
        ("native", "preallocated"): native_step.forward,
        ("eager", "default"): lambda: eager(x, y, mix_factor),
        ("compiled", "default"): lambda: compiled(x, y, mix_factor),
        ("native", "default"): lambda: native(x, y, mix_factor),
    }
    bytes_moved = (x.numel() + 2 * y.numel()) * x.element_size()
    name = str(dtype).removeprefix("torch.")
    case = Case("temporal_resample", shape.name, name, "forward", bytes_moved)
    with torch.no_grad():
        record(measure(case, providers, device))
        benchmark.pedantic(native_step.forward, rounds=3)


@pytest.mark.parametrize("shape, dtype", CASES, ids=IDS)
def bench_temporal_resample_forward_backward(shape, dtype, device, record, benchmark):
    if dtype not in dtypes_of(shape, device):
        pytest.skip("the eager pooling does not support this dtype here")
    x, y, grad, mix_factor = inputs(shape, dtype, device)
    leaves = [t.requires_grad_() for t in (x, y, mix_factor)]
    eager, native = make_eager(shape.mode), make_native(shape.mode)
    compiled = torch.compile(make_eager(shape.mode), fullgraph=True)

    def step(function):
        return torch.autograd.grad(function(*leaves), leaves, grad)

    for actual, expected in zip(step(native)[:2], step(eager)[:2], strict=True):
        check(actual, expected, dtype)
    arguments = [t.detach() for t in leaves]
    eager_step = EagerStep(shape.mode, *arguments, grad)
    native_step = NativeStep(shape.mode, *arguments, grad)
    eager_step(), native_step()
    expected = step(eager)
    check(native_step.grad_x, expected[0], dtype)
    check(native_step.grad_y, expected[1], dtype)
    if shape.mode == "down":
        check(eager_step.grad_padded[:, :, 1:], expected[0], dtype)
    else:
        check(eager_step.grad_x, expected[0], dtype)
    # torch.compile has no backward into given buffers: it appears in the default rows only.
    providers = {
        ("eager", "preallocated"): eager_step,
        ("native", "preallocated"): native_step,
        ("eager", "default"): lambda: step(eager),
        ("compiled", "default"): lambda: step(compiled),
        ("native", "default"): lambda: step(native),
    }
    # Forward reads x, y and writes out; backward reads grad, x, y and writes both gradients.
    bytes_moved = (3 * x.numel() + 5 * y.numel()) * x.element_size()
    name = str(dtype).removeprefix("torch.")
    case = Case("temporal_resample", shape.name, name, "forward+backward", bytes_moved)
    record(measure(case, providers, device))
    benchmark.pedantic(lambda: step(native), rounds=3)
