"""VidTok's native paths against its reference backend: whole, in chunks, streamed, gradients."""

import pytest
import torch
from helpers import needs_one_graph
from torch.profiler import ProfilerActivity, profile

from vtok_ext.layers import _frame_pass
from vtok_ext.models import vidtok

FAMILIES = {
    "vidtok_fsq_causal_488_262144": {},
    "vidtok_kl_causal_444_4chn": {},
    "vidtok_kl_causal_41616_4chn": {},
    "vidtok_kl_causal_288_8chn_v1_1": {},
    "vidtok_kl_causal_488_4chn_v1_1": {},
    "vidtok_fsq_causal_888_32768_v1_1": {},
    "vidtok_kl_noncausal_488_4chn": {},
    "vidtok_fsq_noncausal_488_262144": {},
}
CAUSAL = [name for name in FAMILIES if "noncausal" not in name]
GROUPED = {"ch": 64, "ch_mult": (1, 1), "norm_type": "groupnorm"}


@pytest.fixture
def passes(monkeypatch):
    """Counts the passes that ran in place."""
    found = []
    original = vidtok.in_place.applies

    def applies(*args):
        found.append(original(*args))
        return found[-1]

    monkeypatch.setattr(vidtok.in_place, "applies", applies)
    return found


def close(actual, expected, tolerance=1e-5):
    assert actual.shape == expected.shape
    scale = expected.abs().max()
    assert (actual - expected).abs().max() <= tolerance * scale


def published(model, video):
    """Raw latent, latent and frames of the reference backend."""
    model.set_backend("reference")
    try:
        raw = model.encode_chunk(video)
        latent = model.regularize(raw)[0]
        return raw, latent, model.decode_chunk(latent)
    finally:
        model.set_backend("native")


@pytest.mark.parametrize("name", FAMILIES)
def test_native_equals_reference(build, clip, passes, name):
    model = build(name)
    video = clip(2, 16 if name not in CAUSAL else 9, 32, 16)
    with torch.no_grad():
        raw, latent, frames = published(model, video)
        close(model.encode_chunk(video), raw)
        close(model.decode_chunk(latent), frames)
    assert passes == ([True, True] if name in CAUSAL else [])


@pytest.mark.parametrize("name", CAUSAL)
def test_native_streams_equal_reference(build, clip, name):
    model = build(name)
    f = model.temporal_factor
    video = clip(1, 1 + 2 * f, 32, 16)
    with torch.no_grad():
        raw, latent, frames = published(model, video)
        state, parts = None, []
        for chunk in video.split([1, f, f], dim=2):
            part, state = model.encode_chunk(chunk, state, True)
            parts.append(part)
        close(torch.cat(parts, 2), raw)
        state, parts = None, []
        for chunk in latent.split([2, 1], dim=2):
            part, state = model.decode_chunk(chunk, state, True)
            parts.append(part)
        rest = model.decode_rest(state)
        close(torch.cat(parts if rest is None else [*parts, rest], 2), frames)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("vidtok_kl_causal_488_4chn", {"ch_mult": (1, 2, 2)}),
        ("vidtok_kl_causal_488_4chn_v1_1", {"ch_mult": (1, 2, 2)}),
        ("vidtok_kl_noncausal_488_4chn", {"ch_mult": (1, 2, 2)}),
        ("vidtok_kl_causal_488_4chn", GROUPED),
        ("vidtok_kl_noncausal_488_4chn", GROUPED),
    ],
    ids=["1.0", "1.1", "noncausal", "groupnorm", "noncausal groupnorm"],
)
def test_native_gradients_equal_reference(build, clip, name, overrides):
    """In float64, where a difference is no rounding."""
    model = build(name, **overrides).double()
    video = clip(2, 8 if "noncausal" in name else 5, 16, 8).double()
    results = []
    for backend in ("reference", "native"):
        model.set_backend(backend).zero_grad()
        x = video.clone().requires_grad_()
        raw = model.encode_chunk(x)
        frames = model.decode_chunk(raw[:, :4])
        (frames.square().mean() + raw.square().mean()).backward()
        gradients = [x.grad] + [p.grad for p in model.parameters()]
        results.append((raw.detach(), frames.detach(), *gradients))
    # A key bias has no gradient but roundings; groups of two channels stay ill conditioned.
    largest = max(gradient.abs().max() for gradient in results[0][3:])
    tolerance = 1e-5 if overrides is GROUPED else 1e-9
    for expected, actual in zip(*results, strict=True):
        assert (actual - expected).abs().max() <= tolerance * max(expected.abs().max(), largest)


@pytest.mark.parametrize("name", ["vidtok_kl_causal_488_4chn", "vidtok_kl_causal_488_4chn_v1_1"])
@pytest.mark.parametrize("chunk_bytes", [1, 20_000])
def test_chunk_length_does_not_matter(build, clip, monkeypatch, passes, name, chunk_bytes):
    model = build(name)
    video = clip(1, 9, 16, 24)
    with torch.no_grad():
        expected = model.encode(video)
        frames = model.decode(expected)
        monkeypatch.setattr(_frame_pass, "CHUNK_BYTES", chunk_bytes)
        close(model.encode(video).moments, expected.moments)
        close(model.decode(expected), frames)
    assert all(passes) and len(passes) == 4


@pytest.mark.parametrize("name", ["vidtok_kl_causal_488_4chn", "vidtok_kl_causal_488_4chn_v1_1"])
def test_in_place_bfloat16_is_as_exact_as_layers(build, clip, passes, name):
    model = build(name)
    video = clip(1, 5, 16, 16)
    with torch.no_grad():
        raw, latent, frames = published(model, video)
        with torch.autocast("cpu", torch.bfloat16):
            assert model.encode_chunk(video).dtype == torch.bfloat16
            fast = model.encode_chunk(video), model.decode_chunk(latent)
        model.bfloat16()
        half = model.encode_chunk(video.bfloat16()), model.decode_chunk(latent.bfloat16())
        assert passes == [True] * 5
    layers = model.encode_chunk(video.bfloat16()), model.decode_chunk(latent.bfloat16())
    for found in (fast, half):
        for a, b, exact in zip(found, layers, (raw, frames), strict=True):
            error, allowed = ((t.float() - exact).square().mean().sqrt() for t in (a, b))
            assert error <= 1.5 * allowed


@pytest.mark.parametrize("name", ["vidtok_kl_causal_488_4chn", "vidtok_kl_causal_488_4chn_v1_1"])
@pytest.mark.parametrize("chunk_bytes", [1, 20_000, 2**25])
def test_items_of_a_batch_share_weights(build, clip, monkeypatch, passes, name, chunk_bytes):
    """Folded once for all, and every item is what it is alone, in streams too."""
    model, video = build(name, ch_mult=(1, 2, 2)), clip(3, 9, 16, 24)
    monkeypatch.setattr(_frame_pass, "CHUNK_BYTES", chunk_bytes)
    fold, folded = _frame_pass.transposed_weight, []
    monkeypatch.setattr(
        _frame_pass, "transposed_weight", lambda weight: folded.append(0) or fold(weight)
    )

    def results(x):
        raw, state = model.encode_chunk(x[:, :, :5], None, True)
        more, following = model.encode_chunk(x[:, :, 5:], state, True)
        latent = torch.cat([raw, more], 2)[:, :4]
        frames, waiting = model.decode_chunk(latent[:, :, :2], None, True)
        rest, last = model.decode_chunk(latent[:, :, 2:], waiting, True)
        states = (*state.values(), *following.values(), *waiting.values(), *last.values())
        return latent, frames, rest, model.decode_chunk(latent), *states

    with torch.no_grad():
        model.decode_chunk(model.encode(video).latent)
        assert len(folded) == 2
        for found, *alone in zip(results(video), *map(results, video.split(1)), strict=True):
            assert torch.equal(found, torch.cat(alone))
    assert all(passes)


@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_frames_that_pad_a_clip_are_not_decoded(build, monkeypatch, passes, name):
    model = build(name)
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(1, model.latent_channels, 3, 2, 3, generator=generator)
    finish, num_computed = vidtok.in_place.DecoderPass._finish, []

    def counted(self, run, x):
        num_computed.append(x.shape[2])
        finish(self, run, x)

    monkeypatch.setattr(vidtok.in_place.DecoderPass, "_finish", counted)
    whole = model.decode(latent)
    drop = sum(num_computed) - whole.shape[2]
    for num_frames in range(1, whole.shape[2] + 1):
        num_computed.clear()
        assert torch.equal(model.decode(latent, num_frames=num_frames), whole[:, :, :num_frames])
        assert sum(num_computed) == drop + num_frames
    with pytest.raises(ValueError, match="num_frames and size must be within the decoded"):
        model.decode(latent, num_frames=0)
    assert all(passes)


def test_inference_mode_runs_in_place(build, clip, passes):
    model = build("vidtok_kl_causal_488_4chn_v1_1", ch_mult=(1, 2))
    video = clip(1, 5, 16, 8)
    with torch.no_grad():
        expected = model(video).reconstruction
    with torch.inference_mode():
        found = model(video).reconstruction
    assert passes == [True] * 4 and torch.equal(found, expected)


class Adapter(torch.nn.Module):
    """A convolution and a low-rank correction of zero, as fine-tuning puts in place of a layer."""

    def __init__(self, conv):
        super().__init__()
        self.conv, self.scale = conv, torch.nn.Parameter(torch.zeros(()))
        self.num_calls = 0

    def forward(self, x):
        self.num_calls += 1
        return self.conv(x) * (1 + self.scale)


def _adapt_2d(model):
    block = model.decoder.up[0].block[0]
    block.conv2 = Adapter(block.conv2)
    return lambda: block.conv2.num_calls


def _adapt_1d(model):
    conv = model.encoder.down_temporal[0].block[0].conv1
    conv.conv = Adapter(conv.conv)
    return lambda: conv.conv.num_calls


def _adapt_upsampling(model):
    conv = model.decoder.up_temporal[1].upsample.conv
    conv.conv = Adapter(conv.conv)
    return lambda: conv.conv.num_calls


def _hook(find):
    def attach(model):
        calls = []
        find(model).register_forward_hook(lambda module, args, out: calls.append(out))
        return lambda: len(calls)

    return attach


def _replace_forward(model):
    block = model.decoder.up_temporal[0].block[0]
    forward, calls = block.conv1.forward, []

    def counted(*args, **options):
        calls.append(args)
        return forward(*args, **options)

    block.conv1.forward = counted
    return lambda: len(calls)


SEEN = {
    "adapter 2d": _adapt_2d,
    "adapter 1d": _adapt_1d,
    "adapter upsampling": _adapt_upsampling,
    "forward of an instance": _replace_forward,
    "hook on a norm": _hook(lambda m: m.decoder.up_temporal[0].block[0].norm1),
    "hook on a child": _hook(lambda m: m.encoder.down_temporal[0].block[0].conv2.conv),
    "hook on attention": _hook(lambda m: m.encoder.mid.attn_1.proj_out),
    "hook on a stage": _hook(lambda m: m.decoder.up_temporal[1].upsample),
}


@pytest.mark.parametrize("name", ["vidtok_kl_causal_488_4chn", "vidtok_kl_causal_488_4chn_v1_1"])
@pytest.mark.parametrize("what", SEEN)
def test_fusion_stops_where_somebody_looks(build, clip, passes, name, what):
    model = build(name, ch_mult=(1, 2))
    video = clip(1, 3, 8, 8)
    with torch.no_grad():
        expected = model.decode(model.encode(video))
        assert passes == [True, True]
        count = SEEN[what](model)
        found = model.decode(model.encode(video))
    assert count() == 1 and passes.count(False) == 1
    close(found, expected)


@pytest.mark.parametrize("register", ["forward_hook", "forward_pre_hook"])
def test_hooks_of_all_modules_are_called(build, clip, passes, register):
    model = build("vidtok_kl_causal_488_4chn", ch_mult=(1, 2))
    video, seen = clip(1, 3, 8, 8), set()
    register = getattr(torch.nn.modules.module, f"register_module_{register}")
    with torch.no_grad():
        expected = model.encode_chunk(video)
        handle = register(lambda module, *_: seen.add(module))
        try:
            found = model.encode_chunk(video)
        finally:
            handle.remove()
    close(found, expected)
    assert passes == [True, False]
    assert seen >= {layer for layer in model.encoder.modules() if layer._parameters}


def test_recomputed_blocks_run_in_place(build, clip, passes):
    from vtok_ext.training.blocks import recompute_activations

    model = build("vidtok_kl_causal_488_4chn", ch_mult=(1, 2))
    video = clip(1, 3, 8, 8)
    with torch.no_grad():
        expected = model.encode_chunk(video)
        recompute_activations(model)
        recompute_activations(model)
        assert torch.equal(model.encode_chunk(video), expected)
        block = model.encoder.mid.block_1
        block.forward = lambda x, *_, **__: 2 * x
        recompute_activations(model)
        model.encode_chunk(video)
    assert passes == [True, True, False]


def test_traced_encoder_takes_other_videos(build, clip, passes):
    encoder = build("vidtok_kl_causal_488_4chn", ch_mult=(1, 2)).encoder
    with torch.no_grad():
        traced = torch.jit.trace(encoder, clip(1, 4, 8, 8), check_trace=False)
        assert passes == [False]
        video = clip(1, 4, 8, 8, seed=1)
        close(traced(video), encoder(video))


def test_default_device_does_not_matter(build, clip, passes):
    model = build("vidtok_kl_causal_488_4chn_v1_1", ch_mult=(1, 2))
    video = clip(2, 3, 8, 8)
    with torch.no_grad():
        expected = model.decode(model.encode(video))
        with torch.device("meta"):
            found = model.decode(model.encode(video))
    assert passes == [True] * 4 and torch.equal(found, expected)


def test_parametrized_weights_are_used(build, clip, passes):
    model = build("vidtok_kl_causal_488_4chn", ch_mult=(1, 2))
    video = clip(1, 3, 8, 8)

    class Halved(torch.nn.Module):
        def forward(self, weight):
            return 0.5 * weight

    conv = model.encoder.down[0].block[0].conv1
    with torch.no_grad():
        torch.nn.utils.parametrize.register_parametrization(conv, "weight", Halved())
        found = model.encode_chunk(video)
        assert passes == [False]
        torch.nn.utils.parametrize.remove_parametrizations(conv, "weight")
        close(found, model.encode_chunk(video))
    assert passes == [False, True]


def large_copies(run, least):
    """Calls of copy_, clone and contiguous on at least so many elements, by name."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        run()
    found = {}
    for event in recorded.events():
        if event.name in ("aten::copy_", "aten::clone", "aten::contiguous"):
            shape = event.input_shapes[0] if event.input_shapes else []
            if torch.Size(shape).numel() >= least:
                found[event.name] = found.get(event.name, 0) + 1
    return found


@pytest.mark.parametrize("name", ["vidtok_fsq_causal_488_262144", "vidtok_kl_causal_488_4chn_v1_1"])
def test_activations_are_not_copied(build, clip, name):
    """But for the one-sided padding of halving a frame, which oneDNN does not know (three times),
    and the front frames of the video itself."""
    model = build(name)
    frame = 8 * 64 * 64  # the smallest activation at full resolution; weights are smaller
    with torch.no_grad():
        video = clip(1, 5, 64, 64).contiguous(memory_format=torch.channels_last_3d)
        raw = model.encode_chunk(video)
        latent = raw[:, : model.latent_channels]
        assert large_copies(lambda: model.decode_chunk(latent), frame) == {}
        found = large_copies(lambda: model.encode_chunk(video), frame)
    assert set(found) <= {"aten::copy_"} and found["aten::copy_"] <= 4


def test_residual_blocks_in_training_do_not_copy():
    from vtok_ext.layers import FrameAttention, ResidualBlock1d, ResidualBlock2d, ResidualBlock3d

    blocks = [ResidualBlock1d(16), ResidualBlock2d(16, 32), ResidualBlock3d(16), FrameAttention(16)]
    x = torch.randn(1, 16, 5, 16, 16).contiguous(memory_format=torch.channels_last_3d)
    for block in blocks:
        block(x)
        # Weights are smaller than x; oneDNN reorders them.
        found = large_copies(lambda block=block: block(x), x.numel())
        assert found == {}, type(block).__name__


@needs_one_graph
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("vidtok_fsq_causal_488_4096", marks=pytest.mark.slow),
        "vidtok_kl_causal_488_4chn_v1_1",
    ],
)
def test_forward_compiles_without_a_break(build, clip, name):
    model = build(name, ch_mult=(1, 2))
    video = clip(1, 3, 8, 8)
    with torch.no_grad():
        expected = model(video)
        options = {"fullgraph": True, "backend": "aot_eager"}
        forward = torch.compile(lambda x: model(x), **options)
        found = forward(video)
        close(found.encoding.latent, expected.encoding.latent)
        close(found.reconstruction, expected.reconstruction, 3e-5)


def test_backends_are_checked(build, clip):
    model = build("vidtok_kl_causal_488_4chn")
    with pytest.raises(ValueError, match=r"backend must be one of .*, got 'fast'"):
        model.set_backend("fast")
    assert model.set_backend("reference") is model
    with pytest.raises(ValueError, match="backend must be 'native' for a stream, got 'reference'"):
        model.encode_chunk(clip(1, 1, 8, 8), None, True)
    ablation = build("vidtok_kl_causal_488_4chn", architecture="without_3d")
    with pytest.raises(ValueError, match="architecture must be 'vidtok'"):
        ablation.set_backend("reference")


def test_states_that_do_not_fit_are_refused(build, clip):
    model = build("vidtok_kl_causal_488_4chn")
    with torch.no_grad():
        _, state = model.encode_chunk(clip(1, 1, 16, 16), None, True)
        with pytest.raises(ValueError, match=r"conv_in must be \[1, 3, 2, 16, 24\], got"):
            model.encode_chunk(clip(1, 4, 16, 24), state, True)
