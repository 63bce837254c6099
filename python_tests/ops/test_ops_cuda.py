"""What only a GPU shows: streams, other devices, CUDA graphs, repeated runs."""

import pytest
import torch
from cases import OP_CASES
from test_ops import as_tuple, check_results, gradients

pytestmark = pytest.mark.cuda
CASES = pytest.mark.parametrize("case", OP_CASES, ids=str)


def on_gpu(case, device="cuda"):
    sample = case.samples[0]
    return sample, case.inputs(sample, case.dtypes[0], device)


@CASES
def test_runs_on_the_current_stream(case):
    """A kernel on another stream would read the input before the slow producer has written it."""
    sample, tensors = on_gpu(case)
    expected = as_tuple(case.function(**tensors, **sample.kwargs))
    buffers = {n: torch.zeros_like(t) for n, t in tensors.items()}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for name, buffer in buffers.items():
            buffer.copy_(tensors[name])
        actual = as_tuple(case.function(**buffers, **sample.kwargs))
    stream.synchronize()
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@CASES
def test_runs_on_the_device_of_its_input(case):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    sample, tensors = on_gpu(case, "cuda:1")
    assert torch.cuda.current_device() == 0
    actual = as_tuple(case.function(**tensors, **sample.kwargs))
    assert all(a.device == torch.device("cuda:1") for a in actual)
    assert torch.cuda.current_device() == 0
    cpu = {n: t.cpu() for n, t in tensors.items()}
    check_results(case, actual, case.function(**cpu, **sample.kwargs))


@CASES
def test_cuda_graph_capture_and_replay(case):
    sample, tensors = on_gpu(case)
    other = case.inputs(sample, case.dtypes[0], "cuda", seed=7)
    with torch.no_grad():
        case.function(**tensors, **sample.kwargs)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = as_tuple(case.function(**tensors, **sample.kwargs))
        for name, tensor in tensors.items():
            tensor.copy_(other[name])
        graph.replay()
        torch.cuda.synchronize()
        expected = as_tuple(case.function(**other, **sample.kwargs))
    assert all(torch.equal(a, e) for a, e in zip(captured, expected, strict=True))


@CASES
def test_repeated_runs_are_bitwise_equal(case):
    sample, tensors = on_gpu(case)
    first = as_tuple(case.function(**tensors, **sample.kwargs))
    grads = gradients(case, case.function, tensors, sample.kwargs) if case.differentiable else ()
    for _ in range(5):
        again = as_tuple(case.function(**tensors, **sample.kwargs))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        if case.differentiable:
            repeated = gradients(case, case.function, tensors, sample.kwargs)
            assert all(torch.equal(a, b) for a, b in zip(grads, repeated, strict=True))


@CASES
def test_cpu_and_gpu_agree(case):
    sample, tensors = on_gpu(case)
    cpu = {n: t.cpu() for n, t in tensors.items()}
    check_results(
        case, case.function(**tensors, **sample.kwargs), case.function(**cpu, **sample.kwargs)
    )
