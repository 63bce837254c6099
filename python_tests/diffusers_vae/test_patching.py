"""patch_diffusers: the same results, names and protocols; reversal; refusals."""

import copy
import importlib
import io
import pickle

import pytest
from helpers import import_or_skip

diffusers = import_or_skip("diffusers")

import tiny  # noqa: E402
import torch  # noqa: E402

import vtok_ext as vt  # noqa: E402
from vtok_ext.diffusers_vae import _patching  # noqa: E402

# The largest difference, relative to the largest value. The networks are random and thin, hence
# worse conditioned than trained ones: diffusers itself is 0.5e-5 off its float64 result in some.
# With what oneDNN picks for some processors the two are up to 1.5e-5 apart.
EXACT = 2.5e-5


def difference(actual, expected) -> float:
    assert actual.shape == expected.shape
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.fixture(params=tiny.NAMES)
def name(request):
    return request.param


@torch.no_grad()
def test_same_results_names_and_types(name):
    vae, clip = tiny.make(name), tiny.video(tiny.frames_for(name))
    before, classes = tiny.passes(vae, clip), [type(m).__name__ for m in vae.modules()]
    state = {k: (v.data_ptr(), v.shape) for k, v in vae.state_dict().items()}
    originals = [type(m) for m in vae.modules()]
    assert vt.patch_diffusers(vae) is vae
    assert _patching.num_patched(vae) >= 80
    for actual, expected in zip(tiny.passes(vae, clip), before, strict=True):
        assert difference(actual, expected) <= EXACT
    assert {k: (v.data_ptr(), v.shape) for k, v in vae.state_dict().items()} == state
    assert [type(m).__name__ for m in vae.modules()] == classes
    assert all(isinstance(m, kind) for m, kind in zip(vae.modules(), originals, strict=True))
    patched = [type(m) for m in vae.modules()]
    assert [type(m) for m in vt.patch_diffusers(vae).modules()] == patched  # once is enough
    assert vt.unpatch_diffusers(vae) is vae
    assert [type(m) for m in vae.modules()] == originals
    assert not any(key == "keeps_cache" for m in vae.modules() for key in vars(m))
    for actual, expected in zip(tiny.passes(vae, clip), before, strict=True):
        assert torch.equal(actual, expected)


@torch.no_grad()
def test_chunks_and_tiles_of_diffusers(name):
    """Its own chunked and tiled passes, with the caches between their calls."""
    vae = tiny.make(name)
    vae.enable_tiling(tile_sample_min_height=16, tile_sample_min_width=16)
    clip = tiny.video({"vidtok_noncausal": 32}.get(name, 33), size=24)
    if name.startswith("vidtok"):
        vae.num_sample_frames_batch_size, vae.num_latent_frames_batch_size = 8, 2
    before = tiny.passes(vae, clip)
    vt.patch_diffusers(vae)
    for actual, expected in zip(tiny.passes(vae, clip), before, strict=True):
        assert difference(actual, expected) <= EXACT


@torch.no_grad()
@pytest.mark.parametrize("num_frames", [1, 5, 8, 13])
def test_other_lengths(num_frames):
    """CogVideoX puts the rest of a clip into its first chunk; even ones repeat every frame."""
    vae, clip = tiny.make("cogvideox"), tiny.video(num_frames)
    before = tiny.passes(vae, clip)
    for actual, expected in zip(tiny.passes(vt.patch_diffusers(vae), clip), before, strict=True):
        assert difference(actual, expected) <= EXACT


@torch.no_grad()
def test_slicing_and_batches(name):
    vae, clip = tiny.make(name), tiny.video(tiny.frames_for(name), batch=2)
    before = tiny.passes(vae, clip)
    vt.patch_diffusers(vae)
    for actual, expected in zip(tiny.passes(vae, clip), before, strict=True):
        assert difference(actual, expected) <= EXACT
    vae.enable_slicing()
    for actual, expected in zip(tiny.passes(vae, clip), before, strict=True):
        assert difference(actual, expected) <= EXACT


def loss_gradients(vae, clip):
    vae.zero_grad()
    raw, frames = tiny.passes(vae, clip)
    (raw.square().mean() + frames.square().mean()).backward()
    return {k: p.grad.clone() for k, p in vae.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["wan", "cogvideox", "hunyuan_video", "vidtok"])
def test_gradients(name):
    vae, clip = tiny.make(name), tiny.video(tiny.frames_for(name))
    before = loss_gradients(vae, clip)
    after = loss_gradients(vt.patch_diffusers(vae), clip)
    assert after.keys() == before.keys()
    largest = max(float(g.abs().max()) for g in before.values())
    for key, gradient in before.items():
        assert float((after[key] - gradient).abs().max()) <= 1e-4 * largest, key
    if hasattr(vae, "enable_gradient_checkpointing") and name != "wan":
        vae.train()
        plain = loss_gradients(vae, clip)
        vae.enable_gradient_checkpointing()
        for key, gradient in loss_gradients(vae, clip).items():
            assert float((plain[key] - gradient).abs().max()) <= 1e-5 * largest, key


@torch.no_grad()
def test_autocast_and_half(name):
    """bfloat16 rounds elsewhere than diffusers does: as close to float32 as its own result."""
    vae, clip = tiny.make(name), tiny.video(tiny.frames_for(name))
    if name == "vidtok_fsq":
        pytest.skip("codes of another rounding are other codes")
    exact = tiny.passes(vae, clip)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs = tiny.passes(vae, clip)[0].float()
        ours = tiny.passes(vt.patch_diffusers(vae), clip)[0]
    assert difference(ours.float(), exact) <= 2 * difference(theirs, exact) + 1e-2
    half = vae.to(torch.bfloat16)
    ours = tiny.passes(half, clip.bfloat16())[0]
    theirs = tiny.passes(vt.unpatch_diffusers(half), clip.bfloat16())[0]
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert difference(ours.float(), exact) <= 2 * difference(theirs.float(), exact) + 1e-2


SLOWER = ("cogvideox", "hunyuan_video", "vidtok")  # to trace
SHALLOW = {
    "wan": {"dim_mult": [1, 2], "temperal_downsample": [True]},
    "cogvideox": {
        "block_out_channels": (4, 8),
        "down_block_types": ("CogVideoXDownBlock3D",) * 2,
        "up_block_types": ("CogVideoXUpBlock3D",) * 2,
        "temporal_compression_ratio": 2,
    },
    "vidtok": {"ch_mult": [1, 2, 2]},
}


@torch.no_grad()
@pytest.mark.parametrize(
    "name",
    ["wan", *(pytest.param(n, marks=pytest.mark.slow) for n in SLOWER)],
)
def test_compile(name):
    vae = vt.patch_diffusers(tiny.make(name, **SHALLOW.get(name, {})))
    clip = tiny.video(5 if name != "vidtok" else 8, size=8)
    expected, latent = vae.encoder(clip), None
    encode = torch.compile(vae.encoder, fullgraph=True, backend="aot_eager")
    for actual, e in zip(as_tuple(encode(clip)), as_tuple(expected), strict=True):
        assert difference(actual, e) <= EXACT
    channels = vae.config.get("latent_channels", vae.config.get("z_dim"))
    channels = vae.config.get("z_channels", channels)
    latent = torch.randn(1, channels, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    expected = vae.decoder(latent)
    decode = torch.compile(vae.decoder, fullgraph=True, backend="aot_eager")
    for actual, e in zip(as_tuple(decode(latent)), as_tuple(expected), strict=True):
        assert difference(actual, e) <= EXACT


def as_tuple(result):
    """The tensor of a network, without the caches that CogVideoX returns with it."""
    return (result[0],) if isinstance(result, tuple) else (result,)


@torch.no_grad()
def test_hooks_see_what_they_saw(name):
    """A hooked layer is called as before, with the same values."""
    vae, clip = tiny.make(name), tiny.video(tiny.frames_for(name))
    before = tiny.passes(vae, clip)
    kinds = ("RMS_norm", "GroupNorm", "SpatialNorm3D", "LayerNorm", "Conv3d", "Conv1d", "Conv2d")
    hooked = [m for m in vae.modules() if type(m).__name__.endswith(kinds)][::5]
    seen = {}

    def keep(module, inputs, output):
        output = output[0] if isinstance(output, tuple) else output
        seen.setdefault(module, []).append((inputs[0].clone(), output.clone()))

    handles = [m.register_forward_hook(keep) for m in hooked]
    tiny.passes(vae, clip)
    theirs, seen = seen, {}
    vt.patch_diffusers(vae)
    for actual, expected in zip(tiny.passes(vae, clip), before, strict=True):
        assert difference(actual, expected) <= EXACT
    assert seen.keys() == theirs.keys()
    for module, calls in theirs.items():
        assert len(calls) == len(seen[module])
        for ours, original in zip(seen[module], calls, strict=True):
            for a, b in zip(ours, original, strict=True):
                assert difference(a, b) <= 10 * EXACT, type(module)  # within a random network
    for handle in handles:
        handle.remove()


LORA_TARGETS = {
    "wan": ["resample.1", "to_qkv", "proj"],
    "cogvideox": ["conv1.conv", "conv_y.conv", "upsamplers.0.conv", "downsamplers.0.conv"],
    "hunyuan_video": ["conv2.conv", "conv.conv", "to_q"],
    "vidtok": ["conv2.conv", "downsample.conv.conv", "nin_shortcut"],
}


@pytest.mark.parametrize("name", LORA_TARGETS)
def test_lora(name):
    """Adapters added before or behind patching compute and train as without it."""
    peft = import_or_skip("peft")
    config = peft.LoraConfig(r=2, target_modules=LORA_TARGETS[name], init_lora_weights=False)
    clip = tiny.video(tiny.frames_for(name))
    results = []
    for order in ("never", "before", "behind"):
        vae = tiny.make(name)
        torch.manual_seed(0)
        if order == "before":
            vt.patch_diffusers(vae)
        peft.inject_adapter_in_model(config, vae)
        if order == "behind":
            vt.patch_diffusers(vae)
        raw, frames = tiny.passes(vae, clip)
        (raw.square().mean() + frames.square().mean()).backward()
        gradients = {k: p.grad for k, p in vae.named_parameters() if "lora_A" in k}
        assert gradients and all(g is not None for g in gradients.values())
        results.append((raw.detach(), frames.detach(), gradients))
    for raw, frames, gradients in results[1:]:
        assert difference(raw, results[0][0]) <= EXACT
        assert difference(frames, results[0][1]) <= EXACT
        for key, gradient in results[0][2].items():
            assert torch.allclose(gradients[key], gradient, rtol=1e-3, atol=1e-5), key


@torch.no_grad()
def test_copies_pickles_and_folders(name, tmp_path):
    vae, clip = vt.patch_diffusers(tiny.make(name)), tiny.video(tiny.frames_for(name))
    expected = tiny.passes(vae, clip)
    for other in (copy.deepcopy(vae), pickle.loads(pickle.dumps(vae))):
        assert _patching.num_patched(other) == _patching.num_patched(vae)
        assert all(map(torch.equal, tiny.passes(other, clip), expected))
    vae.save_pretrained(tmp_path)
    loaded = getattr(diffusers, type(vae).__name__).from_pretrained(tmp_path)
    assert _patching.num_patched(loaded) == 0
    loaded = vt.patch_diffusers(loaded.eval())
    assert all(map(torch.equal, tiny.passes(loaded, clip), expected))
    buffer = io.BytesIO()
    torch.save(vae.state_dict(), buffer)
    buffer.seek(0)
    tiny.make(name, seed=1).load_state_dict(torch.load(buffer, weights_only=True))


@torch.no_grad()
@pytest.mark.parametrize("name", ["wan", "cogvideox", "vidtok"])
def test_layers_with_a_forward_of_their_own(name):
    """diffusers' layerwise casting and accelerate's offloading replace the forward of layers."""
    vae, clip = tiny.make(name), tiny.video(tiny.frames_for(name))
    layer = next(m for m in vae.modules() if type(m) is torch.nn.Conv2d)
    inner, calls = layer.forward, []

    def forward(x):
        calls.append(x.shape)
        return inner(x) * 2

    layer.forward = forward
    before = tiny.passes(vae, clip)
    shapes = list(calls)
    calls.clear()
    after = tiny.passes(vt.patch_diffusers(vae), clip)
    assert calls == shapes
    assert all(difference(a, b) <= EXACT for a, b in zip(after, before, strict=True))


@torch.no_grad()
def test_other_activations_and_dropout():
    clip = tiny.video(9)
    for name, field in (("cogvideox", "act_fn"), ("hunyuan_video", "act_fn")):
        vae = tiny.make(name, **{field: "gelu"})
        before = tiny.passes(vae, clip)
        after = tiny.passes(vt.patch_diffusers(vae), clip)
        assert all(difference(a, b) <= EXACT for a, b in zip(after, before, strict=True))
    # Dropout draws in the order of memory, which is another one: only its strength can be compared.
    vae = tiny.make("wan", dropout=0.5)
    before = tiny.passes(vae, clip)
    after = tiny.passes(vt.patch_diffusers(vae), clip)
    assert all(difference(a, b) <= EXACT for a, b in zip(after, before, strict=True))
    dropped = tiny.passes(vae.train(), clip)
    assert all(difference(a, b) > 0.01 for a, b in zip(dropped, before, strict=True))


def cached_bytes(vae) -> int:
    caches = [m.causal_cache for m in vae.modules() if getattr(m, "causal_cache", None) is not None]
    return sum(c.numel() * c.element_size() for c in caches)


@torch.no_grad()
def test_caches_of_vidtok():
    """diffusers retains a copy of every convolution's input; patched, nothing behind a pass and
    two frames a layer between the chunks of one."""
    vae, clip = tiny.make("vidtok"), tiny.video(9)
    tiny.passes(vae, clip)
    theirs = cached_bytes(vae)
    tiny.passes(vt.patch_diffusers(vae), clip)
    assert cached_bytes(vae) == 0 < theirs
    vae._set_first_chunk(True)
    vae.encoder(torch.cat([clip[:, :, :1]] * 3 + [clip], dim=2))
    between = cached_bytes(vae)
    assert 0 < between < theirs / 3


def test_refusals(monkeypatch):
    for function in (vt.patch_diffusers, vt.unpatch_diffusers, vt.wrap_diffusers):
        with pytest.raises(TypeError, match="vae must be one of AutoencoderKLWan, .*got Linear"):
            function(torch.nn.Linear(1, 1))
    vae = tiny.make("wan")
    vae.decoder.conv_in.weight = torch.nn.Parameter(
        torch.zeros(vae.decoder.conv_in.weight.shape, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(ValueError, match=r"plain floating tensors, got Parameter of torch.int8 at"):
        vt.patch_diffusers(vae)
    assert _patching.num_patched(vae) == 0


@pytest.mark.parametrize("name", ["wan", "cogvideox", "hunyuan_video", "vidtok"])
def test_another_diffusers_is_refused(name, monkeypatch):
    """Where a replaced forward is not the one that its replacement was written for."""
    vae = tiny.make(name)
    module = importlib.import_module(f"vtok_ext.diffusers_vae.{name}")
    covered = {*module.REPLACEMENTS} - {torch.nn.GroupNorm}
    assert covered <= module.FORWARDS.keys()
    kind = next(iter(covered - {type(vae)}))

    def forward(self, x, *rest):
        return x

    monkeypatch.setattr(kind, "forward", forward)
    message = f"version {_patching.WRITTEN_FOR}, got .* with another forward of {kind.__name__}"
    with pytest.raises(ValueError, match=message):
        vt.patch_diffusers(vae)
    assert _patching.num_patched(vae) == 0
    assert _patching.num_patched(vt.patch_diffusers(vae, any_version=True)) > 0


def test_absent_diffusers_is_named(monkeypatch):
    vae = tiny.make("wan")
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    for function in (vt.patch_diffusers, vt.unpatch_diffusers, vt.wrap_diffusers):
        with pytest.raises(ImportError, match=r"pip install 'vtok_ext\[diffusers\]'"):
            function(vae)
