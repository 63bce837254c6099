"""The model in other hands: torch.export, several processes, half precision, adapters and hooks."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import import_or_skip, needs_one_graph, needs_torch

needs_fsdp = needs_torch((2, 6), "the first with torch.distributed.fsdp.fully_shard")
SHALLOW = {"ch_mult": (1, 2)}
# Regrouped sums, on values of order 3.
TOLERANCE = {"rtol": 1e-5, "atol": 3e-5}


class EncodeStep(torch.nn.Module):
    """The next f frames of a stream: (frames, state) -> (latent, state)."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, frames, state):
        raw, state = self.model.encode_chunk(frames, state, return_state=True)
        return self.model.regularize(raw)[0], state


class DecodeStep(torch.nn.Module):
    """The next latent of a stream: (latent, state) -> (frames, state)."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, latent, state):
        return self.model.decode_chunk(latent, state, return_state=True)


@needs_one_graph
@pytest.mark.parametrize(
    ("name", "direction"),
    [("vidtok_fsq_causal_488_262144", "encode"), ("vidtok_kl_causal_488_4chn_v1_1", "decode")],
)
@torch.no_grad()
def test_chunk_step_exports(build, clip, name, direction, tmp_path):
    """Exported, saved and loaded, a stream of fixed chunks goes on as the model does."""
    model = build(name, **SHALLOW).requires_grad_(False)
    f, s = model.temporal_factor, model.spatial_factor
    if direction == "encode":
        step, start = EncodeStep(model), model.encode_chunk
        first, *chunks = clip(1, 1 + 4 * f, 16, 16).split([1, *[f] * 4], dim=2)
    else:
        step, start = DecodeStep(model), model.decode_chunk
        generator = torch.Generator().manual_seed(1)
        shape = (1, model.latent_channels, 7, 16 // s, 16 // s)
        first, *chunks = torch.randn(shape, generator=generator).split([3, *[1] * 4], dim=2)
    _, state = start(first, None, True)
    _, state = step(chunks[0], state)  # the shapes of the state settle
    program = torch.export.export(step, (chunks[1], state))
    torch.export.save(program, tmp_path / "step.pt2")
    exported = torch.export.load(tmp_path / "step.pt2").module()
    mine, theirs = state, state
    for chunk in chunks[1:]:
        expected, mine = step(chunk, mine)
        found, theirs = exported(chunk, theirs)
        assert torch.allclose(found, expected, **TOLERANCE)
    assert all(torch.allclose(theirs[n], mine[n], **TOLERANCE) for n in mine)


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=needs_fsdp)])
def test_two_processes_share_gradients_and_parameters(parallel):
    """DDP or FSDP2 over gloo: the gradients of one process with both clips."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(__file__).with_name("two_ranks.py")
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), parallel],
            env={**os.environ, **variables, "RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        out, err = process.communicate(timeout=200)
        assert process.returncode == 0, err
        report = json.loads(out)
        assert report["difference"] < 1e-4, report
        if parallel == "fsdp":
            assert 0.4 < report["share"] < 0.6 and report["learns"], report


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 1e3])
@torch.no_grad()
def test_autocast_keeps_its_dtype_and_stays_finite(build, clip, dtype, scale):
    model, video = build("vidtok_kl_causal_488_4chn_v1_1"), scale * clip(1, 5, 16, 16)
    exact = model.encode_chunk(video)
    with torch.autocast("cpu", dtype):
        raw = model.encode_chunk(video)
        out = model(video)
    assert raw.dtype == dtype
    assert out.reconstruction.isfinite().all() and out.encoding.losses["kl_loss"].isfinite()
    assert (raw.float() - exact).abs().mean() < 0.05 * exact.abs().mean()


@pytest.mark.parametrize("name", ["vidtok_kl_causal_488_4chn", "vidtok_fsq_causal_488_262144"])
@torch.no_grad()
def test_bfloat16_weights_stay_finite_at_large_activations(build, clip, name):
    model = build(name).to(torch.bfloat16)
    out = model(1e4 * clip(1, 5, 16, 16))
    assert out.reconstruction.dtype == torch.bfloat16 and out.reconstruction.isfinite().all()
    latent = model.encode(clip(1, 9, 16, 16)).latent
    stream = model.stream_decoder()
    frames = [y for z in latent.split(1, dim=2) for y in stream.push(z)] + stream.flush()
    assert torch.cat(frames, dim=2).isfinite().all()


@torch.no_grad()
def test_hooks_of_every_child_take_part(build, clip):
    """What a hook returns replaces what the child returned, for every convolution and norm."""
    model, video = build("vidtok_kl_causal_488_4chn_v1_1", **SHALLOW), clip(1, 5, 16, 16)
    before = model(video).reconstruction
    kinds = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d, torch.nn.LayerNorm)
    children = {name: m for name, m in model.named_modules() if isinstance(m, kinds)}
    assert len(children) > 50
    called = []
    for name, child in children.items():
        child.register_forward_hook(lambda m, args, y, name=name: called.append(name) or y * 1.0)
    assert torch.allclose(model(video).reconstruction, before, **TOLERANCE)
    assert set(called) == set(children)
    handle = children["decoder.up.0.block.0.conv2"].register_forward_hook(lambda m, a, y: 0 * y)
    assert not torch.allclose(model(video).reconstruction, before, atol=1e-2)
    handle.remove()


def test_lora_on_convolutions(build, clip):
    """peft's adapters on convolutions of volumes and of frames act, learn, stream and merge."""
    peft = import_or_skip("peft")
    model, video = build("vidtok_kl_causal_488_4chn_v1_1", **SHALLOW), clip(1, 5, 16, 16)
    with torch.no_grad():
        before = model(video).reconstruction
    targets = [
        name
        for name, child in model.named_modules()
        if (isinstance(child, torch.nn.Conv3d) and ".mid.block" in name)
        or (isinstance(child, torch.nn.Conv2d) and name.endswith("block.0.conv2"))
    ]
    assert len(targets) > 5
    config = peft.LoraConfig(r=2, target_modules=targets, lora_alpha=8)
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        assert torch.allclose(adapted(video).reconstruction, before, **TOLERANCE)  # B is zero
    adapted(video).reconstruction.square().mean().backward()
    trained = [p for n, p in adapted.named_parameters() if "lora_B" in n]
    assert len(trained) == len(targets) and all(p.grad.abs().sum() > 0 for p in trained)
    with torch.no_grad():
        for p in trained:
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
        base = adapted.get_base_model()
        whole = base(video).reconstruction
        assert not torch.allclose(whole, before, atol=1e-2)
        encoder, decoder = base.stream_encoder(), base.stream_decoder()
        latents = [z for c in video.split(2, dim=2) for z in encoder.push(c)] + encoder.flush()
        frames = [y for z in latents for y in decoder.push(z)] + decoder.flush(5)
        assert torch.allclose(torch.cat(frames, dim=2), whole, **TOLERANCE)
        tiled = base.tiled((8, 12))(video).reconstruction
        assert torch.allclose(tiled, whole, **TOLERANCE)
        merged = adapted.merge_and_unload()
        assert torch.allclose(merged(video).reconstruction, whole, **TOLERANCE)
