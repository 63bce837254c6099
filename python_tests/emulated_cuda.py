"""Builds the package's CUDA kernels on the host emulation and runs ops on them."""

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from vtok_ext import _native

THREAD_ORDERS = ("forward", "reverse", "seeded")


def load_emulated_module(repository: Path):
    """Returns the emulated `_C`, built in <repository>/build/emulation or named by
    VTOK_EMULATED_MODULE."""
    path = os.environ.get("VTOK_EMULATED_MODULE")
    if path is None:
        path = _build(repository)
    spec = importlib.util.spec_from_file_location("vtok_ext_emulated._C", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.build_info()["cuda_emulation"], f"{path} is not the emulated build"
    return module


def _build(repository: Path) -> str:
    tools = {name: shutil.which(name) for name in ("cmake", "c++")}
    missing = [name for name, path in tools.items() if path is None]
    if not (repository / "CMakeLists.txt").is_file():
        missing.append("the source of the kernels")
    if missing:
        message = f"the CUDA emulation needs {', '.join(missing)}"
        if os.environ.get("VTOK_REQUIRE_EMULATION") == "1":
            pytest.fail(message)
        pytest.skip(message)
    tag = f"{sys.implementation.cache_tag}"
    folder = repository / "build" / "emulation" / tag
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:  # workers of pytest-xdist wait for the first one
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _build_in(folder, repository, tools)


def _build_in(folder: Path, repository: Path, tools: dict[str, str]) -> str:
    configure = [tools["cmake"], "-S", repository, "-B", folder, "-DVTOK_EMULATE_CUDA=ON"]
    configure.append(f"-DPython_EXECUTABLE={sys.executable}")
    if ninja := shutil.which("ninja"):
        # By name: the ninja of the environment that configured this folder may be gone.
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    for command in (configure, [tools["cmake"], "--build", folder, "--target", "_C", "-j", "2"]):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            pytest.fail(
                f"building the CUDA emulation failed:\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
            )
    (module,) = folder.glob("_C*.so")
    return str(module)


class EmulatedCuda:
    """While active, ops on CPU tensors run the emulated CUDA kernels; a finding of the emulation
    fails the test."""

    def __init__(self, module, order: str, seed: str):
        self.module = module
        number = zlib.crc32(seed.encode())
        self.order = order or THREAD_ORDERS[number % len(THREAD_ORDERS)]
        self.cp_async = ("late", "issue")[number // 3 % 2]
        self.seed = number

    def __enter__(self):
        self.module.emulation_set_options(order=self.order, seed=self.seed, cp_async=self.cp_async)
        self.module.emulation_take_reports()
        self.swap = _native.use_module(self.module)
        self.swap.__enter__()
        return self

    def __exit__(self, *error):
        self.swap.__exit__(None, None, None)
        reports = self.module.emulation_take_reports()
        if error[0] is None and reports:
            pytest.fail(f"thread order {self.order}, seed {self.seed}:\n" + "\n".join(reports))
