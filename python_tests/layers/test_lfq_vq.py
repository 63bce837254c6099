"""LFQ and VQ: codes, indices, losses against their definitions, learning of the codebook."""

import math
import os
import subprocess
import sys

import pytest
import torch
from helpers import needs_one_graph

from vtok_ext.layers import LFQ, VQ
from vtok_ext.layers.vq import _LARGEST_MATRIX


def latent(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def lfq_loss_by_definition(z, step, weight=0.1, steps=2000, factor=3.0, commitment=0.25):
    """Softmax over all codes in {-1, 1}^D, token by token."""
    tokens = z.movedim(1, -1).reshape(-1, z.shape[1]).double()
    bits = torch.arange(2 ** z.shape[1])[:, None] >> torch.arange(z.shape[1]) & 1
    probabilities = (200 * tokens @ (2.0 * bits - 1).double().T).softmax(1)

    def entropy(p):
        return -(p * p.clamp(min=1e-300).log()).sum(-1)

    term = entropy(probabilities).mean() - entropy(probabilities.mean(0))
    start = weight * factor
    weight = max(weight, start - step / steps * (start - weight))
    return weight * term + commitment * (tokens - tokens.sign()).square().mean()


def test_lfq_codes_are_signs_and_indices_their_bits():
    layer, z = LFQ(5), latent(2, 5, 3, 4, 2)
    z[0, :, 0, 0, 0] = 0
    codes, indices, losses = layer(z, compute_loss=False)
    assert torch.equal(codes, torch.where(z > 0, 1.0, -1.0)) and losses == {}
    assert indices.dtype == torch.int32 and indices.shape == (2, 3, 4, 2)
    expected = sum((z[:, d] > 0).int() << d for d in range(5))
    assert torch.equal(indices, expected) and indices[0, 0, 0, 0] == 0
    assert torch.equal(layer.indices_to_codes(indices), codes)
    assert torch.equal(layer.codes_to_indices(codes), indices)
    assert layer.codebook_size == 32 and not layer.state_dict()


@pytest.mark.parametrize("layer", [LFQ(3), VQ(8, 3)])
@pytest.mark.parametrize("training", [True, False])
def test_nan_has_no_id(layer, training):
    """As for FSQ: -1, which is refused where ids are read."""
    z = latent(2, 3, 4, 2, 2)
    expected = layer.train(training)(z)[1].clone()
    z[1, 2, 3, 0, 1], expected[1, 3, 0, 1] = float("nan"), -1
    indices = layer(z)[1]
    assert torch.equal(indices, expected) and indices.dtype == torch.int32
    with pytest.raises(ValueError, match="indices must lie in 0..7, got -1.."):
        layer.indices_to_codes(indices)


@pytest.mark.parametrize(("scale", "step"), [(1.0, 0), (0.01, 1000), (0.003, 5000)])
def test_lfq_loss_is_its_definition(scale, step):
    layer, z = LFQ(6), (scale * latent(2, 6, 2, 3, 3)).double().requires_grad_()
    aux_loss = layer(z, step, compute_loss=True)[2]["aux_loss"]
    expected = lfq_loss_by_definition(z, step)
    assert torch.allclose(aux_loss.double(), expected, rtol=1e-5)
    (grad,) = torch.autograd.grad(aux_loss, z)
    (expected_grad,) = torch.autograd.grad(expected, z)
    assert torch.allclose(grad, expected_grad, atol=1e-5 * float(expected_grad.abs().max()))


def test_lfq_loss_of_a_whole_clip_of_18_bits_needs_little_memory():
    """5,120 tokens x 2^18 codes would be 5.4 GB; undecided tokens are uniform over all codes."""
    z = torch.full((1, 18, 5, 32, 32), 1e-9).requires_grad_()
    losses = LFQ(18)(z, compute_loss=True)[2]
    assert float(losses["entropy"].detach()) == pytest.approx(0, abs=1e-3)
    losses["aux_loss"].backward()
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("layer", [LFQ(4), VQ(7, 4)])
def test_gradients_pass_straight_through(layer):
    z, w = latent(2, 4, 3, 2).requires_grad_(), latent(2, 4, 3, 2, seed=1)
    codes, _, _ = layer(z, compute_loss=False)
    assert torch.equal(torch.autograd.grad((codes * w).sum(), z)[0], w)
    with torch.no_grad():
        assert torch.equal(layer(z, compute_loss=False)[0], codes)


@pytest.mark.parametrize("layer", [LFQ(18), VQ(512, 18)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_latents_and_autocast(layer, dtype):
    z = latent(2, 18, 3, 3)
    codes, indices, losses = layer(z.to(dtype), compute_loss=True)
    assert codes.dtype == dtype and losses["aux_loss"].dtype == torch.float32
    expected = layer(z.to(dtype).float(), compute_loss=True)
    assert torch.equal(indices, expected[1])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(z, compute_loss=True)[1], layer(z)[1])
        assert losses["aux_loss"].isfinite()


@needs_one_graph
@pytest.mark.parametrize("layer", [LFQ(4), VQ(16, 4)])
def test_indices_to_codes_compiles_without_a_break(layer):
    indices = torch.arange(16).view(2, 4, 2)
    compiled = torch.compile(layer.indices_to_codes, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(indices), layer.indices_to_codes(indices))


def test_lfq_refuses():
    with pytest.raises(ValueError, match=r"LFQ: num_bits must be in 1\.\.20, got 21"):
        LFQ(21)
    with pytest.raises(ValueError, match="must have 4 channels in dimension 1, got"):
        LFQ(4)(latent(1, 5, 2))
    with pytest.raises(TypeError, match="LFQ: z must be floating, got torch.int64"):
        LFQ(4)(torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"LFQ: indices must lie in 0\.\.15, got 16\.\.16"):
        LFQ(4).indices_to_codes(torch.tensor([16]))
    with pytest.raises(TypeError, match="LFQ: indices must be integers, got torch.float32"):
        LFQ(4).indices_to_codes(torch.zeros(1))


@pytest.mark.parametrize("kind", ["gradient", "ema"])
def test_vq_takes_the_nearest_vector(kind):
    layer, z = VQ(37, 3, codebook=kind).eval(), latent(2, 3, 4, 5, 2)
    with torch.no_grad():
        layer.codebook.copy_(latent(37, 3, seed=1))
    codes, indices, losses = layer(z)
    distance = torch.cdist(z.movedim(1, -1).reshape(-1, 3), layer.codebook)
    assert torch.equal(indices.flatten().long(), distance.argmin(1)) and losses == {}
    assert torch.equal(layer.indices_to_codes(indices), codes)
    assert torch.equal(codes.movedim(1, -1), layer.codebook[indices.long()])


def test_vq_works_in_portions(monkeypatch):
    layer, z = VQ(50, 3), latent(1, 3, 40)
    whole = layer(z)[1]
    monkeypatch.setattr("vtok_ext.layers.vq._LARGEST_MATRIX", 50 * 7)
    assert torch.equal(layer(z)[1], whole) and _LARGEST_MATRIX == 2**24


def test_vq_losses_are_their_definition():
    layer, z = VQ(9, 3), latent(2, 3, 4).requires_grad_()
    with torch.no_grad():
        layer.codebook.copy_(latent(9, 3, seed=1))
    codes, indices, losses = layer(z, compute_loss=True)
    error = (z - codes.detach()).square().mean()
    assert torch.allclose(losses["aux_loss"], 1.25 * error)
    grad_z, grad_e = torch.autograd.grad(losses["aux_loss"], [z, layer.codebook])
    assert torch.allclose(grad_z, 0.25 * 2 * (z - codes).detach() / z.numel(), atol=1e-6)
    expected = torch.zeros(9, 3)
    rows = (codes - z).detach().movedim(1, -1).reshape(-1, 3)
    expected.index_add_(0, indices.flatten().long(), 2 * rows / z.numel())
    assert torch.allclose(grad_e, expected, atol=1e-6)
    counts = torch.bincount(indices.flatten().long(), minlength=9).double() / 8
    perplexity = math.exp(-sum(f * math.log(f) for f in counts.tolist() if f))
    assert losses["codebook_use"] == pytest.approx(float((counts > 0).double().mean()))
    assert losses["codebook_perplexity"] == pytest.approx(perplexity, rel=1e-5)


def test_vq_moving_averages_are_their_definition():
    layer = VQ(4, 2, codebook="ema", decay=0.9)
    start = layer.codebook.clone()
    z = latent(1, 2, 50).requires_grad_()
    nearest = layer(z)[1].flatten().long()
    tokens, counts = z.detach()[0].T, torch.bincount(nearest, minlength=4).float()
    count = 0.9 + 0.1 * counts
    total = 0.9 * start + 0.1 * torch.zeros(4, 2).index_add_(0, nearest, tokens)
    assert torch.allclose(layer.count, count) and torch.allclose(layer.total, total, atol=1e-6)
    assert torch.allclose(layer.codebook, total / count[:, None], atol=1e-4)
    assert not list(layer.parameters()) and set(layer.state_dict()) == {
        "codebook",
        "count",
        "total",
    }
    before = layer.codebook.clone()
    with torch.no_grad():
        layer(z)
    layer.eval()(z)
    assert torch.equal(layer.codebook, before)


@pytest.mark.parametrize("kind", ["gradient", "ema"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_vq_averages_of_half_layers_are_those_of_float32(kind, dtype):
    options = {"codebook": kind, "restart_dead": True}
    torch.manual_seed(0)
    layer, z = VQ(4, 2, **options), latent(1, 2, 50).to(dtype)
    with torch.no_grad():
        layer.codebook.copy_(layer.codebook.to(dtype))
    half = VQ(4, 2, **options)
    half.load_state_dict(layer.state_dict())
    half.to(dtype)
    for _ in range(3):
        layer(z.float())
        half(z)
    assert half.count.dtype == torch.float32 and torch.equal(half.count, layer.count)
    assert half.codebook.dtype == (torch.float32 if kind == "ema" else dtype)
    assert torch.equal(half.codebook.float(), layer.codebook)
    if kind == "ema":
        assert half.total.dtype == torch.float32 and torch.equal(half.total, layer.total)
    assert half.double().count.dtype == torch.float64


@pytest.mark.parametrize("kind", ["gradient", "ema"])
def test_training_finds_clusters(kind):
    """Eight far clusters: vectors end at all of their centres when dead ones move."""
    centres = 3 * latent(8, 2, seed=5)
    used = {}
    for restart in (False, True):
        torch.manual_seed(0)
        layer = VQ(16, 2, codebook=kind, decay=0.8, restart_dead=restart)
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.05) if kind == "gradient" else None
        for step in range(80):
            which = torch.arange(256) % 8
            z = (centres[which] + 0.01 * latent(256, 2, seed=step)).T[None].requires_grad_()
            loss = layer(z)[2]["aux_loss"]
            if optimizer is not None:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        distance = torch.cdist(centres, layer.codebook.detach())
        used[restart] = int((distance.min(1).values < 0.1).sum())
    assert used[True] == 8 and used[True] >= used[False]


@pytest.mark.parametrize("kind", ["gradient", "ema"])
def test_vq_starts_from_latents(kind):
    """Every vector is another latent, so that all of them are used at once."""
    torch.manual_seed(0)
    layer, z = VQ(16, 3, codebook=kind).eval(), latent(2, 3, 2, 4, 2, seed=3)
    assert layer(z, compute_loss=True)[2]["codebook_use"] < 0.8
    layer.start_from(z)
    assert layer(z, compute_loss=True)[2]["codebook_use"] == 1
    tokens = z.movedim(1, -1).reshape(-1, 3)
    assert (layer.codebook[:, None] == tokens).all(-1).sum() == 16
    if kind == "ema":
        assert torch.equal(layer.total, layer.codebook) and (layer.count == 1).all()
    with pytest.raises(ValueError, match="at least 16 positions to start from, got 12"):
        layer.start_from(z[:1, :, :, :3])
    with pytest.raises(ValueError, match="must have 3 channels"):
        layer.start_from(z[:, :2])


def test_vq_refuses():
    for arguments, message in (
        ((0, 4), "codebook_size and dim must be at least 1, got 0, 4"),
        ((4, 4, "mean"), "codebook must be one of .*, got 'mean'"),
    ):
        with pytest.raises(ValueError, match=message):
            VQ(*arguments[:2], **({"codebook": arguments[2]} if len(arguments) > 2 else {}))
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\), got 1"):
        VQ(4, 4, decay=1)
    with pytest.raises(ValueError, match="VQ: z must have 4 channels in dimension 1, got"):
        VQ(4, 4)(latent(1, 5, 2))
    with pytest.raises(TypeError, match="VQ: z must be floating"):
        VQ(4, 4)(torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"VQ: indices must lie in 0\.\.3, got -1\.\.2"):
        VQ(4, 4).indices_to_codes(torch.tensor([-1, 2]))
    with pytest.raises(TypeError, match="VQ: indices must be integers"):
        VQ(4, 4).indices_to_codes(torch.zeros(1))


RANKS = """
import sys, torch
from torch import distributed
from vtok_ext.layers import VQ
rank = int(sys.argv[1])
distributed.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
torch.manual_seed(0)
layer = VQ(6, 3, codebook="ema", restart_dead=True, dead_count=0.95, decay=0.9)
torch.manual_seed(rank)
z = torch.randn(1, 3, 40).requires_grad_()
for _ in range(3):
    layer(z)
states = [torch.empty_like(layer.codebook) for _ in range(2)]
distributed.all_gather(states, layer.codebook)
counts = [torch.empty_like(layer.count) for _ in range(2)]
distributed.all_gather(counts, layer.count)
distributed.destroy_process_group()  # else its threads may outlive the interpreter
assert torch.equal(*states) and torch.equal(*counts)
"""


def test_ranks_keep_one_codebook(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RANKS]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "meet")], env=environment)
        for rank in range(2)
    ]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
