"""What is special about FSQ: published decision points, index rule, NaN, errors, equal bits on
every instruction set."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from emulated_cuda import EmulatedCuda
from torch._subclasses.fake_tensor import FakeTensorMode

import vtok_ext as vt
from vtok_ext import _native
from vtok_ext.ops.fsq import fsq_reference
from vtok_ext.ops.fsq_entropy import fsq_entropy_loss_reference


def test_decision_points_of_eight_levels(backend):
    """Specification section 6.1: q goes from -4 to 3 at these values of z."""
    points = torch.tensor([-1.42295, -0.79248, -0.43727, -0.14369, 0.14989, 0.50510, 1.13557])
    z = torch.stack([points - 1e-4, points + 1e-4], -1).reshape(-1, 1).to(backend.device)
    codes, indices = vt.fsq(z, [8])
    below = torch.arange(7)
    assert indices.tolist() == torch.stack([below, below + 1], -1).reshape(-1).tolist()
    assert codes.flatten().tolist() == [(i - 4) / 4 for i in indices.tolist()]


@pytest.mark.parametrize("levels", [2, 3, 5, 7, 8, 25, 26, 27, 128, 255, 256])
def test_every_level_is_reachable_and_comes_back(levels, backend):
    z = torch.linspace(-9, 9, 20001).reshape(-1, 1).to(backend.device)
    codes, indices = vt.fsq(z, [levels])
    assert indices.unique().tolist() == list(range(levels))
    assert torch.equal(indices, indices.sort().values), "indices must grow with z"
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rounded = vt.fsq_indices_to_codes(indices, [levels], dtype=dtype)
        assert torch.equal(rounded, codes.to(dtype))
        assert torch.equal(vt.fsq_codes_to_indices(rounded, [levels]), indices)


@pytest.mark.parametrize("left", [0, 1])
def test_planar_results_larger_than_caches(left):
    """From 8 MB on they go past the caches, in whole lines: what lies before and after must too."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(3, 5, 7, 150, 153, generator=generator)[..., left : left + 151]
    z[1, 2, 3, 4, 5] = float("nan")
    z.requires_grad_()
    grad = torch.randn(z.shape, generator=generator)
    codes, indices = vt.fsq(z, [8, 8, 8, 5, 5], channel_dim=1)
    assert codes.nbytes >= 8 << 20
    codes.backward(grad)
    packed = z.detach().movedim(1, -1).contiguous().requires_grad_()
    packed_codes, packed_indices = vt.fsq(packed, [8, 8, 8, 5, 5])
    packed_codes.backward(grad.movedim(1, -1).contiguous())
    assert torch.equal(indices, packed_indices)
    for planar, other in ((codes, packed_codes), (z.grad, packed.grad)):
        torch.testing.assert_close(planar, other.movedim(-1, 1), rtol=0, atol=0, equal_nan=True)


def test_first_channel_is_least_significant():
    low, high = -9.0, 9.0
    z = torch.tensor([[high, low, low], [low, high, low], [low, low, high]])
    assert vt.fsq(z, [8, 5, 3])[1].tolist() == [7, 4 * 8, 2 * 40]


def test_indices_above_two_to_the_31(backend):
    levels = [256] * 7 + [127]
    z = torch.full((3, 8), 20.0).to(backend.device)
    codes, indices = vt.fsq(z, levels)
    assert indices.dtype == torch.int64
    assert indices.tolist() == [256**7 * 127 - 1] * 3
    assert torch.equal(vt.fsq_indices_to_codes(indices, levels), codes)


def test_nan_and_infinity(backend):
    z = torch.zeros(5, 6)
    z[1, 2], z[2, 3], z[3, 4] = float("nan"), float("inf"), -float("inf")
    codes, indices = (t.cpu() for t in vt.fsq(z.to(backend.device), [8] * 6))
    expected_codes, expected_indices = fsq_reference(z, [8] * 6)
    assert torch.equal(codes.isnan(), z.isnan())
    assert torch.equal(codes.nan_to_num(), expected_codes.nan_to_num())
    assert indices.tolist() == expected_indices.tolist() and indices[1] == -1
    assert (indices[torch.tensor([0, 2, 3, 4])] >= 0).all()


def test_gradient_is_the_slope_of_the_bounded_value():
    """Against finite differences in float64 of tanh(z + shift) * half / (levels // 2), which has no
    rounding."""
    levels = torch.tensor([8.0, 5.0, 2.0, 27.0], dtype=torch.float64)
    half = (levels - 1) * 1.001 / 2
    offset = torch.where(levels % 2 == 0, 0.5, 0.0).double()
    shift = torch.atanh(offset / half)

    def bounded(z):
        return torch.tanh(z + shift) * half / (levels // 2)

    z = torch.randn(50, 4, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(vt.fsq(z, [8, 5, 2, 27])[0].sum(), z)
    step = 1e-6
    numeric = (bounded(z + step) - bounded(z - step)) / (2 * step)
    assert torch.allclose(grad, numeric, rtol=0, atol=1e-8)


def test_memory_format_is_kept():
    z = torch.randn(2, 6, 3, 4, 5).to(memory_format=torch.channels_last_3d)
    codes, indices = vt.fsq(z, [8] * 6, channel_dim=1)
    assert codes.is_contiguous(memory_format=torch.channels_last_3d)
    assert indices.shape == (2, 3, 4, 5) and indices.is_contiguous()
    for a, b in zip(vt.fsq(z.contiguous(), [8] * 6, channel_dim=1), (codes, indices), strict=True):
        assert torch.equal(a, b)


def test_expanded_input(backend):
    z = torch.randn(1, 6, device=backend.device).expand(50, 6)
    codes, indices = vt.fsq(z, [8] * 6)
    assert indices.unique().numel() == 1 and torch.equal(codes, codes[:1].expand_as(codes))


@pytest.mark.parametrize(
    "error, message, call",
    [
        (
            ValueError,
            r"levels must be in \[2, 256\], got 1",
            lambda: vt.fsq(torch.zeros(3, 2), [8, 1]),
        ),
        (
            ValueError,
            r"levels must be in \[2, 256\], got 257",
            lambda: vt.fsq(torch.zeros(3, 1), [257]),
        ),
        (
            ValueError,
            "levels must have 1 to 16 entries, got 17",
            lambda: vt.fsq(torch.zeros(17), [2] * 17),
        ),
        (
            ValueError,
            "levels must have 1 to 16 entries, got 0",
            lambda: vt.fsq(torch.zeros(3, 0), []),
        ),
        (ValueError, r"product below 2\^63", lambda: vt.fsq(torch.zeros(16), [256] * 16)),
        (TypeError, "levels must be integers, got 8.0", lambda: vt.fsq(torch.zeros(3, 1), [8.0])),
        (
            ValueError,
            r"z must have 6 channels at dimension 1 \(1 x 6 levels\), got \[3, 5\]",
            lambda: vt.fsq(torch.zeros(3, 5), [8] * 6),
        ),
        (
            ValueError,
            "z must have 12 channels",
            lambda: vt.fsq(torch.zeros(3, 6), [8] * 6, num_codebooks=2),
        ),
        (
            ValueError,
            "num_codebooks must be at least 1",
            lambda: vt.fsq(torch.zeros(3), [8], num_codebooks=0),
        ),
        (
            ValueError,
            r"channel_dim must be in \[-2, 2\), got 2",
            lambda: vt.fsq(torch.zeros(3, 6), [8] * 6, channel_dim=2),
        ),
        (
            ValueError,
            "z must have 1 to 6 dimensions",
            lambda: vt.fsq(torch.zeros(1, 1, 1, 1, 1, 1, 6), [8] * 6),
        ),
        (
            TypeError,
            "z must be float32, .* got torch.int64",
            lambda: vt.fsq(torch.zeros(3, 1).long(), [8]),
        ),
        (TypeError, "z must be a torch.Tensor, got list", lambda: vt.fsq([[0.0]], [8])),
        (
            TypeError,
            "indices must be int32 or int64, got torch.float32",
            lambda: vt.fsq_indices_to_codes(torch.zeros(3), [8]),
        ),
        (
            ValueError,
            r"indices must be in \[0, 64\), got values in \[0, 64\]",
            lambda: vt.fsq_indices_to_codes(torch.arange(65), [8, 8]),
        ),
        (
            ValueError,
            r"indices must be in \[0, 64\), got values in \[-1, 5\]",
            lambda: vt.fsq_indices_to_codes(torch.tensor([-1, 5]), [8, 8]),
        ),
        (
            ValueError,
            "indices must have 3 codebooks at dimension 1, got",
            lambda: vt.fsq_indices_to_codes(torch.zeros(3, 2).int(), [8], num_codebooks=3),
        ),
    ],
)
def test_errors_name_requirement_and_actual(error, message, call):
    with pytest.raises(error, match=message):
        call()


class Subclass(torch.Tensor):
    pass


def _fake():
    with FakeTensorMode():
        return torch.zeros(3, 6)


@pytest.mark.parametrize(
    "tensor, error, message",
    [
        (
            lambda: torch.zeros(3, 6, device="meta"),
            ValueError,
            "must be on cpu or cuda .* got device meta",
        ),
        (_fake, TypeError, "must be a plain torch.Tensor, got .*FakeTensor"),
        (
            lambda: torch.zeros(3, 6).as_subclass(Subclass),
            TypeError,
            "plain torch.Tensor, got .*Subclass",
        ),
        (lambda: torch.zeros(3, 6).to_sparse(), ValueError, "strided layout, got torch.sparse_coo"),
        (lambda: torch.zeros(3, 6, dtype=torch.complex64), TypeError, "got torch.complex64"),
        (lambda: [1.0], TypeError, "must be a plain torch.Tensor, got builtins.list"),
        (lambda: torch.zeros(6, 1, 1, 1, 1, 1, 1, 1, 1), ValueError, "at most 8 dimensions, got 9"),
    ],
)
def test_the_binding_takes_plain_tensors_with_memory_only(tensor, error, message):
    codes, indices = torch.zeros(3, 6), torch.zeros(3, dtype=torch.int32)
    with pytest.raises(error, match=message):
        _native.module().fsq_forward(tensor(), codes, indices, [8] * 6, 1, 1, (1, 0))


def test_freed_storage_is_refused():
    z = torch.zeros(3, 6)
    z.untyped_storage().resize_(0)
    with pytest.raises(
        ValueError, match="must have memory .* got a null pointer for shape \\[3, 6\\]"
    ):
        _native.module().fsq_forward(
            z, torch.zeros(3, 6), torch.zeros(3, dtype=torch.int32), [8] * 6, 1, 1, (1, 0)
        )


def test_the_binding_checks_shapes_that_protect_memory():
    z, indices = torch.zeros(3, 6), torch.zeros(3, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"codes must have shape \[3, 6\], got \[2, 6\]"):
        _native.module().fsq_forward(z, torch.zeros(2, 6), indices, [8] * 6, 1, 1, (1, 0))
    with pytest.raises(ValueError, match="indices have shape"):
        _native.module().fsq_forward(z, torch.zeros(3, 6), indices[:2], [8] * 6, 1, 1, (1, 0))
    with pytest.raises(ValueError, match="indices must be int64"):
        _native.module().fsq_forward(
            torch.zeros(3, 16), torch.zeros(3, 16), indices, [8] * 16, 1, 1, (1, 0)
        )


_BITS = """
import json, torch, vtok_ext as vt
z = 2 * torch.randn(40000, 6, generator=torch.Generator().manual_seed(0))
z.requires_grad_()
results = []
for levels in ([8] * 6, [7, 5, 26, 27, 255, 256]):
    for channel_dim, x in ((1, z), (0, z.t().contiguous())):
        codes, indices = vt.fsq(x, levels, channel_dim=channel_dim)
        (grad,) = torch.autograd.grad(codes.square().sum(), x)
        for t in (codes, grad):
            results.append(t.detach().view(torch.int32).long().sum().item())
        results.append(indices.long().sum().item())
print(json.dumps([vt.build_info()["cpu_isa"], results]))
"""


def test_equal_bits_on_every_instruction_set(emulated_module):
    """Note [The same bits everywhere]: each instruction set, and the CUDA kernels, give identical
    results."""
    found = {}
    for isa in ("baseline", "avx2", "avx512"):
        done = subprocess.run(
            [sys.executable, "-c", _BITS],
            env={**os.environ, "VTOK_CPU_ISA": isa},
            capture_output=True,
            text=True,
        )
        if "at most" in done.stderr:  # this machine cannot run it
            continue
        name, found[isa] = json.loads(done.stdout.splitlines()[-1])
        assert name == isa
    z = 2 * torch.randn(40000, 6, generator=torch.Generator().manual_seed(0))
    native = vt.fsq(z, [7, 5, 26, 27, 255, 256])
    with _native.use_module(emulated_module):
        emulated = vt.fsq(z, [7, 5, 26, 27, 255, 256])
    assert all(torch.equal(a, b) for a, b in zip(native, emulated, strict=True))
    assert len({json.dumps(results) for results in found.values()}) == 1 and "baseline" in found


def _boundaries(levels):
    """Where the level grows, in float32 as csrc/fsq/fsq_channel.h computes them."""
    half, offset = (levels - 1) * 1.001 / 2, 0.5 * (levels % 2 == 0)
    bounded = torch.arange(levels - 1, dtype=torch.float64) + 0.5 - levels // 2 + offset
    return ((bounded / half).atanh() - math.atanh(offset / half)).float()


@pytest.mark.parametrize("channels", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("packed", [True, False])
def test_steps_by_saturation_are_the_boundaries(channels, packed, emulated_module):
    """Note [Steps by saturation] in csrc/fsq/fsq_cuda.cu, at every boundary and its neighbours, and
    codes of every number of levels, which the CUDA kernels do not divide for."""
    infinity = torch.tensor(float("inf"))
    special = torch.tensor([0.0, -0.0, 1e-42, 3e38, -3e38, infinity, -infinity, float("nan")])
    for levels in (*range(2, 18), 26, 27, 99, 255, 256):
        exact = _boundaries(levels) if levels <= 16 else torch.linspace(-6, 6, 2000)
        beside = [exact.nextafter(infinity), exact.nextafter(-infinity)]
        z = torch.cat([exact, *beside, special])
        z = torch.stack([z.roll(d) for d in range(channels)], -1 if packed else 0).contiguous()
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            call = (z.to(dtype), [levels] * channels)
            native = vt.fsq(*call, channel_dim=-1 if packed else 0)
            with EmulatedCuda(emulated_module, "", f"{levels} {channels}"):
                emulated = vt.fsq(*call, channel_dim=-1 if packed else 0)
            assert torch.equal(native[1], emulated[1])
            bits = torch.int32 if dtype == torch.float32 else torch.int16
            a, b = (t[0].nan_to_num(77.0).view(bits) for t in (native, emulated))
            assert torch.equal(a, b), f"{levels} levels, {dtype}"


@pytest.mark.parametrize("levels", [[8, 32], [32, 5], [3, 16, 17], [8, 16], [17, 40]])
def test_levels_of_a_channel_do_not_depend_on_memory_or_other_channels(levels, emulated_module):
    """One channel of more than 16 levels made packed memory use tanh for all of its channels, which
    decides otherwise than comparing for a few numbers next to each boundary."""
    columns = []
    for count in levels:
        middle = _boundaries(count).view(torch.int32)[:, None]
        columns.append((middle + torch.arange(-50, 51, dtype=torch.int32)).view(torch.float32))
    rows = max(column.numel() for column in columns)
    z = torch.stack([c.flatten().repeat(40)[:rows] for c in columns], dim=1)
    codes, indices = vt.fsq(z, levels)
    planar_codes, planar = vt.fsq(z.T.contiguous(), levels, channel_dim=0)
    assert torch.equal(indices, planar) and torch.equal(codes, planar_codes.T)
    for channel, count in enumerate(levels):
        alone = vt.fsq(z[:, channel, None].contiguous(), [count])[0]
        assert torch.equal(codes[:, channel], alone[:, 0])
    for given, dim in ((z, -1), (z.T.contiguous(), 0)):
        with EmulatedCuda(emulated_module, "", f"{levels} {dim}"):
            emulated = vt.fsq(given, levels, channel_dim=dim)
        assert torch.equal(emulated[1], indices)


def test_subnormal_halves_where_a_thread_flushes_subnormal_floats():
    """They are ordinary numbers in float32, and stay what they are."""
    x = torch.full((1, 1, 2, 2, 2), 1e-5, dtype=torch.float16)
    assert torch.set_flush_denormal(True)
    try:
        y = vt.temporal_upsample(x, interpolation="nearest")
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(y, x.repeat_interleave(2, dim=2))


def test_references_run_without_the_compiled_kernels():
    code = """if True:
        import torch, vtok_ext as vt
        print(vt.build_info()["native"], vt.fsq(torch.ones(2, 2), [8, 8])[1])
    """
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "VTOK_NATIVE": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    expected = vt.fsq(torch.ones(2, 2), [8, 8])[1]
    assert done.stdout.strip() == f"False {expected}"


def test_entropy_of_certain_and_of_uniform_assignments():
    """A token far from 0 picks one corner code; a token at 0 is spread over all of them."""
    corner = fsq_entropy_loss_reference(torch.full((10, 2), 9.0), [3, 3])
    assert corner.per_sample < 1e-6 and corner.codebook < 1e-6
    uniform = fsq_entropy_loss_reference(torch.zeros(10, 2), [3, 3])
    assert torch.isclose(uniform.per_sample, torch.tensor(9.0).log())
    corners = torch.tensor([[9.0, 9.0], [-9.0, 9.0], [9.0, -9.0], [-9.0, -9.0]])
    diverse = fsq_entropy_loss_reference(corners, [3, 3])
    assert torch.isclose(diverse.loss, -torch.tensor(4.0).log(), atol=1e-5)


def test_layer_losses_and_annealing():
    layer = vt.FSQ([8, 8], channel_dim=1)
    z = torch.randn(2, 2, 3, 4, 4, requires_grad=True)
    codes, indices, losses = layer(z, step=500)
    assert codes.shape == z.shape and indices.shape == (2, 3, 4, 4)
    expected = layer.annealed_entropy_weight(500) * losses["entropy"] + 0.25 * losses["commitment"]
    assert torch.isclose(losses["aux_loss"], expected)
    losses["aux_loss"].backward()
    assert z.grad.abs().sum() > 0
    assert [layer.annealed_entropy_weight(n) for n in (0, 2000, 9999)] == pytest.approx(
        [0.3, 0.1, 0.1]
    )
    assert layer.annealed_entropy_weight(1000) == pytest.approx(0.2)
    assert layer.eval()(z)[2] == {} and not layer.state_dict()
    assert torch.equal(layer.indices_to_codes(indices), codes)
    assert torch.equal(layer.codes_to_indices(codes), indices)
