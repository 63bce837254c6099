"""Swapping the class of layers in place, and back.

A replacement is a subclass of the layer's class with the same name and no state of its own:
`module.__class__` is all that changes. Parameters, buffers, hooks, names, the module tree and what
goes by class name (`_no_split_modules`, `compile_repeated_blocks`) stay what they were, and pickles
find the replacement where it is defined.

See Note [Versions] for the check that the replaced code is the one that replacements were
written for.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import io
import textwrap
import tokenize
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import nn

from vtok_ext.diffusers_vae._folder import EXTRA, VAE_CLASSES
from vtok_ext.models._optional import require

# File of diffusers, and the module here that replaces layers of it.
_MODULES = {
    "AutoencoderKLWan": ("autoencoder_kl_wan", "wan"),
    "AutoencoderKLCogVideoX": ("autoencoder_kl_cogvideox", "cogvideox"),
    "AutoencoderKLHunyuanVideo": ("autoencoder_kl_hunyuan_video", "hunyuan_video"),
    "AutoencoderVidTok": ("autoencoder_vidtok", "vidtok"),
}
WRITTEN_FOR = "0.42.1"
_LAYOUT_TOKENS = (
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
)


def vae_class_name(op: str, vae: Any) -> str:
    """Returns the name of the class of `vae`; it is one of VAE_CLASSES, from diffusers or here.

    Raises:
        ImportError: diffusers is not installed, or not one for this torch.
        TypeError: another class.
    """
    diffusers = require(op, "diffusers")
    name = type(vae).__name__
    if name not in VAE_CLASSES or not isinstance(vae, getattr(diffusers, name, ())):
        raise TypeError(f"{op}: vae must be one of {', '.join(VAE_CLASSES)}, got {name}")
    return name


def replacements_of(op: str, name: str) -> ModuleType:
    """Returns the module here with REPLACEMENTS and FORWARDS of the class called `name`."""
    theirs, ours = _MODULES[name]
    try:
        importlib.import_module(f"diffusers.models.autoencoders.{theirs}")
        return importlib.import_module(f"vtok_ext.diffusers_vae.{ours}")
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"{op}: diffusers must have the layers of {name} in {WRITTEN_FOR} ({EXTRA}), "
            f"got {error}"
        ) from error


def patch(vae: Any, any_version: bool) -> Any:
    """Returns `vae` with the layers swapped; see `vt.patch_diffusers`."""
    op = "patch_diffusers"
    name = vae_class_name(op, vae)
    module = replacements_of(op, name)
    _check_parameters(op, vae)
    if not any_version:
        _check_forwards(op, module.FORWARDS)
    replacements: Mapping[type, type] = module.REPLACEMENTS
    for layer in vae.modules():
        replacement = replacements.get(type(layer))
        if replacement is not None:
            layer.__class__ = replacement
    return vae


def unpatch(vae: Any) -> Any:
    """Returns `vae` with the layers swapped back; see `vt.unpatch_diffusers`."""
    op = "unpatch_diffusers"
    module = replacements_of(op, vae_class_name(op, vae))
    originals = {ours: theirs for theirs, ours in module.REPLACEMENTS.items()}
    for layer in vae.modules():
        original = originals.get(type(layer))
        if original is not None:
            layer.__class__ = original
    return vae


def num_patched(vae: nn.Module) -> int:
    """Returns how many layers of `vae` are replacements."""
    return sum(type(m).__module__.startswith(__package__ + ".") for m in vae.modules())


def _check_parameters(op: str, vae: nn.Module) -> None:
    """Raises ValueError for parameters that are no plain floating tensors."""
    for name, parameter in vae.named_parameters():
        if type(parameter) not in (nn.Parameter, torch.Tensor) or not parameter.is_floating_point():
            raise ValueError(
                f"{op}: parameters must be plain floating tensors, got {type(parameter).__name__} "
                f"of {parameter.dtype} at {name}; a quantized layer is not computed exactly"
            )


# Note [Versions]
# A replacement promises the result of the layer it replaces, so it must know what that computes.
# FORWARDS holds a digest of the tokens, without comments and layout, of every replaced forward and
# of those that the replacements rely on. Where the installed diffusers has others, nothing is
# swapped unless the caller insists.
def forward_digest(kind: type[nn.Module]) -> str:
    """Returns 12 hexadecimal digits of the tokens of `kind.forward`."""
    source = textwrap.dedent(inspect.getsource(kind.forward))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    words = [token.string for token in tokens if token.type not in _LAYOUT_TOKENS]
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:12]


def _check_forwards(op: str, digests: Mapping[type[nn.Module], str]) -> None:
    """Raises ValueError where the installed code is not what replacements were written for."""
    import diffusers

    other = [kind.__name__ for kind, digest in digests.items() if forward_digest(kind) != digest]
    if other:
        raise ValueError(
            f"{op}: diffusers must compute as version {WRITTEN_FOR}, got {diffusers.__version__} "
            f"with another forward of {', '.join(other)}; any_version=True patches all the same"
        )
