"""VidTok 1.1 and non-causal VidTok: frame rules, look-ahead, streams, versions of weights."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save, save_file

import vtok_ext as vt

SETTINGS = settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
KL_488 = "vidtok_kl_causal_488_4chn_v1_1"
FSQ_888 = "vidtok_fsq_causal_888_32768_v1_1"
# Four temporal steps would be more than any release has; two and three are those of 488 and 888.
V1_1 = [KL_488, FSQ_888, "vidtok_kl_causal_288_8chn_v1_1", "vidtok_kl_causal_41616_16chn_v1_1"]
CENTRED = "vidtok_fsq_noncausal_488_262144"


@pytest.fixture(scope="session", params=V1_1)
def v1_1(request, build):
    return build(request.param)


@pytest.fixture(scope="session")
def kl_488(build):
    return build(KL_488)


@pytest.fixture(scope="session")
def centred(build):
    return build(CENTRED)


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max() / (b.max() - b.min()))


@pytest.mark.parametrize("num_frames", [1, 2, 4, 5, 8, 9, 12])
@torch.no_grad()
def test_every_length_and_size_comes_back(v1_1, centred, clip, num_frames):
    for model in (v1_1, centred):
        video = clip(1, num_frames, 13, 18)
        encoding = model.encode(video)
        assert encoding.latent.shape[2:] == model.token_grid(num_frames, 13, 18)
        assert model.decode(encoding).shape == video.shape


@pytest.mark.parametrize(
    ("num_frames", "num_latents"), [(1, 1), (2, 1), (4, 1), (5, 2), (16, 4), (17, 5), (18, 5)]
)
@torch.no_grad()
def test_reference_rule_of_1_1_keeps_every_length(kl_488, clip, num_frames, num_latents):
    """Padding stands in front, up to a multiple of f; the decoder's output is not trimmed."""
    video = clip(1, num_frames, 16, 16)
    encoding = kl_488.encode(video, frames="reference")
    assert encoding.latent.shape[2] == num_latents and encoding.num_frames == num_frames
    padded = torch.cat([video[:, :, :1]] * (-num_frames % 4) + [video], dim=2)
    untrimmed = kl_488.decoder(encoding.moments[:, :4])
    assert torch.equal(kl_488.encoder(padded), encoding.moments)
    assert torch.equal(kl_488.decode(encoding.latent, frames="reference"), untrimmed)
    assert torch.equal(kl_488.decode(encoding), untrimmed[:, :, -num_frames:])


@pytest.mark.parametrize(("num_frames", "num_latents"), [(4, 1), (7, 1), (8, 2), (17, 4)])
@torch.no_grad()
def test_non_causal_reference_rule(centred, clip, num_frames, num_latents):
    encoding = centred.encode(clip(1, num_frames, 17, 19), frames="reference")
    assert encoding.latent.shape[2:] == (num_latents, 2, 2)
    assert centred.decode(encoding).shape[2:] == (4 * num_latents, 16, 16)
    with pytest.raises(ValueError, match="video must have at least 4 frames with frames='refer"):
        centred.encode(clip(1, 3, 16, 16), frames="reference")


@torch.no_grad()
def test_default_equals_the_reference_rule_where_both_apply(v1_1, centred, clip):
    f = v1_1.temporal_factor
    for model, num_frames in ((v1_1, 2 * f + 1), (centred, 8)):
        video = clip(1, num_frames, 16, 16)
        ours, reference = (model.encode(video, frames=rule) for rule in ("preserve", "reference"))
        assert torch.equal(ours.latent, reference.latent)
        # The default computes the equal frames of version 1.1 once, in another order of sums.
        expected = model.decode(reference)
        error = (model.decode(ours) - expected).abs().max()
        assert error <= 1e-5 * (expected.max() - expected.min())


@torch.no_grad()
def test_tokens_remember_their_frame_rule(build, clip, tmp_path):
    model = build("vidtok_fsq_causal_488_32768_v1_1")
    video = clip(1, 6, 16, 16)
    tokens = model.tokenize(video, frames="reference")
    tokens.save(tmp_path / "tokens")
    restored = model.detokenize(vt.Tokens.load(tmp_path / "tokens"))
    assert torch.equal(restored, model(video, frames="reference").reconstruction)
    assert not torch.equal(restored, model(video).reconstruction)
    with pytest.raises(ValueError, match="decode: frames must be one of .*, got 'all'"):
        model.decode(tokens.ids, frames="all")


@torch.no_grad()
def test_causality(v1_1, clip):
    """Latents do not look ahead; frames look ahead by one latent, the first frame of each not."""
    f = v1_1.temporal_factor
    video, other = clip(1, 3 * f + 1, 16, 16), clip(1, 3 * f + 1, 16, 16, seed=1)
    other[:, :, : f + 1] = video[:, :, : f + 1]
    a, b = v1_1.encode(video).latent, v1_1.encode(other).latent
    assert torch.allclose(a[:, :, :2], b[:, :, :2], atol=1e-5)
    assert not torch.allclose(a[:, :, 2:], b[:, :, 2:], atol=1e-2)
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(1, v1_1.latent_channels, 4, 2, 2, generator=generator)
    b = torch.cat([a[:, :, :2], a[:, :, 2:] + 1], dim=2)
    a, b = v1_1.decode(a), v1_1.decode(b)
    assert torch.allclose(a[:, :, :2], b[:, :, :2], atol=1e-5)
    assert not torch.allclose(a[:, :, 2 : f + 1], b[:, :, 2 : f + 1], atol=1e-3)


@torch.no_grad()
def test_non_causal_latents_look_both_ways(centred, clip):
    assert not centred.is_causal
    video = clip(1, 16, 16, 16)
    changed = video.clone()
    changed[:, :, 8:] = clip(1, 8, 16, 16, seed=1)
    a, b = (centred.encode_chunk(v)[:, :, 1] for v in (video, changed))
    assert not torch.allclose(a, b, atol=1e-3)


def test_non_causal_models_have_no_streams(centred, clip):
    message = "model must be causal for an exact stream, got vidtok_fsq_noncausal_488_262144"
    calls = [
        centred.stream_encoder,
        centred.stream_decoder,
        lambda: centred.encode_chunk(clip(1, 4, 16, 16), return_state=True),
        lambda: centred.decode_chunk(torch.zeros(1, 6, 1, 2, 2), return_state=True),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()


@given(plan=st.lists(st.integers(1, 9), min_size=1, max_size=4))
@SETTINGS
@torch.no_grad()
def test_encoder_stream_equals_whole_clip(kl_488, clip, plan):
    video = clip(1, sum(plan), 12, 16)
    stream = kl_488.stream_encoder()
    chunks = [out for chunk in video.split(plan, dim=2) for out in stream.push(chunk)]
    latent = torch.cat(chunks + stream.flush(), dim=2)
    assert relative_error(latent, kl_488.encode(video).latent) <= 1e-5


@pytest.mark.parametrize("plan", [[1] * 5, [2, 3], [1, 3, 1], [4, 1], [5]])
@torch.no_grad()
def test_decoder_stream_equals_whole_clip(v1_1, plan):
    """Frames come as soon as they are final: all but the last f - 1 of what has been pushed."""
    f = v1_1.temporal_factor
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(1, v1_1.latent_channels, 5, 2, 3, generator=generator)
    stream, frames, pushed = v1_1.stream_decoder(), [], 0
    for chunk in latent.split(plan, dim=2):
        frames += stream.push(chunk)
        pushed += chunk.shape[2]
        assert stream.num_emitted == max(1, (pushed - 2) * f + 2)
    frames += stream.flush()
    assert relative_error(torch.cat(frames, dim=2), v1_1.decode(latent)) <= 1e-5


@pytest.mark.parametrize("known_at_start", [True, False])
@pytest.mark.parametrize("num_frames", [1, 6, 9, 10])
@torch.no_grad()
def test_file_to_file(kl_488, clip, num_frames, known_at_start):
    video = clip(1, num_frames, 13, 18)
    latent = kl_488.encode(video).latent
    known = {"num_frames": num_frames} if known_at_start else {}
    stream = kl_488.stream_decoder(size=(13, 18), **known)
    frames = [out for chunk in latent.split(1, dim=2) for out in stream.push(chunk)]
    if num_frames == 10:
        with pytest.raises(ValueError, match=r"num_frames must be in \d+\.\.1[03], got 14"):
            stream.flush(14)
    frames += stream.flush() if known_at_start else stream.flush(num_frames)
    whole = kl_488(video).reconstruction
    assert relative_error(torch.cat(frames, dim=2), whole) <= 1e-5


@pytest.mark.parametrize("kill_after", range(0, 5))
@torch.no_grad()
def test_killed_and_resumed_decoder_is_bit_identical(kl_488, kill_after):
    generator = torch.Generator().manual_seed(0)
    chunks = torch.randn(1, 4, 7, 2, 3, generator=generator).split([1, 3, 2, 1], dim=2)
    stream = kl_488.stream_decoder()
    expected = [out for chunk in chunks for out in stream.push(chunk)] + stream.flush()

    stream = kl_488.stream_decoder()
    found = [out for chunk in chunks[:kill_after] for out in stream.push(chunk)]
    saved = save(stream.state_dict())
    stream = kl_488.stream_decoder()
    stream.load_state_dict(load(saved))
    found += [out for chunk in chunks[kill_after:] for out in stream.push(chunk)] + stream.flush()
    assert torch.cat(found, dim=2).shape[2] == 25
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@torch.no_grad()
def test_stream_state_has_constant_size(kl_488):
    stream, sizes = kl_488.stream_decoder(), []
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        stream.push(torch.randn(1, 4, 1, 2, 2, generator=generator))
        sizes.append(sum(t.untyped_storage().nbytes() for t in stream._state.values()))
    assert len(set(sizes[1:])) == 1


@torch.no_grad()
def test_nearest_interpolation_of_1_1_needs_no_look_ahead(build):
    model = build(KL_488, interpolation="nearest")
    latent = torch.randn(1, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    whole = model.decode(latent)
    frames, state = model.decode_chunk(latent[:, :, :2], return_state=True)
    assert frames.shape[2] == 5 and model.decode_rest(state) is None
    frames = torch.cat([frames, model.decode_chunk(latent[:, :, 2:], state)], dim=2)
    assert relative_error(frames, whole) <= 1e-5


@pytest.mark.parametrize("name", [KL_488, CENTRED])
def test_training_reaches_every_parameter(build, clip, name):
    model = build(name).train()
    out = model(clip(1, 6, 16, 16))
    (out.reconstruction.square().mean() + 1e-3 * sum(out.encoding.losses.values())).backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    assert [name for name, g in grads.items() if g is None or not g.isfinite().all()] == []
    # A key bias shifts all logits of a query alike: softmax makes its gradient zero.
    zero = [name for name, g in grads.items() if not g.abs().max() > 0]
    assert all("attn_1.k." in name for name in zero), zero


@pytest.mark.parametrize("name", [KL_488, "vidtok_kl_noncausal_488_4chn"])
@torch.no_grad()
def test_groupnorm_variant_runs(build, clip, name):
    model = build(name, ch=32, ch_mult=(1, 2), norm_type="groupnorm")
    video = clip(1, 4, 8, 8)
    assert model(video).reconstruction.shape == video.shape


@pytest.mark.parametrize("name", [KL_488, CENTRED])
@torch.no_grad()
def test_saved_models_keep_their_version(build, clip, tmp_path, name):
    model = build(name)
    model.save_pretrained(tmp_path)
    loaded = vt.load_model(tmp_path)
    assert loaded.config == model.config and loaded.reference_version == model.reference_version
    video = clip(1, 6, 16, 16)
    assert torch.equal(loaded(video).reconstruction, model(video).reconstruction)


def test_another_version_of_the_same_weights_is_refused(build, tmp_path):
    """Both versions have the same names and shapes, so that nothing else would notice."""
    one, other = build("vidtok_kl_causal_488_4chn"), build(KL_488)
    small = {"ch": 8, "num_res_blocks": 1}
    assert {k: v.shape for k, v in one.state_dict().items()} == {
        k: v.shape for k, v in other.state_dict().items()
    }
    one.save_pretrained(tmp_path / "one")
    config = tmp_path / "one" / "config.json"
    text = config.read_text()
    config.write_text(text.replace('"reference_version": "1.0"', '"reference_version": "1.1"'))
    with pytest.raises(ValueError, match="reference_version must be '1.0', got '1.1'"):
        vt.load_model(tmp_path / "one")
    for stem, name, version in ((KL_488, one.name, "1.1"), (one.name, KL_488, "1.0")):
        path = tmp_path / f"{stem}.safetensors"
        save_file(one.state_dict(), path)
        assert vt.load_model(path, name=stem, **small).name == stem
        with pytest.raises(ValueError, match=f"name must be that of a version {version} model"):
            vt.load_model(path, name=name, **small)
