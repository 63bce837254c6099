"""What is special about the FSQ entropy loss: memory, processes, chunks, terms, counts, layer."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from helpers import assert_close, needs_one_graph, peak_bytes

import vtok_ext as vt
from vtok_ext import _native
from vtok_ext.ops import _fsq_entropy_kernels
from vtok_ext.ops.fsq_entropy import fsq_entropy_loss_reference

CLAMPS = pytest.mark.parametrize("clamp", [False, True], ids=["exact", "clamped"])


def random_z(*shape, scale=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


@CLAMPS
def test_loss_and_every_gradient_alone(clamp, backend):
    """`loss` weighs the terms, and a term's gradient does not need the others'."""
    arguments = {"diversity_gamma": 0.7, "commitment_weight": 0.25, "clamp_per_sample": clamp}
    arguments |= {"inverse_temperature": 5.0, "num_codebooks": 2}
    real = torch.float32 if backend.is_cuda_kernel else torch.float64
    factor = 8.0 if backend.is_cuda_kernel else 100.0
    grads = []
    for function, z in (
        (fsq_entropy_loss_reference, random_z(23, 6)),
        (vt.fsq_entropy_loss, random_z(23, 6).to(backend.device, real)),
    ):
        z = z.requires_grad_()
        result = function(z, [7, 4, 3], **arguments)
        terms = result.per_sample - 0.7 * result.codebook + 0.25 * result.commitment
        assert torch.isclose(result.loss, terms, rtol=1e-6)
        grads.append([torch.autograd.grad(t, z, retain_graph=True)[0].to(real) for t in result[:4]])
    for name, expected, actual in zip(result._fields[:4], *grads, strict=True):
        assert_close(actual.cpu(), expected, f"gradient of {name}", factor)


@CLAMPS
def test_gradcheck(clamp):
    z = random_z(5, 6, scale=0.5).requires_grad_()

    def terms(z):
        result = vt.fsq_entropy_loss(
            z, [4, 3, 2], num_codebooks=2, inverse_temperature=2.0, clamp_per_sample=clamp
        )
        return result.per_sample, result.codebook, result.commitment

    assert torch.autograd.gradcheck(terms, (z,))


@CLAMPS
def test_gradcheck_where_most_codes_are_below_the_clamp(clamp):
    """Derivatives of ln max(p, 1e-5) on both sides of the clamp, away from the kink itself."""
    z = random_z(3, 4, scale=0.2, seed=3).requires_grad_()
    result = vt.fsq_entropy_loss(z, [8, 8, 8, 5], clamp_per_sample=clamp)
    below = fsq_entropy_loss_reference(z, [8, 8, 8, 5], clamp_per_sample=not clamp)
    assert not torch.isclose(result.per_sample, below.per_sample), "the clamp must matter here"
    assert torch.autograd.gradcheck(
        lambda z: vt.fsq_entropy_loss(z, [8, 8, 8, 5], clamp_per_sample=clamp).loss, (z,)
    )


def test_clamp_saturates_as_published():
    """2^18 equally likely codes: ln 2^18 exactly, -ln 1e-5 with the clamp."""
    z = torch.zeros(3, 6)
    exact = vt.fsq_entropy_loss(z, [8] * 6)
    clamped = vt.fsq_entropy_loss(z, [8] * 6, clamp_per_sample=True)
    assert exact.per_sample.item() == pytest.approx(18 * math.log(2), rel=1e-6)
    assert clamped.per_sample.item() == pytest.approx(-math.log(1e-5), rel=1e-6)
    assert exact.codebook.item() == pytest.approx(-math.log(1e-5), rel=1e-6)


@CLAMPS
def test_chunks_of_tokens_add_up(clamp, backend, monkeypatch):
    """Three tokens per chunk, the last one shorter, against all tokens at once."""
    arguments = {"num_codebooks": 2, "clamp_per_sample": clamp, "inverse_temperature": 3.0}
    results = []
    for chunk_bytes in (1 << 20, 3 * 2 * (64 + 40) * 4):
        monkeypatch.setitem(_fsq_entropy_kernels.CHUNK_BYTES, backend.device, chunk_bytes)
        z = random_z(20, 8).float().to(backend.device).requires_grad_()
        result = vt.fsq_entropy_loss(z, [8, 8, 8, 5], **arguments)
        (grad,) = torch.autograd.grad(result.loss, z)
        results.append((*result[:4], grad))
        counts = result.counts
    assert counts.sum().item() == 40
    for whole, chunked in zip(*results, strict=True):
        assert_close(chunked, whole, "chunked", 8.0)


@CLAMPS
def test_without_tokens(clamp, backend):
    for shape in ((0, 4), (2, 4, 0, 3)):
        z = torch.zeros(shape, device=backend.device, requires_grad=True)
        result = vt.fsq_entropy_loss(z, [8] * 4, channel_dim=1, clamp_per_sample=clamp)
        assert all(term.isnan() for term in result[:4])
        assert result.counts.shape == (1, 4096) and result.counts.sum() == 0
        result.loss.backward()
        assert z.grad.shape == shape


@CLAMPS
def test_nan_is_not_hidden(clamp, backend):
    z = torch.randn(6, 4, device=backend.device)
    z[2, 1] = float("nan")
    z.requires_grad_()
    result = vt.fsq_entropy_loss(z, [8, 5, 3, 3], clamp_per_sample=clamp)
    assert all(term.isnan() for term in result[:4])
    assert result.counts.sum().item() == 5, "a token with a NaN has no code"
    (grad,) = torch.autograd.grad(result.per_sample, z)
    assert grad[2].isnan().any()


def test_counts_are_those_of_fsq(backend):
    z = (2 * torch.randn(3, 10, 40)).to(backend.device)
    counts = vt.fsq_entropy_loss(z, [8, 5, 3, 2, 7], channel_dim=1, num_codebooks=2).counts
    indices = vt.fsq(z, [8, 5, 3, 2, 7], channel_dim=1, num_codebooks=2)[1]
    for book in range(2):
        expected = torch.bincount(indices[:, book].flatten().long().cpu(), minlength=1680)
        assert torch.equal(counts[book].cpu(), expected.int())


def test_statistics_of_known_counts():
    counts = torch.zeros(1, 8, dtype=torch.int32)  # levels 4 x 2, the first least significant
    counts[0, [0, 1, 4]] = torch.tensor([2, 1, 1], dtype=torch.int32)
    statistics = vt.fsq_codebook_statistics(counts, [4, 2])
    assert statistics.use.item() == 3 / 8
    assert statistics.perplexity.item() == pytest.approx(math.exp(1.5 * math.log(2)))
    assert statistics.dead_levels.item() == 2  # levels 2 and 3 of the first channel
    both = vt.fsq_codebook_statistics(torch.cat([counts, torch.ones_like(counts)]), [4, 2])
    assert both.use.item() == pytest.approx((3 / 8 + 1) / 2) and both.dead_levels.item() == 1


@pytest.mark.parametrize(
    "message, call",
    [
        (
            r"product of at most 2\^30 .*, got 2.75e\+11",
            lambda: vt.fsq_entropy_loss(torch.zeros(2, 13), [8] * 12 + [4]),
        ),
        (
            "inverse_temperature must be finite and at least 0, got -1.0",
            lambda: vt.fsq_entropy_loss(torch.zeros(2, 3), [8] * 3, inverse_temperature=-1.0),
        ),
        (
            r"z must have 3 channels at dimension 1",
            lambda: vt.fsq_entropy_loss(torch.zeros(2, 4), [8] * 3),
        ),
        (
            r"counts must be \[num_codebooks, 12\], got \[12\]",
            lambda: vt.fsq_codebook_statistics(torch.zeros(12), [4, 3]),
        ),
    ],
)
def test_errors_name_requirement_and_actual(message, call):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_binding_checks_shapes_that_protect_memory():
    module = _native.module()
    z, low, high = torch.zeros(1, 5, 2), torch.zeros(1, 5, 8), torch.zeros(1, 5, 3)
    tail = (None, None, None, [8, 3], 1, 1.0, (1, 0))
    module.fsq_entropy_factors(z, low, high, *tail)
    with pytest.raises(ValueError, match=r"low must be \[1, 5, 8\], got \[1, 4, 8\]"):
        module.fsq_entropy_factors(z, low[:, :4], high, *tail)
    with pytest.raises(TypeError, match="high must be float32, got float64"):
        module.fsq_entropy_factors(z, low, high.double(), *tail)
    with pytest.raises(ValueError, match="high must have contiguous rows"):
        module.fsq_entropy_factors(z, low, torch.zeros(1, 5, 6)[..., ::2], *tail)
    with pytest.raises(ValueError, match=r"partial_entropy must be contiguous \[2\]"):
        module.fsq_entropy_average_forward(torch.zeros(1025), torch.zeros(1), (1, 0))


@CLAMPS
def test_peak_memory_is_below_one_percent_of_dense(clamp, tmp_path):
    """Forward and backward of 5,120 tokens with 2^18 codes. What the dense reference takes is
    measured where it fits, in copies of [tokens, codebook], and scaled."""

    def step(function, num_tokens, channels):
        z = torch.randn(num_tokens, channels, requires_grad=True)
        levels = [8] * channels
        call = lambda: torch.autograd.grad(function(z, levels, clamp_per_sample=clamp).loss, z)  # noqa: E731
        return peak_bytes(call, tmp_path / "trace.json")

    copies = step(fsq_entropy_loss_reference, 256, 4) / (256 * 8**4 * 4)
    assert 3 < copies < 10, "the dense reference holds several copies of [tokens, codebook]"
    dense = copies * 5120 * 8**6 * 4
    native = step(vt.fsq_entropy_loss, 5120, 6)
    assert 8**6 * 4 < native < 0.01 * dense
    assert step(vt.fsq_entropy_loss, 20480, 6) < 1.2 * native, "memory does not grow with tokens"


_RANK = """
import json, os, sys, torch, torch.distributed as dist, vtok_ext as vt
rank, world, store, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
compile_it = sys.argv[5] == "compiled"
generator = torch.Generator().manual_seed(0)
x = torch.randn(40, 3, generator=generator, dtype=torch.float64)
start = torch.randn(4, 3, generator=generator, dtype=torch.float64)

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 4, bias=False, dtype=torch.float64)
        self.linear.weight.data.copy_(0.1 * start)
        self.fsq = vt.FSQ([8, 5, 4, 3], channel_dim=-1, inverse_temperature=10.0)

    def forward(self, x):
        return self.fsq(self.linear(x), step=100)[2]

net = Net()
if compile_it:
    net = torch.compile(net, fullgraph=True, backend="aot_eager")
if world > 1:
    dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=world)
    net = torch.nn.parallel.DistributedDataParallel(net)
    x = x.chunk(world)[rank]
losses = net(x)
losses["aux_loss"].backward()
weight = next(net.parameters())
result = {name: value.item() for name, value in losses.items()}
result["grad"] = weight.grad.flatten().tolist()
net.eval()
result["eval"] = len(net(x))
if world > 1:
    entropy = vt.fsq_entropy_loss(x @ start.T, [8, 5, 4, 3], process_group=dist.group.WORLD)
    alone = vt.fsq_entropy_loss(x @ start.T, [8, 5, 4, 3])
    result["alone"], result["together"] = alone.codebook.item(), entropy.codebook.item()
    dist.barrier()
    dist.destroy_process_group()
with open(out, "w") as file:
    json.dump(result, file)
# DDP keeps gloo's threads to the end of the process, and one of them that lets go of a tensor while
# the interpreter ends aborts it (pytorch/pytorch pull request 179291).
os._exit(0)
"""


def run_ranks(world, folder, mode):
    paths = [folder / f"{world}-{rank}.json" for rank in range(world)]
    commands = [
        [sys.executable, "-c", _RANK, str(rank), str(world), str(folder / "store"), str(path), mode]
        for rank, path in enumerate(paths)
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    children = [
        subprocess.Popen(c, env=environment, stderr=subprocess.PIPE, text=True) for c in commands
    ]
    try:
        for child in children:
            _, errors = child.communicate(timeout=180)
            assert child.returncode == 0, errors
    finally:
        for child in children:
            child.kill()
    return [json.loads(path.read_text()) for path in paths]


@pytest.mark.parametrize("mode", ["eager", pytest.param("compiled", marks=needs_one_graph)])
def test_two_processes_have_the_gradient_of_one(mode, tmp_path):
    """Data-parallel training of two halves of a batch: DDP's mean gradient is that of the whole."""
    (whole,) = run_ranks(1, tmp_path, "eager")
    halves = run_ranks(2, tmp_path, mode)
    for half in halves:
        assert half["grad"] == pytest.approx(whole["grad"], rel=1e-9, abs=1e-12)
        assert half["eval"] == 0
        assert half["together"] != pytest.approx(half["alone"], rel=1e-6)
    assert halves[0]["together"] == halves[1]["together"]
    for name in ("aux_loss", "entropy", "commitment"):
        mean = (halves[0][name] + halves[1][name]) / 2
        assert mean == pytest.approx(whole[name], rel=1e-12)


def test_layer_gives_the_published_loss_and_statistics():
    z = random_z(2, 4, 3, 5, 5).float()
    layer = vt.FSQ([8, 5, 5, 5])
    _, indices, losses = layer(z, step=3000)
    expected = fsq_entropy_loss_reference(
        z.double(), [8, 5, 5, 5], channel_dim=1, clamp_per_sample=True
    )
    assert losses["entropy"].item() == pytest.approx(expected.loss.item(), rel=1e-5)
    aux_loss = 0.1 * expected.loss + 0.25 * expected.commitment
    assert losses["aux_loss"].item() == pytest.approx(aux_loss.item(), rel=1e-5)
    usage = vt.metrics.codebook_usage(indices, 1000)
    assert losses["codebook_use"].item() == pytest.approx(usage.fraction_used)
    assert losses["codebook_perplexity"].item() == pytest.approx(usage.perplexity, rel=1e-5)
    undecided = torch.zeros(1, 6, 3)
    exact = vt.FSQ([8] * 6, clamp_per_sample=False)(undecided)[2]["entropy"]
    assert exact - vt.FSQ([8] * 6)(undecided)[2]["entropy"] > 0.9


def test_layer_without_entropy_keeps_the_commitment():
    z = torch.randn(2, 4, 3, requires_grad=True)
    codes, _, losses = vt.FSQ([8, 5, 5, 5], entropy_weight=0.0)(z)
    assert torch.isclose(losses["commitment"], (z - codes.detach()).square().mean())
    losses["aux_loss"].backward()
    assert torch.allclose(z.grad, 0.5 * (z - codes).detach() / z.numel())
    nothing = vt.FSQ([8, 5], entropy_weight=0.0, commitment_weight=0.0)(torch.randn(2, 2))[2]
    assert nothing["aux_loss"].item() == 0


def test_layer_compiles_as_one_graph():
    layer = vt.FSQ([8, 5, 5])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    grads = []
    for run in (layer, compiled):
        z = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
        run(z, 10)[2]["aux_loss"].backward()
        grads.append(z.grad)
    assert_close(grads[1], grads[0], "compiled gradient")


def test_reference_runs_without_the_compiled_kernels():
    code = """if True:
        import torch, vtok_ext as vt
        z = torch.linspace(-1, 1, 12).view(4, 3)
        print([round(v.item(), 4) for v in vt.fsq_entropy_loss(z, [5, 4, 3])[:4]])
    """
    outputs = {
        native: subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "VTOK_NATIVE": native},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for native in ("0", "1")
    }
    assert outputs["0"] == outputs["1"] and "nan" not in outputs["0"]
