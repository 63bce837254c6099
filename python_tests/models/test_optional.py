"""Libraries of the extras: what a user is told where one is absent or not for this torch."""

import re
import sys

import pytest
import torch

from vtok_ext.models import _optional
from vtok_ext.models._optional import require
from vtok_ext.models.vtok_lm_config import add_lora, tiny_lm_config

EXTRAS = {"transformers": "lm", "peft": "lm", "diffusers": "diffusers"}


@pytest.mark.parametrize("name", EXTRAS)
def test_an_absent_library_names_its_extra(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    message = rf"^op: {name} must be installed \(pip install 'vtok_ext\[{EXTRAS[name]}\]'\), got no"
    with pytest.raises(ImportError, match=message):
        require("op", name)


@pytest.fixture(params=EXTRAS)
def written(request, monkeypatch, tmp_path):
    """Returns (library, write): `write(code)` makes a library of that name with that code."""
    name = request.param
    for module in modules_of(name):
        monkeypatch.delitem(sys.modules, module)

    def write(code):
        file = tmp_path.joinpath(*_optional._LIBRARIES[name][1].split("."), "__init__.py")
        file.parent.mkdir(parents=True)
        (tmp_path / name / "__init__.py").touch()
        file.write_text(code)

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(_optional.metadata, "version", lambda found: "99.0")
    yield name, write
    for module in modules_of(name):
        del sys.modules[module]


def modules_of(library):
    return [name for name in sys.modules if name.partition(".")[0] == library]


@pytest.mark.parametrize(
    "code",
    [
        "import torch; torch.accelerator_of_a_later_release",
        "class Layer(nn.Module): pass",
        "from torch import of_a_later_release",
        "import torch.of_a_later_release",
    ],
)
def test_a_library_for_a_later_torch_is_named_with_the_remedy(written, code):
    name, write = written
    write(code)
    message = (
        f"^op: {name} 99.0 must be importable, got .*Error: .*; where torch "
        f"{re.escape(torch.__version__)} is too old for it, install a newer torch or an older "
        f"{name}$"
    )
    with pytest.raises(ImportError, match=message):
        require("op", name)


def test_a_library_that_works_is_returned(written):
    name, write = written
    write("import torch")
    assert require("op", name) is sys.modules[name]


def test_functions_name_themselves(monkeypatch):
    for name in EXTRAS:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="^tiny_lm_config: transformers must be installed"):
        tiny_lm_config(10)
    with pytest.raises(ImportError, match="^add_lora: peft must be installed"):
        add_lora(torch.nn.Linear(2, 2), 2, 2, ["q"])
