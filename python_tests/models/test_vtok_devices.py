"""VTok and its unified model where parameters and videos are not on the CPU."""

import pytest
import torch
from helpers import import_or_skip
from other_device import Elsewhere, OtherDevice, moved
from tiny_vtok import tiny, tiny_fsq, tiny_lm

from vtok_ext.models.vision_encoder import SmallViT
from vtok_ext.models.vision_mae import MaskedAutoencoder
from vtok_ext.models.vtok_heads import CodeHead, normal_rows
from vtok_ext.models.vtok_sequence import GENERATION, UNDERSTANDING, Turn
from vtok_ext.models.vtok_streaming import encode_portions

BUILDS = [tiny, tiny_fsq]
ASK = Turn(UNDERSTANDING, "what colour is the circle", "red")
MAKE = Turn(GENERATION, "a red circle moves left")


def generators(count):
    return [torch.Generator().manual_seed(number) for number in range(count)]


def test_the_other_device_refuses_tensors_of_the_cpu():
    with OtherDevice():
        there = Elsewhere(torch.ones(2))
        assert (there + 1).device == there.device and (there + torch.ones(())).tolist() == [2, 2]
        with pytest.raises(RuntimeError, match="tensors must be on one device"):
            there + torch.ones(2)
        assert torch.equal(
            (there + torch.ones(2, device=there.device)).cpu(), torch.full((2,), 2.0)
        )


def answers_of_vtok(model, video):
    """Everything that a VTok does, as tensors on the CPU."""
    with torch.no_grad():
        encoding = model.encode(video, key_frame="auto", cut_threshold=0.1)
        plain = model.encode(video)
        found = [encoding.latent, encoding.positions, model.decode(encoding)]
        found.append(model.decode(plain.latent))
        found += model.stream_encoder().push(video)
        found.append(encode_portions(model, [video[:1]]).latent)
        if model.is_discrete:
            found.append(model.detokenize(model.tokenize(video)))
    model.train()
    output = model(video, generator=generators(2))
    sum(output.encoding.losses[name] for name in ("flow_loss", "aux_loss") if name in
        output.encoding.losses).backward()  # fmt: skip
    found.append(output.reconstruction.detach())
    found += [p.grad for p in model.parameters() if p.requires_grad]
    return [value.cpu() for value in found]


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("pool", ["grid", "attention"])
def test_vtok_elsewhere(clip, build, pool):
    """The decoder met waves of its tokens' frames that were made on the CPU."""
    video = clip(2, 9, 16, 16)
    expected = answers_of_vtok(build(residual_pool=pool, stride=2), video)
    with OtherDevice():
        model = moved(build(residual_pool=pool, stride=2))
        found = answers_of_vtok(model, Elsewhere(video))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def answers_of_lm(model, video):
    """Everything that a VTokLM does, as tensors on the CPU and texts."""
    model.fit_statistics([video])
    texts = model.answer(video, ["what colour is the circle", "how many"], max_tokens=3)
    found = [model.generate(["a red circle"], num_frames=5, temperature=0.5)]
    gap = model.decoder_gap(video, ["a red circle", "a cross"])
    model.train()
    for turns in ([ASK, MAKE], [ASK, ASK], [MAKE, MAKE]):
        losses = model(video, turns, generators=generators(2))
        losses["loss"].backward()
        found += [loss.detach() for loss in losses.values()]
    found += [p.grad for p in model.parameters() if p.requires_grad]
    return texts, gap, [value.cpu() for value in found]


@pytest.mark.parametrize("build", BUILDS)
def test_unified_model_elsewhere(clip, build):
    import_or_skip("transformers")
    video = clip(2, 5, 16, 16)
    expected = answers_of_lm(tiny_lm(build(stride=2), predicted_steps=0), video)
    with OtherDevice():
        model = moved(tiny_lm(build(stride=2), predicted_steps=0))
        found = answers_of_lm(model, Elsewhere(video))
    assert found[0] == expected[0] and found[1] == pytest.approx(expected[1], rel=1e-3)
    for ours, theirs in zip(found[2], expected[2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_masked_autoencoder_elsewhere():
    images = torch.rand(2, 3, 16, 16, generator=generators(1)[0])
    losses = []
    for move, context in ((lambda x: x, torch.enable_grad()), (None, OtherDevice())):
        torch.manual_seed(0)
        model = MaskedAutoencoder(SmallViT(16, 4, 16, 1, 2), dim=16, depth=1, heads=2)
        with context:
            model, batch = (model, images) if move else (moved(model), Elsewhere(images))
            loss = model(batch, generators(1)[0])
            loss.backward()
            losses.append(loss.detach().cpu())
    torch.testing.assert_close(*losses)


@pytest.mark.cuda
@pytest.mark.parametrize("build", BUILDS)
def test_vtok_on_a_gpu(clip, build):
    video = clip(2, 9, 16, 16)
    expected = answers_of_vtok(build(residual_pool="attention", stride=2), video)
    model = build(residual_pool="attention", stride=2).cuda()
    found = answers_of_vtok(model, video.cuda())
    assert all(value.isfinite().all() for value in found)
    if not model.is_discrete:  # else one rounded number may be another
        # Sums in another order, and products in TF32 where torch is told so.
        torch.testing.assert_close(found[0], expected[0], rtol=1e-2, atol=1e-3)
        torch.testing.assert_close(found[2], expected[2], rtol=1e-2, atol=1e-2)


@pytest.mark.cuda
@pytest.mark.parametrize("build", BUILDS)
def test_unified_model_on_a_gpu(clip, build):
    """One step of an optimiser, answers, videos and the gap."""
    import_or_skip("transformers")
    model = tiny_lm(build(stride=2), predicted_steps=0).cuda()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    texts, gap, found = answers_of_lm(model, clip(2, 5, 16, 16).cuda())
    assert len(texts) == 2 and all(value.isfinite().all() for value in found)
    assert set(gap) == {"true", "teacher_forced", "free_running"}
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3).step()
    for name, parameter in model.named_parameters():
        has_gradient = parameter.grad is not None and bool(parameter.grad.any())
        assert not (has_gradient and torch.equal(parameter, before[name])), name
    assert len(model.eval().answer(clip(1, 5, 16, 16).cuda(), ["how many"])) == 1


@pytest.mark.cuda
def test_generators_of_a_gpu():
    source = torch.Generator("cuda").manual_seed(0)
    like = torch.zeros(1, device="cuda")
    assert normal_rows([1, 2], 3, like, source).shape == (3, 3)
    assert normal_rows([1, 2], 3, like, [source, source]).device == like.device
    head = CodeHead(4, torch.rand(5, 2)).cuda()
    assert head.choose(torch.zeros(3, 4, device="cuda"), 1.0, source).shape == (3,)
