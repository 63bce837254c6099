"""CoordTok: any clip shape, masks, training entry, files, and the released layout."""

import math
import re
import zipfile

import numpy as np
import pytest
import torch
from helpers import assert_close, needs_one_graph, needs_torch

import vtok_ext as vt
from vtok_ext.models import CoordTok, CoordTokConfig, Encoding
from vtok_ext.models.coordtok_config import PLANE_AXES
from vtok_ext.models.coordtok_networks import QueryTransformer
from vtok_ext.models.coordtok_points import patches_to_video
from vtok_ext.models.coordtok_sampling import random_frame_points, random_points, video_patches

# Frames of another height than width, planes and query grids (2x4, 2x3, 4x3) that are not square.
SMALL = {
    "video_shape": (8, 16, 24),
    "enc_embed_dim": 16,
    "enc_num_layers": 2,
    "enc_num_heads": 2,
    "enc_patch_num_layers": 1,
    "enc_patch_size": (2, 8, 8),
    "latent_resolution": (8, 4, 6),
    "latent_channels": 3,
    "latent_patch_size": (4, 1, 2),
    "dec_embed_dim": 24,
    "dec_num_layers": 2,
    "dec_num_heads": 2,
    "dec_patch_size": (1, 4, 4),
}
NAME = "coordtok_large_128"


def small(**overrides) -> CoordTok:
    torch.manual_seed(0)
    return vt.create_model(NAME, **{**SMALL, **overrides}).eval()


@pytest.fixture(scope="module")
def tok():
    return small()


@torch.no_grad()
def planes_of(model, video, **options):
    return model.encode(video, **options).latent


def test_names_and_released_sizes():
    ours = ["coordtok_base_128", "coordtok_small_128"]
    assert vt.list_models("coordtok*") == [ours[0], NAME, f"{NAME}_3072", ours[1]]
    for name, tokens in ((NAME, 1280), (f"{NAME}_3072", 3072)):
        with torch.device("meta"):
            model = vt.create_model(name)
        assert model.token_grid(128, 128, 128) == (tokens,) and not model.is_discrete
        assert (
            sum(p.numel() for p in model.parameters())
            == {1280: 853_410_496, 3072: 860_768_448}[tokens]
        )


def test_epsilons_and_biases_of_the_released_weights(tok):
    """A wrong eps shifts activations by less than the recorded outputs can show."""
    for name, module in tok.named_modules():
        if isinstance(module, torch.nn.LayerNorm):
            assert module.eps == (1e-6 if "encoder.transformer" in name else 1e-5), name
    assert isinstance(tok.encoder.transformer, QueryTransformer)
    assert tok.encoder.encoder.layers[0].attn.qkv.bias is None
    assert tok.decoder.transformer.layers[0].attn.qkv.bias is not None


@pytest.mark.parametrize("shape", [(8, 16, 24), (1, 16, 24), (5, 9, 24), (8, 1, 1), (3, 16, 23)])
@torch.no_grad()
def test_every_length_and_size_comes_back(tok, clip, shape):
    video = clip(2, *shape)
    before = video.clone()
    encoding = tok.encode(video, fps=25.0)
    shapes = {name: list(plane.shape) for name, plane in encoding.latent.items()}
    assert shapes == {"xy": [2, 4, 6, 3], "yt": [2, 8, 6, 3], "xt": [2, 8, 4, 3]}
    decoded = tok.decode(encoding)
    assert decoded.shape == video.shape and decoded.isfinite().all()
    assert torch.equal(video, before) and encoding.fps == 25.0
    picture = tok.decode(encoding, output="uint8", num_frames=1, size=(1, 1))
    assert picture.dtype == torch.uint8 and picture.shape == (2, 3, 1, 1, 1)
    whole = tok.decode(encoding.latent)
    assert whole.shape == (2, 3, 8, 16, 24)


@pytest.mark.parametrize("plane", PLANE_AXES)
def test_cells_of_a_query_token_lie_together(tok, plane):
    """Token (i, j) of the true grid makes the cells of its block, row by row."""
    (rows, columns), (p1, p2) = tok.config.query_grid(plane), tok.config.plane_patch(plane)
    tokens = torch.randn(2, rows * columns, p1 * p2 * 3)
    cells = tok.encoder._unpatchify(tokens, plane)
    for i in range(rows):
        for j in range(columns):
            block = cells[:, i * p1 : (i + 1) * p1, j * p2 : (j + 1) * p2]
            assert torch.equal(block.flatten(1), tokens[:, i * columns + j])


def test_square_root_unpatchify():
    """Equal on square grids; 4x1 tokens are laid out as 2x2 and the memory is read anew."""
    square = {"latent_patch_size": (4, 2, 3)}
    grid, root = small(**square), small(**square, unpatchify="square_root")
    video = torch.rand(1, 3, 8, 16, 24)
    a, b = planes_of(grid, video), planes_of(root, video)
    assert all(torch.equal(a[name], b[name]) for name in a)
    # Query grids: xy 4x1, yt 1x1, xt 1x4.
    root = small(unpatchify="square_root", latent_patch_size=(8, 1, 6))
    tokens = torch.arange(4 * 6 * 3).view(1, 4, 18)
    blocks = tokens.view(2, 2, 1, 6, 3).permute(0, 2, 1, 3, 4)  # [2, 1, 2, 6, C]
    assert torch.equal(root.encoder._unpatchify(tokens, "xy"), blocks.reshape(1, 4, 6, 3))
    with pytest.raises(ValueError, match="unpatchify must be 'grid' for 4 x 3 tokens of plane xy"):
        small(unpatchify="square_root")


@torch.no_grad()
def test_padding_is_the_released_one(tok, clip):
    """A short clip is one with frames of -3 after it, and its mask is the one of its length."""
    video = clip(2, 5, 16, 24)
    padded = torch.cat([video, torch.full((2, 3, 3, 16, 24), -3.0)], dim=2)
    short = planes_of(tok, video)
    rest = torch.cat([video, clip(2, 3, 16, 24, seed=1)], dim=2)
    for other in (padded, rest):
        same = planes_of(tok, other, num_frames=torch.tensor([5, 5]))
        assert all(torch.equal(short[name], same[name]) for name in short)
    unmasked = planes_of(tok, padded)
    assert not torch.allclose(short["xy"], unmasked["xy"], atol=1e-3), "the mask counts"


@torch.no_grad()
def test_additive_mask_adds_one_to_padded_logits(tok):
    """Frames 4 and 5 of 5 real ones share a token with padding or are padding: both are padded."""
    _, mask = tok.encoder._masks(torch.tensor([8, 5, 1]))
    per_token = mask.view(3, 4, 6)[:, :, 0]
    assert per_token.tolist() == [[0, 0, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1]]
    attention = tok.encoder.transformer.layers[0].cross_attn
    x, memory = torch.randn(3, 4, 16), torch.randn(3, 24, 16)
    q, k, v = (
        (y @ w.T).view(3, -1, 2, 8).transpose(1, 2)
        for y, w in zip((x, memory, memory), attention.in_proj_weight.chunk(3), strict=True)
    )
    weights = (q @ k.transpose(2, 3) / math.sqrt(8) + mask).softmax(-1)
    expected = attention.out_proj((weights @ v).transpose(1, 2).flatten(2))
    assert_close(attention(x, memory, mask), expected, "attention")


@torch.no_grad()
def test_true_mask_hides_padding(clip):
    """With the true mask nothing of a wholly padded token arrives; with the released one it does.

    5 frames: the third token of 2 frames is half real and is seen.
    """
    lengths = torch.tensor([5])
    video = clip(1, 8, 16, 24)
    other = torch.cat([video[:, :, :6], torch.zeros(1, 3, 2, 16, 24)], dim=2)
    for mask, hidden in (("true", True), ("additive", False)):
        model = small(padding_mask=mask)
        a, b = (model.encoder(x, model._queries(), lengths)["xt"] for x in (video, other))
        assert torch.allclose(a, b, atol=1e-6) == hidden
        seen = torch.cat([video[:, :, :5], torch.zeros(1, 3, 3, 16, 24)], dim=2)
        assert not torch.allclose(a, model.encoder(seen, model._queries(), lengths)["xt"])


def test_true_mask_is_a_boolean_of_yaml_too(tmp_path):
    model = small(padding_mask=True)
    assert model.config == small(padding_mask="true").config
    model.save_pretrained(tmp_path)
    assert vt.load_model(tmp_path).config.padding_mask == "true"


def test_nan_reaches_the_loss_of_training(clip):
    """The loop names the layer that made it; `decode` itself refuses such planes."""
    model = small()
    torch.nn.init.constant_(model.weight_tokens_xy, float("nan"))
    points = torch.zeros(1, 1, 3, dtype=torch.int64)
    with torch.no_grad():
        for options in ({}, {"points": points}):
            assert model(clip(1, 8, 16, 24), **options).reconstruction.isnan().any()


@pytest.mark.cuda
@pytest.mark.parametrize("mask", ["additive", "true"])
def test_cuda_gives_the_numbers_of_the_cpu(clip, mask):
    model, video = small(padding_mask=mask).requires_grad_(False), clip(2, 8, 16, 24)
    lengths = torch.tensor([8, 3])
    encoding = model.encode(video, num_frames=lengths)
    decoders = (
        lambda m, e: m.decode(e, num_slices=5),
        lambda m, e: m.decode_frames(e, [2, 4.5]),
        lambda m, e: m.decode_region(e, 3, 5, 7, 9, times=[1]),
    )
    expected = [decode(model, encoding) for decode in decoders]
    model.cuda()
    on_cuda = model.encode(video.cuda(), num_frames=lengths.cuda())
    for name, plane in encoding.latent.items():
        assert_close(on_cuda.latent[name].cpu(), plane, name, factor=20)
    for decode, video in zip(decoders, expected, strict=True):
        assert_close(decode(model, on_cuda).cpu(), video, "decoded", factor=20)


@torch.no_grad()
def test_clips_of_different_length_in_one_batch(tok, clip):
    video = clip(3, 8, 16, 24)
    together = planes_of(tok, video, num_frames=torch.tensor([8, 3, 1]))
    for i, frames in enumerate((8, 3, 1)):
        alone = planes_of(tok, video[i : i + 1, :, :frames])
        for name in alone:
            assert_close(together[name][i : i + 1], alone[name], f"{frames} frames", factor=5)


def test_training_entry(clip):
    """Patches of chosen points; every parameter that takes part gets a gradient."""
    model = small().train()
    points = torch.stack([torch.randint(size, (2, 10)) for size in (8, 4, 6)], -1)
    before = points.clone()
    lengths = torch.tensor([8, 4])
    output = model(clip(2, 8, 16, 24), points=points, num_frames=lengths)
    assert output.reconstruction.shape == (2, 10, 48) and torch.equal(points, before)
    output.reconstruction.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    whole = model(clip(2, 8, 16, 24), num_slices=3)
    assert whole.reconstruction.shape == (2, 3, 8, 16, 24) and whole.reconstruction.requires_grad


def test_points_that_training_draws(clip):
    """Single patches of real frames, or whole frames; their targets lie where they say."""
    video, lengths = clip(2, 8, 16, 24), torch.tensor([8, 3])
    generator = torch.Generator().manual_seed(0)
    points = random_points(lengths, 200, (4, 4, 3), 2, generator)
    assert points.shape == (2, 200, 3)
    assert points.amax(1).tolist() == [[3, 3, 2], [0, 3, 2]] and not points.amin(1).any()
    patches = video_patches(video, points, (2, 4, 8))
    t, x, y = points[1, 17].tolist()
    block = video[1, :, 2 * t : 2 * t + 2, 4 * x : 4 * x + 4, 8 * y : 8 * y + 8]
    assert torch.equal(patches[1, 17], block.permute(1, 2, 3, 0).flatten())
    frames = random_frame_points(lengths, 3, (8, 4, 6), generator)
    assert frames.shape == (2, 72, 3) and sorted(frames[1, ::24, 0].tolist()) == [0, 1, 2]
    whole = patches_to_video(video_patches(video, frames, (1, 4, 4)), (3, 4, 6), (1, 4, 4))
    for b in range(2):
        assert torch.equal(whole[b], video[b][:, frames[b, ::24, 0]])
    again = random_frame_points(lengths, 5, (8, 4, 6), generator)[1, ::24, 0].tolist()
    assert sorted(again[:3]) == [0, 1, 2] and len(set(again[3:])) == 2 and max(again) == 2
    with pytest.raises(ValueError, match="num_frames must be at least 4, .* got 3"):
        random_points(lengths, 1, (2, 4, 6), 4)


def test_overfits_four_clips():
    """decode(encode(A)) is at least 6 dB closer to A than to any other clip."""
    torch.manual_seed(0)
    model = small(video_shape=(4, 16, 16), latent_resolution=(4, 4, 4), latent_patch_size=(2, 2, 2))
    model.train()
    t, x, y = torch.meshgrid(torch.arange(4), torch.arange(16), torch.arange(16), indexing="ij")
    phase = torch.arange(4.0).view(4, 1, 1, 1, 1) * 1.6 + torch.arange(3.0).view(3, 1, 1, 1)
    slope = torch.tensor([1.0, -1.0, 1.0, -1.0]).view(4, 1, 1, 1, 1)
    clips = torch.sin(phase + 0.25 * x * slope + 0.2 * y + 0.4 * t)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 250)
    for _ in range(250):
        optimizer.zero_grad()
        (model(clips).reconstruction - clips).square().mean().backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        decoded = model.eval()(clips).reconstruction
    error = (decoded[:, None] - clips[None]).square().mean(dim=(2, 3, 4, 5))
    own, best_other = error.diagonal(), (error + torch.eye(4) * 1e9).min(dim=1).values
    assert (10 * torch.log10(best_other / own) >= 6).all(), error


def test_saving_and_loading(tok, tmp_path, clip):
    tok.save_pretrained(tmp_path / "model")
    loaded = vt.load_model(tmp_path / "model")
    assert isinstance(loaded, CoordTok) and loaded.config == tok.config
    assert loaded.model_id == tok.model_id
    with torch.no_grad():
        encoding = tok.encode(clip(1, 5, 16, 20))
    encoding.model_id = tok.model_id
    encoding.save(tmp_path / "clip.safetensors")
    again = Encoding.load(tmp_path / "clip.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded.decode(again), tok.decode(encoding))
    other = small(dec_num_layers=1)
    with pytest.raises(ValueError, match="decode: tokens must come from"):
        other.decode(again)


def test_released_checkpoint_layout(tok, tmp_path, clip):
    """Prefix of the distributed wrapper, the perceptual loss's weights, and training state."""
    state = {f"module.{name}": value for name, value in tok.state_dict().items()}
    state["module.decoder.lpips_loss.net.slice1.0.weight"] = torch.zeros(64, 3, 3, 3)
    content = {"epoch": 3, "model": state, "best_psnr": 30.5, "optimizer": {"state": {}}}
    torch.save(content, tmp_path / "model.pth")
    model = vt.load_model(tmp_path / "model.pth", name=NAME, trust_checkpoint=True, **SMALL)
    assert not model.training and model.model_id == tok.model_id
    del state["module.decoder.projector.bias"]
    torch.save(content, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"got 1 missing \(decoder.projector.bias\)"):
        vt.load_model(tmp_path / "model.pth", name=NAME, trust_checkpoint=True, **SMALL)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_dtypes(tok, clip, dtype):
    video = clip(1, 7, 15, 24)
    model = small().to(dtype)
    times = [0, 2.5]
    expected = tok.decode_frames(tok.encode(video), times)
    decoded = model.decode_frames(model.encode(video), times)
    assert decoded.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float64 else 0.1  # half types: 8 bits through 6 layers
    assert (decoded - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.fixture
def points():
    """Ten points of `small()`."""
    return torch.stack([torch.randint(size, (1, 10)) for size in (8, 4, 6)], -1)


def test_autocast(clip, points):
    model = small().train()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(clip(1, 8, 16, 24), points=points).reconstruction
    assert output.dtype == torch.bfloat16
    output.float().square().mean().backward()
    assert model.weight_tokens_yt.grad.isfinite().all()


@needs_one_graph
def test_compiles_as_one_graph(clip, points):
    model = small().train()
    eager = model(clip(1, 8, 16, 24), points=points).reconstruction
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_close(compiled(clip(1, 8, 16, 24), points=points).reconstruction, eager, "compiled")


def test_errors(tok, clip):
    with torch.no_grad():
        planes = planes_of(tok, clip(2, 8, 16, 24))
    with pytest.raises(ValueError, match=r"encode: video must have .*at most .*\(8, 16, 24\), got"):
        tok.encode(clip(1, 9, 16, 24))
    with pytest.raises(ValueError, match="encode: video must be 16x24 with frames='reference'"):
        tok.encode(clip(1, 8, 16, 16), frames="reference")
    for wrong, message in (
        (torch.tensor([3]), r"num_frames must be integers \[B\] with B = 2, got \[1\]"),
        (torch.tensor([0, 8]), r"num_frames must be in 1..8, got 0..8"),
        (torch.tensor([1, 9]), r"num_frames must be in 1..8, got 1..9"),
        (torch.ones(2), r"num_frames must be integers \[B\] .* got \[2\] torch.float32"),
        (7, r"num_frames must be integers \[B\] with B = 2, got 7"),
    ):
        with pytest.raises(ValueError, match=message):
            tok.encode(clip(2, 8, 16, 24), num_frames=wrong)
    with pytest.raises(TypeError, match=r"decode: latent must be a dict of planes .* got Tensor"):
        tok.decode(planes["xy"])
    for fps in (float("nan"), float("inf"), 0, -1, "x", True):
        with pytest.raises(ValueError, match=r"encode: fps must be a number > 0 or None, got"):
            tok.encode(clip(1, 8, 16, 24), fps=fps)
    for shape in ((9, 16, 24), (8, 17, 24), (-1, 0, 0)):
        with pytest.raises(ValueError, match=r"token_grid: video must have .* \(8, 16, 24\), got"):
            tok.token_grid(*shape)
    with pytest.raises(ValueError, match="forward: num_slices must be 1 with points, got 9"):
        tok(clip(1, 8, 16, 24), points=torch.zeros(1, 1, 3).long(), num_slices=9)
    with pytest.raises(TypeError, match=r"got \['xy', 'yt'\]"):
        tok.decode({name: planes[name] for name in ("xy", "yt")})
    with pytest.raises(ValueError, match=r"plane xt must be \[B, 8, 4, 3\], got \[1, 8, 4, 3\]"):
        tok.decode({**planes, "xt": planes["xt"][:1]})
    with pytest.raises(ValueError, match=r"decode: num_frames must be an integer in 1..8, got 9"):
        tok.decode(planes, num_frames=9)
    with pytest.raises(
        ValueError, match=r"decode: num_slices must be an integer in 1..192, .* got 0"
    ):
        tok.decode(planes, num_slices=0)
    with pytest.raises(ValueError, match=r"num_frames must be an integer in 1..8, got 2.5"):
        tok.decode(planes, num_frames=2.5)
    with pytest.raises(ValueError, match=r"num_slices must be an integer in .* got 1.5"):
        tok.decode(planes, num_slices=1.5)
    with pytest.raises(ValueError, match=r"must be integers within 16x24, got \(0.5, 0, 4, 4\)"):
        tok.decode_region(planes, 0.5, 0, 4, 4)
    for recorded in (Encoding(planes, 9, (16, 24)), Encoding(planes, 8, (16, 25))):
        for decode in (
            tok.decode,
            lambda e: tok.decode_frames(e, [7.5]),
            lambda e: tok.decode_region(e, 0, 0, 4, 4),
        ):
            with pytest.raises(
                ValueError, match=r"encoding must record .*at most .* \(8, 16, 24\), "
            ):
                decode(recorded)
    with pytest.raises(ValueError, match="got coordtok_large_128, whose latent is continuous"):
        tok.tokenize(clip(1, 8, 16, 24))
    with pytest.raises(ValueError, match="model must be causal for an exact stream"):
        tok.stream_encoder()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"video_shape": (8, 16)}, "video_shape must be three integers"),
        ({"enc_patch_size": (3, 8, 8)}, r"enc_patch_size must be divisors of video_shape \(8"),
        ({"latent_patch_size": (4, 3, 2)}, "latent_patch_size must be divisors of latent_resol"),
        ({"dec_num_heads": 5}, "dec_embed_dim must be a multiple of the 5 heads, got 24"),
        ({"padding_mask": "add"}, "padding_mask must be one of 'additive', 'true', got 'add'"),
        ({"latent_channels": 0}, "latent_channels must be an integer >= 1, got 0"),
    ],
)
def test_bad_configurations(fields, message):
    with pytest.raises(ValueError, match=f"CoordTokConfig: {message}"):
        CoordTokConfig(**{**SMALL, **fields})


@needs_torch((2, 7), "older ones refuse to allow such numbers")
@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_checkpoint_with_a_numpy_score(tok, tmp_path, module):
    """`best_psnr` of a training script may be a number of NumPy 1 or 2."""
    torch.save({"model": tok.state_dict(), "best_psnr": np.float64(30.5)}, tmp_path / "saved.pth")
    with zipfile.ZipFile(tmp_path / "saved.pth") as saved:
        parts = {name: saved.read(name) for name in saved.namelist()}
    with zipfile.ZipFile(tmp_path / "model.pth", "w") as edited:
        for name, content in parts.items():
            edited.writestr(name, re.sub(rb"numpy\._?core\.multiarray", module.encode(), content))
    model = vt.load_model(tmp_path / "model.pth", name=NAME, **SMALL)
    assert model.model_id == tok.model_id
