"""VidTok: every length and size comes back, causality, training, dtypes, presets."""

import pytest
import torch

import vtok_ext as vt
from vtok_ext.models import VidTok, VidTokConfig

# Parameters in millions, encoder and decoder, as published for each configuration.
PARAMETERS_M = {
    "vidtok_kl_causal_488_4chn": 157.5,
    "vidtok_kl_causal_488_8chn": 157.6,
    "vidtok_kl_causal_488_16chn": 157.9,
    "vidtok_kl_causal_288_8chn": 148.8,
    "vidtok_kl_causal_444_4chn": 154.9,
    "vidtok_kl_causal_41616_4chn": 199.0,
    "vidtok_kl_noncausal_488_4chn": 157.5,
    "vidtok_kl_noncausal_488_16chn": 157.9,
    "vidtok_kl_noncausal_41616_4chn": 199.0,
    "vidtok_kl_noncausal_41616_16chn": 199.5,
    "vidtok_fsq_causal_488_262144": 157.5,
    "vidtok_fsq_causal_488_32768": 157.4,
    "vidtok_fsq_causal_488_4096": 157.4,
    "vidtok_fsq_causal_41616_262144": 199.0,
    "vidtok_fsq_noncausal_488_262144": 157.5,
    "vidtok_fsq_noncausal_41616_262144": 199.0,
    "vidtok_kl_causal_488_4chn_v1_1": 157.5,
    "vidtok_kl_causal_488_16chn_v1_1": 157.9,
    "vidtok_kl_causal_41616_16chn_v1_1": 199.5,
    "vidtok_kl_causal_288_8chn_v1_1": 148.8,
    "vidtok_fsq_causal_488_32768_v1_1": 157.4,
    "vidtok_fsq_causal_888_32768_v1_1": 164.9,
    "vidtok_fsq_causal_41616_262144_v1_1": 199.0,
}
FACTORS = {"288": (2, 8), "444": (4, 4), "488": (4, 8), "888": (8, 8), "41616": (4, 16)}


def test_every_preset_is_listed_with_its_published_size():
    ablations = [n for n in vt.list_models() if n.endswith(("full_3d", "_blender", "without_3d"))]
    assert vt.list_models("vidtok_*") == sorted([*PARAMETERS_M, *ablations]) and len(ablations) == 3
    assert vt.list_models("vidtok_*", discrete=True) == sorted(
        n for n in PARAMETERS_M if "fsq" in n
    )


@pytest.mark.parametrize("name", sorted(PARAMETERS_M))
def test_parameter_count_and_factors_of_preset(name):
    with torch.device("meta"):
        model = vt.create_model(name)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert abs(count / 1e6 - PARAMETERS_M[name]) < 0.06
    assert (model.temporal_factor, model.spatial_factor) == FACTORS[name.split("_")[3]]
    codes = int(name.split("_")[4]) if "fsq" in name else None
    assert (model.is_discrete, model.codebook_size) == ("fsq" in name, codes)
    assert model.is_causal == ("noncausal" not in name)
    assert model.reference_version == ("1.1" if name.endswith("v1_1") else "1.0")


def test_encoder_and_decoder_of_the_smallest_latent_have_the_published_sizes():
    with torch.device("meta"):
        model = vt.create_model("vidtok_kl_causal_488_4chn")
    encoder, decoder = (
        sum(p.numel() for p in part.parameters()) / 1e6 for part in (model.encoder, model.decoder)
    )
    assert abs(encoder - 69.3) < 0.06 and abs(decoder - 88.2) < 0.06


@pytest.mark.parametrize("num_frames", range(1, 19))
def test_every_length_comes_back(model, clip, num_frames):
    video = clip(1, num_frames, 16, 16)
    with torch.no_grad():
        encoding = model.encode(video)
        assert encoding.latent.shape[2:] == model.token_grid(num_frames, 16, 16)
        assert model.decode(encoding).shape == video.shape


@pytest.mark.parametrize("size", [(1, 1), (7, 9), (8, 8), (13, 24), (17, 31)])
def test_every_size_comes_back(fsq_model, clip, size):
    video = clip(2, 3, *size)
    with torch.no_grad():
        out = fsq_model(video)
    assert out.reconstruction.shape == video.shape
    assert out.encoding.size == size and out.encoding.num_frames == 3
    assert out.encoding.indices.shape == (2, *fsq_model.token_grid(3, *size))


def test_default_equals_the_reference_rule_where_both_apply(model, clip):
    video = clip(2, 9, 16, 24)
    with torch.no_grad():
        ours, reference = (model.encode(video, frames=rule) for rule in ("preserve", "reference"))
    assert torch.equal(ours.latent, reference.latent)
    assert (reference.num_frames, reference.size) == (9, (16, 24))


@pytest.mark.parametrize(
    ("num_frames", "num_latents", "num_decoded"),
    [(1, 1, 1), (2, 1, 1), (4, 1, 1), (5, 2, 5), (16, 4, 13), (17, 5, 17), (18, 5, 17)],
)
def test_reference_rule_counts(fsq_model, clip, num_frames, num_latents, num_decoded):
    with torch.no_grad():
        encoding = fsq_model.encode(clip(1, num_frames, 17, 19), frames="reference")
        assert encoding.latent.shape[2:] == (num_latents, 2, 2)
        assert fsq_model.decode(encoding).shape[2:] == (num_decoded, 16, 16)


def test_tail_padding_repeats_the_last_frame(model, clip):
    video = clip(1, 7, 16, 16)
    extended = torch.cat([video, video[:, :, -1:].expand(-1, -1, 2, -1, -1)], dim=2)
    with torch.no_grad():
        assert torch.equal(model.encode(video).latent, model.encode(extended).latent)


def test_encoder_and_decoder_are_causal(model, clip):
    video = clip(1, 13, 16, 16)
    changed = video.clone()
    changed[:, :, 5:] = clip(1, 8, 16, 16, seed=1)
    with torch.no_grad():
        a, b = model.encode(video), model.encode(changed)
        assert torch.allclose(a.latent[:, :, :2], b.latent[:, :, :2], atol=1e-5)
        assert not torch.allclose(a.latent[:, :, 2:], b.latent[:, :, 2:], atol=1e-2)
        a, b = model.decode(a), model.decode(b)
        assert torch.allclose(a[:, :, :5], b[:, :, :5], atol=1e-5)
        assert not torch.allclose(a[:, :, 5:], b[:, :, 5:], atol=1e-2)


def test_batch_items_do_not_mix(model, clip):
    video = torch.cat([clip(1, 6, 16, 24, seed=s) for s in range(3)])
    with torch.no_grad():
        together = model(video).reconstruction
        alone = torch.cat([model(item).reconstruction for item in video.split(1)])
    assert torch.allclose(together, alone, atol=1e-4)


def test_uint8_video_equals_its_float_form(model):
    video = torch.randint(0, 256, (1, 3, 5, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        a = model.encode(video)
        b = model.encode(video.float() / 127.5 - 1)
        assert torch.allclose(a.latent, b.latent, atol=1e-5)
        decoded = model.decode(a, output="uint8")
        exact = (model.decode(a).clamp(-1, 1) + 1) * 127.5
    assert decoded.dtype == torch.uint8
    assert (decoded.float() - exact).abs().max() <= 0.5001


def test_decode_accepts_latent_and_ids_and_crops(fsq_model, clip):
    with torch.no_grad():
        encoding = fsq_model.encode(clip(1, 6, 12, 20))
        whole = fsq_model.decode(encoding.latent)
        assert whole.shape[2:] == (9, 16, 24)
        assert torch.equal(fsq_model.decode(encoding.indices), whole)
        cropped = fsq_model.decode(encoding.latent, num_frames=6, size=(12, 20))
        assert torch.equal(cropped, fsq_model.decode(encoding))
        assert torch.equal(cropped, whole[:, :, :6, :12, :20])


def test_tokens_round_trip(fsq_model, clip):
    with torch.no_grad():
        video = clip(2, 6, 12, 20)
        tokens = fsq_model.tokenize(video, fps=25.0)
        assert (tokens.grid, tokens.num_frames, tokens.size) == ((3, 2, 3), 6, (12, 20))
        assert tokens.fps == 25.0 and tokens.model_id == fsq_model.model_id
        assert torch.equal(fsq_model.detokenize(tokens), fsq_model.decode(fsq_model.encode(video)))


def test_tokens_of_another_model_are_refused(fsq_model, build, clip):
    other = build("vidtok_fsq_causal_488_4096")
    with torch.no_grad():
        tokens = other.tokenize(clip(1, 1, 16, 16))
    with pytest.raises(
        ValueError, match="detokenize: tokens must come from vidtok_fsq_causal_488_2"
    ):
        fsq_model.detokenize(tokens)
    foreign = vt.Tokens(torch.full((1, 1, 2, 2), 262144), (1, 2, 2), 1, (16, 16))
    with pytest.raises(ValueError, match="262144"):
        fsq_model.detokenize(foreign)
    short = vt.Tokens(torch.zeros((1, 1, 2, 2), dtype=torch.int32), (1, 2, 2), 9, (16, 16))
    with pytest.raises(ValueError, match="num_frames and size must be within"):
        fsq_model.detokenize(short)


def test_tokens_need_a_discrete_model(kl_model, clip):
    for call in (kl_model.tokenize, kl_model.detokenize):
        with pytest.raises(ValueError, match="must be discrete .*vidtok_fsq_causal_488_262144"):
            call(clip(1, 1, 8, 8))
    with pytest.raises(ValueError, match="stream_encoder: model must be discrete"):
        kl_model.stream_encoder("tokens")
    with pytest.raises(ValueError, match="indices_to_latent: model must be discrete"):
        kl_model.decode(torch.zeros((1, 1, 2, 2), dtype=torch.int32))


def test_kl_samples_by_generator_and_by_global_seed(kl_model, clip):
    video = clip(1, 5, 16, 16)
    with torch.no_grad():
        mode = kl_model.encode(video)
        torch.manual_seed(7)
        seeded = kl_model.encode(video, sample=True).latent
        generator = torch.Generator().manual_seed(7)
        drawn = kl_model.encode(video, sample=True, generator=generator).latent
    assert torch.equal(seeded, drawn) and not torch.equal(seeded, mode.latent)
    mean, logvar = mode.moments.chunk(2, dim=1)
    assert torch.equal(mode.latent, mean)
    torch.manual_seed(7)
    noise = torch.randn(mean.shape)
    assert torch.allclose(drawn, mean + (0.5 * logvar).exp() * noise, atol=1e-5)
    terms = mean.square() + logvar.exp() - 1 - logvar
    assert torch.allclose(mode.losses["kl_loss"], 0.5 * terms.sum(), rtol=1e-5)


def test_auxiliary_loss_is_computed_in_training_only(build, clip):
    model = build("vidtok_fsq_causal_488_4096")
    video = clip(1, 1, 16, 16)
    assert model.encode(video).losses == {}
    assert "aux_loss" in model.encode(video, compute_loss=True).losses
    model.train()
    assert "aux_loss" in model(video).encoding.losses
    assert model(video, compute_loss=False).encoding.losses == {}
    with torch.no_grad():
        assert model.encode(video).losses == {}
    early, late = (model.encode(video, step=s).losses["aux_loss"] for s in (0, 2000))
    assert not torch.allclose(early, late)


@pytest.mark.parametrize("name", ["vidtok_fsq_causal_488_4096", "vidtok_kl_causal_488_4chn"])
def test_training_reaches_every_parameter(build, clip, name):
    model = build(name).train()
    out = model(clip(1, 6, 20, 16))
    loss = out.reconstruction.square().mean() + 1e-3 * sum(out.encoding.losses.values())
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    assert [name for name, g in grads.items() if g is None or not g.isfinite().all()] == []
    # A key bias shifts all logits of a query alike: softmax makes its gradient zero.
    zero = [name for name, g in grads.items() if not g.abs().max() > 0]
    assert all(name.endswith("attn_1.k.conv.bias") for name in zero), zero


def test_inference_in_place_writes_do_not_show(model, clip):
    """Results without gradients, where activations are overwritten, equal those with gradients."""
    video = clip(2, 5, 16, 16)
    source = video.clone()
    with torch.no_grad():
        fast = model(video, compute_loss=False).reconstruction
    assert torch.equal(video, source)
    assert torch.allclose(model(video, compute_loss=False).reconstruction, fast, atol=1e-5)


def test_forward_hooks_see_unchanged_activations(fsq_model, clip):
    """A hook that keeps a block's inner activation must not find it overwritten."""
    block = fsq_model.encoder.down[0].block[0]
    kept = []
    handles = [
        module.register_forward_hook(lambda m, args, out: kept.append((out, out.clone())))
        for module in (block.norm1.norm, block.conv2)
    ]
    try:
        with torch.no_grad():
            fsq_model.encode(clip(1, 1, 16, 16))
    finally:
        for handle in handles:
            handle.remove()
    assert len(kept) == 2
    assert all(torch.equal(out, copy) for out, copy in kept)


@pytest.mark.parametrize("name", ["vidtok_fsq_causal_488_262144", "vidtok_kl_causal_488_4chn"])
def test_bfloat16_autocast_and_weights(build, clip, name):
    model = build(name)
    video = clip(1, 5, 16, 16)
    with torch.no_grad():
        exact = model.encode_chunk(video)
        with torch.autocast("cpu", torch.bfloat16):
            raw = model.encode_chunk(video)
            assert raw.dtype == torch.bfloat16  # no branch promotes the stream to float32
            assert model(video).reconstruction.isfinite().all()
        # bf16 has 8 bits of mantissa; about 30 roundings in a row on values of order one.
        assert (raw.float() - exact).abs().mean() < 0.05 * exact.abs().mean()
        out = model.to(torch.bfloat16)(video)
    assert out.reconstruction.dtype == torch.bfloat16 and out.reconstruction.isfinite().all()


def test_large_activations_stay_finite_under_autocast(build, clip):
    model = build("vidtok_kl_causal_488_4chn")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = model(1e4 * clip(1, 5, 16, 16))
    assert out.reconstruction.isfinite().all() and out.encoding.losses["kl_loss"].isfinite()


def test_channels_last_memory_throughout(build, clip):
    """No layer of a realistic size leaves channels_last_3d, which would cost a copy."""
    model = build("vidtok_fsq_causal_488_262144", ch=32)
    wrong = []

    def check(module, args, out):
        out = out[0] if isinstance(out, tuple) else out
        if out.dim() == 5 and not out.is_contiguous(memory_format=torch.channels_last_3d):
            wrong.append(type(module).__name__)

    kinds = (vt.NormAct, vt.CausalConv3d, vt.TemporalDownsample, vt.TemporalUpsample)
    for module in model.modules():
        if isinstance(module, kinds) or type(module).__name__.endswith(("Conv2d", "Block2d")):
            module.register_forward_hook(check)
    with torch.no_grad():
        model(clip(1, 7, 61, 64))
        encoder, decoder = model.stream_encoder(), model.stream_decoder()
        for chunk in clip(1, 10, 64, 64).split(5, dim=2):
            latents = encoder.push(chunk)
            decoder.push(latents[0])
    assert wrong == []


def test_groupnorm_variant_runs(build, clip):
    model = build("vidtok_kl_causal_488_4chn", ch=32, ch_mult=(1, 2), norm_type="groupnorm")
    assert (model.temporal_factor, model.spatial_factor) == (2, 2)
    video = clip(1, 3, 8, 8)
    with torch.no_grad():
        assert model(video).reconstruction.shape == video.shape


def test_replaced_config_keeps_defaults_that_follow_the_depth():
    config = VidTok.presets["vidtok_fsq_causal_488_262144"].replace(ch=16, ch_mult=(1, 2, 2))
    model = VidTok(config)
    assert (model.temporal_factor, model.spatial_factor) == (4, 4)
    assert config.steps("tempo_ds") == (0, 1) and config.steps("tempo_us") == (1, 2)
    deep = VidTokConfig("kl", 4, ch_mult=(1, 2, 4, 4, 4))
    assert deep.steps("tempo_ds") == (2, 3) and deep.steps("tempo_us") == (1, 2)


@pytest.mark.parametrize(
    "fields",
    [
        {"regularizer": "lfq", "z_channels": 8},
        {"regularizer": "vq", "z_channels": 4, "codebook_size": 64},
        {"regularizer": "vq", "z_channels": 4, "codebook_size": 64, "codebook": "ema"},
    ],
)
def test_other_quantizers(build, clip, tmp_path, fields):
    """Tokens, streams, saving and training with every regulariser that has a codebook."""
    model = build("vidtok_kl_causal_488_4chn", ch_mult=(1, 2, 2, 2), **fields)
    video = clip(1, 6, 13, 18)
    with torch.no_grad():
        tokens = model.tokenize(video)
        assert model.is_discrete and int(tokens.ids.max()) < model.codebook_size
        restored = model.detokenize(tokens)
        assert restored.shape == video.shape
        assert torch.equal(restored, model(video).reconstruction)
        stream = model.stream_encoder("tokens")
        ids = [out for chunk in video.split(2, dim=2) for out in stream.push(chunk)]
        assert torch.equal(torch.cat(ids + stream.flush(), dim=1), tokens.ids)
        model.save_pretrained(tmp_path)
        assert torch.equal(vt.load_model(tmp_path).detokenize(tokens), restored)
    out = model.train()(video)
    (out.reconstruction.square().mean() + out.encoding.losses["aux_loss"]).backward()
    for part in (model.encoder.conv_in, model.decoder.conv_out, *model.quantizer.parameters()):
        parameters = [part] if isinstance(part, torch.nn.Parameter) else part.parameters()
        assert all(p.grad.abs().max() > 0 for p in parameters)
