"""The published chunked computation of VidTok 1.1, and where it differs from the whole clip."""

import pytest
import torch
from safetensors.torch import load, save

import vtok_ext as vt
from vtok_ext.models.vidtok_published import decode_published, encode_published

KL_488 = "vidtok_kl_causal_488_4chn_v1_1"
# Chunk lengths differ in summation order only.
ATOL = 1e-4


@pytest.fixture(scope="module")
def kl(build):
    return build(KL_488)


def latent(num_latents: int) -> torch.Tensor:
    return torch.randn(1, 4, num_latents, 2, 3, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_encoding_equals_the_whole_clip_where_lengths_fit(kl, clip):
    video = clip(2, 25, 16, 16)
    whole = kl.encode(video, frames="reference")
    for chunk_frames in (4, 8, 16):
        chunked = encode_published(kl, video, chunk_frames=chunk_frames, fps=30)
        assert torch.allclose(chunked.latent, whole.latent, atol=1e-5)
        assert torch.allclose(chunked.moments, whole.moments, atol=1e-5)
        # A sum over each chunk, averaged over the chunks.
        num_chunks = 1 + -(-24 // chunk_frames)
        expected = whole.losses["kl_loss"] / num_chunks
        assert torch.allclose(chunked.losses["kl_loss"], expected, rtol=1e-4)
    assert (chunked.num_frames, chunked.size, chunked.fps) == (25, (16, 16), 30)


@torch.no_grad()
def test_last_chunk_is_padded_at_its_own_front(kl, clip):
    video = clip(1, 20, 16, 16)
    chunked = encode_published(kl, video)
    assert chunked.latent.shape[2] == 6
    assert kl.encode(video, frames="reference").latent.shape[2] == 5
    padded = torch.cat([video[:, :, :17], video[:, :, 17:18], video[:, :, 17:]], dim=2)
    assert torch.allclose(chunked.latent, kl.encode(padded).latent, atol=1e-5)
    assert decode_published(kl, chunked).shape == video.shape


@torch.no_grad()
def test_tokens_of_chunks(build, clip):
    model = build("vidtok_fsq_causal_488_32768_v1_1")
    encoding = encode_published(model, clip(1, 9, 16, 16), chunk_frames=4, compute_loss=True)
    assert encoding.indices.shape == (1, 3, 2, 2) and "aux_loss" in encoding.losses
    assert torch.equal(model.indices_to_latent(encoding.indices), encoding.latent)


@torch.no_grad()
def test_decoding_with_overlap_differs_behind_the_first_latent_and_fades(kl):
    z = latent(12)
    published, whole = decode_published(kl, z), kl.decode(z, frames="reference")
    error = (published - whole).abs().amax(dim=(0, 1, 3, 4))
    assert error[:4].max() < ATOL  # the frames of the first latent
    assert error[4:8].max() > 1e-3
    assert error[-8:].max() < 0.1 * error[4:8].max()
    for chunk_frames in (4, 8):
        found = decode_published(kl, z, chunk_frames=chunk_frames)
        assert torch.allclose(found, published, atol=ATOL)


@torch.no_grad()
def test_one_frame_rate_step_makes_no_difference(build):
    model = build("vidtok_kl_causal_288_8chn_v1_1", z_channels=4)
    whole = model.decode(latent(5), frames="reference")
    assert torch.allclose(decode_published(model, latent(5)), whole, atol=ATOL)
    apart = decode_published(model, latent(5), chunk_frames=4, overlap=False)
    assert not torch.allclose(apart, whole, atol=1e-2)


@pytest.mark.parametrize("overlap", [True, False])
@torch.no_grad()
def test_nearest_interpolation_is_the_same_in_chunks(build, overlap):
    model = build(KL_488, ch_mult=(1, 2, 2), interpolation="nearest")
    whole = model.decode(latent(5), frames="reference")
    found = decode_published(model, latent(5), chunk_frames=8, overlap=overlap)
    assert torch.allclose(found, whole, atol=ATOL)


@pytest.mark.parametrize("plan", [[1] * 6, [2, 4], [1, 5], [6]])
@torch.no_grad()
def test_stream_equals_the_published_decoding(kl, plan):
    z = latent(6)
    stream = kl.stream_decoder(streaming="reference")
    frames = [out for chunk in z.split(plan, dim=2) for out in stream.push(chunk)]
    video = torch.cat(frames + stream.flush(), dim=2)
    assert torch.allclose(video, decode_published(kl, z)[:, :, 3:], atol=ATOL)


@pytest.mark.parametrize("kill_after", range(0, 4))
@torch.no_grad()
def test_killed_and_resumed_stream_is_bit_identical(kl, kill_after):
    chunks = latent(5).split([1, 1, 2, 1], dim=2)
    stream = kl.stream_decoder(streaming="reference")
    expected = [out for chunk in chunks for out in stream.push(chunk)] + stream.flush()
    stream = kl.stream_decoder(streaming="reference")
    found = [out for chunk in chunks[:kill_after] for out in stream.push(chunk)]
    saved = load(save(stream.state_dict()))
    with pytest.raises(ValueError, match="state must be that of"):
        kl.stream_decoder().load_state_dict(saved)
    stream = kl.stream_decoder(streaming="reference")
    stream.load_state_dict(saved)
    found += [out for chunk in chunks[kill_after:] for out in stream.push(chunk)] + stream.flush()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@torch.no_grad()
def test_models_without_look_ahead_stream_exactly_either_way(kl_model):
    exact, published = (kl_model.stream_decoder(streaming=s) for s in ("exact", "reference"))
    for chunk in latent(3).split(1, dim=2):
        assert torch.equal(exact.push(chunk)[0], published.push(chunk)[0])


@torch.no_grad()
def test_single_frame(kl, clip):
    video = clip(1, 1, 16, 16)
    encoding = encode_published(kl, video)
    whole = kl(video).reconstruction
    for overlap in (True, False):
        found = decode_published(kl, encoding, overlap=overlap)
        assert torch.allclose(found, whole, atol=ATOL)


@pytest.mark.parametrize("num_frames", [1, 9, 20, 23])
@pytest.mark.parametrize("plan", [1, 7, 100])
@torch.no_grad()
def test_encoder_stream_equals_the_published_encoding(kl, clip, num_frames, plan):
    """Whatever the portions, the last chunk is padded at its own front."""
    video = clip(1, num_frames, 17, 23)
    expected = encode_published(kl, video, chunk_frames=8)
    stream = kl.stream_encoder(streaming="reference", chunk_frames=8)
    found = [out for chunk in video.split(plan, dim=2) for out in stream.push(chunk)]
    latent = torch.cat(found + stream.flush(), dim=2)
    assert torch.allclose(latent, expected.latent, atol=1e-5)
    assert (stream.num_frames, stream.size) == (num_frames, expected.size)


@torch.no_grad()
def test_killed_and_resumed_encoder_stream_is_bit_identical(kl, clip):
    chunks = clip(1, 23, 16, 16).split([3, 7, 9, 4], dim=2)
    stream = kl.stream_encoder(streaming="reference", chunk_frames=8)
    expected = [out for chunk in chunks for out in stream.push(chunk)] + stream.flush()
    for kill_after in range(4):
        stream = kl.stream_encoder(streaming="reference", chunk_frames=8)
        found = [out for chunk in chunks[:kill_after] for out in stream.push(chunk)]
        saved = load(save(stream.state_dict()))
        for other in (kl.stream_encoder(), kl.stream_encoder(streaming="reference")):
            with pytest.raises(ValueError, match="state must be that of"):
                other.load_state_dict(saved)
        stream = kl.stream_encoder(streaming="reference", chunk_frames=8)
        stream.load_state_dict(saved)
        found += [out for chunk in chunks[kill_after:] for out in stream.push(chunk)]
        found += stream.flush()
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@torch.no_grad()
def test_token_stream_of_published_chunks(build, clip):
    model = build("vidtok_fsq_causal_488_32768_v1_1")
    video = clip(1, 12, 16, 16)
    stream = model.stream_encoder("tokens", streaming="reference", chunk_frames=4)
    ids = torch.cat(stream.push(video) + stream.flush(), dim=1)
    assert torch.equal(ids, encode_published(model, video, chunk_frames=4).indices)


@torch.no_grad()
def test_files_remember_the_chunks(build, kl, clip, tmp_path):
    """What is read back decodes as it was encoded, not as a whole clip."""
    video, path = clip(1, 12, 16, 16), tmp_path / "file"
    encode_published(kl, video, chunk_frames=8).save(path)
    encoding = vt.Encoding.load(path)
    assert (encoding.chunk_frames, encoding.frame_rule) == (8, "reference")
    expected = decode_published(kl, encoding, chunk_frames=8)
    assert torch.equal(kl.decode(encoding), expected)
    assert not torch.allclose(kl.decode(encoding, frames="reference"), expected, atol=1e-3)
    assert torch.equal(kl.decode(encoding, num_frames=5, size=(9, 8)), expected[:, :, :5, :9, :8])
    with pytest.raises(ValueError, match="must be a VidTok 1.1 without tiles, got"):
        kl.decode(encoding, tile=(16, 16))
    kl.encode(video).save(path)
    assert vt.Encoding.load(path).chunk_frames is None
    # The first frames of the clip that an Encoding records; of a bare latent the last ones.
    whole = kl.encode(clip(1, 10, 16, 16), frames="reference")
    frames = kl.decode(whole)
    assert torch.equal(kl.decode(whole, num_frames=3), frames[:, :, :3])
    bare = kl.decode(whole.latent, num_frames=3, frames="reference")
    assert torch.equal(bare, frames[:, :, -3:])

    fsq = build("vidtok_fsq_causal_488_32768_v1_1")
    chunked = encode_published(fsq, video, chunk_frames=8)
    grid, facts = tuple(chunked.indices.shape[1:]), (chunked.num_frames, chunked.size)
    vt.Tokens(chunked.indices, grid, *facts, frame_rule="reference", chunk_frames=8).save(path)
    tokens = vt.Tokens.load(path)
    assert tokens.chunk_frames == 8
    assert torch.equal(fsq.detokenize(tokens), decode_published(fsq, chunked, chunk_frames=8))


def test_refused_arguments(kl, kl_model, clip, build):
    with pytest.raises(ValueError, match="encode_published: height and width must be >= 8, got"):
        encode_published(build("vidtok_kl_causal_488_4chn_v1_1"), torch.zeros(1, 3, 5, 4, 16))
    reference = build("vidtok_kl_causal_488_4chn_v1_1").set_backend("reference")
    with pytest.raises(ValueError, match="encode_published: backend must be 'native'"):
        encode_published(reference, torch.zeros(1, 3, 5, 16, 16))
    with pytest.raises(ValueError, match="encode_published: model must be of version 1.1"):
        encode_published(kl_model, clip(1, 5, 16, 16))
    with pytest.raises(ValueError, match="decode_published: model must be of version 1.1"):
        decode_published(kl_model, latent(2))
    for length in (0, 2, 6):
        with pytest.raises(ValueError, match=f"chunk_frames must be a multiple of 4, got {length}"):
            decode_published(kl, latent(2), chunk_frames=length)
    with pytest.raises(ValueError, match="streaming must be 'exact' or 'reference', got 'fast'"):
        kl.stream_decoder(streaming="fast")
    with pytest.raises(
        ValueError, match="stream_encoder: streaming must be 'exact' or 'reference'"
    ):
        kl.stream_encoder(streaming="fast")
    with pytest.raises(ValueError, match="stream_encoder: model must be of version 1.1, got"):
        kl_model.stream_encoder(streaming="reference")
    with pytest.raises(ValueError, match="stream_encoder: chunk_frames must be a multiple of 4"):
        kl.stream_encoder(streaming="reference", chunk_frames=6)
    stream = kl.stream_encoder(streaming="reference")
    with pytest.raises(ValueError, match=r"push: height and width must be >= 8, got \[7, 16\]"):
        stream.push(clip(1, 5, 7, 16))
