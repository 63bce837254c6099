"""What is special about norm_act: agreement with torch's norms, layouts read in place, the padded
buffer, casts, numerical range, determinism of the weight gradients, errors."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close, in_float64

import vtok_ext as vt
from vtok_ext import _native
from vtok_ext.ops.norm_act import norm_act_reference

NORMS = ("layer", "rms", "group", "group_rms")


def video(*shape, seed=0, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) + 1.5
    return x.to(dtype).to(device, memory_format=torch.channels_last_3d)


def affine(channels, device="cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(9)
    pair = torch.randn(2, channels, generator=generator, dtype=torch.float64)
    return tuple(pair.to(dtype).to(device))


def is_channels_last(x):
    return x.is_contiguous(memory_format=torch.channels_last_3d)


def test_against_the_norms_of_torch(backend):
    """Independent of the reference: LayerNorm, RMS norm and GroupNorm as torch computes them."""
    x = video(2, 64, 3, 6, 5, device=backend.device)
    weight, bias = affine(64, backend.device)
    last = x.movedim(1, -1)
    layer = F.layer_norm(last, (64,), weight, bias, 1e-6).movedim(-1, 1)
    assert_close(vt.norm_act(x, weight, bias), F.silu(layer), "layer", 2)
    rms = F.rms_norm(last, (64,), weight, 1e-6).movedim(-1, 1)
    assert_close(vt.norm_act(x, weight, norm="rms", act=False), rms.contiguous(), "rms", 2)
    group = F.group_norm(x.transpose(1, 2).flatten(0, 1), 8, weight, bias, 1e-6)
    group = group.unflatten(0, (2, 3)).transpose(1, 2)
    assert_close(
        vt.norm_act(x, weight, bias, norm="group", num_groups=8), F.silu(group), "group", 2
    )


@pytest.mark.parametrize("eps", [1e-6, 0.0])
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("channels", [3, 15, 16, 17])
def test_few_channels_in_blocks_that_are_not_full(channels, norm, eps):
    """Rows of up to 15 channels are transposed; 19 rows are a block and 3 more."""
    x = video(1, channels, 2, 3, 19).requires_grad_()
    leaves = [x, *(p.requires_grad_() for p in affine(channels))]
    options = {"norm": norm, "eps": eps, "front": 2, "temporal": "replicate"}
    y = vt.norm_act(*leaves, **options)
    double = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = norm_act_reference(*double, **options)
    direction = video(*y.shape, seed=1)
    found = [y, *torch.autograd.grad(y, leaves, direction)]
    right = [expected, *torch.autograd.grad(expected, double, direction.double())]
    for a, b in zip(found, right, strict=True):
        assert (a - b).abs().max() <= 2e-5 * b.abs().max()


@pytest.mark.parametrize("norm", NORMS)
def test_gradcheck(norm):
    x = video(2, 6, 2, 3, 2, dtype=torch.float64).requires_grad_()
    weight, bias = (p.requires_grad_() for p in affine(6, dtype=torch.float64))
    state = video(2, 6, 2, 3, 2, seed=1, dtype=torch.float64).requires_grad_()

    def run(x, weight, bias, state=None):
        temporal = "replicate" if state is None else "zeros"
        kwargs = {"norm": norm, "num_groups": 3, "front": 2, "temporal": temporal}
        return vt.norm_act(x, weight, bias, state=state, border=(1, 1), **kwargs)

    assert torch.autograd.gradcheck(run, (x, weight, bias))
    assert torch.autograd.gradcheck(run, (x, weight, bias, state))


@pytest.mark.parametrize("norm", ["layer", "group"])
@pytest.mark.parametrize("channels", [32, 6])
def test_slices_of_channels_last_memory_are_read_in_place(norm, channels, backend):
    """A copy would be invisible in the values; one element outside the slice is NaN to show reads
    there, and rows start at any multiple of the element size."""
    kwargs = {"norm": norm, "num_groups": 2}
    for dtype in (torch.float32, torch.bfloat16):
        whole = torch.full((2, 5, 7, 8, channels + 3), torch.nan, dtype=dtype)
        x = whole.to(backend.device)[:, 1:4, 2:6, 1:7, 1 : channels + 1].permute(0, 4, 1, 2, 3)
        x.copy_(video(2, channels, 3, 4, 6, dtype=dtype))
        weight, bias = affine(channels, backend.device)
        expected = norm_act_reference(x, weight, bias, **kwargs)
        actual = vt.norm_act(x, weight, bias, **kwargs)
        assert_close(actual, expected, f"{norm} {dtype}")
        assert is_channels_last(actual)
        grads = []
        for function in (vt.norm_act, norm_act_reference):
            leaf = x.detach().requires_grad_()
            function(leaf, weight, bias, **kwargs).square().sum().backward()
            grads.append(leaf.grad)
        assert_close(*grads, f"{norm} {dtype} gradient", 3)


def test_channels_last_slices_are_not_copied(monkeypatch):
    x = video(2, 16, 5, 4, 4)[:, :, 1:4, 1:, :3]
    pointers = []
    module = _native.module()

    class Spy:
        def __getattr__(self, name):
            return getattr(module, name)

        def norm_act_forward(self, x, *rest):
            pointers.append(x.data_ptr())
            return module.norm_act_forward(x, *rest)

    with _native.use_module(Spy()), torch.no_grad():
        vt.norm_act(x)
        vt.norm_act(x.contiguous())
    assert pointers[0] == x.data_ptr() and len(pointers) == 2


@pytest.mark.parametrize("temporal", ["zeros", "replicate", "state"])
@pytest.mark.parametrize("norm", ["layer", "group_rms"])
def test_buffer_gives_a_convolution_what_padding_would(temporal, norm, backend):
    x = video(2, 8, 3, 5, 6, device=backend.device)
    state = video(2, 8, 2, 5, 6, seed=3, device=backend.device) if temporal == "state" else None
    options = {"norm": norm, "num_groups": 2}
    plain = vt.norm_act(x, **options)
    buffer = vt.norm_act(
        x,
        **options,
        front=2,
        temporal="replicate" if temporal == "replicate" else "zeros",
        state=state,
        border=(1, 1),
    )
    assert buffer.shape == (2, 8, 5, 6, 7) and is_channels_last(buffer)
    assert torch.equal(buffer[:, :, 2:, :5, :6], plain)
    assert not buffer[:, :, :, 5:].any() and not buffer[..., 6:].any()
    front = {"zeros": torch.zeros_like(plain[:, :, :1]), "replicate": plain[:, :, :1]}
    expected = state if state is not None else front[temporal].expand(-1, -1, 2, -1, -1)
    assert torch.equal(buffer[:, :, :2, :5, :6], expected)


@pytest.mark.parametrize("temporal", ["zeros", "replicate"])
@pytest.mark.parametrize("norm", ["layer", "group"])
def test_chunks_with_state_equal_the_whole(norm, temporal, backend):
    """norm - pad - causal stride-2 convolution, in chunks that hand on the last frames of the
    buffer: values, and gradients that reach earlier chunks through the state only."""
    x = video(1, 16, 7, 4, 6, device=backend.device)
    leaves = [t.requires_grad_() for t in (x, *affine(16, backend.device))]
    x, weight, bias = leaves
    kernel = video(8, 16, 3, 3, 3, seed=2, device=backend.device)
    options = {"norm": norm, "num_groups": 4, "front": 2, "temporal": temporal, "border": (1, 1)}
    state, parts = None, []
    for chunk in x.split([1, 4, 2], dim=2):
        buffer = vt.norm_act(chunk, weight, bias, **options, state=state)
        state = buffer[:, :, -2:, :4, :6].clone(memory_format=torch.channels_last_3d)
        parts.append(F.conv3d(buffer, kernel, stride=(1, 2, 2)))
    whole = F.conv3d(vt.norm_act(x, weight, bias, **options), kernel, stride=(1, 2, 2))
    assert_close(torch.cat(parts, 2), whole, "chunks", 10)
    grad = video(*whole.shape, seed=4, device=backend.device)
    expected = torch.autograd.grad(whole, leaves, grad)
    actual = torch.autograd.grad(torch.cat(parts, 2), leaves, grad)
    for name, a, e in zip(("x", "weight", "bias"), actual, expected, strict=True):
        assert_close(a, e, f"grad_{name}", 10)


def test_strided_parameters(backend):
    x = video(2, 8, 2, 3, 4, device=backend.device)
    weight, bias = (p[::2] for p in affine(16, backend.device))
    for norm in ("layer", "group"):
        found = []
        for function in (vt.norm_act, norm_act_reference):
            leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
            y = function(*leaves, norm=norm, num_groups=2)
            found.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
        for name, a, e in zip(("y", "x", "weight", "bias"), *found, strict=True):
            assert_close(a, e, f"{norm} {name}", 3)


@pytest.mark.parametrize("out", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_casts_and_parameters_of_any_floating_dtype(dtype, out, backend):
    x = video(1, 64, 2, 3, 3, dtype=dtype, device=backend.device)
    for parameter in (torch.float32, torch.float16, torch.bfloat16):
        weight, bias = (p.to(parameter) for p in affine(64, backend.device))
        for norm in ("layer", "group"):
            kwargs = {"norm": norm, "dtype": out, "front": 1, "temporal": "replicate"}
            results = []
            for function in (vt.norm_act, norm_act_reference):
                leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
                y = function(*leaves, **kwargs)
                loss = (y * torch.linspace(-1, 1, y.shape[-1], device=y.device).to(out)).sum()
                results.append((y, *torch.autograd.grad(loss, leaves)))
            for name, a, e in zip(("y", "x", "weight", "bias"), *results, strict=True):
                assert_close(a.to(e.dtype), e, name, 1 if name == "y" else 8)
                assert a.dtype == e.dtype


def test_dtype_under_autocast():
    x = video(1, 8, 2, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert vt.norm_act(x).dtype == torch.bfloat16
        assert vt.norm_act(x.bfloat16()).dtype == torch.bfloat16
        assert vt.norm_act(x, dtype=torch.float32).dtype == torch.float32
        assert vt.norm_act(x.double()).dtype == torch.float64
        assert vt.norm_act(x).equal(norm_act_reference(x))
    assert vt.norm_act(x).dtype == torch.float32


@pytest.mark.parametrize("norm", NORMS)
def test_a_large_mean_costs_no_accuracy(norm, backend):
    """E[x^2] - mean^2 in float32 would be off by a tenth, and by all of it in a frame's sums."""
    x = video(1, 32, 1, 70, 40) - 1.5
    x = x.to(backend.device) + 1000.0
    kwargs = {"norm": norm, "num_groups": 4, "act": False}
    expected = norm_act_reference(in_float64(x), **kwargs).float()
    # x itself is known to 3e-5 only: the float32 input is the same for both, so this is the sums.
    assert_close(vt.norm_act(x, **kwargs), expected, norm, 50)


def test_extreme_values(backend):
    """No overflow in x * sigmoid(x) or its slope; NaN stays in its row, or its frame and group."""
    weight = torch.tensor([1e4, -1e4] * 16, device=backend.device)
    x = video(1, 32, 2, 2, 3, device=backend.device).requires_grad_()
    y = vt.norm_act(x, weight)
    assert y.isfinite().all()
    assert_close(y, norm_act_reference(x, weight), "steep", 2)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert grad.isfinite().all()
    bad = x.detach().clone()
    bad[0, 3, 1, 1, 2] = torch.nan
    nan = vt.norm_act(bad).isnan()
    assert nan[0, :, 1, 1, 2].all() and nan.sum() == 32
    nan = vt.norm_act(bad, norm="group", num_groups=8).isnan()
    assert nan[0, :4, 1].all() and nan.sum() == 4 * 6


@pytest.mark.parametrize("norm", NORMS)
def test_weight_gradients_do_not_depend_on_threads(norm):
    """Enough rows for many parts, and more parts than threads."""
    x, (weight, bias) = video(1, 32, 3, 50, 41), affine(32)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y = vt.norm_act(*leaves, norm=norm, num_groups=4, front=1, temporal="replicate")
            results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_weight_gradients_over_many_rows(backend):
    """The sum over 24,000 rows is as exact as its terms: against float64."""
    shape = (1, 8, 1, 120, 200) if backend.name == "cpu" else (1, 8, 1, 20, 30)
    x, (weight, bias) = video(*shape, device=backend.device), affine(8, backend.device)
    grad = video(*shape, seed=5, device=backend.device)
    for norm in ("layer", "group"):
        found = []
        for function, convert in ((vt.norm_act, torch.clone), (norm_act_reference, in_float64)):
            leaves = [convert(p).requires_grad_() for p in (weight, bias)]
            y = function(convert(x), *leaves, norm=norm, num_groups=2)
            found.append(torch.autograd.grad(y, leaves, convert(grad)))
        for name, a, e in zip(("weight", "bias"), *found, strict=True):
            assert_close(a, e.float(), f"{norm} {name}")


@pytest.mark.parametrize("norm", ["layer", "group"])
def test_only_needed_gradients_are_computed(norm, backend):
    x = video(1, 16, 2, 3, 3, device=backend.device)
    weight, bias = affine(16, backend.device)
    full = [t.detach().requires_grad_() for t in (x, weight, bias)]
    expected = torch.autograd.grad(vt.norm_act(*full, norm=norm, num_groups=4).square().sum(), full)
    for needed in ((True, False, False), (False, True, False), (False, False, True)):
        leaves = [
            t.detach().requires_grad_(n) for t, n in zip((x, weight, bias), needed, strict=True)
        ]
        vt.norm_act(*leaves, norm=norm, num_groups=4).square().sum().backward()
        for leaf, n, e in zip(leaves, needed, expected, strict=True):
            assert (leaf.grad is not None) == n
            assert not n or torch.equal(leaf.grad, e)


def _ok(**kwargs):
    return vt.norm_act(torch.zeros(1, 4, 2, 3, 3), **kwargs)


@pytest.mark.parametrize(
    "error, message, call",
    [
        (TypeError, "x must be a torch.Tensor, got list", lambda: vt.norm_act([1.0])),
        (
            TypeError,
            "x must be float32, .* got torch.int64",
            lambda: vt.norm_act(torch.zeros(1, 4, 2, 3, 3).long()),
        ),
        (
            ValueError,
            r"x must be \[B, C, T, H, W\], C >= 1, got \[1, 4, 2, 3\]",
            lambda: vt.norm_act(torch.zeros(1, 4, 2, 3)),
        ),
        (ValueError, "norm must be one of .* got 'batch'", lambda: _ok(norm="batch")),
        (
            ValueError,
            "num_groups must divide the 4 channels, got 3",
            lambda: _ok(norm="group", num_groups=3),
        ),
        (TypeError, "weight must be a torch.Tensor, got float", lambda: _ok(weight=1.0)),
        (TypeError, "state must be a torch.Tensor, got list", lambda: _ok(state=[])),
        (
            ValueError,
            r"weight must be \[4\], got \[5\]",
            lambda: _ok(weight=torch.zeros(5)),
        ),
        (
            TypeError,
            "bias must be a floating type, got torch.int64",
            lambda: _ok(bias=torch.zeros(4).long()),
        ),
        (ValueError, "eps must be at least 0, got -1", lambda: _ok(eps=-1.0)),
        (ValueError, "front must be at least 0, got -1", lambda: _ok(front=-1)),
        (ValueError, "temporal must be one of .* got 'edge'", lambda: _ok(temporal="edge")),
        (
            ValueError,
            r"border must be \(bottom, right\) >= 0, got \(0, -1\)",
            lambda: _ok(border=(0, -1)),
        ),
        (
            ValueError,
            r"state must be \[1, 4, 2, 3, 3\], got \[1, 4, 1, 3, 3\]",
            lambda: _ok(front=2, state=torch.zeros(1, 4, 1, 3, 3)),
        ),
        (
            TypeError,
            "state must be a floating type, got torch.int64",
            lambda: _ok(front=1, state=torch.zeros(1, 4, 1, 3, 3).long()),
        ),
        (
            ValueError,
            "x must have a frame to replicate, got none",
            lambda: vt.norm_act(torch.zeros(1, 4, 0, 3, 3), front=1, temporal="replicate"),
        ),
        (
            TypeError,
            "dtype must be float32, .* got torch.float64 for torch.float32",
            lambda: _ok(dtype=torch.float64),
        ),
        (TypeError, "dtype must be float32, .* got torch.int32", lambda: _ok(dtype=torch.int32)),
    ],
)
def test_errors_name_requirement_and_actual(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_the_binding_checks_what_protects_memory():
    x = video(1, 4, 2, 3, 3)
    y, stats, work = torch.empty_like(x), None, torch.empty(0)
    options = (0, 1, 1e-6, True, 0, False)

    def call(x=x, weight=None, state=None, y=y, stats=stats, work=work, options=options):
        arguments = (x, weight, None, state, y, stats, work, options, (1, 0))
        _native.module().norm_act_forward(*arguments)

    call()
    with pytest.raises(ValueError, match="x must have channel stride 1, got 18"):
        call(x=x.contiguous())
    with pytest.raises(ValueError, match="y must be dense channels_last_3d"):
        call(y=torch.empty(1, 4, 2, 3, 3))
    with pytest.raises(ValueError, match=r"y must hold .* and 1 frames in front"):
        call(options=(0, 1, 1e-6, True, 1, False))
    with pytest.raises(ValueError, match=r"weight must be contiguous \[4\], got \[3\]"):
        call(weight=torch.ones(3))
    with pytest.raises(ValueError, match=r"weight must be contiguous \[4\], got \[4\]"):
        call(weight=torch.ones(8)[::2])
    with pytest.raises(TypeError, match="weight must be a floating type of its device, got uint8"):
        call(weight=torch.ones(4, dtype=torch.uint8))
    with pytest.raises(TypeError, match="y must be a floating type of its device, got int32"):
        call(y=y.int())
    with pytest.raises(ValueError, match=r"state must be \[1, 4, 0, 3, 3\]"):
        call(state=torch.zeros(1, 4, 1, 3, 3))
    with pytest.raises(ValueError, match=r"stats must be \[1, 2, 2, 2\] float32"):
        call(options=(2, 2, 1e-6, True, 0, False))
    with pytest.raises(ValueError, match=r"stats must be \[1, 2, 9, 2\] float32"):
        call(stats=torch.empty(1, 2, 8, 2))
    with pytest.raises(ValueError, match="workspace must have .* float32 elements, got 0"):
        call(options=(2, 2, 1e-6, True, 0, False), stats=torch.empty(1, 2, 2, 2))
