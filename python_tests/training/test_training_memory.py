"""Prediction of a training step's memory: counts what autograd really saves."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import vtok_ext as vt
from vtok_ext.cli.max_batch import NUM_POINTS, measured_per_clip, training_step
from vtok_ext.models.memory_rehearsal import _LiveBytes
from vtok_ext.training.training_memory import (
    TrainingMemory,
    cuda_autocast_on_cpu,
    predict_training_memory,
    saved_bytes,
)

MODEL = "vidtok_kl_causal_488_4chn"
THIN = {"enc_embed_dim": 32, "enc_num_layers": 1, "enc_patch_num_layers": 1, "enc_num_heads": 2}
THIN |= {"dec_embed_dim": 32, "dec_num_layers": 2, "dec_num_heads": 2}


def squares(model, batch):
    return model(torch.zeros(batch, 8)).square().sum()


def test_a_network_counted_by_hand():
    """Two linear layers keep their inputs, the relu between them its result, which is the input of
    the second; the square keeps what it squares."""

    def build():
        return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))

    memory = predict_training_memory(build, squares)
    weights = (8 * 16 + 16 + 16 * 4 + 4) * 4
    assert memory.state == 4 * weights  # gradients and two moments
    assert memory.constant == 0
    assert memory.per_clip == (8 + 16 + 4) * 4


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["vidtok", "coordtok"])
def test_prediction_equals_what_a_real_step_saves(name, precision):
    def build():
        if name == "coordtok":
            return vt.create_model("coordtok_small_128", video_shape=(16, 32, 32), **THIN)
        return vt.create_model("vidtok_kl_causal_488_4chn", ch=16)

    _, step, _ = training_step("coordtok_small_128" if name == "coordtok" else MODEL, 8, 32)
    memory = predict_training_memory(build, step, precision=precision)
    model = build().train()
    for batch in (1, 2):
        with saved_bytes(model) as count, cuda_autocast_on_cpu(precision):
            loss = step(model, batch)
        assert count.total == memory.constant + batch * memory.per_clip
        del loss


def normed():
    return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4))


def float_squares(model, batch):
    x = torch.zeros(batch, 8, device=next(model.parameters()).device)
    return model(x).float().square().sum()


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_layer_norms_of_half_precision_save_float32(precision):
    """As CUDA's autocast has it: the clip, in half; what the norm gets, its mean and deviation in
    float32; its result, in half; and what is squared in float32."""
    memory = predict_training_memory(normed, float_squares, precision=precision)
    assert memory.per_clip == 8 * 2 + (16 + 2) * 4 + 16 * 2 + 4 * 4
    assert memory.constant == 16 * 4 * 2  # the second matrix in half


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_what_cuda_saves_is_what_is_predicted(precision):
    memory = predict_training_memory(normed, float_squares, precision=precision)
    model = normed().cuda()
    autocast = torch.autocast("cuda", getattr(torch, precision), enabled=precision != "float32")
    for batch in (1, 2):
        with saved_bytes(model) as count, autocast:
            loss = float_squares(model, batch)
        assert count.total == memory.constant + batch * memory.per_clip
        del loss


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["coordtok_small_128", "vtok_small"])
def test_measured_peaks_are_near_the_prediction(name):
    """The peak also has the tensors of the operations at work, which are no part of it."""
    build, step, _ = training_step(name, 64, 128)
    memory = predict_training_memory(build, step, precision="bfloat16")
    ratio = measured_per_clip(build, step, "bfloat16") / memory.per_clip
    assert 0.95 <= ratio <= 1.25


def test_frozen_weights_have_no_gradients():
    def build():
        model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
        model[0].requires_grad_(False)
        return model

    memory = predict_training_memory(build, squares)
    assert memory.state == ((8 * 16 + 16) + 4 * (16 * 4 + 4)) * 4


def test_coordtok_hardly_grows_with_the_clip():
    """Released widths: activations of 128 frames are at most 1.4 times those of 32."""
    build_step = {t: training_step("coordtok_large_128", t, 128) for t in (32, 128)}
    memory = {t: predict_training_memory(build, step) for t, (build, step, _) in build_step.items()}
    assert memory[128].per_clip <= 1.4 * memory[32].per_clip
    assert memory[128].largest_batch(24 * 2**30) >= 1


def test_coordtok_grows_less_with_a_recomputed_encoder():
    found = []
    for frames in (32, 128):
        build, step, _ = training_step("coordtok_large_128", frames, 128, recompute_encoder=True)
        found.append(predict_training_memory(build, step).per_clip)
    assert found[0] < found[1] <= 1.1 * found[0]


@pytest.mark.parametrize(("recompute_encoder", "limit"), [(False, 1.4), (True, 1.1)])
def test_peak_of_forward_and_backward_hardly_grows_with_the_clip(recompute_encoder, limit):
    """All tensors alive at once, also those that autograd does not save, beyond weights, their
    gradients and the clips."""
    found = []
    for frames in (32, 128):
        build, step, _ = training_step(
            "coordtok_large_128", frames, 128, recompute_encoder=recompute_encoder
        )
        found.append(peak_of_step(build, step))
    assert found[0] < found[1] <= limit * found[0]


class Live(_LiveBytes):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self._count(result, 0)
        return result


def peak_of_step(build, step) -> int:
    with FakeTensorMode():
        model = build().train()
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        known = [*model.parameters(), *(p.grad for p in model.parameters())]
        with Live(known) as live:
            step(model, 8).backward()
    return live.peak


def test_decoder_activations_do_not_depend_on_the_clip():
    def decode(model, batch):
        planes = {
            plane: torch.zeros(batch, *model.config.plane_shape(plane), requires_grad=True)
            for plane in ("xy", "yt", "xt")
        }
        points = torch.zeros(batch, NUM_POINTS, 3, dtype=torch.int64)
        return model.decode_points(planes, points).square().mean()

    found = []
    for frames in (32, 128):
        overrides = {"video_shape": (frames, 128, 128), **THIN}
        build = lambda o=overrides: vt.create_model("coordtok_large_128", **o)  # noqa: E731
        found.append(predict_training_memory(build, decode).per_clip)
    assert abs(found[1] - found[0]) <= 0.02 * found[0]


def test_largest_batch_fits_and_one_more_does_not():
    memory = TrainingMemory(state=100, constant=20, per_clip=7)
    assert memory.largest_batch(119) == 0
    assert memory.largest_batch(126) == 0
    assert memory.largest_batch(127) == 1
    batch = memory.largest_batch(1000)
    assert memory.total(batch) <= 1000 < memory.total(batch + 1)


def test_unknown_precision():
    with pytest.raises(ValueError, match="precision must be one of .*, got 'half'"):
        predict_training_memory(lambda: nn.Linear(8, 8), squares, precision="half")
