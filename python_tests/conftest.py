"""Fixtures and switches of the whole test suite.

--slow                       also run tests marked `slow`
VTOK_REQUIRE_CUDA=1          `cuda` tests fail instead of skipping when there is no GPU
VTOK_REQUIRE_EMULATION=1     tests on the CUDA emulation fail instead of skipping without a compiler
VTOK_EMULATION_SEED=N        which thread order each emulated case gets (printed in the header)
VTOK_EMULATION_ORDERS=all    every emulated case in all thread orders
VTOK_PARITY_DIR=DIR          recorded outputs of the reference systems (default ../shared/parity)
"""

import os
import time
from pathlib import Path

import pytest
import torch
from emulated_cuda import THREAD_ORDERS, EmulatedCuda, load_emulated_module

# Convolutions of float32 would else be compared at the precision of tf32.
torch.backends.cudnn.allow_tf32 = False

REPOSITORY = Path(__file__).parent.parent
# In the environment, so that the workers of pytest-xdist have the seed that the header prints.
EMULATION_SEED = int(os.environ.setdefault("VTOK_EMULATION_SEED", str(int(time.time()) % 100_000)))


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run tests marked slow")


def pytest_report_header(config):
    return f"VTOK_EMULATION_SEED={EMULATION_SEED}"


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))


def require_cuda():
    """Skips the calling test without a GPU, or fails it when VTOK_REQUIRE_CUDA=1."""
    if torch.cuda.is_available():
        return
    if os.environ.get("VTOK_REQUIRE_CUDA") == "1":
        pytest.fail("VTOK_REQUIRE_CUDA=1, but torch sees no CUDA GPU")
    pytest.skip("needs a CUDA GPU")


@pytest.fixture(autouse=True)
def _cuda_marker(request):
    if request.node.get_closest_marker("cuda"):
        require_cuda()


@pytest.fixture(scope="session")
def emulated_module():
    """The compiled module whose CUDA kernels run on the host emulation; built once per checkout."""
    return load_emulated_module(REPOSITORY)


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        backends = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
        if os.environ.get("VTOK_EMULATION_ORDERS") == "all":
            backends += [f"emulated-{order}" for order in THREAD_ORDERS]
        else:
            backends.append("emulated")
        metafunc.parametrize("backend", backends, indirect=True)


@pytest.fixture
def backend(request):
    """Where kernels run: yields an object with `.device`, `.is_cuda_kernel` and `.name`."""
    name = request.param
    if not name.startswith("emulated"):
        yield Backend(name, name, name == "cuda")
        return
    module = request.getfixturevalue("emulated_module")
    order = name.partition("-")[2]
    with EmulatedCuda(module, order, f"{EMULATION_SEED}/{request.node.nodeid}"):
        yield Backend("emulated", "cpu", True)


class Backend:
    """A place where kernels run."""

    def __init__(self, name: str, device: str, is_cuda_kernel: bool):
        self.name, self.device, self.is_cuda_kernel = name, device, is_cuda_kernel


@pytest.fixture(scope="session")
def parity_dir():
    """The folder with recorded reference outputs; skips when it is not there."""
    folder = Path(os.environ.get("VTOK_PARITY_DIR", REPOSITORY.parent / "shared" / "parity"))
    if not folder.is_dir():
        pytest.skip(f"no parity data at {folder} (VTOK_PARITY_DIR)")
    return folder
