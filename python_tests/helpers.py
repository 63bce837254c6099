"""What several test files share: the tolerance table, the comparison against a reference, and what
a call allocates, what a test needs of torch and of other libraries, the hashes of a folder."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import pytest
import torch

from vtok_ext.data.file_hash import sha256_of
from vtok_ext.models._optional import require

RELEASE = tuple(int(part) for part in torch.__version__.split(".")[:2])


def needs_torch(release: tuple[int, int], reason: str) -> pytest.MarkDecorator:
    """Skips a test with an older torch than `release`, such as (2, 6), because of `reason`."""
    major, minor = release
    return pytest.mark.skipif(RELEASE < release, reason=f"needs torch {major}.{minor}: {reason}")


# See README.md, Install. Older versions break the graph at the first of our ops.
needs_one_graph = needs_torch((2, 6), "torch.compile traces setup_context from then on")


def digests(folder: Path) -> dict[str, str]:
    """Returns the hash of every file below a folder, hidden ones too, by its place in it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in files}


def import_or_skip(name: str) -> ModuleType:
    """Returns transformers, peft or diffusers; skips without it, or with one not for this torch."""
    try:
        return require("tests", name)
    except ImportError as error:
        pytest.skip(str(error), allow_module_level=True)


def write_video(path, num_frames: int, height: int = 32, width: int = 48) -> None:
    """Writes a procedural clip, another one for each length, at 30 frames per second."""
    # Here, since tests of ops run where there is no PyAV.
    from vtok_ext.data.procedural import procedural_clip
    from vtok_ext.data.video import VideoWriter

    frames = procedural_clip(num_frames, height, width, seed=num_frames)
    with VideoWriter(path, height=height, width=width, time_base=Fraction(1, 30)) as writer:
        writer.write(frames, list(range(num_frames)))


def start_torchrun(*arguments, **variables: str) -> subprocess.Popen:
    """Returns a started torchrun of two processes of one thread, which meet at a free port.

    Args:
        arguments: what comes after the options of that.
        variables: of the environment, beside those of this process.
    """
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [sys.executable, *command, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def torchrun(*arguments, **variables: str) -> subprocess.CompletedProcess:
    """Returns what has become of `start_torchrun`."""
    process = start_torchrun(*arguments, **variables)
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


# Largest |difference| relative to the largest |reference value|, and why it is that large.
TOLERANCES = {
    torch.float64: 1e-12,  # a few roundings of 1e-16 in sums of up to thousands of terms
    torch.float32: 2e-6,  # tanh differs by 3 ulp (1.8e-7) from torch's, times a few roundings
    torch.float16: 1e-3,  # one rounding to 11 bits (4.9e-4) on either side
    torch.bfloat16: 8e-3,  # one rounding to 8 bits (3.9e-3) on either side
}


def assert_close(actual: torch.Tensor, expected: torch.Tensor, what: str, factor: float = 1.0):
    """Fails unless shapes, dtypes and values agree within `factor` times the table's tolerance."""
    assert actual.shape == expected.shape, f"{what}: {list(actual.shape)} != {list(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype} != {expected.dtype}"
    if actual.numel() == 0:
        return
    tolerance = factor * TOLERANCES[expected.dtype]
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    assert torch.equal(actual.isnan(), expected.isnan()), f"{what}: NaN in different places"
    difference = (actual - expected).nan_to_num().abs().max().item()
    scale = expected.nan_to_num().abs().max().item()
    assert difference <= tolerance * scale, (
        f"{what}: {difference:.3g} > {tolerance:.3g} * {scale:.3g}"
    )


def in_float64(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` for a reference in float64: on the CPU, since ops refuse float64 on a GPU; gradients
    go back to where `tensor` is."""
    return tensor.cpu().double()


def peak_bytes(call, path):
    """Most bytes that torch's allocator holds at once beyond those before the call.

    The profiler records every allocation and release of that allocator, also those inside compiled
    ops; buffers that a BLAS library takes for itself are not among them.
    """
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    profile.export_chrome_trace(str(path))
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e["name"] == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        live += event["args"]["Bytes"]
        peak = max(peak, live)
    return peak


@dataclass
class Strided:
    """How a test tensor lies in memory: a slice of a larger buffer, with permuted dimensions."""

    name: str

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.name == "contiguous" or tensor.dim() == 0:
            return tensor
        if self.name == "permuted":
            return tensor.movedim(0, -1).contiguous().movedim(-1, 0)
        if self.name == "slice":
            outside = torch.nan if tensor.is_floating_point() else -1
            larger = torch.full([size + 3 for size in tensor.shape], outside, dtype=tensor.dtype)
            inner = larger.to(tensor.device)[tuple(slice(1, size + 1) for size in tensor.shape)]
            return inner.copy_(tensor)
        if self.name == "offset":  # starts one element into its buffer: vector loads are misaligned
            flat = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
            return flat[1:].view(tensor.shape).copy_(tensor)
        raise ValueError(self.name)


STRIDES = [Strided(name) for name in ("contiguous", "permuted", "slice", "offset")]
