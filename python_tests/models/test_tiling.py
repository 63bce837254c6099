"""Tiles give the whole picture: all families, odd sizes, streams; blended ones are declared so."""

import pytest
import torch
from safetensors.torch import load, save

import vtok_ext as vt
from vtok_ext.models import tiling
from vtok_ext.models.tiling import Segment, split_axis
from vtok_ext.models.tiling_blended import overlapping_ranges
from vtok_ext.models.tiling_steps import Reach, measure_reaches

TOLERANCE = 1e-5  # relative to the range of the result; sums are split in other places
FAMILIES = [
    ("vidtok_kl_causal_488_4chn", {}),
    ("vidtok_fsq_causal_888_32768_v1_1", {}),
    ("vidtok_kl_causal_41616_4chn", {}),
    ("vidtok_kl_causal_444_4chn", {}),
    ("vidtok_kl_noncausal_488_4chn", {}),
    ("vidtok_kl_causal_488_4chn", {"architecture": "full_3d"}),
    ("vidtok_kl_causal_488_4chn", {"architecture": "without_3d"}),
    ("vidtok_kl_causal_488_4chn", {"architecture": "without_blender"}),
]


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max() / (b.max() - b.min()))


@pytest.fixture(scope="module")
def model(build):
    return build("vidtok_kl_causal_488_4chn_v1_1")


@pytest.mark.parametrize(("name", "options"), FAMILIES)
@torch.no_grad()
def test_tiles_equal_the_whole_picture(build, clip, name, options):
    model = build(name, **options)
    view, video = model.tiled((16, 24)), clip(1, 5, 37, 45)
    whole, found = model.encode(video), view.encode(video)
    assert found.size == (37, 45)
    if model.is_discrete:  # values next to a rounding boundary may round differently
        assert (found.indices != whole.indices).float().mean() < 0.01
    else:
        assert relative_error(found.moments, whole.moments) <= TOLERANCE
    assert relative_error(view.decode(whole), model.decode(whole)) <= TOLERANCE
    assert view.model_id == model.model_id and view.is_exact


@torch.no_grad()
def test_odd_sizes_of_the_published_rule(model, clip):
    """Sizes that no step divides evenly, which the published rule floors at every step down."""
    video = clip(1, 4, 43, 77)
    whole = model.encode(video, frames="reference")
    found = model.tiled(16).encode(video, frames="reference")
    assert found.size == whole.size == (40, 72)
    assert relative_error(found.latent, whole.latent) <= TOLERANCE


@pytest.mark.parametrize("tile", [(8, 64), (3, 100), (200, 9)])
@torch.no_grad()
def test_any_tile(build, clip, tile):
    model = build("vidtok_kl_causal_488_4chn", ch_mult=(1, 2))
    video = clip(1, 1, 35, 26)
    whole = model.encode(video)
    assert relative_error(model.encode(video, tile=tile).latent, whole.latent) <= TOLERANCE
    assert relative_error(model.decode(whole, tile=tile), model.decode(whole)) <= TOLERANCE


@pytest.mark.parametrize("side", ["before", "behind"])
@torch.no_grad()
def test_every_position_of_the_reach_is_needed(model, clip, monkeypatch, side):
    """With one position less on one side, the tiles show."""
    video = clip(1, 1, 64, 64)
    latent = model.encode(video).latent
    whole = model.decode(latent)

    def less(steps, x):
        reaches = [r.__dict__ for r in measure_reaches(steps, x)]
        return [Reach(**{**r, side: max(0, r[side] - 1)}) for r in reaches]

    monkeypatch.setattr(tiling, "measure_reaches", less)
    monkeypatch.setattr(tiling, "_measured", {})
    assert relative_error(model.tiled(32).decode(latent), whole) > 1e-3


@torch.no_grad()
def test_reaches_of_layers(model):
    steps = model.network_steps(model.encoder)
    found = measure_reaches(steps, torch.zeros(1, 3, 4, 1, 1))
    named = {step.name: reach for step, reach in zip(steps, found, strict=True)}
    assert named["conv_in"] == Reach(1, 1, 1, 1)
    assert named["down.0.block.0"] == Reach(1, 1, 2, 2)  # two convolutions of 3
    assert named["down.0.downsample"] == Reach(2, 1, 0, 1)  # zeros at the end only
    assert named["down.1.downsample"] == Reach(2, 1, 1, 2)  # and a 3x3x3 behind it
    assert not named["mid.attn_1"].is_local
    assert [step.name for step in steps if step.begins_level] == [
        f"down.{level}.block.0" for level in (1, 2, 3)
    ]


@torch.no_grad()
def test_a_wider_layer_is_found(build, clip):
    """A hook that averages over 7x7 pixels: not in any configuration, but in the measured reach."""
    model, video = build("vidtok_kl_causal_488_4chn", ch_mult=(1, 2)), clip(1, 1, 48, 48)
    latent = model.encode(video).latent
    before = model.decode(latent, tile=(16, 16))
    model.decoder.up[0].block[0].conv1.register_forward_hook(
        lambda layer, inputs, y: torch.nn.functional.avg_pool3d(y, (1, 7, 7), 1, (0, 3, 3))
    )
    whole = model.decode(latent)
    assert relative_error(before, whole) > 1e-2
    assert relative_error(model.decode(latent, tile=(16, 16)), whole) <= TOLERANCE


@torch.no_grad()
def test_streams_in_tiles(model, clip):
    video = clip(1, 10, 35, 30)
    whole = model.encode(video)
    expected, view = model.decode(whole), model.tiled((24, 16))
    encoder = view.stream_encoder()
    latents = [z for chunk in video.split(3, dim=2) for z in encoder.push(chunk)] + encoder.flush()
    assert relative_error(torch.cat(latents, dim=2), whole.latent) <= TOLERANCE
    decoder = view.stream_decoder(size=(35, 30))
    frames = [y for z in whole.latent.split(1, dim=2) for y in decoder.push(z)]
    assert relative_error(torch.cat(frames + decoder.flush(10), dim=2), expected) <= TOLERANCE


@torch.no_grad()
def test_killed_and_resumed_stream_in_tiles_is_bit_identical(model, clip):
    chunks, view = clip(1, 10, 35, 30).split([3, 4, 2, 1], dim=2), model.tiled((24, 16))
    stream = view.stream_encoder()
    expected = [z for chunk in chunks for z in stream.push(chunk)] + stream.flush()
    stream = view.stream_encoder()
    found = [z for chunk in chunks[:2] for z in stream.push(chunk)]
    state = load(save(stream.state_dict()))
    stream = model.tiled("auto").stream_encoder()  # the tile is that of the state
    stream.load_state_dict(state)
    found += [z for chunk in chunks[2:] for z in stream.push(chunk)] + stream.flush()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with pytest.raises(ValueError, match="state must be that of encoder to latent of .*in tiles"):
        model.stream_encoder().load_state_dict(state)
    plain = model.stream_encoder()
    plain.push(chunks[0])
    with pytest.raises(ValueError, match="state must be that of encoder to latent in tiles of"):
        view.stream_encoder().load_state_dict(plain.state_dict())


def test_gradients_are_those_of_the_whole_picture(build, clip):
    model = build("vidtok_kl_causal_488_4chn", ch_mult=(1, 2))
    video, names = clip(1, 1, 24, 24), [name for name, _ in model.named_parameters()]
    for runs in (model, model.tiled(12)):
        runs(video).reconstruction.square().mean().backward()
        grads = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        if runs is model:
            expected = grads
    # Gradients that vanish, as that of a bias of keys in a softmax, are noise.
    least = 1e-4 * max(grad.abs().max() for grad in expected)
    for name, a, b in zip(names, grads, expected, strict=True):
        assert (a - b).abs().max() <= 1e-4 * max(least, b.abs().max()), name


@torch.no_grad()
def test_blended_tiles_are_close_and_their_seams_are_measured(build, clip):
    """Seams are where tiles meet, and an overlap makes them less visible."""
    model, video = build("vidtok_kl_causal_488_4chn", ch_mult=(1, 2)), clip(1, 1, 64, 64)
    view = model.tiled((32, 32), mode="blended", overlap=0.25)
    assert not view.is_exact and model.is_exact
    latent = model.encode(video).latent
    whole, exact, blended = (m.decode(latent) for m in (model, model.tiled(32), view))
    assert blended.shape == whole.shape and relative_error(blended, whole) > 1e-3
    hard = model.tiled((32, 32), mode="blended", overlap=0.01).decode(latent)
    seams = {}
    for name, video, overlap in (("soft", blended, 0.25), ("hard", hard, 0.01)):
        ranges = overlapping_ranges(32, 16, overlap)[1:]
        # Columns take the place of frames; the middle of an overlap is where two tiles meet.
        borders = [2 * start + parts[0] for start, _, parts in ranges]
        columns = (y.transpose(2, 4) for y in (video, whole))
        seams[name] = vt.metrics.boundary_jump(*columns, borders=borders).item()
    assert seams["hard"] > 1.2 and seams["hard"] > seams["soft"]
    assert relative_error(exact, whole) <= TOLERANCE
    stream = view.stream_decoder()
    frames = stream.push(latent) + stream.flush()
    assert relative_error(torch.cat(frames, dim=2), blended) <= TOLERANCE


@torch.no_grad()
def test_statistics_over_a_frame_are_refused_and_may_be_blended(build, clip):
    model, video = (
        build("vidtok_kl_causal_488_4chn", ch=32, norm_type="groupnorm"),
        clip(1, 1, 8, 8),
    )
    with pytest.raises(ValueError, match=r"whole frames at full resolution, got .* down.0.block.0"):
        model.encode(video, tile=(64, 64))
    assert model.tiled(64, mode="blended").encode(video).latent.shape == (1, 4, 1, 1, 1)


@pytest.mark.parametrize("name", ["vidtok_kl_causal_488_4chn_v1_1", "promag_base_4x8x8"])
@torch.no_grad()
def test_blended_streams_equal_blended_clips(build, clip, name):
    """The look-ahead of 1.1, group norms, models without steps: tiles have streams of their own."""
    if name.startswith("promag"):
        torch.manual_seed(0)
        model = vt.create_model(name, ch=8, ch_mult=(1, 1, 1, 1), num_res_blocks=1).eval()
        with pytest.raises(ValueError, match="tiled: model must declare the steps"):
            model.network_steps(model.encoder)
    else:
        model = build(name, ch_mult=(1, 2, 2))
    view, video = model.tiled((16, 24), mode="blended"), clip(1, 9, 32, 40)
    whole = view.encode(video)
    encoder, decoder = view.stream_encoder(), view.stream_decoder(size=(32, 40))
    latents = [z for chunk in video.split(4, dim=2) for z in encoder.push(chunk)] + encoder.flush()
    assert relative_error(torch.cat(latents, dim=2), whole.latent) <= TOLERANCE
    frames = [y for z in latents for y in decoder.push(z)] + decoder.flush(9)
    assert relative_error(torch.cat(frames, dim=2), view.decode(whole)) <= TOLERANCE


@torch.no_grad()
def test_streams_keep_the_tiles_they_began_with(build, clip):
    model, video = build("vidtok_kl_causal_488_4chn", ch_mult=(1, 2)), clip(1, 9, 48, 48)
    chunks = video[:, :, :1], video[:, :, 1:5], video[:, :, 5:]
    for mode in ("exact", "blended"):
        small = model.tiled((32, 32), mode=mode)
        straight, stream = small.stream_encoder(), small.stream_encoder()
        expected = [z for chunk in chunks for z in straight.push(chunk)]
        found = stream.push(chunks[0])
        other = model.tiled((48, 48), mode=mode).stream_encoder()
        other.load_state_dict(stream.state_dict())
        found += other.push(chunks[1]) + other.push(chunks[2])
        assert all(map(torch.equal, found, expected)), mode
        # Tiles of another kind, or none, would go on from something else.
        for view in (
            model,
            model.tiled((32, 32), mode="exact" if mode == "blended" else "blended"),
            model.tiled((32, 32), mode="blended", overlap=0.5),
        ):
            with pytest.raises(ValueError, match="state must be that of encoder to latent"):
                view.stream_encoder().load_state_dict(stream.state_dict())


def test_the_reference_backend_has_no_tiles(build, clip):
    model = build("vidtok_kl_causal_488_4chn").set_backend("reference")
    with pytest.raises(ValueError, match="tiled: backend must be 'native', got 'reference'"):
        model.tiled(32)


@torch.no_grad()
def test_forward_tiles_both_directions(build, clip, monkeypatch):
    model, video = build("vidtok_kl_causal_488_4chn", ch_mult=(1, 2)), clip(1, 1, 64, 64)
    tiles, tiled = [], type(model).tiled
    monkeypatch.setattr(type(model), "tiled", lambda m, t: tiles.append(t) or tiled(m, t))
    output = model(video, tile=(32, 32))
    assert tiles == [(32, 32)] * 2
    assert relative_error(output.reconstruction, model(video).reconstruction) <= TOLERANCE


def test_weights_of_overlapping_ranges_add_up_to_one():
    from vtok_ext.models.tiling_blended import _ramp

    for size, tile, overlap in ((37, 16, 0.25), (9, 4, 0.5), (5, 2, 0.25), (7, 20, 0.25)):
        total = torch.zeros(size)
        for start, stop, parts in overlapping_ranges(size, tile, overlap):
            total[start:stop] += _ramp(*parts)
        assert torch.allclose(total, torch.ones(size)), (size, tile, overlap)


def test_ranges_cover_each_axis_once():
    for size, tile in ((1, 8), (8, 8), (9, 8), (61, 20), (5, 1)):
        ranges = split_axis(size, tile)
        assert [i for start, stop in ranges for i in range(start, stop)] == list(range(size))
        assert max(stop - start for start, stop in ranges) <= tile
    segment = Segment((0, 2), (Reach(1, 1, 2, 2), Reach(2, 1, 0, 1)))
    assert segment.inputs_for(5, 9, 100) == (8, 22) and segment.inputs_for(0, 50, 100) == (0, 100)
    assert segment.output_size(100) == 50 and segment.finest == 2


def test_refusals(model, clip):
    for tile in (0, (0, 4), (4,), "large", (4, 2.5), True):
        with pytest.raises(ValueError, match=r'tile must be "auto" or \(height, width\)'):
            model.tiled(tile)
    with pytest.raises(ValueError, match="mode must be 'exact' or 'blended', got 'fast'"):
        model.tiled(8, mode="fast")
    with pytest.raises(ValueError, match=r"overlap must be in \(0, 0.5\], got 0.7"):
        model.tiled(8, mode="blended", overlap=0.7)
    with pytest.raises(ValueError, match='tile must be .* with mode="blended"'):
        model.tiled(mode="blended")
    with pytest.raises(ValueError, match="memory must be at least"), torch.no_grad():
        model.tiled("auto", memory=1000).encode(clip(1, 1, 32, 32))
