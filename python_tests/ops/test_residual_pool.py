"""residual_pool: gradients by finite differences, streams, what it allocates, and errors."""

import pytest
import torch
from case_residual_pool import RESIDUAL_POOL

import vtok_ext as vt
from vtok_ext.ops import residual_pool as op
from vtok_ext.ops.residual_pool import residual_pool_reference


def inputs(sample=0, dtype=torch.float32, device="cpu"):
    return RESIDUAL_POOL.inputs(RESIDUAL_POOL.samples[sample], dtype, device)


def test_gradcheck():
    tensors = [t.requires_grad_() for t in inputs(2, torch.float64).values()]
    assert torch.autograd.gradcheck(vt.residual_pool, tensors)


def test_frames_one_by_one_give_the_same_bits(backend):
    """A stream encodes one frame at a time."""
    tensors = inputs(0, device=backend.device)
    whole = vt.residual_pool(**tensors)
    frames = tensors.pop("frames")
    single = [vt.residual_pool(frames[:, t : t + 1], **tensors) for t in range(frames.shape[1])]
    assert torch.equal(torch.cat(single, 1), whole)


def test_a_still_clip_gives_one_token_whatever_the_picture(backend):
    """Frames equal to the key leave only the positions."""
    tensors = inputs(0, device=backend.device)
    tensors["frames"] = tensors["key"][:, None].expand_as(tensors["frames"])
    tokens = vt.residual_pool(**tensors)
    assert torch.equal(tokens, tokens[:1, :1].expand_as(tokens))


def test_large_scores_stay_finite(backend):
    """The softmax is shifted by its largest score, also between pieces of a frame."""
    tensors = inputs(1, device=backend.device)
    tensors["query"] = tensors["query"] * 1e4
    tokens = vt.residual_pool(**tensors)
    expected = residual_pool_reference(**tensors)
    assert tokens.isfinite().all()
    assert (tokens - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_frozen_features_get_no_gradient_and_no_memory(monkeypatch):
    """The encoder is frozen as a rule: its gradients are neither allocated nor computed."""
    tensors = inputs()
    needed_seen = []
    original = op._empty_gradients

    def spy(*arguments):
        gradients = original(*arguments)
        needed_seen.append([g.numel() > 0 for g in gradients])
        return gradients

    monkeypatch.setattr(op, "_empty_gradients", spy)
    for name in ("position", "query", "weight", "bias"):
        tensors[name].requires_grad_()
    vt.residual_pool(**tensors).sum().backward()
    assert needed_seen == [[False, False, True, True, True, True]]
    assert tensors["frames"].grad is None and tensors["query"].grad is not None


def test_nothing_of_the_size_of_the_frames_is_allocated():
    """The reference stores the difference, the native op does not."""
    tensors = inputs()
    size = tensors["frames"].numel() * 4

    def largest_allocation(function):
        with (
            torch.no_grad(),
            torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
            ) as profile,
        ):
            function(**tensors)
        return max(event.cpu_memory_usage for event in profile.events())

    assert largest_allocation(residual_pool_reference) >= size
    assert largest_allocation(vt.residual_pool) < size / 4


def test_half_parameters_do_not_lower_the_precision():
    tensors = inputs(0, torch.bfloat16)
    exact = {n: t if n in ("frames", "key") else t.float() for n, t in tensors.items()}
    assert torch.equal(vt.residual_pool(**tensors), vt.residual_pool(**exact))


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"key": (2, 63, 96)}, ValueError, r"residual_pool: key must be \[2, 64, 96\]"),
        ({"frames": (2, 3, 0, 96)}, ValueError, r"frames must be \[B, T, N, C\] with N, C >= 1"),
        ({"frames": (3, 64, 96)}, ValueError, r"frames must be \[B, T, N, C\]"),
        ({"query": (17, 96)}, ValueError, r"query must be \[Q, 96\] with Q in 1..16"),
        ({"query": (96,)}, ValueError, r"query must be \[Q, 96\]"),
        ({"weight": (48, 96)}, ValueError, r"weight must be \[48, 192\]"),
        ({"bias": (47,)}, ValueError, r"bias must be \[48\]"),
        ({"position": (64, 95)}, ValueError, r"position must be \[64, 96\]"),
    ],
)
def test_errors(changes, error, message):
    tensors = {**inputs(), **{name: torch.zeros(shape) for name, shape in changes.items()}}
    for function in (vt.residual_pool, residual_pool_reference):
        with pytest.raises(error, match=message):
            function(**tensors)


def test_wrong_dtypes_are_named():
    tensors = inputs()
    with pytest.raises(TypeError, match="key must be torch.float32 as frames, got torch.float64"):
        vt.residual_pool(**{**tensors, "key": tensors["key"].double()})
    with pytest.raises(TypeError, match="query must be float32, float16 or bfloat16 or float64"):
        vt.residual_pool(**{**tensors, "query": tensors["query"].int()})
    with pytest.raises(TypeError, match="bias must be a torch.Tensor"):
        vt.residual_pool(**{**tensors, "bias": [0.0]})
