"""The linear layer: oneDNN's float32 products against PyTorch's, and what is left to PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from vtok_ext.layers.linear import Linear, linear

# Sums of up to 1,536 products in another order.
TOLERANCES = {"rtol": 2e-5, "atol": 2e-5}
onednn = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available(),
    reason="products are PyTorch's without AVX-512 and oneDNN",
)


def operands(shape, rows=192, bias=True, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    sizes = [shape, (rows, shape[-1]), *([(rows,)] if bias else [])]
    tensors = [torch.randn(size, generator=generator) for size in sizes]
    tensors[1] /= shape[-1] ** 0.5
    return [t.to(dtype).requires_grad_() for t in tensors]


def ran_onednn(call) -> bool:
    with profile(activities=[ProfilerActivity.CPU]) as events:
        call()
    return any("_linear_pointwise" in event.key for event in events.key_averages())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(128, 96), (2, 67, 96), (2, 3, 31, 96), (12, 1536), (1, 6144)])
def test_values_and_gradients_are_those_of_pytorch(shape, bias):
    tensors = operands(shape, bias=bias)
    expected = F.linear(*tensors)
    out = linear(*tensors)
    torch.testing.assert_close(out, expected, **TOLERANCES)
    grad = torch.randn_like(out)
    for found, wanted in zip(
        torch.autograd.grad(out, tensors, grad),
        torch.autograd.grad(expected, tensors, grad),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted, **TOLERANCES)


def test_slices_transposes_and_expanded_gradients():
    wide, weight = operands((2, 80, 192))[0], torch.randn(96, 192)
    for x, w in (
        (wide[:, 1:, 96:], weight[:, 96:]),
        (wide.transpose(1, 2)[..., :64], weight.t()[:64].t()[:, :64]),
        (wide[:1].expand(2, -1, -1), weight[::2]),
    ):
        expected, out = F.linear(x, w), linear(x, w)
        torch.testing.assert_close(out, expected, **TOLERANCES)
        found, wanted = (torch.autograd.grad(y.sum(), wide)[0] for y in (out, expected))
        torch.testing.assert_close(found, wanted, **TOLERANCES)


def test_second_derivative():
    def second(call):
        x, weight, bias = operands((64, 128))
        (grad,) = torch.autograd.grad(call(x, weight, bias).square().sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), (x, weight, bias))

    for found, wanted in zip(second(linear), second(F.linear), strict=True):
        torch.testing.assert_close(found / wanted.std(), wanted / wanted.std(), **TOLERANCES)


@onednn
def test_large_float32_products_are_onednns():
    layer, x = Linear(96, 192), torch.randn(128, 96)
    assert ran_onednn(lambda: layer(x))
    with torch.inference_mode():
        assert ran_onednn(lambda: layer(x))
    loss = layer(x.requires_grad_()).sum()
    assert ran_onednn(loss.backward)


def test_all_else_is_pytorchs():
    x, weight, bias = operands((128, 96))
    calls = [
        lambda: linear(x[:2], weight, bias),
        lambda: linear(x.double(), weight.double(), bias.double()),
        lambda: linear(x.bfloat16(), weight.bfloat16(), bias.bfloat16()),
        lambda: torch.func.vmap(lambda row: linear(row, weight, bias))(x[:, None]),
    ]
    for call in calls:
        assert not ran_onednn(call)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, bias).dtype == torch.bfloat16
    assert linear(x[:0], weight, bias).shape == (0, 192)
    with pytest.raises(RuntimeError):
        linear(x, weight[:, 1:], bias)


def test_counters_of_products_see_them():
    layer, x = Linear(96, 192), torch.randn(128, 96, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 128 * 96 * 192


def test_compiles_as_one_graph():
    layer, x = Linear(96, 192), torch.randn(128, 96)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), F.linear(x, layer.weight, layer.bias), **TOLERANCES)
