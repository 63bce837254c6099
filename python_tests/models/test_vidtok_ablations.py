"""The architectures of the paper's ablation: published size and work, causality, exact streams."""

import pytest
import torch

import vtok_ext as vt
from vtok_ext.models import VidTok, VidTokConfig
from vtok_ext.models.multiply_adds import count_multiply_adds, multiply_adds_of

KL = "vidtok_kl_causal_488_4chn"
ABLATIONS = [f"{KL}_full_3d", f"{KL}_without_blender", f"{KL}_without_3d"]


@pytest.fixture(scope="module", params=ABLATIONS)
def ablation(request, build):
    return build(request.param, ch_mult=(1, 2, 2, 2))


@pytest.mark.parametrize(
    ("name", "millions", "multiply_adds"),
    [
        (ABLATIONS[0], 245, "16.98"),
        (ABLATIONS[1], 142, "7.17"),
        (ABLATIONS[2], 126, "10.18"),
        (KL, 157, "10.35"),
    ],
)
def test_published_size_and_work(name, millions, multiply_adds):
    """Table 2 of the paper, 17 frames of 256x256. It rounds some parameter counts and cuts others
    off: 1 M is its accuracy. Multiply-adds (there called FLOPs) agree to all digits."""
    with torch.device("meta"):
        model = vt.create_model(name)
    assert abs(sum(p.numel() for p in model.parameters()) / 1e6 - millions) < 1
    assert f"{count_multiply_adds(VidTok, model.config, 17, 256, 256) / 1e12:.2f}" == multiply_adds


def test_work_is_that_of_the_padded_clip():
    config = VidTok.presets[KL].replace(ch=8)
    whole = count_multiply_adds(VidTok, config, 17, 64, 64)
    assert count_multiply_adds(VidTok, config, 14, 57, 60) == whole
    assert count_multiply_adds(VidTok, config, 13, 64, 64) < whole


def test_a_model_with_weights_does_the_work_of_its_configuration(build):
    """Although its pass in place runs operations that no counter of products knows."""
    model = build(KL)
    work = multiply_adds_of(lambda: model.run_networks(1, 9, 32, 32))
    assert work == count_multiply_adds(VidTok, model.config, 9, 32, 32)


def test_work_of_one_convolution():
    """A network of which everything is known: two 3x3x3 convolutions in each direction, a middle
    of width 1 and one level without any block's width changing."""
    config = VidTokConfig("kl", 1, ch=1, ch_mult=(1,), num_res_blocks=1, tempo_ds=(), tempo_us=())
    positions = 4 * 5 * 6
    pair = 2 * 9 + 2 * 3  # a 2-D and a 1-D block
    middle = 4 * 27 + 4 + 2 * 30  # four convolutions, four projections, attention over 5x6
    encoder = 3 * 27 + pair + middle + 2 * 27
    decoder = 27 + middle + 2 * pair + 3 * 27
    assert count_multiply_adds(VidTok, config, 4, 5, 6) == positions * (encoder + decoder)


@torch.no_grad()
def test_every_length_and_size_comes_back(ablation, clip):
    for num_frames in (1, 6):
        video = clip(1, num_frames, 9, 15)
        encoding = ablation.encode(video)
        assert encoding.latent.shape[2:] == ablation.token_grid(num_frames, 9, 15)
        assert ablation.decode(encoding).shape == video.shape


@pytest.mark.parametrize("plan", [[1, 2, 3, 3], [1] * 9])
@torch.no_grad()
def test_streams_equal_the_whole_clip(ablation, clip, plan):
    video = clip(1, 9, 8, 8)
    whole = ablation(video)
    encoder, decoder = ablation.stream_encoder(), ablation.stream_decoder()
    latents = [out for chunk in video.split(plan, dim=2) for out in encoder.push(chunk)]
    latents += encoder.flush()
    frames = [out for latent in latents for out in decoder.push(latent)] + decoder.flush()
    for found, expected in (
        (torch.cat(latents, dim=2), whole.encoding.latent),
        (torch.cat(frames, dim=2), whole.reconstruction),
    ):
        assert (found - expected).abs().max() <= 1e-5 * (expected.max() - expected.min())


@torch.no_grad()
def test_networks_continue_after_chunks_of_any_length(ablation, clip):
    """Odd frames wait in the state of the layers that halve the frame rate."""
    video = clip(1, 8, 8, 8)
    whole, state, parts = ablation.encoder(video), None, []
    for chunk in video.split([1, 2, 2, 3], dim=2):
        part, state = ablation.encoder(chunk, state, True)
        parts.append(part)
    assert torch.allclose(torch.cat(parts, dim=2), whole, atol=1e-5 * float(whole.abs().max()))


@torch.no_grad()
def test_latents_do_not_look_ahead(ablation, clip):
    video, other = clip(1, 9, 8, 8), clip(1, 9, 8, 8, seed=1)
    other[:, :, :5] = video[:, :, :5]
    a, b = ablation.encode(video).latent, ablation.encode(other).latent
    assert torch.allclose(a[:, :, :2], b[:, :, :2], atol=1e-5)
    assert not torch.allclose(a[:, :, 2:], b[:, :, 2:], atol=1e-2)


def test_training_reaches_every_parameter(ablation, clip):
    out = ablation(clip(1, 5, 16, 16), sample=True)
    loss = out.reconstruction.square().mean() + 1e-3 * out.encoding.losses["kl_loss"]
    names, parameters = zip(*ablation.named_parameters(), strict=True)
    grads = torch.autograd.grad(loss, parameters)
    # A key bias shifts all logits of a query alike: softmax makes its gradient zero.
    still = [n for n, g in zip(names, grads, strict=True) if not g.abs().max() > 0]
    assert all("attn_1.k." in name for name in still), still


def test_saved_ablations_keep_their_architecture(ablation, tmp_path, clip):
    ablation.save_pretrained(tmp_path)
    loaded = vt.load_model(tmp_path)
    assert loaded.config == ablation.config and loaded.name == ablation.name
    video = clip(1, 5, 8, 8)
    with torch.no_grad():
        assert torch.equal(loaded(video).reconstruction, ablation(video).reconstruction)


@pytest.mark.parametrize(
    "fields", [{"version": "1.1"}, {"causal": False}, {"architecture": "full3d", "version": "1.1"}]
)
def test_ablations_are_causal_and_1_0(fields):
    with pytest.raises(ValueError, match="architecture must be one of 'vidtok', got 'full"):
        vt.create_model(KL, **{"architecture": "full_3d", **fields})
    with pytest.raises(ValueError, match=r"got 'full3d'; did you mean 'full_3d'\?"):
        vt.create_model(KL, architecture="full3d")
