"""The errors that csrc/core/vectorized.h and half.h state, measured against float64."""

import pytest
import torch

from vtok_ext import _native


def evaluate(name, x):
    y = torch.empty_like(x)
    _native.module().evaluate(name, x, y)
    return y


def error_in_ulp(actual, exact):
    """|actual - exact| in units of the last place of the exact value (float32, normal range)."""
    exponent = torch.frexp(exact).exponent.clamp(min=-125)
    return ((actual.double() - exact).abs() / 2.0 ** (exponent.double() - 24)).max()


@pytest.mark.parametrize(
    "name, exact, low, high, ulp",
    [
        ("exp", torch.exp, -87.0, 88.0, 2.0),
        ("log", torch.log, 1e-5, 0.5, 2.0),
        ("log", torch.log, 2.0, 1e30, 2.0),
        ("tanh", torch.tanh, -12.0, 12.0, 3.0),
        ("tanh", torch.tanh, -0.5, 0.5, 3.0),
        ("tanh", torch.tanh, -1e-3, 1e-3, 3.0),
        ("sigmoid", torch.sigmoid, -87.0, 87.0, 3.0),
    ],
)
def test_error_is_as_stated(name, exact, low, high, ulp):
    x = torch.linspace(low, high, 2_000_001, dtype=torch.float64).float()
    assert error_in_ulp(evaluate(name, x), exact(x.double())) < ulp


def test_log_near_one_and_of_small_values():
    x = torch.linspace(0.5, 2.0, 2_000_001, dtype=torch.float64).float()
    assert (evaluate("log", x).double() - x.double().log()).abs().max() < 1e-7
    tiny = torch.logspace(-37, -5, 100_001, dtype=torch.float64).float()
    assert error_in_ulp(evaluate("log", tiny), tiny.double().log()) < 2.0
    assert evaluate("log", torch.ones(1)).item() == 0.0


def test_special_values():
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([0.0, -0.0, inf, -inf, nan, 1e-40, 200.0, -200.0])
    tanh = evaluate("tanh", x)
    assert tanh[:4].tolist() == [0.0, 0.0, 1.0, -1.0] and tanh[4].isnan()
    assert torch.signbit(tanh[1]) and not torch.signbit(tanh[0])
    assert tanh[6:].tolist() == [1.0, -1.0]
    exp = evaluate("exp", x)
    assert exp[:2].tolist() == [1.0, 1.0] and exp[3] == 0 and exp[4].isnan() and exp[7] == 0
    assert torch.isfinite(exp[2]) and exp[2] > 1e38
    sigmoid = evaluate("sigmoid", x)
    assert sigmoid[:3].tolist() == [0.5, 0.5, 1.0] and 0 <= sigmoid[3] < 1e-38
    assert sigmoid[4].isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_conversions_are_exact_both_ways(dtype):
    """Every half value survives a round trip, and rounding of floats agrees with torch bit for
    bit."""
    name = str(dtype).removeprefix("torch.")
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    every = every[~every.isnan()]
    assert torch.equal(evaluate(name, every), every)
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (2_000_000,), generator=generator).to(torch.int32)
    x = bits.view(torch.float32)
    small = torch.randn(500_000, generator=generator) * 1e-5  # subnormals of float16
    x = torch.cat([x[~x.isnan()], small, torch.tensor([65504.0, 65519.9, 65520.0, -65520.0, 2e-8])])
    assert torch.equal(evaluate(name, x), x.to(dtype).float())
    assert evaluate(name, torch.tensor([float("nan")])).isnan().all()
