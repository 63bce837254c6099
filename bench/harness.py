"""Times providers side by side in one run and writes what it measured as JSON.

Providers of a case take turns, round by round, so that drift of the machine hits all of them alike;
results are medians with the 20th and 80th percentile. On a GPU every call starts with a cold L2
cache, and times are the GPU's: a wait in front of each call lets Python queue all of it. Each case
checks in the same run that providers agree.
"""

import json
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch

import vtok_ext as vt

RESULTS = Path(__file__).parent / "results"
QUICK = os.environ.get("VTOK_BENCH_QUICK") == "1"  # smoke run: few rounds, nothing saved
_L2_FLUSH_BYTES = 256 << 20  # larger than any L2 (H200: 50 MB)
_QUEUE_CYCLES = 2_000_000  # that a GPU waits while Python queues a call: about 1 ms
# Without, torch.compile does nothing and its providers are left out: compilation takes minutes.
COMPILED = os.environ.get("VTOK_BENCH_COMPILED", "1") == "1"


@dataclass
class Measurement:
    """One provider of one case. Times in milliseconds."""

    provider: str
    allocation: str  # "preallocated" outputs or the "default" allocator
    median_ms: float
    p20_ms: float
    p80_ms: float
    gb_per_s: float  # of the bytes that the op must move
    floor_fraction: float  # time of copying as many bytes / time of this
    # Above the inputs, in bench_models with the weights (on a CPU of the process); None: unknown.
    peak_mb: float | None
    retained_mb: float | None = None  # memory that a model still holds when its call has returned
    num_frames: int | None = None  # that a model returned
    error: float | None = None  # mean |difference| over mean |value| from the float32 reference


@dataclass
class Case:
    """What is measured: an op on a shape, in a direction."""

    op: str
    shape: str
    dtype: str
    direction: str
    bytes_moved: int  # least bytes that any implementation reads and writes
    weight: int = 1  # how often a model runs it; sums over shapes count it so
    measurements: list[Measurement] = field(default_factory=list)
    gflop: float = 0.0  # multiplications and additions that the result needs, in 1e9
    achievable_gflop_per_s: float = 0.0  # the fastest product measured in the same run

    def ratio(self, provider: str, against: str, allocation: str) -> float:
        """How many times faster `provider` is than `against`."""
        by_name = {(m.provider, m.allocation): m.median_ms for m in self.measurements}
        return by_name[against, allocation] / by_name[provider, allocation]


def process_peak_mb() -> float:
    """Highest memory of this process since `forget_process_peak`."""
    return _status_mb("VmHWM")


def forget_process_peak() -> float | None:
    """Starts a new peak and returns the memory of this process; None where Linux refuses."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _status_mb("VmRSS")


def _status_mb(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024


class Timer:
    """Times calls on the CPU with the clock, on a GPU with events after flushing L2."""

    def __init__(self, device: str):
        self.device = device
        self.is_cuda = device == "cuda"
        if self.is_cuda:
            self.flush = torch.empty(_L2_FLUSH_BYTES, dtype=torch.uint8, device=device)

    def once(self, call: Callable[[], Any]) -> float:
        """Milliseconds of one call."""
        if not self.is_cuda:
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e3
        self.flush.zero_()
        torch.cuda._sleep(_QUEUE_CYCLES)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def peak_mb(self, call: Callable[[], Any]) -> float | None:
        """Memory that a call takes beyond what is allocated before it; None where unknown."""
        if not self.is_cuda:
            before = forget_process_peak()
            call()
            return None if before is None else process_peak_mb() - before
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20


def achievable_gflop_per_s(dtype: torch.dtype, device: str) -> float:
    """The rate of the fastest large product here and now: of matrices, or a convolution."""
    timer = Timer(device)
    count = 256 if QUICK else 8192 if device == "cuda" else 2048
    a = torch.randn(count, count, device=device).to(dtype)
    channels = 32 if QUICK else 512
    x = torch.randn(1, channels, 4, 32, 32, device=device).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last_3d)
    weight = torch.randn(channels, channels, 1, 3, 3, device=device).to(dtype)
    calls = [
        (lambda: a @ a, 2 * count**3),
        (lambda: torch.conv3d(x, weight, padding=(0, 1, 1)), 2 * 9 * channels**2 * 4096),
    ]
    return max(flop / timer.once(call) / 1e6 for call, flop in calls for _ in range(8))


def measure(
    case: Case,
    providers: dict[tuple[str, str], Callable[[], Any]],
    device: str,
    budget_s: float = 4.0,
    least_rounds: int = 10,
) -> Case:
    """Fills `case.measurements` for providers {(name, allocation): call}; a copy of equal bytes is
    the floor."""
    timer = Timer(device)
    half = max(case.bytes_moved // 2, 1)
    source = torch.zeros(half, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    calls = {("copy", "preallocated"): lambda: target.copy_(source), **providers}
    if not COMPILED:
        calls = {key: call for key, call in calls.items() if key[0] != "compiled"}
    for call in calls.values():  # compiles, warms caches, faults pages in
        call()
    longest = sum(timer.once(call) for call in calls.values()) / 1e3
    if not QUICK and longest < budget_s / 2:
        for call in calls.values():
            call()
    most_rounds = 50 if timer.is_cuda else 200
    rounds = 2 if QUICK else int(min(most_rounds, max(least_rounds, budget_s / longest)))
    times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for _ in range(rounds):
        for key, call in calls.items():
            times[key].append(timer.once(call))
    quantiles = {
        key: torch.tensor(values).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
        for key, values in times.items()
    }
    floor = quantiles["copy", "preallocated"][1]
    for (name, allocation), (p20, median, p80) in quantiles.items():
        case.measurements.append(
            Measurement(
                provider=name,
                allocation=allocation,
                median_ms=median,
                p20_ms=p20,
                p80_ms=p80,
                gb_per_s=case.bytes_moved / median / 1e6,
                floor_fraction=floor / median,
                peak_mb=timer.peak_mb(calls[name, allocation]),
            )
        )
    return case


def device_name(device: str) -> str:
    """A folder name for the device, such as "nvidia-h200" or "cpu-amd-epyc-2-threads"."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        pairs = [line.split(":", 1) for line in lines if ":" in line]
        cpu = {key.strip(): value.strip() for key, value in pairs}
        model = cpu.get("model name", "unknown")
        if not any(c.isdigit() for c in model):  # Some virtual machines hide which one it is.
            model += f" family {cpu.get('cpu family', '')} model {cpu.get('model', '')}"
        name = f"cpu {model} {torch.get_num_threads()} threads"
    return "-".join(name.lower().replace("(r)", "").split())


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent.parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def environment(device: str) -> dict[str, Any]:
    """What a reader needs to judge the numbers."""
    commit = _git("rev-parse", "--short", "HEAD") or "unknown"
    if _git("status", "--porcelain", "--untracked-files=no", "--", "csrc", "vtok_ext"):
        commit += " with changes"
    info = vt.build_info()
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "vtok_ext": info["version"],
        "cpu_isa": info["cpu_isa"],
        "cuda": torch.version.cuda,
        "commit": commit,
        "date": date.today().isoformat(),
    }


def merge(measured: dict[str, Any], earlier: dict[str, Any]) -> None:
    """Adds to `measured` what an earlier run of the same commit, on the same day and device,
    measured and this one did not."""
    if earlier["environment"] != measured["environment"]:
        return
    names = ("op", "shape", "dtype", "direction")
    for case in earlier["cases"]:
        again = [c for c in measured["cases"] if all(c[name] == case[name] for name in names)]
        found = {(m["provider"], m["allocation"]) for c in again for m in c["measurements"]}
        missing = [m for m in case["measurements"] if (m["provider"], m["allocation"]) not in found]
        if again:
            again[0]["measurements"] += missing
        else:
            measured["cases"].append(case)


def save(name: str, device: str, cases: list[Case]) -> Path | None:
    """Writes results/<device>/<name>.json (or below VTOK_BENCH_OUT); a quick run writes nothing."""
    if QUICK or not cases:
        return None
    folder = Path(os.environ.get("VTOK_BENCH_OUT", RESULTS)) / device_name(device)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    measured = {"environment": environment(device), "cases": [asdict(case) for case in cases]}
    if os.environ.get("VTOK_BENCH_MERGE") == "1" and path.exists():
        merge(measured, json.loads(path.read_text()))
    text = json.dumps(measured, indent=1)
    temporary = path.with_suffix(".json.partial")
    temporary.write_text(text + "\n")
    temporary.replace(path)
    return path
