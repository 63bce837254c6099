"""Growing: starts as the base, trains nothing but the new parts, streams, and keeps its lineage."""

import pytest
import torch

import vtok_ext as vt
from vtok_ext.models._trunk import trunk
from vtok_ext.models.promag_grown import Grown, weights_sha256

TINY_PROMAG = {"ch": 4, "ch_mult": (1, 2, 2), "num_res_blocks": 1, "z_channels": 3}
TINY_VIDTOK = {"ch": 4, "ch_mult": (1, 1, 1, 2), "num_res_blocks": 1}
BASES = {
    "promag": ("promag_base_4x8x8", TINY_PROMAG),
    "kl": ("vidtok_kl_causal_488_4chn", TINY_VIDTOK),
    "fsq": ("vidtok_fsq_causal_488_4096", TINY_VIDTOK),
    "linear": ("vidtok_kl_causal_488_4chn_v1_1", TINY_VIDTOK),
}
TOLERANCE = 1e-5


def perturb(module: torch.nn.Module, seed: int = 0, scale: float = 0.1) -> torch.nn.Module:
    """Returns `module` in eval mode with noise on every parameter: nothing stays zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def base_of(kind: str) -> vt.VideoTokenizer:
    torch.manual_seed(0)
    name, options = BASES[kind]
    return perturb(vt.create_model(name, **options))


def grown_of(kind: str, mixing: str = "per_position", moved: bool = True) -> Grown:
    """Returns a grown model, with `moved` away from its start."""
    model = vt.grow(base_of(kind), mixing=mixing).eval()
    if moved:
        for i, part in enumerate((model.encoder, model.decoder)):
            perturb(part, seed=1 + i, scale=0.05)
    return model


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max() / (b.max() - b.min()))


@pytest.mark.parametrize("kind", BASES)
@torch.no_grad()
def test_at_the_start_it_is_the_base_on_every_second_frame(kind, clip):
    base, model, video = base_of(kind), grown_of(kind, moved=False), clip(1, 17, 16, 16)
    encoding, expected = model.encode(video), base.encode(video[:, :, ::2])
    assert relative_error(encoding.latent, expected.latent) <= TOLERANCE
    features = base.decoder.conv_in(expected.latent)
    repeated = features.repeat_interleave(2, 2)[:, :, 1:]
    assert relative_error(model.decode(encoding), trunk(base).decode_chunk(repeated)) <= TOLERANCE


@torch.no_grad()
def test_at_the_start_promag_decodes_the_base_latents_repeated(clip):
    """With 1x1x1 latent convolutions repeating features is repeating latents."""
    base, model, video = base_of("promag"), grown_of("promag", moved=False), clip(1, 9, 8, 8)
    latent = base.encode(video[:, :, ::2]).latent.repeat_interleave(2, 2)[:, :, 1:]
    assert relative_error(model(video).reconstruction, base.decode(latent)) <= TOLERANCE


@pytest.mark.parametrize("kind", ["promag", "kl"])
@torch.no_grad()
def test_17_frames_give_5_3_2_latents(kind, clip):
    base, video = base_of(kind), clip(1, 17, 8, 8)
    eight = vt.grow(base).eval()
    sixteen = vt.grow(eight).eval()
    counts = [m.encode(video).latent.shape[2] for m in (base, eight, sixteen)]
    assert counts == [5, 3, 2]
    assert [m.encode(video[:, :, ::2]).latent.shape[2] for m in (base, eight)] == [3, 2]
    assert [m.temporal_factor for m in (base, eight, sixteen)] == [4, 8, 16]
    assert sixteen.name == base.name + "_grown_16x"
    for frames in (1, 2, 17, 20):
        some = clip(1, frames, 9, 8)
        assert sixteen(some).reconstruction.shape == some.shape


@pytest.mark.parametrize("kind", ["promag", "fsq"])
def test_a_gradient_reaches_exactly_the_trainable_set(kind, clip):
    model = grown_of(kind).train()
    before = weights_sha256(model.base)
    output = model(clip(1, 9, 8, 8), sample=False)
    losses = output.encoding.losses
    (output.reconstruction.square().mean() + losses.get("kl_loss", 0)).backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == set(model.trainable())
    assert {n.split(".")[0] for n in reached} == {"encoder", "decoder"}
    parts = {".".join(n.split(".")[:2]) for n in reached}
    new = {f"encoder.{p}" for p in ("affine", "block", "down", "conv_out")}
    assert parts == new | {f"decoder.{p}" for p in ("conv_in", "block", "up")}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    optimizer.step()
    assert not model.base.training
    assert weights_sha256(model.base) == before == model.config.base_sha256
    model.check_base()


@pytest.mark.parametrize("kind", BASES)
def test_streams_equal_the_whole_clip(kind, clip):
    model, video = grown_of(kind), clip(1, 27, 8, 8)
    with torch.no_grad():
        whole = model.encode(video)
        frames = model.decode(whole)
    encoder, decoder = model.stream_encoder(), model.stream_decoder()
    latents, parts = [], []
    for part in video.split([3, 7, 1, 9, 7], dim=2):
        latents += encoder.push(part)
    latents += encoder.flush()
    for latent in torch.cat(latents, 2).split(1, 2):
        parts += decoder.push(latent)
        moved = model.stream_decoder()  # a stream goes on from its saved state
        moved.load_state_dict(decoder.state_dict())
        decoder = moved
    parts += decoder.flush(27)
    if kind != "fsq":  # whose codes may round to either side
        assert relative_error(torch.cat(latents, 2), whole.latent) <= TOLERANCE
        assert relative_error(torch.cat(parts, 2), frames) <= TOLERANCE
    assert torch.cat(parts, 2).shape == video.shape


def test_a_twice_grown_model_streams(clip):
    model = vt.grow(grown_of("promag")).eval()
    perturb(model.encoder, 5, 0.05), perturb(model.decoder, 6, 0.05)
    video = clip(1, 33, 4, 4)
    with torch.no_grad():
        whole = model.encode(video).latent
    stream = model.stream_encoder()
    latents = [y for part in video.split(10, dim=2) for y in stream.push(part)] + stream.flush()
    assert relative_error(torch.cat(latents, 2), whole) <= TOLERANCE


def test_global_mixing_sees_the_whole_clip_and_refuses_streams(clip):
    model, video = grown_of("promag", "global"), clip(1, 17, 8, 8)
    changed = video.clone()
    changed[:, :, 9:] *= -1
    with torch.no_grad():
        latents = [model.encode(v).latent for v in (video, changed)]
        assert latents[0].shape[2] == 3
        assert not torch.allclose(latents[0][:, :, 0], latents[1][:, :, 0])
        causal = grown_of("promag")
        latents = [causal.encode(v).latent for v in (video, changed)]
        assert torch.equal(latents[0][:, :, :2], latents[1][:, :, :2])
    twice = vt.grow(model)
    assert twice.temporal_factor == 16 and not twice.is_causal
    for one in (model, twice):
        with pytest.raises(ValueError, match="stream_encoder: model must be causal"):
            one.stream_encoder()


@pytest.mark.parametrize("kind", ["promag", "fsq"])
def test_save_and_load_keep_the_lineage(kind, clip, tmp_path):
    base, model, video = base_of(kind), grown_of(kind), clip(1, 9, 8, 8)
    model.save_pretrained(tmp_path)
    loaded = vt.load_model(tmp_path)
    assert loaded.model_id == model.model_id
    assert loaded.config == model.config
    assert loaded.config.base_id == base.model_id
    assert set(loaded.trainable()) == set(model.trainable())
    with torch.no_grad():
        assert torch.equal(loaded(video).reconstruction, model(video).reconstruction)
        assert torch.equal(loaded.base(video).reconstruction, base(video).reconstruction)
    model.bfloat16().save_pretrained(tmp_path)  # rounded, and still of that base
    vt.load_model(tmp_path)
    model.float()
    model.base.encoder.conv_in.conv.weight.data[0] += 0.01
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="base must have the weights of"):
        vt.load_model(tmp_path)


def test_stage_3_trains_all_decoders_and_keeps_latents(clip, tmp_path):
    model = vt.grow(grown_of("promag")).eval()
    perturb(model.encoder, 5, 0.05), perturb(model.decoder, 6, 0.05)
    model.unlock_decoder()
    model.train()(clip(1, 17, 4, 4), sample=False).reconstruction.square().mean().backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == set(model.trainable())
    assert all("decoder" in n for n in reached)
    assert any(n.startswith("base.base.decoder.up") for n in reached)
    model.base.base.decoder.conv_out.conv.weight.data += 0.01
    model.save_pretrained(tmp_path)
    assert set(vt.load_model(tmp_path).trainable()) == set(model.trainable())


def test_tokens_of_a_grown_discrete_model(clip):
    model, video = grown_of("fsq"), clip(1, 9, 8, 8)
    with torch.no_grad():
        tokens = model.tokenize(video)
        assert list(tokens.ids.shape) == [1, 2, 1, 1]
        assert model.detokenize(tokens).shape == video.shape


def test_errors():
    base = base_of("promag")
    with pytest.raises(TypeError, match="grow: model must be a VideoTokenizer, got Linear"):
        vt.grow(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="grow: factor must be 2"):
        vt.grow(base, factor=4)
    with pytest.raises(ValueError, match="mixing must be one of"):
        vt.grow(base, mixing="positions")
    other = vt.create_model("vidtok_kl_noncausal_488_4chn", **TINY_VIDTOK)
    with pytest.raises(ValueError, match="grow: model must be a causal one of ProMAG, VidTok"):
        vt.grow(other)
