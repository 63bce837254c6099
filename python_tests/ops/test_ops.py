"""Tests that every op passes: against its reference on the CPU, on CUDA and on the CUDA emulation,
under autograd,
torch.compile, autocast, vmap, fork and any thread count. Ops are listed in cases.py.
"""

import multiprocessing

import pytest
import torch
from cases import OP_CASES
from helpers import STRIDES, assert_close, needs_one_graph
from torch.utils.checkpoint import checkpoint

import vtok_ext as vt

SAMPLES = [
    pytest.param(
        case,
        sample,
        id=f"{case}-{sample}",
        marks=[pytest.mark.first_sample] if sample is case.samples[0] else [],
    )
    for case in OP_CASES
    for sample in case.samples
]
FIRST = [pytest.param(case, case.samples[0], id=str(case)) for case in OP_CASES]
DIFFERENTIABLE = [case for case in OP_CASES if case.differentiable]


def dtypes_for(case, backend):
    """float64 exists on the CPU only."""
    return [d for d in case.dtypes if not (backend.is_cuda_kernel and d == torch.float64)]


def as_tuple(result):
    return result if isinstance(result, tuple) else (result,)


def check_results(case, actual, expected, factor=1.0):
    for number, (a, e) in enumerate(zip(as_tuple(actual), as_tuple(expected), strict=True)):
        if e.is_floating_point():
            assert_close(a, e, f"{case} output {number}", factor)
        else:
            assert a.dtype == e.dtype and torch.equal(a.cpu(), e.cpu()), f"{case} output {number}"


@pytest.mark.parametrize("strides", STRIDES, ids=lambda s: s.name)
@pytest.mark.parametrize("case, sample", SAMPLES)
def test_forward_matches_reference(case, sample, strides, backend):
    for dtype in dtypes_for(case, backend):
        tensors = case.inputs(sample, dtype, backend.device)
        expected = case.reference(**tensors, **sample.kwargs)
        actual = case.function(**{n: strides(t) for n, t in tensors.items()}, **sample.kwargs)
        check_results(case, actual, expected)


def gradients(case, function, tensors, kwargs):
    """Outputs and the gradients of a fixed random projection of the floating outputs."""
    leaves = {n: t.detach().requires_grad_(n in case.differentiable) for n, t in tensors.items()}
    outputs = as_tuple(function(**leaves, **kwargs))
    generator = torch.Generator().manual_seed(1)
    loss_terms = [
        (out * torch.randn(out.shape, generator=generator).to(out)).sum()
        for out in outputs
        if out.is_floating_point()
    ]
    return torch.autograd.grad(sum(loss_terms), [leaves[n] for n in differentiable(case, leaves)])


def differentiable(case, tensors):
    """Names of the sample's tensors that get a gradient: optional ones may be absent."""
    return [name for name in case.differentiable if name in tensors]


@pytest.mark.parametrize("strides", STRIDES, ids=lambda s: s.name)
@pytest.mark.parametrize(
    "case, sample",
    [p for p in SAMPLES if p.values[0].differentiable],
)
def test_gradients_match_reference(case, sample, strides, backend):
    for dtype in dtypes_for(case, backend):
        tensors = case.inputs(sample, dtype, backend.device)
        expected = gradients(case, case.reference, tensors, sample.kwargs)
        strided = {n: strides(t) for n, t in tensors.items()}
        actual = gradients(case, case.function, strided, sample.kwargs)
        for name, a, e in zip(differentiable(case, tensors), actual, expected, strict=True):
            assert_close(a, e, f"{case} grad_{name}", case.gradient_factor)


@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=str)
def test_expanded_gradient(case, backend):
    """`.sum().backward()` sends a gradient whose strides are all 0."""
    sample = case.samples[0]
    tensors = case.inputs(sample, torch.float32, backend.device)
    grads = []
    for function in (case.function, case.reference):
        leaves = {n: t.detach().clone().requires_grad_() for n, t in tensors.items()}
        as_tuple(function(**leaves, **sample.kwargs))[0].sum().backward()
        grads.append([leaf.grad for leaf in leaves.values()])
    for a, e in zip(*grads, strict=True):
        assert_close(a, e, str(case), case.gradient_factor)


def refusal(case):
    """What a second differentiation says: the name of the op, of which a case may be a variant."""
    common = ("fsq_entropy", "norm_act", "triplane_gather", "temporal")
    name = next((start for start in common if case.name.startswith(start)), case.name)
    return f"^{name}[a-z_]*: differentiable once"


@pytest.mark.parametrize("loss", [torch.sum, torch.mean, lambda y: y.square().sum()])
@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=str)
def test_double_backward_is_refused(case, loss):
    """Also where the gradient that comes in is a constant, as that of a sum is."""
    sample = case.samples[0]
    tensors = case.inputs(sample, torch.float32, "cpu")
    leaves = [tensors[name].requires_grad_() for name in differentiable(case, tensors)]
    out = loss(as_tuple(case.function(**tensors, **sample.kwargs))[0])
    plain = torch.autograd.grad(out, leaves, retain_graph=True, allow_unused=True)
    grads = torch.autograd.grad(out, leaves, create_graph=True, allow_unused=True)
    for once, again in zip(plain, grads, strict=True):
        assert (once is None) == (again is None)
        if once is not None:
            assert not once.requires_grad and torch.equal(once, again)
            with pytest.raises(RuntimeError, match=refusal(case)):
                again.sum().backward(retain_graph=True)


def test_double_backward_is_refused_on_the_way_to_a_leaf():
    """A second gradient of chosen leaves does not run what leads to none of them."""
    x, weight = torch.randn(1, 2, 3, 4, 4), torch.randn(2, 2, 3, 3, 3)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    y = vt.causal_conv3d(x, weight).sum()
    (grad,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(RuntimeError, match="^causal_conv3d: differentiable once"):
        torch.autograd.grad(grad.sum(), leaves, allow_unused=True)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_double_backward_is_refused_behind_a_checkpoint(use_reentrant):
    """It gives out what was saved only once, and plain gradients as ever."""
    x, weight = torch.randn(1, 2, 3, 4, 4), torch.randn(2, 2, 3, 3, 3)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    expected = torch.autograd.grad(vt.causal_conv3d(x, weight, activation="silu").sum(), leaves)

    def convolve(x, weight):
        return vt.causal_conv3d(x, weight, activation="silu")

    loss = checkpoint(convolve, x, weight, use_reentrant=use_reentrant).sum()
    loss.backward(create_graph=not use_reentrant)
    assert all(torch.equal(leaf.grad, e) for leaf, e in zip(leaves, expected, strict=True))
    if not use_reentrant:
        with pytest.raises(RuntimeError, match="^causal_conv3d: differentiable once"):
            x.grad.sum().backward()


@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=str)
def test_gradients_of_torch_func(case):
    """As autograd's; a second transform is refused, unless the first gradient is constant."""
    sample = case.samples[0]
    tensors = case.inputs(sample, torch.float32, "cpu")
    name = differentiable(case, tensors)[0]

    def loss(tensor):
        return (
            as_tuple(case.function(**{**tensors, name: tensor}, **sample.kwargs))[0].square().sum()
        )

    found = torch.func.grad(loss)(tensors[name])
    leaf = tensors[name].clone().requires_grad_()
    assert not found.requires_grad
    assert torch.equal(found, torch.autograd.grad(loss(leaf), leaf)[0])
    with pytest.raises(RuntimeError, match=refusal(case)):
        torch.func.grad(lambda tensor: torch.func.grad(loss)(tensor).sum())(tensors[name])


@pytest.mark.parametrize("case", [c for c in DIFFERENTIABLE if c.supports_vmap], ids=str)
def test_gradients_under_vmap(case):
    sample = case.samples[0]
    batch = [case.inputs(sample, torch.float32, "cpu", seed=s) for s in range(3)]
    stacked = {n: torch.stack([b[n] for b in batch]) for n in batch[0]}

    def loss(tensors):
        return as_tuple(case.function(**tensors, **sample.kwargs))[0].square().sum()

    found = torch.func.vmap(torch.func.grad(loss))(stacked)
    for i, b in enumerate(batch):
        for name, grad in torch.func.grad(loss)(b).items():
            assert_close(found[name][i], grad, f"{case} grad_{name}", case.gradient_factor)


@pytest.mark.parametrize("name, arguments", [p for case in OP_CASES for p in case.raw])
def test_raw_ops_are_well_registered(name, arguments):
    op = getattr(torch.ops.vtok_ext, name).default
    torch.library.opcheck(op, arguments(), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=str)
def test_raw_op_refuses_to_lose_gradients(case):
    name, arguments = case.raw[0]
    first, *rest = arguments()
    with pytest.raises(RuntimeError, match=f"vtok_ext::{name} has no gradient"):
        getattr(torch.ops.vtok_ext, name)(first.requires_grad_(), *rest)


@needs_one_graph
@pytest.mark.parametrize("case, sample", FIRST)
def test_compiles_as_one_graph(case, sample):
    torch._dynamo.reset()  # all cases share one code object, whose recompilations are limited
    tensors = case.inputs(sample, torch.float32, "cpu") if case.differentiable else None
    if tensors is None:
        tensors = case.inputs(sample, case.dtypes[0], "cpu")
    compiled = torch.compile(
        lambda **tensors: case.function(**tensors, **sample.kwargs),
        fullgraph=True,
        backend="aot_eager",
    )
    check_results(case, compiled(**tensors), case.function(**tensors, **sample.kwargs))
    if case.differentiable:
        expected = gradients(case, case.function, tensors, sample.kwargs)
        actual = gradients(case, lambda **t: compiled(**{n: t[n] for n in tensors}), tensors, {})
        for a, e in zip(actual, expected, strict=True):
            assert_close(a, e, f"{case} compiled gradient")


@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=str)
def test_under_autocast(case, backend):
    """Results keep the values that they have without autocast, and the dtype or its dtype."""
    sample = case.samples[0]
    tensors = case.inputs(sample, torch.float32, backend.device)
    expected = case.function(**tensors, **sample.kwargs)
    if case.returns_autocast_dtype:
        expected = tuple(out.to(torch.bfloat16) for out in as_tuple(expected))
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        actual = case.function(**tensors, **sample.kwargs)
    check_results(case, actual, expected)


@pytest.mark.parametrize("case", [c for c in OP_CASES if c.supports_vmap], ids=str)
def test_vmap(case):
    sample = case.samples[2]
    batch = [case.inputs(sample, torch.float32, "cpu", seed=s) for s in range(3)]
    stacked = {n: torch.stack([b[n] for b in batch], 1) for n in batch[0]}
    actual = torch.func.vmap(lambda t: case.function(**t, **sample.kwargs), in_dims=1)(stacked)
    for i, b in enumerate(batch):
        expected = case.function(**b, **sample.kwargs)
        check_results(case, tuple(a[i] for a in as_tuple(actual)), expected)


def _run_in_child(case, sample, tensors, queue):
    if case.runs_torch_kernels:
        torch.set_num_threads(1)
    queue.put([t.tolist() for t in as_tuple(case.function(**tensors, **sample.kwargs))])


@pytest.mark.parametrize("case", OP_CASES, ids=str)
def test_forked_child_after_use_in_the_parent(case):
    """libgomp's threads do not survive a fork: a child that opened a parallel region would hang.

    The inputs are made in the parent, because torch's own parallel ops do hang in such a child.
    """
    sample, dtype = case.samples[2], case.dtypes[0]
    tensors = case.inputs(sample, dtype, "cpu")
    expected = case.function(**tensors, **sample.kwargs)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_run_in_child, args=(case, sample, tensors, queue))
    child.start()
    try:
        actual = queue.get(timeout=60)
        child.join(timeout=60)
        assert child.exitcode == 0
    finally:
        child.kill()
    assert actual == [t.tolist() for t in as_tuple(expected)]


@pytest.mark.parametrize("case", OP_CASES, ids=str)
def test_bitwise_independent_of_threads_and_repetition(case):
    before = torch.get_num_threads()
    results = []
    try:
        # oneDNN, which torch calls, shares work out by the number of threads.
        for threads in (2, 2, 2, 2) if case.runs_torch_kernels else (1, 2, 3, 2):
            torch.set_num_threads(threads)
            for sample in case.samples:
                tensors = case.inputs(sample, case.dtypes[0], "cpu")
                results.append((sample, as_tuple(case.function(**tensors, **sample.kwargs))))
    finally:
        torch.set_num_threads(before)
    first = results[: len(case.samples)]
    for run in range(1, 4):
        again = results[run * len(first) : (run + 1) * len(first)]
        for (_, a), (_, b) in zip(first, again, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
