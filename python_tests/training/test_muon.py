"""Muon: orthogonal steps, the shapes it takes, and what it refuses."""

import pytest
import torch

import vtok_ext as vt
from vtok_ext.training.muon import Muon, orthogonalize
from vtok_ext.training.optimizers import tokenizer_optimizers, transformer_optimizers
from vtok_ext.training.recipe import OptimizerRecipe


@pytest.mark.parametrize("shape", [(8, 8), (5, 40), (40, 5), (1, 7)])
def test_orthogonalized_matrix_keeps_its_directions(shape):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape, generator=generator)
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    values = u.T @ orthogonalize(matrix) @ vh.T
    # Jordan et al. tune the iteration for speed: singular values end within about 0.7..1.2, small
    # ones of a square matrix a little lower.
    assert 0.5 < values.diagonal().min() and values.diagonal().max() < 1.3
    assert (values - values.diagonal().diag()).abs().max() < 1e-4


def test_zeros_stay_zeros():
    assert torch.equal(orthogonalize(torch.zeros(3, 4)), torch.zeros(3, 4))


def test_step_moves_every_direction_by_the_same_length():
    """The gradient is tiny in one direction; a plain step would hardly move there."""
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    optimizer = Muon([weight], lr=0.1, momentum=0.0)
    weight.grad = torch.tensor([[1.0, 0.0], [0.0, 0.05]])
    optimizer.step()
    step = weight.detach().diagonal()
    assert (step < -0.06).all() and (step > -0.13).all()


def test_convolution_weights_learn_a_known_filter():
    torch.manual_seed(0)
    images = torch.randn(8, 3, 12, 12)
    target = torch.nn.Conv2d(3, 6, 3, bias=False)
    model = torch.nn.Conv2d(3, 6, 3, bias=False)
    expected = target(images).detach()
    before = (model(images) - expected).square().mean().item()
    optimizer = Muon(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(100):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 100)
        optimizer.zero_grad()
        loss = (model(images) - expected).square().mean()
        loss.backward()
        optimizer.step()
    assert loss.item() < 1e-2 * before


def test_closure_is_evaluated_with_gradients():
    weight = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = Muon([weight])

    def closure():
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4
    assert not torch.equal(weight.detach(), torch.ones(2, 2))


def test_weights_without_gradient_stay():
    weight = torch.nn.Parameter(torch.ones(2, 2))
    Muon([weight]).step()
    assert torch.equal(weight.detach(), torch.ones(2, 2))


def test_the_vectors_of_a_codebook_are_no_matrix():
    options = {"ch": 8, "ch_mult": (1, 1, 1, 1), "num_res_blocks": 1, "regularizer": "vq"}
    model = vt.create_model("vidtok_kl_causal_488_4chn", **options, codebook_size=16)
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = tokenizer_optimizers(model, OptimizerRecipe(muon_lr=0.01), [])
    adam, muon = (
        {names[p] for group in found[kind].param_groups for p in group["params"]}
        for kind in ("generator", "matrices")
    )
    assert adam.isdisjoint(muon) and adam | muon == set(names.values())
    assert "quantizer.codebook" in adam and "decoder.conv_in.conv.weight" in muon


@pytest.mark.parametrize("muon_lr", [None, 0.01])
def test_the_matrices_of_a_transformer(muon_lr):
    sizes = {"image_size": 16, "encoder_dim": 16, "encoder_depth": 1, "encoder_heads": 2}
    sizes |= {"token_dim": 16, "decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
    model = vt.create_model("vtok_small", **sizes)
    model.encoder.requires_grad_(False)
    found = transformer_optimizers(model, OptimizerRecipe(lr=0.1, muon_lr=muon_lr))
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = {
        kind: {names[p] for group in optimizer.param_groups for p in group["params"]}
        for kind, optimizer in found.items()
    }
    matrices = groups.pop("matrices", set())
    trained = {name for name in names.values() if not name.startswith("encoder.")}
    assert groups["model"].isdisjoint(matrices) and groups["model"] | matrices == trained
    assert bool(matrices) == (muon_lr is not None)
    if matrices:
        assert {"decoder.blocks.0.attn.qkv.weight", "residual.mlp.0.weight"} <= matrices
        rest = {"decoder.embed.weight", "decoder.slot_embed.weight", "decoder.out.weight"}
        assert rest <= groups["model"]


def test_refusals():
    with pytest.raises(ValueError, match=r"two dimensions or more, got \[4\]"):
        Muon([torch.nn.Parameter(torch.zeros(4))])
    for options in ({"lr": 0.0}, {"momentum": 1.0}):
        with pytest.raises(ValueError, match="lr must be positive and momentum"):
            Muon([torch.nn.Parameter(torch.zeros(2, 2))], **options)
