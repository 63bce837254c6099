"""What is special about alpha_blend: finite differences, dtypes, strategies, threads, errors."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vtok_ext.ops.alpha_blend import _check_alpha_blend, alpha_blend, alpha_blend_reference


def randn(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("strategy", ["learned", "fixed"])
@pytest.mark.parametrize("factor", [(1,), (3, 1, 1), (2, 1, 4, 1), (2, 3, 4, 2), ()])
def test_gradcheck(strategy, factor):
    tensors = [randn(2, 3, 4, 2, dtype=torch.float64, seed=s).requires_grad_() for s in (1, 2)]
    mix_factor = randn(*factor, dtype=torch.float64, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda a, b, m: alpha_blend(a, b, m, strategy=strategy), (*tensors, mix_factor)
    )


def test_gradcheck_with_images():
    images = torch.tensor([[True, False, True, False], [False] * 4])
    tensors = [randn(2, 3, 4, 2, dtype=torch.float64, seed=s).requires_grad_() for s in (1, 2)]
    mix_factor = randn(1, dtype=torch.float64, seed=3).requires_grad_()
    strategy = "learned_with_images"
    assert torch.autograd.gradcheck(
        lambda a, b, m: alpha_blend(a, b, m, strategy=strategy, image_only=images),
        (*tensors, mix_factor),
    )


def test_images_keep_the_first_tensor_bit_for_bit(backend):
    a, b = randn(2, 3, 4, 5, 6, seed=1), randn(2, 3, 4, 5, 6, seed=2)
    images = torch.tensor([[True, False, False, True], [False] * 4])
    a, b, images, factor = (t.to(backend.device) for t in (a, b, images, randn(1, seed=3)))
    out = alpha_blend(a, b, factor, strategy="learned_with_images", image_only=images)
    assert torch.equal(out[0, :, [0, 3]], a[0, :, [0, 3]])
    assert torch.equal(out[1], alpha_blend(a, b, factor)[1])


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
def test_only_the_gradients_asked_for(needed, backend):
    """Each subset gives the very gradients of the full set."""
    tensors = [randn(2, 8, 3, 4, 4, seed=s).to(backend.device) for s in (1, 2)]
    tensors.append(randn(8, 1, 1, 1, seed=3).to(backend.device))
    grad = randn(2, 8, 3, 4, 4, seed=4).to(backend.device)
    everything = [t.clone().requires_grad_() for t in tensors]
    expected = torch.autograd.grad(alpha_blend(*everything), everything, grad)
    leaves = [t.clone().requires_grad_(i in needed) for i, t in enumerate(tensors)]
    out = alpha_blend(*leaves)
    assert len(out.grad_fn.saved_tensors) == (3 if 2 in needed else 1)
    actual = torch.autograd.grad(out, [leaves[i] for i in needed], grad)
    for i, gradient in zip(needed, actual, strict=True):
        assert torch.equal(gradient, expected[i])


def test_gradients_do_not_depend_on_threads():
    before = torch.get_num_threads()
    a, b, grad = (randn(1, 16, 4, 40, 40, seed=s) for s in (1, 2, 3))
    results = []
    try:
        for factor in (randn(1), randn(16, 1, 1, 1), randn(4, 1, 1)):
            for threads in (1, 2, 3, 2):
                torch.set_num_threads(threads)
                leaves = [t.clone().requires_grad_() for t in (a, b, factor)]
                results.append(torch.autograd.grad(alpha_blend(*leaves), leaves, grad))
    finally:
        torch.set_num_threads(before)
    for first in range(0, 12, 4):
        for again in results[first + 1 : first + 4]:
            assert all(torch.equal(x, y) for x, y in zip(results[first], again, strict=True))


def test_factor_gradient_of_a_large_tensor(backend):
    """Many partial sums: every block and every column is added exactly once."""
    ones = torch.ones(1, 24, 5, 61, 60).contiguous(memory_format=torch.channels_last_3d)
    for shape, count in (((1,), ones.numel()), ((24, 1, 1, 1), 18300), ((5, 1, 1), 87840)):
        factor = torch.zeros(shape).to(backend.device).requires_grad_()
        out = alpha_blend(ones.to(backend.device), -ones.to(backend.device), factor)
        out.backward(ones.to(backend.device))
        # d out / d m = alpha (1 - alpha) (a - b) = 1 / 2 each, exact in float32
        assert torch.equal(factor.grad.cpu(), torch.full(shape, count / 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtype_of_b_decides_and_the_factor_never_promotes(dtype, backend):
    a, b = (randn(3, 4, seed=seed).to(backend.device) for seed in (1, 2))
    b, number = b.to(dtype), randn(1).to(backend.device)
    for factor in (number, number.to(dtype), number.double()):
        out = alpha_blend(a, b, factor)
        assert out.dtype == dtype
        assert torch.equal(out, alpha_blend(a.to(dtype), b, factor.float()))
        leaves = [t.clone().requires_grad_() for t in (a, b, factor)]
        grads = torch.autograd.grad(alpha_blend(*leaves).float().sum(), leaves)
        assert [g.dtype for g in grads] == [t.dtype for t in (a, b, factor)]


def test_a_float64_factor_on_cuda_is_converted_and_float64_inputs_are_not():
    """What CUDA's kernels do not take; fake tensors have a device that need not be there."""
    with FakeTensorMode():
        a = b = torch.empty(2, 3, device="cuda")
        factor = torch.empty(1, device="cuda", dtype=torch.float64)
        assert _check_alpha_blend(a, b, factor, "learned", None)[1].dtype == torch.float32
        with pytest.raises(TypeError, match="a must be .* on cuda, got torch.float64"):
            _check_alpha_blend(a.double(), b, factor, "learned", None)


def test_far_factors_and_missing_numbers():
    a, b = torch.tensor([1.0, torch.nan, 3.0]), torch.tensor([5.0, 6.0, torch.nan])
    out = alpha_blend(a, b, torch.tensor([200.0, 0.0, -200.0]))
    assert out[0] == 1.0 and out[1].isnan() and out[2].isnan()
    assert alpha_blend(a[:1], b[:1], torch.tensor([-200.0])).item() == 5.0
    assert alpha_blend(a[:1], b[:1], torch.tensor(torch.nan)).isnan().all()


def test_memory_format_follows_b():
    a = randn(2, 3, 4, 5, 6)
    b = a.contiguous(memory_format=torch.channels_last_3d)
    assert alpha_blend(a, b, randn(1)).stride() == b.stride()
    assert torch.equal(alpha_blend(a, b, randn(1)), alpha_blend(a, b.contiguous(), randn(1)))


def test_overlapping_input_and_expanded_factor():
    """Strides of 0: an expanded tensor is an input like any other."""
    a, b = randn(1, 4, 1, seed=1).expand(3, 4, 5), randn(3, 4, 5, seed=2)
    factor = randn(4, 1, seed=3).expand(3, 4, 5)
    torch.testing.assert_close(alpha_blend(a, b, factor), alpha_blend_reference(a, b, factor))
    leaves = [t.detach().clone().requires_grad_() for t in (a, b, factor)]
    expanded = [t.detach().requires_grad_() for t in (a, b, factor)]
    expected = torch.autograd.grad(alpha_blend(*leaves).square().sum(), leaves)
    actual = torch.autograd.grad(alpha_blend(*expanded).square().sum(), expanded)
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y)


def test_rank_limit_leaves_room_for_vmap():
    a, b = randn(1, 2, 1, 2, 1, 2, 3, seed=1), randn(1, 2, 1, 2, 1, 2, 3, seed=2)
    factor = randn(3, 2, 1, 2, seed=3)
    actual = torch.func.vmap(alpha_blend, in_dims=(6, 6, 0))(a, b, factor)
    for i in range(3):
        assert torch.equal(actual[i], alpha_blend(a[..., i], b[..., i], factor[i]))
    unbatched = torch.func.vmap(alpha_blend, in_dims=(6, None, None))(a, b[..., 0], factor[0])
    assert torch.equal(unbatched[1], alpha_blend(a[..., 1], b[..., 0], factor[0]))


def test_errors_name_argument_requirement_and_value():
    a, b, m = randn(2, 3, 4), randn(2, 3, 4), randn(1)
    for arguments, kwargs, error, message in (
        ((a, b[:1], m), {}, ValueError, r"a and b must have one shape .*, got \[2, 3, 4\] and \[1"),
        (
            (a, b, randn(3)),
            {},
            ValueError,
            r"mix_factor must broadcast to a \[2, 3, 4\], got \[3\]",
        ),
        ((a, b, randn(5, 1, 1, 1)), {}, ValueError, "mix_factor must broadcast to a"),
        ((randn(2), randn(2), randn(2, 2)), {}, ValueError, "mix_factor must broadcast to a"),
        ((randn(*[1] * 7), randn(*[1] * 7), m), {}, ValueError, "a and b must have one shape"),
        ((a.int(), b, m), {}, TypeError, "a must be float32, .* on cpu, got torch.int32"),
        ((a, b, 0.5), {}, TypeError, "mix_factor must be a torch.Tensor, got <class 'float'>"),
        ((a, b, m.to(torch.complex64)), {}, TypeError, "mix_factor must be float32"),
        ((a, b, m.to("meta")), {}, ValueError, "mix_factor must be on cpu, got meta"),
        ((a, b, m), {"strategy": "mean"}, ValueError, "strategy must be one of .*, got 'mean'"),
        (
            (a, b, m),
            {"image_only": torch.zeros(2, 4).bool()},
            ValueError,
            "image_only must be given",
        ),
        ((a, b, m), {"strategy": "learned_with_images"}, ValueError, "image_only must be given"),
    ):
        with pytest.raises(error, match="alpha_blend: " + message):
            alpha_blend(*arguments, **kwargs)
    video = randn(2, 3, 4, 1, 1)
    for images in (torch.zeros(2, 3).bool(), torch.zeros(2, 4)):
        with pytest.raises(ValueError, match=r"image_only must be \[2, 4\] bool, got \[2, [34]\]"):
            alpha_blend(video, video, m, strategy="learned_with_images", image_only=images)
