"""norm_act: LayerNorm over channels + SiLU, with and without frames in front, forward and backward.

Providers: eager (F.layer_norm, F.silu, F.pad), compiled (torch.compile of it), native (this
package). F.layer_norm cannot write into a given tensor: its "preallocated" rows run while the C
library keeps and reuses freed memory, so that no provider pays for fresh pages.
"""

import ctypes
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from harness import QUICK, Case, measure
from shapes import NORM_ACT_SHAPES

import vtok_ext as vt
from vtok_ext import _native

EPS = 1e-6
FRONT = 2
OPTIONS = (0, 1, EPS, True)  # kind "layer", groups, eps, act
CASES = [(shape, torch.float32) for shape in NORM_ACT_SHAPES]
CASES.append((NORM_ACT_SHAPES[0], torch.bfloat16))
if QUICK:
    CASES = CASES[2:3]
SHAPES = pytest.mark.parametrize(
    "shape, dtype", CASES, ids=lambda p: getattr(p, "name", str(p).removeprefix("torch."))
)
FRONTS = pytest.mark.parametrize("front", [0, FRONT], ids=["plain", "front"])
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # of mallopt(3)


@contextmanager
def reused_memory():
    """glibc serves every block from its heap and returns none to the system."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt") or not hasattr(libc, "malloc_trim"):
        yield  # another C library: fresh pages are counted
        return
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        # What glibc's thresholds grow to by themselves in a process that frees large blocks.
        libc.mallopt(_M_MMAP_MAX, 65536)
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, 64 << 20)
        libc.malloc_trim(0)


def measured(case, default, preallocated, device):
    """The case with both groups of providers, the default allocator first."""
    measure(case, {(name, "default"): call for name, call in default.items()}, device, 2.0)
    case.measurements.pop(0)  # the copy, which is measured again
    with reused_memory():
        calls = {(name, "preallocated"): call for name, call in preallocated.items()}
        return measure(case, calls, device, 2.0)


def inputs(shape, dtype, device):
    """x in channels_last_3d memory, weight, bias."""
    x = torch.randn(shape.shape, device=device).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last_3d)
    weight, bias = torch.randn(2, shape.shape[1], device=device).to(dtype)
    return x, weight, bias


def eager(x, weight, bias, front=0):
    y = F.silu(F.layer_norm(x.movedim(1, -1), weight.shape, weight, bias, EPS)).movedim(-1, 1)
    return F.pad(y, (0, 0, 0, 0, front, 0)) if front else y


def check(actual, expected):
    """Providers of this run agree: to a few roundings of the dtype."""
    # 5e-5: float32 sums over a million positions, in different orders.
    tolerance = 5e-5 if expected.dtype == torch.float32 else 2e-2
    difference = (actual.float() - expected.float()).abs().max()
    assert difference <= tolerance * expected.float().abs().max()


def case_of(direction, shape, dtype, front, bytes_moved):
    """The case without measurements."""
    if front:
        direction += f", {front} frames in front"
    return Case("norm_act", shape.name, str(dtype).removeprefix("torch."), direction, bytes_moved)


@FRONTS
@SHAPES
def bench_norm_act_forward(shape, dtype, front, device, record, benchmark):
    x, weight, bias = inputs(shape, dtype, device)
    compiled = torch.compile(eager, fullgraph=True)
    with torch.no_grad():
        out = vt.norm_act(x, weight, bias, front=front)
        check(out, eager(x, weight, bias, front))
        workspace = torch.empty(0, device=device)
        context = _native.call_context(x)

        @torch.compile(fullgraph=True)
        def compiled_into(x, weight, bias, out):
            out.copy_(eager(x, weight, bias, front))

        def native_into():
            _native.module().norm_act_forward(
                x, weight, bias, None, out, None, workspace, (*OPTIONS, front, False), context
            )

        default = {
            "eager": lambda: eager(x, weight, bias, front),
            "compiled": lambda: compiled(x, weight, bias, front),
            "native": lambda: vt.norm_act(x, weight, bias, front=front),
        }
        preallocated = {
            "eager": default["eager"],
            "compiled": lambda: compiled_into(x, weight, bias, out),
            "native": native_into,
        }
        bytes_moved = (x.numel() + out.numel()) * x.element_size()
        case = case_of("forward", shape, dtype, front, bytes_moved)
        record(measured(case, default, preallocated, device))
        benchmark.pedantic(native_into, rounds=3)


@FRONTS
@SHAPES
def bench_norm_act_backward(shape, dtype, front, device, record, benchmark):
    leaves = [t.requires_grad_() for t in inputs(shape, dtype, device)]
    with torch._functorch.config.patch(donated_buffer=False):  # its graph is used many times
        compiled = torch.compile(eager, fullgraph=True)(*leaves, front)
    results = {
        "eager": eager(*leaves, front),
        "compiled": compiled,
        "native": vt.norm_act(*leaves, front=front),
    }
    grad = torch.randn_like(results["native"])

    def backward(y):
        return torch.autograd.grad(y, leaves, grad, retain_graph=True)

    # In float32: eager sums a bfloat16 weight gradient in bfloat16, a third of it is rounding.
    exact = [t.detach().float().requires_grad_() for t in leaves]
    expected = torch.autograd.grad(eager(*exact, front), exact, grad.float())
    for actual, e in zip(backward(results["native"]), expected, strict=True):
        check(actual, e.to(actual.dtype))
    x, weight, bias = (t.detach() for t in leaves)
    outputs = [torch.empty_like(t) for t in (x, weight, bias)]
    module, context = _native.module(), _native.call_context(x)
    options = (*OPTIONS, front, False)
    device_index = x.get_device() if x.is_cuda else -1
    size = module.norm_act_workspace(list(x.shape), 0, 1, True, device_index)
    workspace = torch.empty(size, device=device)
    stats = None
    if not x.is_cuda:  # see NormActFunction
        stats = torch.empty(1, shape.shape[2], shape.shape[3] * shape.shape[4], 2)
        y = torch.empty_like(grad)
        module.norm_act_forward(x, weight, bias, None, y, stats, workspace, options, context)

    def native_into():
        module.norm_act_backward(
            grad, x, weight, bias, stats, *outputs, workspace, options, context
        )

    default = {name: lambda y=y: backward(y) for name, y in results.items()}
    bytes_moved = 3 * x.numel() * x.element_size()
    case = case_of("backward", shape, dtype, front, bytes_moved)
    record(measured(case, default, {**default, "native": native_into}, device))
    benchmark.pedantic(native_into, rounds=3)
