"""The planner: what it predicts is what is measured, and what it plans fits."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers import peak_bytes
from torch._subclasses.fake_tensor import FakeTensorMode

import vtok_ext as vt
from vtok_ext import _native
from vtok_ext.layers import _frame_pass
from vtok_ext.models.memory_rehearsal import free_bytes, predicted_bytes
from vtok_ext.models.planning import MemoryPlan, plan_stream, predict_stream
from vtok_ext.ops import _causal_conv3d_cuda

SCRIPT = Path(__file__).with_name("measured_peak.py")
# Large pictures, few channels: hundreds of MB of activations in a second or two.
WIDE = {"ch": 8, "ch_mult": (1, 2), "num_res_blocks": 1}
NAME = "vidtok_kl_causal_488_4chn"


def peaks(name, overrides, direction, shape, tile):
    """Returns (predicted, measured) bytes of a process of its own."""
    arguments = [name, json.dumps(overrides), direction, json.dumps(shape), json.dumps(tile)]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    return found["predicted"], found["measured"]


linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs /proc")


@linux
@pytest.mark.parametrize(("direction", "tile"), [("encode", None), ("decode", [160, 160])])
def test_prediction_is_within_15_percent(direction, tile):
    predicted, measured = peaks(NAME, WIDE, direction, (1, 4, 512, 512), tile)
    assert measured > 2**25
    assert predicted == pytest.approx(measured, rel=0.15)


@linux
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "direction", "tile"),
    [
        (NAME, "encode", None),
        (NAME, "decode", None),
        (NAME, "encode", [128, 128]),
        (NAME, "decode", [128, 128]),
        (f"{NAME}_v1_1", "reconstruct", None),
    ],
)
def test_prediction_for_realistic_widths(name, direction, tile):
    predicted, measured = peaks(name, {"ch": 64}, direction, (1, 4, 256, 256), tile)
    assert predicted == pytest.approx(measured, rel=0.15)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return vt.create_model(NAME, **WIDE).eval()


def test_rehearsal_counts_what_is_alive(model):
    def run():
        a = torch.zeros(1000)
        b = a + 1
        del a
        return b.view(10, 100) * 2  # a view costs nothing; a is gone

    assert predicted_bytes(model, run) == 8000
    assert predicted_bytes(model, lambda: [p * 1 for p in model.parameters()]) == sum(
        p.nbytes for p in model.parameters()
    )


@torch.no_grad()
def test_rehearsal_leaves_other_threads_alone(build, clip):
    model, video = build(NAME, ch_mult=(1, 2)), clip(1, 5, 16, 16)
    expected, found = model.encode_chunk(video), []

    @torch.no_grad()
    def in_other_thread():
        found.append(model.encode_chunk(video))
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            found.append(_frame_pass.takes(fake.from_tensor(video)))

    def run():
        with ThreadPoolExecutor() as other:
            other.submit(in_other_thread).result()
        model.encode_chunk(torch.zeros(video.shape))

    alone = predicted_bytes(model, lambda: model.encode_chunk(torch.zeros(video.shape)))
    assert predicted_bytes(model, run) == alone
    assert torch.equal(found[0], expected) and not found[1]


def test_encoding_keeps_no_level_of_a_clip_for_long(build, monkeypatch):
    """In chunks of one frame, what a longer clip adds is the video, the copy behind its front, and
    the halved first level: 3 + 3 + 8 / 4 channels; further levels take less in their turn."""
    monkeypatch.setattr(_frame_pass, "CHUNK_BYTES", 1)
    model = build(NAME)
    short, long = (
        predicted_bytes(model, lambda t=t: model.encoder(torch.zeros(1, 3, t, 64, 64)))
        for t in (16, 32)
    )
    assert long - short <= 8 * 16 * 4 * 64 * 64


def test_plans_keep_to_the_memory(model):
    size = {"height": 160, "width": 192}
    f = model.temporal_factor
    whole = predict_stream(model, "decode", (1, f, 160, 192), None)
    ample = plan_stream(model, "decode", memory=10 * whole, **size)
    assert ample.tile is None and ample.chunk_frames == 16 and ample.predicted_bytes <= 10 * whole
    assert ample.view(model) is model
    just = plan_stream(model, "decode", memory=whole, **size)
    assert just == MemoryPlan(f, None, whole)
    scarce = plan_stream(model, "decode", memory=int(0.9 * whole), **size)
    assert scarce.tile is not None and scarce.predicted_bytes <= 0.9 * whole
    assert scarce.predicted_bytes == predict_stream(
        model, "decode", (1, scarce.chunk_frames, 160, 192), scarce.tile
    )
    with pytest.raises(ValueError, match=r"plan: memory must be at least [\d,]+ bytes to decode"):
        plan_stream(model, "decode", memory=2**20, **size)


@torch.no_grad()
def test_automatic_tiles_keep_to_the_memory(model):
    latent = model.encode(torch.zeros(1, 3, 1, 160, 192)).latent
    shape = (1, *latent.shape[2:])
    need = predicted_bytes(model, lambda: model.decoder(torch.zeros(latent.shape)))
    view = model.tiled("auto", memory=int(0.9 * need))
    assert torch.allclose(view.decode(latent), model.decode(latent), atol=1e-5)
    assert view.decoder.choose_tile(shape)[0] < 160
    ample = model.tiled("auto", memory=2 * need)
    assert ample.decoder.choose_tile(shape) == (160, 192)


@torch.no_grad()
def test_automatic_tiles_keep_to_the_memory_of_longer_clips(model):
    one, four = (torch.zeros(1, 4, t, 40, 48) for t in (1, 4))
    need = predicted_bytes(model, lambda: model.decoder(torch.zeros(one.shape)))
    view = model.tiled("auto", memory=int(1.1 * need))
    height = 40 * model.spatial_factor
    assert view.decoder.choose_tile((1, *one.shape[2:]))[0] == height
    tile = view.decoder.choose_tile((1, *four.shape[2:]))
    assert tile[0] < height
    tiled = model.tiled(tile)
    assert predicted_bytes(model, lambda: tiled.decoder(torch.zeros(four.shape))) <= 1.1 * need
    chunk = 16 // model.temporal_factor
    for latent in (one, four):  # whatever a stream begins with
        _, state = view.decode_chunk(latent, None, True)
        planned = view.decoder.choose_tile((1, max(chunk, latent.shape[2]), 40, 48))
        assert tuple(state["tile"].shape[1:3]) == planned
    with pytest.raises(ValueError, match="tiled: memory must be at least"):
        model.tiled("auto", memory=2**10).stream_decoder().push(one)


def test_clips_of_models_without_causality(build):
    model = build("vidtok_kl_noncausal_488_4chn", ch_mult=(1, 2, 2))
    size = {"height": 64, "width": 64}
    with pytest.raises(ValueError, match="num_frames must be given for vidtok_kl_noncausal"):
        plan_stream(model, "encode", **size)
    plan = plan_stream(model, "reconstruct", num_frames=8, memory=2**30, **size)
    assert (plan.chunk_frames, plan.tile) == (8, None)
    with pytest.raises(ValueError, match="direction must be one of"):
        plan_stream(model, "train", num_frames=8, **size)


def test_free_memory_is_something():
    assert 2**20 < free_bytes(torch.device("cpu")) < 2**50


@torch.no_grad()
def test_prediction_for_kernels_of_cuda(emulated_module, monkeypatch, tmp_path):
    """Exact: copies of weights and partial sums are those that the emulated kernels are given."""
    model = vt.create_model(NAME, **{**WIDE, "ch_mult": (1, 1)}).eval()
    latent_size = model.token_grid(1, 16, 16)
    monkeypatch.setattr(_causal_conv3d_cuda, "forced_splits", 3)

    def push_three():
        stream = model.stream_decoder(output="uint8")
        for _ in range(3):
            stream.push(torch.zeros(1, 4, *latent_size))

    with _native.use_module(emulated_module):
        predicted = predict_stream(model, "decode", (1, model.temporal_factor, 16, 16), None)
        assert predicted == peak_bytes(push_three, tmp_path / "trace.json")
    monkeypatch.setattr(_causal_conv3d_cuda, "forced_splits", None)
    layer, x = vt.CausalConv3d(8, 8, 3), torch.zeros(1, 8, 3, 4, 4)
    monkeypatch.setattr(_causal_conv3d_cuda, "_gemm_plan", lambda *_: (0, 5))
    with _native.use_module(emulated_module):
        # x and the weights in the order of the kernels, the result and its partial sums
        expected = (1 + 1 + 5) * x.nbytes + layer.conv.weight.nbytes
        assert predicted_bytes(layer, lambda: layer(x)) == expected


@pytest.mark.cuda
def test_prediction_on_a_gpu(model):
    """The stream's state is part of the prediction, so that what is there before is the model and
    what libraries keep after a first stream."""
    model = vt.create_model(NAME, ch=64).eval().cuda()
    latent = torch.zeros(1, 4, 2, 32, 32, device="cuda")
    model.stream_decoder(output="uint8").push(latent)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    stream = model.stream_decoder(output="uint8")
    for _ in range(3):
        stream.push(latent)
    measured = torch.cuda.max_memory_allocated() - before
    predicted = predict_stream(model, "decode", (1, 8, 256, 256), None)
    assert predicted == pytest.approx(measured, rel=0.15)
