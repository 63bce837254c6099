"""A model learns four clips by heart, and its output is that of the clip that was put in."""

import pytest
import torch

import vtok_ext as vt
from vtok_ext.data.procedural import procedural_clip
from vtok_ext.models.failed_computation import FailedComputationError
from vtok_ext.training.overfit import center_latent, learn_by_heart, overfit_clip

SMALL = {"ch": 16, "ch_mult": (1, 1, 2, 4), "num_res_blocks": 1}


def clips(seeds, num_frames=5, size=32) -> torch.Tensor:
    """Returns [len(seeds), 3, T, size, size] in [-1, 1]."""
    return torch.stack(
        [procedural_clip(num_frames, size, size, seed=s, dtype=torch.float32) for s in seeds]
    )


def test_four_clips_at_once():
    """An encoder that ignores its input, or a decoder that gives one picture, fails by far."""
    torch.manual_seed(0)
    model = vt.create_model("vidtok_fsq_causal_488_262144", **SMALL)
    videos = clips(range(4))
    result = overfit_clip(model, videos, max_steps=150)
    assert result.steps == 150
    assert not model.training
    with torch.no_grad():
        outputs = model.detokenize(model.tokenize(videos))
    psnr = [
        [vt.metrics.psnr(outputs[a : a + 1], videos[b : b + 1]).item() for b in range(4)]
        for a in range(4)
    ]
    for a in range(4):
        for b in range(4):
            if a != b:
                assert psnr[a][a] >= psnr[a][b] + 6, (a, b, psnr)
    assert min(psnr[a][a] for a in range(4)) > 20


def test_same_seed_same_result():
    losses = []
    for _ in range(2):
        torch.manual_seed(1)
        model = vt.create_model("vidtok_fsq_causal_488_262144", **SMALL)
        losses.append(overfit_clip(model, clips([0]), max_steps=3).loss)
    assert losses[0] == losses[1]


def test_latent_is_centred():
    """Afterwards every raw latent channel has mean 0 and deviation 1, and more codes are in use."""
    torch.manual_seed(0)
    model = vt.create_model("vidtok_fsq_causal_488_262144", **SMALL)
    video = clips([0], num_frames=9, size=48)
    before = vt.metrics.codebook_usage(model.tokenize(video).ids, model.codebook_size)
    center_latent(model, video)
    after = vt.metrics.codebook_usage(model.tokenize(video).ids, model.codebook_size)
    assert after.num_used > before.num_used
    raw = []
    model.encoder.conv_out.conv.register_forward_hook(lambda *call: raw.append(call[2]))
    model.encode(video, compute_loss=False)
    deviation, mean = torch.std_mean(raw[0].transpose(0, 1).flatten(1), dim=1)
    torch.testing.assert_close(mean, torch.zeros(6), atol=1e-4, rtol=0)
    torch.testing.assert_close(deviation, torch.ones(6), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("limits", "steps"),
    [
        ({"max_steps": 2}, 2),
        ({"max_steps": 3, "max_seconds": 3600}, 3),
        ({"max_steps": None, "max_seconds": 1e-9}, 1),
        ({"max_steps": None, "max_seconds": 1e-9, "min_steps": 3}, 3),
    ],
)
def test_the_first_limit_ends_the_training(limits, steps):
    model = vt.create_model("vidtok_fsq_causal_488_262144", **SMALL)
    seen = []
    result = overfit_clip(model, clips([0], 1, 16), on_step=seen.append, **limits)
    assert result.steps == steps == len(seen)
    assert [state.step for state in seen] == list(range(1, steps + 1))
    assert seen[-1].fraction == 1
    assert all(a.fraction < b.fraction for a, b in zip(seen, seen[1:], strict=False))


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"max_steps": None}, "one of max_steps and max_seconds must be given"),
        ({"max_steps": 0}, "max_steps must be at least 1, got 0"),
        ({"max_seconds": 0.0}, "max_seconds must be positive, got 0.0"),
        ({"min_steps": 0}, "min_steps must be at least 1, got 0"),
    ],
)
def test_wrong_limits(limits, words):
    model = vt.create_model("vidtok_fsq_causal_488_262144", **SMALL)
    with pytest.raises(ValueError, match=words):
        overfit_clip(model, clips([0], 1, 16), **limits)


def test_a_video_the_model_does_not_take():
    model = vt.create_model("vidtok_fsq_causal_488_262144", **SMALL)
    with pytest.raises(ValueError, match="video must"):
        overfit_clip(model, torch.full((1, 3, 1, 16, 16), float("nan")), max_steps=1)


def test_a_loss_that_is_no_number_is_not_a_defect_of_the_code():
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    with pytest.raises(FailedComputationError, match="loss must be finite, got nan at step 1"):
        learn_by_heart(lambda step: (weight * float("nan")).sum(), [optimizer], max_steps=2)
