"""Streams: any chunk plan equals the whole clip; kill and resume is bit-identical."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from vtok_ext.models.failed_computation import FailedComputationError

SETTINGS = settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
plans = st.lists(st.integers(1, 7), min_size=1, max_size=5)
# Summation order differs between chunk shapes; relative to the range of the result.
TOLERANCE = 1e-5


def run_encoder(model, video, plan, output="latent"):
    stream = model.stream_encoder(output)
    chunks = [out for chunk in video.split(plan, dim=2) for out in stream.push(chunk)]
    chunks += stream.flush()
    return torch.cat(chunks, dim=2 if output == "latent" else 1), stream


def run_decoder(model, latent, plan, **options):
    stream = model.stream_decoder(**options)
    frames, start = [], 0
    while start < latent.shape[2]:
        count = plan[start % len(plan)]
        frames += stream.push(latent[:, :, start : start + count])
        start += count
    return frames, stream


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max() / (b.max() - b.min()))


@given(plan=plans)
@SETTINGS
def test_encoder_stream_equals_whole_clip(kl_model, clip, plan):
    video = clip(2, sum(plan), 12, 16)
    latent, stream = run_encoder(kl_model, video, plan)
    with torch.no_grad():
        whole = kl_model.encode(video)
    assert relative_error(latent, whole.latent) <= TOLERANCE
    assert (stream.num_frames, stream.size) == (whole.num_frames, whole.size)


@pytest.fixture(scope="module")
def kl_1_1(build):
    return build("vidtok_kl_causal_488_4chn_v1_1")


@pytest.fixture(scope="module", params=["1.0", "1.1"])
def fsq(request, fsq_model, build):
    """An FSQ model of either version, all of whose channels have 8 levels."""
    return fsq_model if request.param == "1.0" else build("vidtok_fsq_causal_488_32768_v1_1")


@pytest.mark.parametrize("plan", [[1] * 10, [3, 4, 3], [2, 7, 1]])
def test_streams_of_1_1_take_several_clips(kl_1_1, clip, plan):
    """Both ways, each clip for itself: the second one of a batch is what it is alone."""
    video = clip(3, sum(plan), 12, 16)
    latent, stream = run_encoder(kl_1_1, video, plan)
    with torch.no_grad():
        whole = kl_1_1.encode(video)
        alone = kl_1_1.encode(video[1:2]).latent
        expected = kl_1_1.decode(whole.latent)
    assert relative_error(latent, whole.latent) <= TOLERANCE
    assert relative_error(latent[1:2], alone) <= TOLERANCE
    assert stream.batch == 3
    frames, decoder = run_decoder(kl_1_1, whole.latent, [1, 2])
    assert relative_error(torch.cat(frames + decoder.flush(), dim=2), expected) <= TOLERANCE


@given(plan=plans)
@SETTINGS
def test_token_stream_equals_whole_clip(fsq, clip, plan):
    fsq_model, video = fsq, clip(1, sum(plan), 16, 16)
    ids, _ = run_encoder(fsq_model, video, plan, "tokens")
    with torch.no_grad():
        whole = fsq_model.encode(video)
        raw = fsq_model.encode_chunk(extend(video, fsq_model.temporal_factor))
    # Only values next to a rounding boundary may round differently.
    near = (boundary_distance(raw) < 1e-4).any(dim=1)
    assert ids.dtype == whole.indices.dtype
    assert torch.equal(ids[~near], whole.indices[~near])
    assert near.float().mean() < 0.01


def extend(video: torch.Tensor, factor: int) -> torch.Tensor:
    missing = -(video.shape[2] - 1) % factor
    return torch.cat([video, video[:, :, -1:].expand(-1, -1, missing, -1, -1)], dim=2)


def boundary_distance(raw: torch.Tensor) -> torch.Tensor:
    """Distance of the 8-level bounded value from the nearest rounding boundary."""
    half = 7 * 1.001 / 2
    bounded = torch.tanh(raw + torch.atanh(torch.tensor(0.5 / half))) * half - 0.5
    return (bounded - bounded.floor() - 0.5).abs()


@given(plan=st.lists(st.integers(1, 3), min_size=1, max_size=3), num_latents=st.integers(1, 5))
@SETTINGS
def test_decoder_stream_equals_whole_clip(kl_model, plan, num_latents):
    latent = torch.randn(2, 4, num_latents, 2, 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = kl_model.decode(latent)
    frames, stream = run_decoder(kl_model, latent, plan)
    assert relative_error(torch.cat(frames + stream.flush(), dim=2), whole) <= TOLERANCE


@pytest.mark.parametrize("known_at_start", [True, False])
@pytest.mark.parametrize("num_frames", [1, 6, 7, 8, 9])
def test_file_to_file_crops_length_and_size(kl_model, clip, num_frames, known_at_start):
    video = clip(1, num_frames, 13, 18)
    with torch.no_grad():
        whole = kl_model(video).reconstruction
    latent, encoder = run_encoder(kl_model, video, [1] * num_frames)
    known = {"num_frames": encoder.num_frames} if known_at_start else {}
    frames, decoder = run_decoder(kl_model, latent, [1], size=encoder.size, **known)
    frames += decoder.flush() if known_at_start else decoder.flush(encoder.num_frames)
    assert relative_error(torch.cat(frames, dim=2), whole) <= TOLERANCE
    if known_at_start and num_frames > 1:
        # Nothing is held back when the length is known: each latent's frames come at once.
        assert len(frames) == latent.shape[2]


def test_stream_of_ids_and_uint8(fsq_model, clip):
    with torch.no_grad():
        encoding = fsq_model.encode(clip(1, 9, 16, 16))
        whole = fsq_model.decode(encoding, output="uint8")
    stream = fsq_model.stream_decoder(output="uint8")
    frames = [f for ids in encoding.indices.split(1, dim=1) for f in stream.push(ids)]
    streamed = torch.cat(frames + stream.flush(), dim=2)
    assert streamed.dtype == torch.uint8
    # A value next to a rounding boundary may differ by one grey level.
    assert (streamed.int() - whole.int()).abs().max() <= 1


@pytest.mark.parametrize("kill_after", range(0, 7))
def test_killed_and_resumed_encoder_is_bit_identical(kl_model, clip, kill_after):
    plan = [3, 1, 5, 2, 4, 1]
    chunks = clip(2, sum(plan), 12, 16).split(plan, dim=2)
    stream = kl_model.stream_encoder()
    expected = [out for chunk in chunks for out in stream.push(chunk)] + stream.flush()

    stream = kl_model.stream_encoder()
    found = [out for chunk in chunks[:kill_after] for out in stream.push(chunk)]
    saved = save(stream.state_dict())  # through bytes, as a file would
    stream = kl_model.stream_encoder()
    stream.load_state_dict(load(saved))
    found += [out for chunk in chunks[kill_after:] for out in stream.push(chunk)] + stream.flush()
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert stream.num_frames == sum(plan)


@pytest.mark.parametrize("kill_after", range(0, 5))
def test_killed_and_resumed_decoder_is_bit_identical(fsq_model, kill_after):
    ids = torch.randint(0, 8**6, (1, 7, 2, 3), generator=torch.Generator().manual_seed(0))
    chunks = ids.int().split([1, 3, 2, 1], dim=1)
    stream = fsq_model.stream_decoder(size=(15, 21))
    expected = [out for chunk in chunks for out in stream.push(chunk)] + stream.flush(22)

    stream = fsq_model.stream_decoder(size=(15, 21))
    found = [out for chunk in chunks[:kill_after] for out in stream.push(chunk)]
    saved = save(stream.state_dict())
    stream = fsq_model.stream_decoder()
    stream.load_state_dict(load(saved))
    found += [out for chunk in chunks[kill_after:] for out in stream.push(chunk)] + stream.flush(22)
    assert torch.cat(found, dim=2).shape == (1, 3, 22, 15, 21)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_streams_of_one_model_do_not_interfere(kl_model, clip):
    videos = [clip(1, 9, 16, 16, seed=s) for s in range(2)]
    streams = [kl_model.stream_encoder() for _ in videos]
    found: list[list[torch.Tensor]] = [[], []]
    for start in range(0, 9, 3):
        for stream, video, out in zip(streams, videos, found, strict=True):
            out += stream.push(video[:, :, start : start + 3])
    with torch.no_grad():
        for out, video in zip(found, videos, strict=True):
            assert relative_error(torch.cat(out, dim=2), kl_model.encode(video).latent) <= TOLERANCE


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_decoders_of_one_model_do_not_interfere(kl_model, kl_1_1, version):
    """Pushed in turn, with whole-clip calls between; one of them in published chunks."""
    model = kl_model if version == "1.0" else kl_1_1
    generator = torch.Generator().manual_seed(0)
    latents = [torch.randn(1, 4, 5, 2, 3, generator=generator) for _ in range(3)]
    modes = ["exact", "exact", "reference"]
    with torch.no_grad():
        streams = [model.stream_decoder(streaming=mode) for mode in modes]
        expected = [model.decode(z) for z in latents]
        alone = model.stream_decoder(streaming="reference")
        expected[2] = torch.cat(alone.push(latents[2]) + alone.flush(), dim=2)
        found: list[list[torch.Tensor]] = [[], [], []]
        for part in range(5):
            for stream, z, out in zip(streams, latents, found, strict=True):
                out += stream.push(z[:, :, part : part + 1])
            assert torch.equal(model.decode(latents[0]), expected[0])
        for stream, out, whole in zip(streams, found, expected, strict=True):
            out += stream.flush()
            assert relative_error(torch.cat(out, dim=2), whole) <= TOLERANCE


def test_state_has_constant_size_and_owns_its_memory(kl_model, clip):
    stream = kl_model.stream_encoder()
    sizes = []
    for seed in range(6):
        stream.push(clip(1, 4, 16, 16, seed=seed))
        state = [stream._waiting, *stream._state.values()]
        sizes.append(sum(t.untyped_storage().nbytes() for t in state))
        assert all(t.untyped_storage().nbytes() == t.nbytes for t in state)
        assert not any(t.requires_grad for t in state)
    assert len(set(sizes[1:])) == 1


def test_empty_stream_and_calls_after_the_end(fsq_model, clip):
    encoder, decoder = fsq_model.stream_encoder("tokens"), fsq_model.stream_decoder()
    assert encoder.flush() == [] and decoder.flush() == []
    assert encoder.size is None and encoder.num_frames == 0
    for call in (lambda: encoder.push(clip(1, 1, 8, 8)), encoder.flush, decoder.flush):
        with pytest.raises(ValueError, match="stream must be open, got a call after flush"):
            call()


def test_bad_pushes_are_refused(fsq_model, kl_model, clip):
    stream = fsq_model.stream_encoder()
    stream.push(clip(1, 2, 16, 16))
    with pytest.raises(
        ValueError, match=r"chunk must be \[1, 3, t, 16, 16\] as before, got \[1, 3, 2"
    ):
        stream.push(clip(1, 2, 16, 24))
    with pytest.raises(ValueError, match=r"stream_encoder.push: video must be \[B, 3, T, H, W\]"):
        stream.push(torch.zeros(3, 2, 16, 16))
    assert stream.num_frames == 2  # refused chunks leave the stream as it was
    decoder = fsq_model.stream_decoder()
    with pytest.raises(ValueError, match=r"latent must be a non-empty \[B, 6, T, H, W\], got"):
        decoder.push(torch.zeros(1, 4, 1, 2, 2))
    decoder.push(torch.zeros(1, 6, 3, 2, 2))
    with pytest.raises(ValueError, match=r"num_frames must be in 6\.\.9, got 5"):
        decoder.flush(5)
    with pytest.raises(ValueError, match="output must be 'latent' or 'tokens', got 'ids'"):
        fsq_model.stream_encoder("ids")
    with pytest.raises(ValueError, match="output must be 'float' or 'uint8', got 'int'"):
        kl_model.stream_decoder(output="int")


def test_state_of_another_stream_is_refused(fsq_model, kl_model, clip):
    stream = fsq_model.stream_encoder()
    stream.push(clip(1, 5, 16, 16))
    state = stream.state_dict()
    for other in (
        kl_model.stream_encoder(),
        fsq_model.stream_encoder("tokens"),
        fsq_model.stream_decoder(),
    ):
        with pytest.raises(ValueError, match="state must be that of"):
            other.load_state_dict(state)
    with pytest.raises(ValueError, match="state must be that of a stream"):
        fsq_model.stream_encoder().load_state_dict({"x": torch.zeros(1)})
    damaged = {k: v for k, v in state.items() if k != "layer.conv_in"}
    resumed = fsq_model.stream_encoder()
    resumed.load_state_dict(damaged)
    with pytest.raises(ValueError, match="must have an entry 'conv_in'"):
        resumed.push(clip(1, 4, 16, 16))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_ids_of_nan_are_refused(build, clip, value):
    model = build("vidtok_fsq_causal_488_4096")
    stream = model.stream_encoder("tokens")
    stream.push(clip(1, 5, 16, 16))
    with torch.no_grad():
        model.encoder.conv_out.conv.bias[0] = value
    with pytest.raises(ValueError, match="finite latents, got NaN or infinity within 9 frames"):
        stream.push(clip(1, 4, 16, 16))


def test_uint8_of_nan_is_refused(kl_model):
    """It would be black."""
    latent = torch.zeros(1, kl_model.latent_channels, 2, 2, 2)
    for output in ("uint8", "float"):
        stream = kl_model.stream_decoder(output=output)
        stream.push(latent)
        bad = torch.full_like(latent, float("nan"))
        if output == "float":
            assert stream.push(bad)[0].isnan().any()
            continue
        with pytest.raises(FailedComputationError, match="finite frames, got NaN or infinity af"):
            stream.push(bad)


def test_decoders_know_the_shape_of_their_latents(kl_model):
    latent = torch.zeros(2, kl_model.latent_channels, 2, 2, 3)
    stream = kl_model.stream_decoder()
    stream.push(latent)
    for other in (latent[:1], latent[..., :2]):
        with pytest.raises(ValueError, match=r"latent must be \[2, 4, t, 2, 3\] as before, got"):
            stream.push(other)
    stream.push(latent)
    resumed = kl_model.stream_decoder()
    resumed.load_state_dict(stream.state_dict())
    with pytest.raises(ValueError, match="as before, got"):
        resumed.push(latent[:1])
    stream = kl_model.stream_decoder(size=(16, 25))
    with pytest.raises(ValueError, match=r"size must be within the decoded \[16, 24\], got"):
        stream.push(latent)
    assert stream.num_latents == 0
    for options in ({"num_frames": 0}, {"size": 8}, {"size": (8, 0)}, {"size": (8, 8, 8)}):
        with pytest.raises(ValueError, match=r"num_frames and size \(H, W\) must be integers >= 1"):
            kl_model.stream_decoder(**options)
    with pytest.raises(TypeError, match=r"decode: size must be \(H, W\), got 8"):
        kl_model.decode(latent, size=8)
