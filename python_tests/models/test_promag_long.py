"""Videos larger or longer than a model's clips: tiling inside layers, overlapping chunks."""

import pytest
import torch

import vtok_ext as vt
from vtok_ext.models.promag_overlap import (
    blend_chunks,
    chunk_bounds,
    decode_overlapping,
    encode_overlapping,
)
from vtok_ext.models.promag_tiling import Tiles, layerwise_tiled

TINY = {"ch": 8, "ch_mult": (1, 2, 2), "num_res_blocks": 1, "z_channels": 3}
TOLERANCE = 1e-5


def perturb(module: torch.nn.Module, seed: int = 0, scale: float = 0.1) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def promag(**overrides) -> vt.VideoTokenizer:
    torch.manual_seed(0)
    return perturb(vt.create_model("promag_base_4x8x8", **{**TINY, **overrides}))


def grown() -> vt.VideoTokenizer:
    model = vt.grow(promag()).eval()
    perturb(model.encoder, 1, 0.05), perturb(model.decoder, 2, 0.05)
    return model


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max() / (b.max() - b.min()))


@pytest.mark.parametrize("size", [(8, 8), (4, 12), (32, 32)])
@pytest.mark.parametrize("kind", ["base", "with mean", "grown"])
@torch.no_grad()
def test_tiles_inside_layers_leave_no_trace(kind, size, clip):
    model = grown() if kind == "grown" else promag(subtract_mean=kind == "with mean")
    tiled, video = layerwise_tiled(model, *size), clip(1, 9, 22, 19)
    encoding, whole = tiled.encode(video), model.encode(video)
    assert relative_error(encoding.latent, whole.latent) <= TOLERANCE
    assert relative_error(tiled.decode(whole), model.decode(whole)) <= TOLERANCE
    assert tiled.model_id == model.model_id


def test_a_tiling_of_the_whole_network_does_differ(clip):
    """Statistics of single tiles are others: what tiling inside layers is for."""
    model, video = promag(), clip(1, 5, 16, 16)
    with torch.no_grad():
        corner = model.encode(video[..., :8, :8]).latent
        assert relative_error(corner, model.encode(video).latent[..., :2, :2]) > 0.01


@torch.no_grad()
def test_tiled_streams_equal_the_whole_clip(clip):
    model, video = grown(), clip(1, 27, 8, 12)
    tiled, whole = layerwise_tiled(model, 4, 8), model.encode(clip(1, 27, 8, 12))
    encoder, decoder = tiled.stream_encoder(), tiled.stream_decoder(num_frames=27)
    latents = [y for part in video.split(10, dim=2) for y in encoder.push(part)] + encoder.flush()
    assert relative_error(torch.cat(latents, 2), whole.latent) <= TOLERANCE
    frames = [y for z in latents for y in decoder.push(z)] + decoder.flush()
    assert relative_error(torch.cat(frames, 2), model.decode(whole)) <= TOLERANCE


def test_tiles_split_window_and_join():
    x, cpu = torch.randn(1, 2, 3, 7, 5), torch.device("cpu")
    tiles = Tiles.split(x, 3, 2, cpu, cpu)
    assert torch.equal(tiles.join(), x) and tiles.shape == x.shape
    padded = torch.nn.functional.pad(x, (1, 2, 1, 1))
    assert torch.equal(tiles.window(-1, 8, -1, 7), padded)
    assert torch.equal(tiles.window(2, 6, 1, 4), x[:, :, :, 2:6, 1:4])
    assert torch.equal((tiles + tiles).join(), x + x)


@torch.no_grad()
def test_views_in_tiles(clip):
    model, video = promag(), clip(1, 5, 16, 16)
    view = model.tiled((7, 8))
    assert view.is_exact
    assert relative_error(view(video).reconstruction, model(video).reconstruction) <= TOLERANCE
    assert not model.tiled((8, 8), mode="blended").is_exact
    with pytest.raises(ValueError, match="tile must be .height, width. in pixels"):
        model.tiled()


def test_tiling_errors():
    with pytest.raises(ValueError, match="height and width must be multiples of 4"):
        layerwise_tiled(promag(), 8, 6)
    vidtok = vt.create_model("vidtok_kl_causal_488_4chn", ch=8, num_res_blocks=1)
    with pytest.raises(ValueError, match="layers must be convolutions and group norms"):
        layerwise_tiled(vidtok, 8, 8)
    with pytest.raises(ValueError, match="must be a causal grid tokenizer"):
        layerwise_tiled(vt.grow(promag(), mixing="global"), 8, 8)


def test_56_frames_are_4_overlapping_chunks():
    assert chunk_bounds(56) == [(0, 17), (13, 30), (26, 43), (39, 56)]
    assert chunk_bounds(17) == [(0, 17)] and chunk_bounds(3) == [(0, 3)]
    assert chunk_bounds(18) == [(0, 17), (13, 18)]
    assert chunk_bounds(34, overlap=0) == [(0, 17), (17, 34)]
    for frames in range(1, 70):  # every later chunk brings a frame of its own
        bounds = chunk_bounds(frames)
        assert bounds[-1][1] == frames and all(b - a > 4 for a, b in bounds[1:])


def test_overlaps_are_blended_linearly():
    early, late = torch.zeros(1, 1, 6, 1, 1), torch.ones(1, 1, 6, 1, 1)
    blended = torch.cat(list(blend_chunks([early, late])), 2).flatten()
    assert torch.allclose(blended, torch.tensor([0, 0, 0.2, 0.4, 0.6, 0.8, 1, 1]))
    assert torch.equal(
        torch.cat(list(blend_chunks([early, late], 0)), 2), torch.cat([early, late], 2)
    )
    with pytest.raises(ValueError, match="a chunk must have more than 4 frames, got 3"):
        list(blend_chunks([early, late[:, :, :3]]))


@torch.no_grad()
def test_any_length_comes_back_from_overlapping_chunks(clip):
    model = grown()
    for frames in (5, 18, 31):
        video = clip(1, frames, 8, 8)
        encodings = encode_overlapping(model, video)
        decoded = decode_overlapping(model, encodings)
        assert decoded.shape == video.shape
        first = model.decode(encodings[0])
        count = min(13, frames)
        assert torch.equal(decoded[:, :, :count], first[:, :, :count])
