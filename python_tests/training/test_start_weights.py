"""How tokenizers start: what of a latent depends on the video, which places are alike."""

import pytest
import torch
from tiny_recipe import tiny

import vtok_ext as vt
from vtok_ext.training.recipe import ModelRecipe
from vtok_ext.training.start_weights import start
from vtok_ext.training.tokenizer_task import build_model

SMALL = {"ch": 8, "ch_mult": (1, 1, 2, 2), "num_res_blocks": 1}


def share_of_the_video(model):
    """Returns which part of a latent's root mean square differs between clips of one colour."""
    frames = 17 if model.is_causal else 16
    generator = torch.Generator().manual_seed(0)
    colours = torch.rand(8, 3, 1, 1, 1, generator=generator) * 2 - 1
    with torch.no_grad():
        latent = model.encoder(colours.expand(-1, -1, frames, 32, 32).contiguous())
    return (latent.std(0).square().mean().sqrt() / latent.square().mean().sqrt()).item()


@pytest.mark.parametrize(
    "name",
    ["vidtok_fsq_causal_488_4096", "vidtok_kl_noncausal_488_4chn", "vidtok_kl_causal_288_8chn"],
)
def test_a_scaled_start_lets_the_video_through(name):
    torch.manual_seed(0)
    model = vt.create_model(name, **SMALL)
    before = share_of_the_video(model)
    start(model, "published")
    assert share_of_the_video(model) == before < 0.7
    start(model, "scaled")
    assert share_of_the_video(model) > 0.85
    x = torch.randn(1, 8, 3, 4, 4)
    block = model.encoder.down[0].block[0]
    assert torch.equal(block(x), x) and not torch.equal(block.conv1(x), x)


def test_the_architecture_without_factorised_blocks_starts_too():
    model = vt.create_model("vidtok_kl_causal_488_4chn", architecture="full_3d", **SMALL)
    start(model, "scaled")
    assert share_of_the_video(model) > 0.85


@pytest.mark.parametrize("architecture", ["vidtok", "full_3d", "without_blender", "without_3d"])
def test_residual_blocks_of_all_architectures_start_as_their_shortcut(architecture):
    model = vt.create_model("vidtok_fsq_causal_488_4096", architecture=architecture, **SMALL)
    start(model, "scaled")
    blocks = [m for m in model.modules() if "ResidualBlock" in type(m).__name__]
    assert len(blocks) > 10
    for block in blocks:
        last = block.conv2.state_dict().values()
        assert not any(parameter.any() for parameter in last), type(block).__name__


def test_a_recipe_says_how():
    torch.manual_seed(0)
    published = build_model(tiny().model)
    torch.manual_seed(0)
    scaled = build_model(tiny("model.start=scaled").model)
    biases = [model.encoder.conv_in.conv.bias for model in (published, scaled)]
    assert biases[0].any() and not biases[1].any()
    with pytest.raises(ValueError, match="recipe: model.start must be one of"):
        tiny("model.start=zeros")
    with pytest.raises(ValueError, match="model.start must be published with model.weights"):
        tiny("model.name=null", "model.overrides={}", "model.weights=x", "model.start=scaled")
    with pytest.raises(ValueError, match="start: model must be a VidTok for 'scaled', got ProMAG"):
        start(vt.create_model("promag_base_4x8x8", ch=16, num_res_blocks=1), "scaled")
    with pytest.raises(ValueError, match="must be a CoordTok for 'sinusoidal', got VidTok"):
        start(published, "sinusoidal")


@pytest.mark.parametrize("width", [32, 36, 45])
def test_a_sinusoidal_start_makes_near_places_alike(width):
    """In tables as large as the published ones; only these change."""
    torch.manual_seed(0)
    model = vt.create_model(
        "coordtok_small_128",
        **{"video_shape": (16, 16, 24), "latent_resolution": (8, 4, 4), "latent_channels": 4},
        **{"enc_embed_dim": width, "enc_num_heads": 1, "enc_num_layers": 1},
        **{"dec_embed_dim": width, "dec_num_heads": 1, "dec_num_layers": 1},
        **{"enc_patch_num_layers": 1, "enc_patch_size": (2, 4, 4), "dec_patch_size": (1, 4, 4)},
        latent_patch_size=(4, 2, 2),
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    start(model, "sinusoidal")
    grids = {
        "encoder.encoder.pos_emb": model.config.memory_grid(),
        "encoder.cross_pos_emb": model.config.memory_grid(),
        "decoder.transformer.pos_embed": model.config.point_grid(),
    }
    after = model.state_dict()
    assert {name for name in after if not torch.equal(after[name], before[name])} == set(grids)
    for name, grid in grids.items():
        sizes = [tables[name].square().mean().item() for tables in (after, before)]
        assert sizes[0] == pytest.approx(sizes[1], rel=0.1)
        table = after[name].view(*grid, width)
        for axis in range(3):
            place = table.movedim(axis, 0)
            distances = (place - place[:1]).square().sum(-1).flatten(1).mean(1)
            assert distances[0] == 0 < distances[1] < distances[2:].min()
        flat = table.flatten(0, 2)
        apart = torch.cdist(flat, flat) + 1e9 * torch.eye(len(flat))
        assert apart.min() > 0.05 * flat.norm(dim=1).mean()  # no two places are one


def test_a_recipe_of_coordtok_says_how():
    fields = {"name": "coordtok_small_128", "overrides": {"enc_embed_dim": 48, "enc_num_heads": 4}}
    model = build_model(ModelRecipe(**fields, start="sinusoidal"))
    table = model.encoder.cross_pos_emb[0]
    assert torch.equal(table, model.encoder.encoder.pos_emb[0])
    assert (table[1:] * table[:-1]).sum(1).mean() > 0.5 * table.square().sum(1).mean()
