"""Fixtures of the benchmarks: the device (CUDA when there is one) and where measurements go."""

import os

import pytest
import torch
from harness import COMPILED, save

CASES: dict[str, list] = {}
if not COMPILED:
    torch._dynamo.config.disable = True


def _device() -> str:
    wanted = os.environ.get("VTOK_BENCH_DEVICE", "cuda" if torch.cuda.is_available() else "cpu")
    if wanted == "cpu" and not torch.cuda.is_available():
        torch.set_num_threads(min(2, os.cpu_count() or 1))
    return wanted


@pytest.fixture(scope="session")
def device():
    """The device under test; VTOK_BENCH_DEVICE chooses it."""
    return _device()


@pytest.fixture(autouse=True)
def _fresh_compiler():
    """torch.compile gives up after a few shapes of one function; every case starts anew."""
    torch._dynamo.reset()


@pytest.fixture
def record(request, capsys):
    """Call with a measured Case: prints it and keeps it for the JSON of this bench file.

    With VTOK_BENCH_OUT the file is written at once, so that a run which its time limit cuts off
    leaves what it has measured.
    """
    stem = request.path.stem.removeprefix("bench_")
    name = getattr(request.module, "RESULTS_NAME", stem)

    def keep(case):
        CASES.setdefault(name, []).append(case)
        with capsys.disabled():
            print(f"\n{case.op} {case.direction}, {case.shape}, {case.dtype}")
            for m in case.measurements:
                print(
                    f"  {m.provider:<26}{m.allocation:<14}{m.median_ms:9.3f} ms "
                    f"[{m.p20_ms:.3f}, {m.p80_ms:.3f}]{m.gb_per_s:8.1f} GB/s"
                    f"{m.floor_fraction:7.0%} of the limit"
                )
        if "VTOK_BENCH_OUT" in os.environ:
            save(name, _device(), CASES[name])

    return keep


def pytest_sessionfinish(session, exitstatus):
    """Writes the JSON files when every benchmark passed."""
    if exitstatus == 0:
        for name, cases in CASES.items():
            path = save(name, _device(), cases)
            if path is not None:
                print(f"\nwrote {path}")
