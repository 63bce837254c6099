"""Libraries of the extras, imported when first needed, with an error that names the remedy.

A library that is too new for the installed torch fails in many ways: transformers imports without
its models, peft and diffusers end in a NameError or an AttributeError of their own. Importing a
module of each that needs torch tells at once.
"""

import importlib
from importlib import metadata
from types import ModuleType

import torch

# What must be installed, and a module that is imported only together with torch.
_LIBRARIES = {
    "transformers": ("vtok_ext[lm]", "transformers.modeling_utils"),
    "peft": ("vtok_ext[lm]", "peft"),
    "diffusers": ("vtok_ext[diffusers]", "diffusers.models.modeling_utils"),
}


def require(op: str, name: str) -> ModuleType:
    """Returns the module `name` of transformers, peft or diffusers.

    Raises:
        ImportError: it is not installed, or fails to import with the installed torch.
    """
    extra, module_with_torch = _LIBRARIES[name]
    try:
        library = importlib.import_module(name)
        importlib.import_module(module_with_torch)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == name:
            raise ImportError(
                f"{op}: {name} must be installed (pip install '{extra}'), got no module"
            ) from error
        reason = str(error).partition("\n")[0]
        raise ImportError(
            f"{op}: {name} {_version(name)} must be importable, got {type(error).__name__}: "
            f"{reason}; where torch {torch.__version__} is too old for it, install a newer torch "
            f"or an older {name}"
        ) from error
    return library


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "of unknown version"
