"""causal_conv3d on the convolutions of VidTok 488 and ProMAG's base: forward and both gradients.

Providers: what PyTorch offers (F.pad + F.conv3d in contiguous and in channels_last_3d memory, and
compiled), diffusers' causal convolution of a video autoencoder where it is installed, and native:
once on a bare clip and once on a buffer that already holds its front frames, as norm_act writes it.

"default" rows leave allocation to torch. Convolutions allocate their result inside torch, so that
there are no rows with outputs made beforehand; "tuned" rows come from a run under an allocator that
keeps freed memory (a preloaded jemalloc or tcmalloc, or glibc with MALLOC_MMAP_THRESHOLD_ and
MALLOC_TRIM_THRESHOLD_ at 1e12), which VTOK_BENCH_ALLOCATOR=tuned says; VTOK_BENCH_MERGE=1 joins the
runs. VTOK_BENCH_DTYPES names others than float32 on a CPU and bfloat16 on a GPU. Upsampling rows
include the upsampling. The floor is the greater of two times: the products at the rate of the
fastest product of matrices or images measured in this run, and copying the bytes. That the last
wave of blocks leaves a part of a GPU idle is not taken off it.
"""

import math
import os
from collections import Counter
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from conv_shapes import PROMAG_SHAPES, ConvShape, vidtok_shapes
from harness import COMPILED, QUICK, Case, achievable_gflop_per_s, measure

import vtok_ext as vt

LAYOUT = torch.channels_last_3d
ALLOCATION = "tuned" if os.environ.get("VTOK_BENCH_ALLOCATOR") == "tuned" else "default"
# Seconds of a case; a CPU has 35 shapes of up to a second each.
BUDGET_S = float(os.environ.get("VTOK_BENCH_BUDGET_S", 4.0))
SIZES = (
    (128,) if QUICK else tuple(map(int, os.environ.get("VTOK_BENCH_SIZES", "128,256").split(",")))
)


def shapes() -> list[tuple[str, ConvShape, int]]:
    """(set, shape, how often it runs) of every distinct convolution."""
    sets = {f"VidTok 488, 17x{size}x{size}": vidtok_shapes(size) for size in SIZES}
    sets["ProMAG base, 17x128x128"] = Counter(PROMAG_SHAPES)
    rows = [(name, shape, n) for name, found in sets.items() for shape, n in found.items()]
    return [r for r in rows if r[1].flops < 3e8] if QUICK else rows


# A JSON of its own for the large clips, which a CPU measures apart from the others.
RESULTS_NAME = "causal_conv3d_256" if SIZES == (256,) else "causal_conv3d"
SHAPES = shapes()
IDS = [f"{name}-{shape.name}" for name, shape, _ in SHAPES]


class Problem:
    """Tensors of one shape, and the call of every provider."""

    def __init__(self, shape: ConvShape, dtype: torch.dtype, device: str):
        self.shape = shape
        size = (1, shape.channels, shape.frames, shape.height, shape.width)
        # On the device: a CPU takes a second to make the largest video.
        options = {"generator": torch.Generator(device).manual_seed(0), "device": device}
        self.plain = torch.randn(size, **options).to(dtype)
        self.x = self.plain.contiguous(memory_format=LAYOUT)
        weight = torch.randn(shape.columns, shape.channels, *shape.kernel, **options)
        self.weight = (weight / (shape.channels * 27) ** 0.5).to(dtype)
        self.bias = torch.randn(shape.columns, **options).to(dtype)
        front = 0 if shape.upsample else shape.front
        self.buffer = F.pad(self.x, (0, 0, 0, 0, front, 0)).contiguous(memory_format=LAYOUT)
        self.compiled = torch.compile(self.eager, fullgraph=True)

    def eager(self, x, weight):
        """As published: pad in time, convolve with spatial padding; one sided padding by hand."""
        time, space = self.shape.repeats
        if self.shape.upsample:
            x = F.interpolate(x, scale_factor=(time, space, space), mode="nearest")
        (top, bottom), (left, right) = self.shape.spatial_padding
        one_sided = (left, right, top, bottom) if self.shape.one_sided else (0, 0, 0, 0)
        if self.shape.front or self.shape.one_sided:
            x = F.pad(x, (*one_sided, self.shape.front, 0))
        padding = (0, 0, 0) if self.shape.one_sided else (0, top, left)
        return F.conv3d(x, weight, self.bias, self.shape.stride, padding)

    def bare(self, x, weight):
        """The op on a clip."""
        return vt.causal_conv3d(
            x,
            weight,
            self.bias,
            stride=self.shape.stride,
            front=self.shape.front,
            spatial_padding=self.shape.spatial_padding,
            upsample=self.shape.upsample,
        )

    def native(self, buffer, weight):
        """The op on a buffer with its front frames; upsampling adds them by itself."""
        if self.shape.upsample:
            return self.bare(buffer, weight)
        return vt.causal_conv3d(
            buffer,
            weight,
            self.bias,
            stride=self.shape.stride,
            temporal="valid",
            spatial_padding=self.shape.spatial_padding,
        )

    def diffusers(self):
        """A causal convolution of diffusers with the same weights, or None."""
        shape = self.shape
        if shape.front != shape.kernel[0] - 1 or shape.stride != (1, 1, 1):
            return None
        if shape.one_sided or shape.upsample:
            return None
        try:
            from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
        except ImportError:
            return None
        padding = tuple(k // 2 for k in shape.kernel)
        conv = WanCausalConv3d(shape.channels, shape.columns, shape.kernel, padding=padding)
        conv = conv.to(self.x.device, self.x.dtype)
        conv.load_state_dict({"weight": self.weight, "bias": self.bias})
        return conv


def agree(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Fails unless both are equal up to rounding."""
    tolerance = 2e-2 if actual.dtype == torch.bfloat16 else 2e-3
    scale = expected.float().abs().max()
    assert (actual.float() - expected.float()).abs().max() <= tolerance * scale


def make_case(name: str, shape: ConvShape, count: int, dtype: torch.dtype, direction: str) -> Case:
    t, h, w = shape.output
    elements = shape.channels * shape.frames * shape.height * shape.width
    elements += shape.columns * t * h * w
    elements += shape.columns * shape.channels * math.prod(shape.kernel)
    label = f"{name}: {count} x {shape.name}, {shape.flops / 1e9:.1f} GFLOP"
    return Case(
        "causal_conv3d",
        label,
        str(dtype).removeprefix("torch."),
        direction,
        elements * (2 if dtype == torch.bfloat16 else 4),
        weight=count,
        gflop=shape.needed_flops / 1e9,
    )


@cache
def rate(dtype: torch.dtype, device: str) -> float:
    """Of this run; see `achievable_gflop_per_s`."""
    return achievable_gflop_per_s(dtype, device)


def timed(case: Case, providers: dict, dtype: torch.dtype, device: str) -> Case:
    """Measures a case; a copy of its bytes stays the floor where arithmetic is not the limit."""
    case.achievable_gflop_per_s = rate(dtype, device)
    measure(case, providers, device, BUDGET_S, least_rounds=3 if device == "cpu" else 10)
    arithmetic_ms = case.gflop / case.achievable_gflop_per_s * 1e3
    for m in case.measurements[1:]:
        m.floor_fraction = max(m.floor_fraction, arithmetic_ms / m.median_ms)
    return case


def dtypes(device: str) -> list[torch.dtype]:
    default = "bfloat16" if device == "cuda" else "float32"
    names = os.environ.get("VTOK_BENCH_DTYPES", default).split(",")
    return [getattr(torch, name) for name in names]


@pytest.mark.parametrize("name, shape, count", SHAPES, ids=IDS)
def bench_causal_conv3d_forward(name, shape, count, device, record, benchmark):
    for dtype in dtypes(device):
        p = Problem(shape, dtype, device)
        with torch.no_grad():
            expected = p.eager(p.plain, p.weight)
            agree(p.bare(p.x, p.weight), expected)
            agree(p.native(p.buffer, p.weight), expected)
            providers = {
                ("pad + conv, contiguous", ALLOCATION): lambda p=p: p.eager(p.plain, p.weight),
                ("pad + conv, channels last", ALLOCATION): lambda p=p: p.eager(p.x, p.weight),
                ("native, bare clip", ALLOCATION): lambda p=p: p.bare(p.x, p.weight),
                ("native", ALLOCATION): lambda p=p: p.native(p.buffer, p.weight),
            }
            if COMPILED:
                providers["compiled", ALLOCATION] = lambda p=p: p.compiled(p.x, p.weight)
            peer = p.diffusers()
            if peer is not None:
                agree(peer(p.plain), expected)
                providers["diffusers", ALLOCATION] = lambda p=p, peer=peer: peer(p.plain)
            case = make_case(name, shape, count, dtype, "forward")
            record(timed(case, providers, dtype, device))
            benchmark.pedantic(lambda p=p: p.native(p.buffer, p.weight), rounds=1)


@pytest.mark.parametrize("which", ["input gradient", "weight gradient"])
@pytest.mark.parametrize("name, shape, count", SHAPES, ids=IDS)
def bench_causal_conv3d_gradient(name, shape, count, which, device, record, benchmark):
    """The backward pass alone: graphs are made once and kept."""
    for dtype in dtypes(device):
        p = Problem(shape, dtype, device)
        t, h, w = shape.output
        direction = torch.randn(1, shape.columns, t, h, w, device=device).to(dtype)
        direction = direction.contiguous(memory_format=LAYOUT)
        providers, results = {}, {}
        for provider, function, x in (
            ("pad + conv, contiguous", p.eager, p.plain),
            ("pad + conv, channels last", p.eager, p.x),
            *([("compiled", p.compiled, p.x)] if COMPILED and not QUICK else []),
            ("native, bare clip", p.bare, p.x),
            ("native", p.native, p.buffer),
        ):
            leaf = (x if which == "input gradient" else p.weight).detach().requires_grad_()
            y = function(*((leaf, p.weight) if which == "input gradient" else (x, leaf)))

            def call(y=y, leaf=leaf, direction=direction):
                return torch.autograd.grad(y, leaf, direction, retain_graph=True)[0]

            providers[provider, ALLOCATION] = call
            results[provider] = call()
        expected = results["pad + conv, contiguous"]
        agree(results["native, bare clip"], expected)
        found = results["native"]
        is_buffer = which == "input gradient" and not shape.upsample
        agree(found[:, :, shape.front :] if is_buffer else found, expected)
        case = make_case(name, shape, count, dtype, which)
        record(timed(case, providers, dtype, device))
        benchmark.pedantic(providers["native", ALLOCATION], rounds=1)
