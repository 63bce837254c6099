"""diffusers' video autoencoders on this package's kernels, with their own weights and classes.

    vt.patch_diffusers(vae)     swaps layers in place; same state_dict, same results
    vt.unpatch_diffusers(vae)   swaps them back
    vt.wrap_diffusers(vae)      a VideoTokenizer on the same parameters: exact streams, the CLI

AutoencoderKLWan, AutoencoderKLCogVideoX, AutoencoderKLHunyuanVideo and AutoencoderVidTok. diffusers
is imported when one of these is called. See docs/diffusers.md.
"""

from __future__ import annotations

import os
from typing import TypeVar

from torch import nn

from vtok_ext.models.base import VideoTokenizer

Vae = TypeVar("Vae", bound=nn.Module)


def patch_diffusers(vae: Vae, *, any_version: bool = False) -> Vae:
    """Returns `vae` itself, a diffusers video autoencoder, after swapping layers in place.

    Causal convolutions, norm + SiLU, residual blocks and changes of resolution run on this
    package's ops. Names and parameters stay, hence state_dict, optimizers, save_pretrained, device
    moves, autocast, torch.compile and adapters; so do class names. Results in float32 agree with
    the original within 1e-5 of their largest value, with the caches of its chunked passes as well.
    A layer with a hook, an adapter or another activation computes as before, and so do its
    neighbours where they would be fused with it.

    Args:
        vae: AutoencoderKLWan, AutoencoderKLCogVideoX, AutoencoderKLHunyuanVideo or
            AutoencoderVidTok, in any mode, dtype and device. Patching it again changes nothing.
        any_version: patch also where a forward of the installed diffusers is not the one that the
            replacement was written for.

    Raises:
        ImportError: diffusers, or the class, is not installed; the `[diffusers]` extra does it.
        TypeError: another class.
        ValueError: quantized parameters, or a diffusers whose layers compute something else; the
            message says which.
    """
    from vtok_ext.diffusers_vae._patching import patch

    return patch(vae, any_version)


def unpatch_diffusers(vae: Vae) -> Vae:
    """Returns `vae` itself after undoing `patch_diffusers`; a model that is not patched as it is.

    Raises:
        ImportError, TypeError: as `patch_diffusers`.
    """
    from vtok_ext.diffusers_vae._patching import unpatch

    return unpatch(vae)


def wrap_diffusers(vae: nn.Module, name: str | None = None) -> VideoTokenizer:
    """Returns a VideoTokenizer on the parameters of `vae`, in its mode; see docs/diffusers.md.

    Wan and CogVideoX stream exactly, in the units of frames that diffusers takes at a time;
    HunyuanVideo takes whole clips and refuses streams. Their layers stay as they are, patched or
    not. AutoencoderVidTok becomes a `VidTok` that shares the parameters. Latents are not scaled.

    Args:
        vae: one of the classes of `patch_diffusers`.
        name: of the model, for messages and `model_id`; default the class name.

    Raises:
        ImportError, TypeError: as `patch_diffusers`.
        ValueError: a configuration that diffusers itself does not stream or compute consistently.
    """
    from vtok_ext.diffusers_vae.tokenizers import wrap

    return wrap(vae, name)


def load_diffusers_vae(folder: str | os.PathLike, *, patch: bool = True) -> VideoTokenizer:
    """Returns the wrapped model, in eval mode, of a folder that diffusers' `save_pretrained` wrote.

    Args:
        folder: with config.json and diffusion_pytorch_model.safetensors.
        patch: also call `patch_diffusers` on it.

    Raises:
        ImportError: diffusers is not installed.
        FileNotFoundError, ValueError: no such folder, another class, or no weights in it.
    """
    from vtok_ext.diffusers_vae.tokenizers import load

    return load(folder, patch)


__all__ = ["load_diffusers_vae", "patch_diffusers", "unpatch_diffusers", "wrap_diffusers"]
