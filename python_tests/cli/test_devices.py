"""`--device`: CUDA only where the kernels of this build run on the chip; else one clear line."""

import pytest
import torch

from vtok_ext.cli import cuda_use, doctor
from vtok_ext.cli.doctor import _warnings, examine
from vtok_ext.cli.model_source import resolve_device

WITH, WITHOUT = (
    {"native": True, "cuda_version": "13.0"},
    {"native": True, "cuda_version": None},
)
DEFINITIONS = {**WITHOUT, "native": False}


@pytest.fixture
def machine(monkeypatch):
    """Returns a function (build, capability) that pretends there is one such GPU."""

    def pretend(build, capability=(9, 0)):
        monkeypatch.setattr(cuda_use, "build_info", lambda: build)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=None: "Tesla V100")

    return pretend


@pytest.mark.parametrize(
    ("build", "capability"), [(WITH, (8, 0)), (WITH, (12, 0)), (DEFINITIONS, (7, 0))]
)
@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_cuda_is_taken_where_it_can_be(machine, capsys, build, capability, name):
    machine(build, capability)
    assert resolve_device(name).type == "cuda"
    assert capsys.readouterr().err == ""


OBSTACLES = [
    (WITHOUT, (9, 0), "built without CUDA kernels; put nvcc on the PATH and install it again"),
    (WITH, (7, 0), "need compute capability 8.0 or newer and Tesla V100 has 7.0; use --device cpu"),
]


@pytest.mark.parametrize(("build", "capability", "words"), OBSTACLES)
def test_a_gpu_that_kernels_cannot_use(machine, capsys, monkeypatch, build, capability, words):
    machine(build, capability)
    assert resolve_device("auto") == torch.device("cpu")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: the GPU is not used: ") and words in line
    with pytest.raises(ValueError, match=r"^device: must be usable, got 'cuda:0'") as caught:
        resolve_device("cuda:0")
    assert words in str(caught.value)
    assert resolve_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("RANK", "1")
    assert resolve_device("auto") == torch.device("cpu")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("build", "capability", "words"), OBSTACLES)
def test_doctor_warns_of_it(machine, monkeypatch, build, capability, words):
    machine(build, capability)

    class Properties:
        name, total_memory = "Tesla V100", 2**34
        major, minor = capability

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    state = doctor._cuda_state()
    assert state["usable"] and len(state["obstacles"]) == 1
    report = {**examine(), "cuda": state}
    assert any("the GPU is not used" in line and words in line for line in _warnings(report))
