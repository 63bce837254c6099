"""diffusers' video autoencoders as they are and patched: encode and decode, time and memory.

Providers: diffusers (its contiguous layout), "diffusers, channels last" (weights and input in
channels_last_3d memory, what one can do without this package), native (`vt.patch_diffusers`).
Random weights. Small widths by default; VTOK_BENCH_REAL=1 takes the published ones, and
VTOK_BENCH_SIZE and VTOK_BENCH_FRAMES another clip. Peak memory is that above the state before the
call: of the allocator on a GPU, of the process on Linux. "Retained" are the caches that layers
still hold when encode or decode has returned.
"""

import copy
import os
import warnings
from pathlib import Path

import pytest
import torch
from bench_norm_act import reused_memory
from harness import QUICK, Case, measure

import vtok_ext as vt

diffusers = pytest.importorskip("diffusers")

REAL = os.environ.get("VTOK_BENCH_REAL") == "1"
RESULTS_NAME = "diffusers_real" if REAL else "diffusers"  # of the JSON file
SIZE = int(os.environ.get("VTOK_BENCH_SIZE", 16 if QUICK else 64))
FRAMES = int(os.environ.get("VTOK_BENCH_FRAMES", 9))
BUDGET_S = float(os.environ.get("VTOK_BENCH_BUDGET_S", 3.0))
_WAN_22 = {
    "is_residual": True,
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "scale_factor_spatial": 16,
    "z_dim": 48,
    "latents_mean": [0.0] * 48,
    "latents_std": [1.0] * 48,
}
# name: class, published arguments, what makes it small (a quarter of the width)
VAES = {
    "Wan 2.1": ("AutoencoderKLWan", {}, {"base_dim": 24}),
    "Wan 2.2": (
        "AutoencoderKLWan",
        {**_WAN_22, "base_dim": 160, "decoder_base_dim": 256},
        {"base_dim": 40, "decoder_base_dim": 64},
    ),
    "CogVideoX": ("AutoencoderKLCogVideoX", {}, {"block_out_channels": (32, 64, 64, 128)}),
    "HunyuanVideo": ("AutoencoderKLHunyuanVideo", {}, {"block_out_channels": (32, 64, 128, 128)}),
    "VidTok": ("AutoencoderVidTok", {}, {"ch": 32}),
}
if QUICK:
    VAES = {
        "Wan 2.1": ("AutoencoderKLWan", {}, {"base_dim": 8, "num_res_blocks": 1}),
        "VidTok": ("AutoencoderVidTok", {}, {"ch": 8, "num_res_blocks": 1}),
    }
NAMES = list(VAES)
NAMES = [n for n in NAMES if n in os.environ.get("VTOK_BENCH_VAES", ",".join(NAMES)).split(",")]


def make(name: str, device: str):
    kind, published, small = VAES[name]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        vae = getattr(diffusers, kind)(**{**published, **({} if REAL else small)})
    return vae.eval().to(device)


def resident_mb() -> tuple[float, float] | None:
    """(current, highest) resident memory of this process; None where the system does not say."""
    path = Path("/proc/self/status")
    if not path.exists():
        return None
    fields = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
    return tuple(int(fields[key].split()[0]) / 1024 for key in ("VmRSS", "VmHWM"))


def peak_mb(call, device: str) -> float | None:
    """Memory that `call` takes beyond what is there before it."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forgets the highest value
    except OSError:
        return None
    before = resident_mb()
    call()
    return None if before is None else resident_mb()[1] - before[0]


def retained_mb(vae) -> float:
    """Caches that layers of `vae` hold."""
    caches = [getattr(m, "causal_cache", None) for m in vae.modules()]
    caches += [*getattr(vae, "_feat_map", []), *getattr(vae, "_enc_feat_map", [])]
    return sum(c.numel() * c.element_size() for c in caches if torch.is_tensor(c)) / 2**20


def calls_of(vae, direction: str, clip: torch.Tensor, latent: torch.Tensor):
    """A call of `vae` that returns a tensor."""
    if direction == "encode":
        return lambda: vae.encode(clip).latent_dist.parameters
    if type(vae).__name__ == "AutoencoderVidTok":
        return lambda: vae.decode(latent)
    return lambda: vae.decode(latent).sample


@pytest.mark.parametrize("direction", ["encode", "decode"])
@pytest.mark.parametrize("name", NAMES)
def bench_diffusers(name, direction, device, record, benchmark):
    vae = make(name, device)
    frames = FRAMES + 3 if name == "VidTok" else FRAMES  # its encode wants whole groups of frames
    clip = torch.rand(1, 3, frames, SIZE, SIZE, device=device) * 2 - 1
    with torch.no_grad():
        latent = vae.encode(clip).latent_dist.mode()
        last = torch.channels_last_3d
        variants = {
            "diffusers": vae,
            "diffusers, channels last": in_channels_last(copy.deepcopy(vae)),
            "native": vt.patch_diffusers(copy.deepcopy(vae)),
        }
        inputs = {
            key: [t.contiguous(memory_format=last) if key != "diffusers" else t for t in pair]
            for key, pair in ((key, (clip, latent)) for key in variants)
        }
        calls = {key: calls_of(v, direction, *inputs[key]) for key, v in variants.items()}
        expected = calls["diffusers"]()
        for call in calls.values():
            assert (call() - expected).abs().max() <= 1e-4 * expected.abs().max()
        memory = {key: peak_mb(call, device) for key, call in calls.items()}
        retained = {key: retained_mb(v) for key, v in variants.items()}
        width = "published width" if REAL else "1/4 width"
        shape = f"{name}, {width}, {FRAMES}x{SIZE}x{SIZE}"
        case = Case(name, shape, "float32", direction, 4 * (clip.numel() + latent.numel()))
        effort = {"budget_s": BUDGET_S, "least_rounds": 2 if REAL else 3}
        with reused_memory():
            tuned = {(key, "preallocated"): call for key, call in calls.items()}
            if not REAL:
                measure(case, tuned, device, **effort)
        case.measurements = case.measurements[1:]  # the copy, which is measured again
        measure(case, {(key, "default"): call for key, call in calls.items()}, device, **effort)
        for m in case.measurements:
            m.peak_mb, m.retained_mb = memory.get(m.provider), retained.get(m.provider)
        record(case)
        benchmark.pedantic(calls["native"], rounds=1)


def in_channels_last(vae):
    """`vae` with the weights of its convolutions in channels_last memory."""
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv3d):
            module.to(memory_format=torch.channels_last_3d)
        elif isinstance(module, torch.nn.Conv2d):
            module.to(memory_format=torch.channels_last)
    return vae
