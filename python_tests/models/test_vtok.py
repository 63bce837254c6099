"""VTok: the length of its sequences, key frames, cuts, streams, files and encoders."""

import dataclasses
from fractions import Fraction

import numpy
import pytest
import torch
from helpers import assert_close, import_or_skip, peak_bytes
from tiny_vtok import tiny, tiny_fsq

import vtok_ext as vt
from vtok_ext.models import Encoding, Tokens
from vtok_ext.models.failed_computation import FailedComputationError
from vtok_ext.models.vision_encoder import SmallViT, VisionEncoder
from vtok_ext.models.vision_mae import MaskedAutoencoder
from vtok_ext.models.vtok_config import VTokConfig
from vtok_ext.models.vtok_layout import FrameRule
from vtok_ext.models.vtok_residual import build_residual
from vtok_ext.models.vtok_streaming import encode_portions

POOLS = ("mean", "attention", "grid")


@torch.no_grad()
def encode(model, video, **options):
    return model.encode(video, **options)


def two_shots(frames=12, cut=6):
    """A clip whose picture changes once; within a shot it drifts a little."""
    generator = torch.Generator().manual_seed(3)
    first, second = torch.rand(2, 1, 3, 1, 24, 20, generator=generator) * 2 - 1
    shots = first.expand(1, 3, cut, 24, 20), second.expand(1, 3, frames - cut, 24, 20)
    clip = torch.cat(shots, 2)
    return (clip + 0.02 * torch.arange(frames).view(1, 1, -1, 1, 1)).clamp(-1, 1)


def test_names():
    assert vt.list_models("vtok*") == ["vtok_base", "vtok_base_fsq", "vtok_small", "vtok_small_fsq"]
    assert vt.list_models("vtok*", discrete=True) == ["vtok_base_fsq", "vtok_small_fsq"]
    assert tiny(levels=(8, 8, 8, 5, 5, 5)).codebook_size == 64_000


def test_published_example_of_46_tokens(clip):
    """5 s at 24 frames per second: 16 tokens of the key frame and 30 of motion."""
    model = tiny()
    encoding = encode(model, clip(1, 120, 16, 16), fps=24)
    assert encoding.latent.shape == (1, 46, 12)
    assert model.token_grid(120, 16, 16) == (46,)
    frames = encoding.positions[0, 16:, 0].tolist()
    assert frames == list(range(3, 120, 4))


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("frames", [1, 2, 9])
def test_sequence_grows_by_one_token_per_frame(clip, pool, frames):
    encoding = encode(tiny(residual_pool=pool), clip(2, frames, 20, 13), stride=1)
    assert encoding.latent.shape == (2, 16 + frames - 1, 12)


def test_rules_of_frames():
    assert FrameRule.of(3, 6.0, 24.0).frames(0, 10) == [3, 6, 9]
    assert FrameRule.of(0, 6.0, 30.0).frames(0, 30) == [4, 9, 14, 19, 24, 29]
    assert FrameRule.of(0, 100.0, 24.0).frames(0, 4) == [1, 2, 3]  # at most one per frame
    uneven = FrameRule.of(0, 6.0, 29.97)
    assert len(uneven.frames(0, 2997)) == 600  # no drift over 100 s


@pytest.mark.parametrize("stride", [0, 1, 3])
@pytest.mark.parametrize("rate", [0.3, 6.0, 12.0, 29.97, 100.0])
def test_sampled_frames_are_found_without_looking_at_each(stride, rate):
    """By their numbers, as `samples` says frame by frame, which streams ask."""
    for fps in (24.0, 29.97):
        rule = FrameRule.of(stride, rate, fps)
        for begin, end in ((0, 0), (0, 1), (0, 90), (1, 90), (7, 41), (40, 41)):
            frames = [frame for frame in range(begin, end) if rule.samples(frame)]
            assert rule.frames(begin, end) == frames and rule.count(begin, end) == len(frames)
        for number, frame in enumerate(rule.frames(0, 90), start=1):
            assert rule.frame_of(number) == frame


@torch.no_grad()
def test_a_file_that_speaks_of_too_many_frames(clip):
    """Each of a billion frames was looked at before the tokens were counted."""
    model = tiny_fsq()
    tokens = model.tokenize(clip(1, 9, 16, 16))
    damaged = dataclasses.replace(tokens, num_frames=10**9)
    with pytest.raises(ValueError, match="latent must have 250000016 tokens for 1000000000 frames"):
        model.detokenize(damaged)
    # A rate of frames at which the next token would be far away.
    with pytest.raises(ValueError, match="latent must have 16 tokens for 9 frames, got 18"):
        model.detokenize(dataclasses.replace(tokens, fps=1e12))


@pytest.mark.parametrize("size", [(1, 1), (16, 16), (17, 40)])
@pytest.mark.parametrize("frames", [1, 5])
@torch.no_grad()
def test_every_length_and_size_comes_back(clip, frames, size):
    model = tiny()
    video = clip(2, frames, *size)
    encoding = encode(model, video)
    decoded = model.decode(encoding)
    assert decoded.shape == video.shape and decoded.isfinite().all()
    assert model.decode(encoding, output="uint8").dtype == torch.uint8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision(clip, dtype):
    """Pictures of another size than the encoder's are resized, which no half type can on a CPU."""
    model, video = tiny(stride=1), clip(1, 5, 20, 24)
    exact = model.encode(video).latent
    encoding = model.to(dtype).encode(video)
    assert encoding.latent.dtype == dtype and model.decode(encoding).isfinite().all()
    assert (encoding.latent - exact).abs().max() < 0.05 * exact.abs().max()
    stream = model.stream_encoder()
    pushed = torch.cat([part for frame in video.split(1, 2) for part in stream.push(frame)], 1)
    assert_close(pushed, encoding.latent, "stream", factor=20)


@torch.no_grad()
def test_decoding_is_repeatable_and_seeded(clip):
    model = tiny()
    encoding = encode(model, clip(1, 4, 16, 16))
    assert torch.equal(model.decode(encoding), model.decode(encoding))
    assert not torch.equal(model.decode(encoding), model.decode(encoding, seed=1))


@torch.no_grad()
def test_bare_latent_counts_as_one_segment(clip):
    model = tiny(stride=1)
    encoding = encode(model, clip(1, 4, 16, 16))
    assert torch.equal(model.decode(encoding.latent), model.decode(encoding))
    with pytest.raises(ValueError, match="latent must have 20 tokens for 5 frames, got 19"):
        model.decode(encoding.latent, num_frames=5)
    with pytest.raises(ValueError, match=r"latent must be \[B, L, 12\]"):
        model.decode(encoding.latent[..., :5])


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("portions", [[12], [1] * 12, [5, 4, 3]])
def test_stream_equals_the_whole_clip(clip, pool, portions):
    model = tiny(residual_pool=pool, stride=2)
    video = clip(2, 12, 16, 16)
    whole = encode(model, video)
    stream, parts, positions = model.stream_encoder(), [], []
    for chunk in video.split(portions, dim=2):
        parts += stream.push(chunk)
        positions.append(stream.positions)
    assert stream.flush() == []
    # A batch of pictures and a single one take different paths through torch's matrix products.
    assert_close(torch.cat(parts, 1), whole.latent, "stream", factor=20)
    assert torch.equal(torch.cat(positions), whole.positions[0])


def test_stream_of_one_frame_gives_at_most_one_token(clip):
    model = tiny(motion_tokens_per_second=6.0)
    stream = model.stream_encoder()
    counts = [
        sum(part.shape[1] for part in stream.push(frame))
        for frame in clip(1, 9, 16, 16).split(1, dim=2)
    ]
    assert counts == [16, 0, 0, 1, 0, 0, 0, 1, 0]


def test_stream_resumes_from_its_state(clip):
    model = tiny(cut_threshold=0.3)
    video = two_shots()
    whole = model.stream_encoder().push(video)
    stream = model.stream_encoder()
    first = stream.push(video[:, :, :5])
    resumed = model.stream_encoder()
    resumed.load_state_dict(stream.state_dict())
    assert torch.equal(torch.cat([*first, *resumed.push(video[:, :, 5:])], 1), whole[0])
    with pytest.raises(ValueError, match="state must be that of"):
        tiny_fsq().stream_encoder().load_state_dict(stream.state_dict())


@pytest.mark.parametrize("pool", POOLS)
def test_a_stream_is_one_of_the_same_clips(clip, pool):
    """The key frames of two clips would serve another number of them: means are broadcast."""
    stream = tiny(residual_pool=pool, stride=1).stream_encoder()
    stream.push(clip(1, 2, 16, 16))
    with pytest.raises(ValueError, match="chunk must have 1 clips, as before, got 2"):
        stream.push(clip(2, 2, 16, 16))
    with pytest.raises(ValueError, match="fps must be set before the first push, got 8 after 2"):
        stream.fps = 8
    with pytest.raises(ValueError, match="fps must be a positive number, got 'fast'"):
        tiny().stream_encoder().fps = "fast"
    state = stream.state_dict()
    del state["key"]
    with pytest.raises(ValueError, match="state must have fps, key, .* after 2 frames"):
        tiny(residual_pool=pool, stride=1).stream_encoder().load_state_dict(state)


def test_memory_of_a_stream_does_not_grow(clip):
    stream, sizes = tiny(stride=1, cut_threshold=2.0).stream_encoder(), []
    for _ in range(3):
        stream.push(clip(1, 8, 16, 16))
        sizes.append(sum(t.numel() for t in stream.state_dict().values()))
    assert sizes[0] == sizes[1] == sizes[2]


@pytest.mark.parametrize("length", [1, 7, 50])
@pytest.mark.parametrize(
    "build, options",
    [(tiny, {"stride": 1}), (tiny, {"stride": 1, "cut_threshold": 0.3}), (tiny_fsq, {"stride": 1})],
)
def test_portions_give_the_bits_of_the_whole_clip(build, options, length):
    """More than two groups of 16 pictures, and a cut within one."""
    model = build(**options)
    video = ((two_shots(50, 21) + 1) * 127.5).to(torch.uint8)
    whole = encode(model, video, fps=12)
    found = encode_portions(model, iter(video.split(length, 2)), fps=12)
    assert torch.equal(found.latent, whole.latent)
    assert torch.equal(found.positions, whole.positions)
    assert (found.num_frames, found.size, found.fps) == (50, tuple(video.shape[3:]), 12.0)
    if whole.indices is None:
        assert found.indices is None
    else:
        assert torch.equal(found.indices, whole.indices)


def test_bad_portions(clip):
    model, video = tiny(), clip(1, 2, 16, 16)
    with pytest.raises(ValueError, match="portions must have at least one frame, got none"):
        encode_portions(model, [])
    with pytest.raises(ValueError, match=r"got \[1, 3, 2, 8, 16\] after \[1, 3, t, 16, 16\]"):
        encode_portions(model, [video, video[:, :, :, :8]])
    with pytest.raises(ValueError, match=r"portions must be of one clip .*, got \[2, 3, 2, 16, 16"):
        encode_portions(model, [clip(2, 2, 16, 16)])
    with pytest.raises(ValueError, match="key_frame must be 'first' for portions, got 'auto'"):
        encode_portions(tiny(key_frame="auto"), [video])


def test_memory_of_portions_does_not_grow(tmp_path):
    model = tiny(stride=8, cut_threshold=0.5)

    def peak(num_portions):
        portions = (torch.zeros(1, 3, 16, 64, 64, dtype=torch.uint8) for _ in range(num_portions))
        return peak_bytes(lambda: encode_portions(model, portions), tmp_path / "trace.json")

    peak(9)
    frame = 3 * 64 * 64
    assert peak(48) - peak(24) < 16 * frame  # of 384 more frames


@pytest.mark.parametrize("kind", ["float", "uint8", "cuts"])
def test_memory_of_encoding_is_flat_per_extra_frame(kind, tmp_path):
    """Feature maps of at most 16 frames exist at a time, and no copy of the video: 96 frames cost
    what 48 cost, plus their own tokens."""
    cuts = {"cut_threshold": 0.5, "key_frame": "auto"} if kind == "cuts" else {}
    model = tiny(stride=1, image_size=64, encoder_dim=32, **cuts)
    dtype = torch.float32 if kind == "float" else torch.uint8

    def peak(frames):
        video = torch.zeros(1, 3, frames, 128, 128, dtype=dtype)
        return peak_bytes(lambda: encode(model, video), tmp_path / "trace.json")

    peak(17)
    extra = peak(97) - peak(49)
    maps_of_a_frame = 4 * 32 * 16 * 16
    assert extra < 48 * maps_of_a_frame / 4


def test_a_cut_begins_a_segment():
    model = tiny(stride=2, cut_threshold=0.3)
    video = two_shots()
    encoding = encode(model, video)
    frames, slots = encoding.positions[0].unbind(1)
    assert frames[slots < 16].tolist() == [0] * 16 + [6] * 16
    assert frames[slots == 16].tolist() == [2, 4, 8, 10]
    # The second shot is encoded as if it were a clip of its own.
    alone = encode(model, video[:, :, 6:])
    assert_close(encoding.latent[:, 18:], alone.latent, "second shot", factor=20)
    stream = model.stream_encoder()
    assert_close(stream.push(video)[0], encoding.latent, "stream", factor=20)


def test_clips_of_a_batch_may_have_other_cuts(clip):
    model = tiny(stride=2, cut_threshold=0.3)
    video = two_shots()
    still = video[:, :, :1].expand_as(video)
    both = encode(model, torch.cat([video, still]))
    assert both.latent.shape == (2, 36, 12)
    assert (both.positions[1, 21:] == -1).all() and (both.latent[1, 21:] == 0).all()
    assert_close(both.latent[1:, :21], encode(model, still).latent, "short clip", factor=20)
    # Padding does not reach the decoder.
    changed = both.latent.clone()
    changed[1, 21:] = 100.0
    again = Encoding(changed, both.num_frames, both.size, positions=both.positions)
    with torch.no_grad():
        assert torch.equal(model.decode(again), model.decode(both))


def test_chosen_key_frame_is_the_most_typical():
    model = tiny(stride=1)
    video = two_shots(12, 3)[:, :, :7]  # three frames of one picture, four of another
    encoding = encode(model, video, key_frame="auto")
    assert int(encoding.positions[0, 0, 0]) >= 3
    assert encoding.latent.shape == encode(model, video).latent.shape
    frames = encoding.positions[0, 16:, 0].tolist()
    assert sorted({*frames, int(encoding.positions[0, 0, 0])}) == list(range(7))
    with pytest.raises(ValueError, match="key_frame must be 'first' for a stream"):
        tiny(key_frame="auto").stream_encoder()


def test_a_moving_square_leaves_no_trace_in_the_mean():
    """Why mean pooling is not enough: features that see single patches, a square that moves by
    whole patches."""

    def patch_means(images):
        return torch.nn.functional.avg_pool2d(images, 4)

    video = -torch.ones(1, 3, 2, 16, 16)
    video[:, :, 0, :4, :4] = 1
    video[:, :, 1, 4:8, 8:12] = 1
    tokens = {}
    for pool in POOLS:
        model = tiny(residual_pool=pool, stride=1, encoder_dim=16)
        with torch.no_grad():
            maps = torch.stack([patch_means(video[:, :, t]) for t in (0, 1)], 1)
            maps = maps.repeat(1, 1, 6, 1, 1)[:, :, :16]
            still = model.residual(maps[:, :1], maps[:, 0])
            tokens[pool] = (model.residual(maps[:, 1:], maps[:, 0]) - still).abs().max()
    assert tokens["mean"] < 1e-6
    assert tokens["grid"] > 1e-3 and tokens["attention"] > 1e-3


@torch.no_grad()
def test_discrete_tokens_and_back(clip, tmp_path):
    model = tiny_fsq()
    video = clip(2, 9, 16, 16)
    encoding = encode(model, video, fps=12.0)
    assert encoding.latent.shape == (2, 20, 3) and encoding.indices.shape == (2, 20)
    assert torch.equal(model.indices_to_latent(encoding.indices), encoding.latent)
    tokens = model.tokenize(video, fps=12.0)
    tokens.save(tmp_path / "tokens")
    loaded = Tokens.load(tmp_path / "tokens")
    assert torch.equal(model.detokenize(loaded), model.decode(encoding))
    ids = model.stream_encoder("tokens")
    ids.fps = 12.0
    assert torch.equal(ids.push(video)[0], encoding.indices)
    with pytest.raises(ValueError, match="Tokens record no positions"):
        model.tokenize(video, key_frame="auto")
    with pytest.raises(ValueError, match="Tokens record no positions"):
        tiny_fsq(cut_threshold=0.1).tokenize(video, cut_threshold=None)
    assert model.tokenize(video, key_frame=None, stride=None).ids.shape == (2, 18)
    with pytest.raises(ValueError, match="must be discrete"):
        tiny().tokenize(video)


@torch.no_grad()
def test_encoding_file_keeps_positions(clip, tmp_path):
    model = tiny(cut_threshold=0.3)
    encoding = encode(model, two_shots())
    encoding.save(tmp_path / "clip.latent")
    loaded = Encoding.load(tmp_path / "clip.latent")
    assert torch.equal(loaded.positions, encoding.positions)
    assert torch.equal(model.decode(loaded), model.decode(encoding))


@pytest.mark.parametrize("overrides", [{}, {"levels": (4, 4)}, {"residual_pool": "grid"}])
def test_save_and_load(clip, tmp_path, overrides):
    model = tiny(**overrides)
    model.save_pretrained(tmp_path / "model")
    loaded = vt.load_model(tmp_path / "model")
    assert loaded.config == model.config and loaded.model_id == model.model_id
    video = clip(1, 5, 16, 16)
    assert torch.equal(encode(loaded, video).latent, encode(model, video).latent)


def test_training_entry_has_a_loss_and_gradients(clip):
    model = tiny(stride=1).train()
    output = model(clip(2, 5, 16, 16))
    assert output.reconstruction.shape == (2, 3, 5, 16, 16)
    output.encoding.losses["flow_loss"].backward()
    assert all(p.grad is None for p in model.encoder.parameters())
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    discrete = tiny_fsq().train()(clip(1, 5, 16, 16)).encoding.losses
    assert {"flow_loss", "aux_loss"} <= set(discrete)


@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2"])
def test_towers_of_transformers(kind, clip, tmp_path, monkeypatch):
    transformers = import_or_skip("transformers")
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
    }
    torch.manual_seed(1)
    tower = {
        "clip": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**sizes)),
        "siglip": lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**sizes)),
        "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**sizes)),
    }[kind]()
    tower.save_pretrained(tmp_path / "tower")
    model = tiny(encoder="huggingface", encoder_source=str(tmp_path / "tower"))
    assert isinstance(model.encoder, VisionEncoder) and model.encoder.frozen
    assert model.features(torch.zeros(2, 3, 40, 30)).shape == (2, 16, 4, 4)
    video = clip(1, 5, 20, 20)
    expected = encode(model, video).latent
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "tower").rename(tmp_path / "gone")
    loaded = vt.load_model(tmp_path / "model")
    assert torch.equal(encode(loaded, video).latent, expected)
    # Ids name the model, not the folder it came from or who reads it.
    assert str(tmp_path) not in (tmp_path / "model" / "config.json").read_text()
    monkeypatch.setattr(transformers.configuration_utils, "__version__", "99.0.0")
    assert vt.load_model(tmp_path / "model").model_id == loaded.model_id == model.model_id


def test_a_tower_in_half_precision_and_wrong_ones(clip, tmp_path):
    transformers = import_or_skip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Dinov2Config(**sizes, image_size=16, patch_size=4)
    transformers.Dinov2Model(config).to(torch.bfloat16).save_pretrained(tmp_path / "tower")
    model = tiny(encoder="huggingface", encoder_source=str(tmp_path / "tower"))
    assert encode(model, clip(1, 5, 20, 20)).latent.dtype == torch.float32
    model.save_pretrained(tmp_path / "model")
    assert {p.dtype for p in vt.load_model(tmp_path / "model").parameters()} == {torch.float32}
    with pytest.raises(FileNotFoundError, match="load_tower: source must be a folder or a hub id"):
        tiny(encoder="huggingface", encoder_source=str(tmp_path / "nothing"))
    masking = transformers.ViTMAEModel(
        transformers.ViTMAEConfig(**sizes, image_size=16, patch_size=4)
    )
    masking.save_pretrained(tmp_path / "masking")
    masked = tiny(encoder="huggingface", encoder_source=str(tmp_path / "masking"))
    with pytest.raises(ValueError, match="tower must give a feature for each of 4 x 4 patches"):
        encode(masked, clip(1, 5, 20, 20))
    with pytest.raises(ValueError, match=r"layer must be in -2..1 for a dinov2 of 1 layers, got 2"):
        tiny(encoder="huggingface", encoder_source=str(tmp_path / "tower"), encoder_layer=2)
    for text, message in (
        ("{", "text must be JSON"),
        ('{"model_type": "gpt2"}', "tower must have hidden_size, image_size and patch_size"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny(encoder="huggingface", encoder_config=text)


def test_a_tower_gives_the_layer_that_is_asked_for(clip, tmp_path):
    transformers = import_or_skip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.CLIPVisionConfig(
        **sizes, intermediate_size=32, image_size=16, patch_size=4
    )
    torch.manual_seed(1)
    transformers.CLIPVisionModel(config).save_pretrained(tmp_path / "tower")
    source = {"encoder": "huggingface", "encoder_source": str(tmp_path / "tower")}
    before_last, last = (tiny(**source, encoder_layer=layer) for layer in (-2, -1))
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(2)) * 2 - 1
    pixels = ((images + 1) / 2 - last.encoder.mean) / last.encoder.deviation
    output = last.encoder.tower(pixel_values=pixels, output_hidden_states=True)
    for model, states in ((before_last, output.hidden_states[-2]), (last, output[0])):
        expected = states[:, 1:].mT.unflatten(2, (4, 4))
        torch.testing.assert_close(model.encoder(images), expected)
    before_last.save_pretrained(tmp_path / "model")
    loaded = vt.load_model(tmp_path / "model")
    video = clip(1, 5, 20, 20)
    assert torch.equal(encode(loaded, video).latent, encode(before_last, video).latent)


def test_masked_autoencoder_hides_something():
    """The mean over no patch at all was NaN."""
    model = MaskedAutoencoder(SmallViT(8, 4, 16, 1, 2), dim=16, depth=1, heads=2, mask_ratio=0.1)
    assert model(torch.rand(2, 3, 8, 8)).isfinite()
    with pytest.raises(ValueError, match=r"two patches of 4 or more, got \[4, 4\]"):
        model(torch.rand(2, 3, 4, 4))
    with pytest.raises(ValueError, match=r"generator must be one per picture \(2\), got 1"):
        model(torch.rand(2, 3, 8, 8), [torch.Generator()])


def test_masked_autoencoder_learns_and_freezes():
    torch.manual_seed(0)
    encoder = SmallViT(16, 4, 16, 1, 2)
    assert isinstance(encoder, VisionEncoder)
    model = MaskedAutoencoder(encoder, dim=16, depth=1, heads=2)
    # Stripes: what is hidden follows from what is seen.
    phase = torch.arange(16) * torch.rand(8, 1) + 6 * torch.rand(8, 1)
    images = phase.sin()[:, None, None].expand(8, 3, 16, 16)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(150):
        loss = model(images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-20:]) < 0.7 * sum(losses[:20])
    assert model.finish() is encoder and encoder.frozen
    assert not any(p.requires_grad for p in encoder.parameters())
    with pytest.raises(ValueError, match="mask_ratio must be in"):
        MaskedAutoencoder(encoder, mask_ratio=1.0)


def test_features_are_standardised(clip, tmp_path):
    model, videos = tiny(), [clip(2, 20, 16, 16), clip(1, 3, 24, 20)]
    before = model.features(videos[0][:, :, 0])
    torch.testing.assert_close(before, model.encoder(videos[0][:, :, 0]))  # none stored yet
    model.fit_features(videos)
    # Frames evenly apart: 8 of 20, and all of 3.
    frames = [i * 20 // 8 for i in range(8)]
    pictures = [videos[0][:, :, frames], videos[1]]
    maps = [model.features(p.transpose(1, 2).flatten(0, 1)).transpose(0, 1) for p in pictures]
    points = torch.cat([part.flatten(1) for part in maps], 1)
    torch.testing.assert_close(points.mean(1), torch.zeros(len(points)), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        points.std(1, correction=0), torch.ones(len(points)), atol=1e-4, rtol=0
    )
    model.save_pretrained(tmp_path / "vtok")
    latent = encode(model, videos[1]).latent
    assert torch.equal(encode(vt.load_model(tmp_path / "vtok"), videos[1]).latent, latent)
    with pytest.raises(ValueError, match="videos must be at least one"):
        model.fit_features([])
    with pytest.raises(ValueError, match="fit_features: video must be"):
        model.fit_features([videos[0][0]])


@torch.no_grad()
@pytest.mark.parametrize("pool", POOLS)
def test_residual_tokens_begin_as_large_as_the_difference(pool):
    """With torch's initial weights they had a tenth of its deviation, and no reader saw them."""
    config = VTokConfig(residual_pool=pool, token_dim=64)
    torch.manual_seed(0)
    residual = build_residual(config, 64, (4, 4))
    key = torch.randn(8, 64, 1, 1).expand(-1, -1, 4, 4)
    # The same everywhere: no average shrinks it.
    frames = key[:, None] + torch.randn(8, 6, 64, 1, 1)
    assert residual(frames, key).std().item() == pytest.approx(1, abs=0.25)


def test_times_of_the_decoder_are_near_noise(clip, monkeypatch):
    model, seen = tiny(), []
    predict = model.decoder.predict

    def recorded(x, t, tokens, positions):
        seen.append(t)
        return predict(x, t, tokens, positions)

    monkeypatch.setattr(model.decoder, "predict", recorded)
    encoding = encode(model, clip(1, 1, 16, 16))
    tokens, positions = encoding.latent.expand(512, -1, -1), encoding.positions.expand(512, -1, -1)
    video = clip(1, 1, 16, 16).expand(512, -1, -1, -1, -1)
    with torch.no_grad():
        model.decoder.loss(video, tokens, positions, torch.Generator().manual_seed(0))
    times = seen[0]
    assert times.min() >= 0 and times.max() <= 0.95
    # u / (4 - 3 u) of u = 1/4, 1/2, 3/4.
    quartiles = times.quantile(torch.tensor([0.25, 0.5, 0.75])) / 0.95
    torch.testing.assert_close(quartiles, torch.tensor([1 / 13, 1 / 5, 3 / 7]), atol=0.04, rtol=0)


def test_frames_take_the_nearest_residual_token():
    decoder = tiny().decoder
    key, residual = 0, decoder.key_tokens
    positions = torch.tensor([[[2, key], [0, residual], [5, residual], [6, residual], [-1, -1]]])
    memory = torch.arange(1.0, 6.0).view(1, 5, 1)
    found = decoder._residuals_of_frames(memory, positions, 9)
    assert found.flatten().tolist() == [2, 2, 2, 3, 3, 3, 4, 4, 4]
    # The second shot, from frame 6 on, has residuals of its own only; the third, from 8 on, none.
    cut = torch.tensor([[[0, key], [4, residual], [6, key], [7, residual], [8, key]]])
    found = decoder._residuals_of_frames(memory, cut, 9)
    assert found.flatten().tolist() == [2, 2, 2, 2, 2, 2, 4, 4, 0]
    for count in (0, 1):
        none = decoder._residuals_of_frames(memory[:, :count], positions[:, :count], 4)
        assert none.flatten().tolist() == [0] * 4


def test_dead_channels_stay_small(clip):
    model = tiny()
    model.encoder.norm.weight.data[3] = 0
    model.fit_features([clip(1, 3, 16, 16)])
    assert model.features(clip(1, 1, 16, 16)[:, :, 0])[:, 3].abs().max() < 1e-3


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"key_tokens": 12}, "key_tokens must be a square number"),
        ({"residual_pool": "max"}, "residual_pool must be one of"),
        ({"motion_tokens_per_second": 0}, "motion_tokens_per_second must be positive"),
        ({"encoder": "huggingface"}, "encoder_source must be given"),
        ({"encoder_layer": -2}, "encoder_layer must be -1 for encoder 'vit'"),
        ({"encoder_layer": 1.5}, "encoder_layer must be an integer"),
        ({"levels": (1,)}, "levels must be"),
        ({"image_size": 18}, "image_size must be a multiple of 4"),
        ({"decoder_patch": (2, 4)}, "decoder_patch must be three integers"),
        ({"residual_pool": "attention", "num_queries": 17}, "num_queries must be at most 16"),
        (
            {"residual_pool": "attention", "num_queries": 16, "encoder_dim": 1028},
            "num_queries must be at most 16 and 16384 / ",
        ),
    ],
)
def test_bad_configurations(overrides, message):
    with pytest.raises(ValueError, match=message):
        tiny(**overrides)


def test_bad_calls(clip):
    model, video = tiny(), clip(1, 4, 16, 16)
    for options, message in (
        ({"fps": 0.0}, "fps must be a positive number"),
        ({"stride": -1}, "stride must be an integer >= 0"),
        ({"key_frame": "last"}, "key_frame must be one of"),
        ({"cut_threshold": -1.0}, "cut_threshold must be >= 0"),
        ({"fps": "24"}, "fps must be a positive number, got '24'"),
        ({"stride": True}, "stride must be an integer >= 0, got True"),
        ({"cut_threshold": "high"}, "cut_threshold must be >= 0, got 'high'"),
    ):
        with pytest.raises(ValueError, match=message):
            model.encode(video, **options)
    encoding = encode(model, video)
    for options in ({"num_steps": 0}, {"num_steps": 1.5}, {"size": 16}, {"size": (4, 4, 4)}):
        with pytest.raises(ValueError, match="must be integers of at least 1"):
            model.decode(encoding, **options)
    with pytest.raises(ValueError, match="output must be one of"):
        model.decode(encoding, output="int8")


def test_positions_of_a_damaged_file_are_refused(clip):
    model = tiny(stride=1)
    encoding = encode(model, clip(1, 4, 16, 16))
    right = encoding.positions
    for wrong, error, message in (
        (right + 17, ValueError, r"slots in -1..16, got 17 and 33"),
        (right - 5, ValueError, "positions must be frames >= -1"),
        (right.float(), TypeError, "positions must be integers"),
        (right.expand(3, -1, -1), ValueError, r"positions must be \[1, 19, 2\]"),
    ):
        encoding.positions = wrong
        with pytest.raises(error, match=message):
            model.decode(encoding)


def test_rates_of_any_type_are_recorded_as_numbers(clip, tmp_path):
    model, video = tiny(), clip(1, 9, 16, 16)
    for rate in (Fraction(24000, 1001), numpy.float32(24), 24):
        encoding = encode(model, video, fps=rate)
        assert type(encoding.fps) is float and encoding.latent.shape[1] == 18
        encoding.save(tmp_path / "clip.latent")
        assert Encoding.load(tmp_path / "clip.latent").fps == encoding.fps


def test_a_clip_of_one_frame_gives_every_parameter_a_gradient(clip):
    """Of the residual tokens there are none, but DDP waits for all parameters."""
    model = tiny(stride=1).train()
    output = model(clip(2, 1, 16, 16))
    output.encoding.losses["flow_loss"].backward()
    trained = [p for part in (model.residual, model.decoder) for p in part.parameters()]
    assert trained and all(p.grad is not None for p in trained)
    assert not any(p.grad.any() for p in model.residual.parameters())


@pytest.mark.parametrize("output", ["float", "uint8"])
def test_what_is_not_finite_is_no_black_video(output):
    latent = torch.full((1, 16, 12), torch.nan)
    if output == "float":
        assert tiny().decode(latent).isnan().all()
        return
    with pytest.raises(FailedComputationError, match="decode: the model must give finite frames"):
        tiny().decode(latent, output="uint8")


@pytest.mark.parametrize(
    ("seed", "error", "message"),
    [(1.5, TypeError, "seed must be an integer"), (10**23, ValueError, r"in 0..2\^63 - 1, got 1")],
)
def test_seeds_are_checked(seed, error, message):
    with pytest.raises(error, match=message):
        tiny().decode(torch.zeros(1, 16, 12), seed=seed)


@pytest.mark.parametrize("shape", [(0, 16, 12), (1, 0, 12)])
def test_no_tokens_are_refused(shape):
    with pytest.raises(ValueError, match="latent must have a clip and a token at least"):
        tiny().decode(torch.zeros(shape))
