"""Growth through the training engine: what trains, what stays, and stage III."""

import pytest
import torch

import vtok_ext as vt
from vtok_ext.data.procedural import procedural_clip
from vtok_ext.models.promag_grown import weights_sha256
from vtok_ext.training.growth_loss import growth_loss
from vtok_ext.training.growth_work import step_multiply_adds
from vtok_ext.training.loop import train
from vtok_ext.training.optimizers import tokenizer_optimizers
from vtok_ext.training.recipe import OptimizerRecipe
from vtok_ext.training.recipe_file import load_recipe

TINY = {"ch": 4, "ch_mult": (1, 2), "num_res_blocks": 1, "time_levels": 1, "z_channels": 2}
SMALL = [
    "data.num_frames=9",
    "data.height=24",
    "data.width=24",
    "data.num_clips=4",
    "data.validation_clips=1",
    "run.steps=3",
    "run.batch_size=2",
]


def base() -> vt.VideoTokenizer:
    torch.manual_seed(0)
    return vt.create_model("promag_base_4x8x8", **TINY).eval()


def test_stages_2_and_3(tmp_path):
    model = base()
    model.save_pretrained(tmp_path / "base")
    weights = [f"model.weights={tmp_path / 'base'}", "optimizer.ema_decay=0.9"]
    result = train(load_recipe("promag_grow", [*SMALL, *weights]), tmp_path / "two")
    assert set(result.validation) == {"rec_loss", "psnr"}
    grown = vt.load_model(result.model)
    assert weights_sha256(grown.base) == weights_sha256(model)
    fresh = vt.grow(model)
    found = grown.trainable().items()
    trained = [n for n, p in found if not torch.equal(p, fresh.get_parameter(n))]
    assert set(trained) == set(fresh.trainable())

    weights = [f"model.weights={result.model}", "loss.discriminator_start=1"]
    result = train(load_recipe("promag_decoder", [*SMALL, *weights]), tmp_path / "three")
    unlocked, video = vt.load_model(result.model), torch.rand(1, 3, 9, 24, 24) * 2 - 1
    assert unlocked.config.decoder_unlocked
    with torch.no_grad():
        latent = grown.encode(video).latent
        assert torch.equal(unlocked.encode(video).latent, latent)
        assert not torch.equal(unlocked.decode(latent), grown.decode(latent))


def test_a_frozen_encoder_means_nothing_where_things_grow():
    with pytest.raises(ValueError, match="model.freeze must be empty to grow"):
        load_recipe("promag_grow", ["model.freeze=[encoder]"])


def test_the_loss_counts_kl_per_pixel():
    video = torch.rand(2, 3, 5, 16, 16) * 2 - 1
    output = base()(video)
    loss, terms = growth_loss(video, output, kl_weight=0.5)
    pixels = 5 * 16 * 16
    assert torch.allclose(terms["kl"], output.encoding.losses["kl_loss"] / pixels)
    rec = (output.reconstruction - video).abs().mean()
    assert torch.allclose(loss, rec + 0.5 * output.encoding.losses["kl_loss"] / pixels)


def test_a_step_of_growing_costs_less_than_three_forward_passes():
    model = vt.grow(base())
    work = step_multiply_adds(model, 9, 16, 16)
    whole = step_multiply_adds(base(), 9, 16, 16)
    assert 0.5 * whole < work < 3 * whole
    model.base, parts = base(), step_multiply_adds(model, 9, 16, 16)
    assert work == parts


@pytest.mark.slow
def test_four_clips_by_heart():
    """decode(encode(A)) is at least 6 dB closer to A than to another clip, also once grown."""
    clips = [procedural_clip(9, 16, 16, seed=i, motion="erratic") for i in range(4)]
    video = torch.stack(clips).float() / 127.5 - 1
    torch.manual_seed(0)
    small = {"ch": 16, "ch_mult": (1, 2, 2), "num_res_blocks": 1}
    model = vt.create_model("promag_base_4x8x8", **small)
    for _ in range(2):
        settings = OptimizerRecipe(lr=3e-3, muon_lr=0.01, betas=[0.9, 0.99], schedule="cosine")
        optimizers = tokenizer_optimizers(model, settings, []).values()
        groups = [(g, g["lr"]) for o in optimizers for g in o.param_groups]
        model.train()
        for step in range(150):
            for group, peak in groups:
                group["lr"] = peak * min(1, step / 10) * settings.scale(step, 150)
            for optimizer in optimizers:
                optimizer.zero_grad()
            growth_loss(video, model(video, sample=False))[0].backward()
            for optimizer in optimizers:
                optimizer.step()
        model.eval()
        with torch.no_grad():
            output = model(video).reconstruction
        own = vt.metrics.psnr(output, video).mean()
        assert own > vt.metrics.psnr(output, video.roll(1, 0)).mean() + 6, own
        model = vt.grow(model)
