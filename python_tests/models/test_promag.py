"""ProMAG's base: frame bookkeeping, causality, exact streams, inflation of an image model."""

import pytest
import torch

import vtok_ext as vt
from vtok_ext.models.promag import ProMAG

TINY = {"ch": 8, "num_res_blocks": 1, "z_channels": 4}
# Summation order differs between chunk shapes; relative to the range of the result.
TOLERANCE = 1e-5


def perturb(model: torch.nn.Module, seed: int = 0, scale: float = 0.1) -> torch.nn.Module:
    """Returns `model` in eval mode with noise on every parameter: nothing stays zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def promag(name: str = "promag_base_4x8x8", **overrides) -> ProMAG:
    torch.manual_seed(0)
    return perturb(vt.create_model(name, **{**TINY, **overrides}))


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max() / (b.max() - b.min()))


@pytest.mark.parametrize(
    "name, factor", [("base_4x8x8", 4), ("direct_8x8x8", 8), ("direct_16x8x8", 16)]
)
def test_17_frames_give_5_3_2_latents_and_come_back(name, factor, clip):
    model = promag("promag_" + name)
    assert model.temporal_factor == factor
    for frames in (1, 9, 17, 20):
        with torch.no_grad():
            encoding = model.encode(clip(1, frames, 16, 24))
            video = model.decode(encoding)
        expected = 1 + -(-(frames - 1) // factor)
        assert list(encoding.latent.shape) == [1, 4, expected, 2, 3]
        assert model.token_grid(frames, 16, 24) == (expected, 2, 3)
        assert list(video.shape) == [1, 3, frames, 16, 24]


def test_a_latent_depends_on_its_own_and_earlier_frames_only(clip):
    model, video = promag(), clip(1, 17, 16, 16)
    changed = video.clone()
    changed[:, :, 9:] = -changed[:, :, 9:]
    with torch.no_grad():
        before, after = model.encode(video).latent, model.encode(changed).latent
        frames, others = model.decode(before), model.decode(after)
    assert torch.equal(before[:, :, :3], after[:, :, :3])
    assert not torch.allclose(before[:, :, 3], after[:, :, 3])
    assert torch.equal(frames[:, :, :9], others[:, :, :9])


def test_a_stream_equals_the_whole_clip(clip):
    model, video = promag(), clip(2, 18, 12, 16)
    with torch.no_grad():
        whole = model.encode(video)
        frames = model.decode(whole)
    encoder, decoder = model.stream_encoder(), model.stream_decoder(num_frames=18, size=(12, 16))
    latents, parts = [], []
    for part in video.split([3, 7, 1, 4, 3], dim=2):
        latents += encoder.push(part)
    latents += encoder.flush()
    for latent in latents:
        parts += decoder.push(latent)
    parts += decoder.flush()
    assert relative_error(torch.cat(latents, 2), whole.latent) <= TOLERANCE
    assert relative_error(torch.cat(parts, 2), frames) <= TOLERANCE


def test_the_norm_subtracts_no_mean():
    """A constant feature keeps its sign, which a norm that subtracts the mean would lose."""
    norm = promag().encoder.norm_out
    norm.weight.data.fill_(1), norm.bias.data.fill_(0)
    x = torch.full((1, 32, 2, 4, 4), 3.0)
    assert torch.allclose(norm(x), torch.nn.functional.silu(torch.ones_like(x)), atol=1e-5)
    plain = promag(subtract_mean=True).encoder.norm_out
    plain.weight.data.fill_(1), plain.bias.data.fill_(0)
    assert torch.allclose(plain(x), torch.zeros_like(x), atol=1e-5)


def test_an_inflated_model_starts_as_the_image_model_on_the_frames_it_keeps(clip):
    image = promag("promag_image_8x8")
    model, video = ProMAG.inflate(image).eval(), clip(1, 9, 16, 16)
    with torch.no_grad():
        latent, of_images = model.encode(video).latent, image.encode(video).latent
        frames, pictures = model.decode(latent), image.decode(of_images[:, :, ::4])
    assert relative_error(latent, of_images[:, :, ::4]) <= TOLERANCE
    assert relative_error(frames[:, :, ::4], pictures) <= TOLERANCE
    with pytest.raises(ValueError, match="inflate: image_model must have is_image=True"):
        ProMAG.inflate(model)
    with pytest.raises(ValueError, match="inflate: fields must keep the shape"):
        ProMAG.inflate(image, ch=16)


def test_a_frozen_image_encoder_keeps_what_it_has_from_images(clip):
    image = promag("promag_image_8x8")
    model = ProMAG.inflate(image, freeze_image_encoder=True).train()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0
    )
    video = clip(1, 5, 16, 16)
    before = model.encoder.conv_in.conv.weight.detach().clone()
    for _ in range(2):
        optimizer.zero_grad()
        (model(video).reconstruction - video).abs().mean().backward()
        optimizer.step()
    after = model.encoder.conv_in.conv.weight.detach()
    assert torch.equal(before[:, :, -1], after[:, :, -1])
    assert not torch.equal(before[:, :, :-1], after[:, :, :-1])
    with torch.no_grad():
        first = model.eval().encode(video[:, :, :1]).latent
        assert relative_error(first, image.encode(video[:, :, :1]).latent) <= TOLERANCE


def test_save_and_load(tmp_path, clip):
    model = promag()
    model.save_pretrained(tmp_path)
    loaded = vt.load_model(tmp_path)
    assert loaded.model_id == model.model_id
    video = clip(1, 5, 16, 16)
    with torch.no_grad():
        assert torch.equal(loaded(video).reconstruction, model(video).reconstruction)


def test_errors():
    with pytest.raises(ValueError, match="time_levels must be at most 3"):
        vt.create_model("promag_base_4x8x8", time_levels=4)
    with pytest.raises(ValueError, match="is_image must be False"):
        vt.create_model("promag_base_4x8x8", is_image=True)
    with pytest.raises(ValueError, match=r"video must have 1 \+ k \* 4 frames"):
        promag().encode(torch.zeros(1, 3, 6, 16, 16), frames="reference")
