"""Finds the model and the device that a command names, or says in one line why not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from vtok_ext.models.latent_statistics import LatentStatistics, read_statistics

from .console import Console
from .cuda_use import cuda_obstacle


def resolve_device(name: str) -> torch.device:
    """Returns the device called `name`; "auto" is CUDA where it can be used, else the CPU.

    Where torch can use CUDA and the kernels of this package cannot, "auto" says so on the console.

    Raises:
        ValueError: not a device, or CUDA that cannot be used here.
    """
    if name == "auto":
        return _automatic_device()
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device: must be auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device: must be usable, got {name!r}, which torch cannot use here; "
            "`vtok doctor` says why"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device: must be one of {torch.cuda.device_count()} CUDA devices, got {name!r}"
        )
    obstacle = cuda_obstacle(device.index or 0) if device.type == "cuda" else None
    if obstacle is not None:
        raise ValueError(f"device: must be usable, got {name!r}, but {obstacle}")
    return device


def _automatic_device() -> torch.device:
    """Returns CUDA or the CPU; the process that leads warns if a GPU is left unused."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    obstacle = cuda_obstacle()
    if obstacle is None:
        return torch.device("cuda")
    if os.environ.get("RANK", "0") == "0":  # of torchrun, whose process group is not there yet
        Console().warn(f"the GPU is not used: {obstacle}")
    return torch.device("cpu")


def load_model_for(
    source: str,
    name: str | None,
    device: torch.device,
    console: Console,
    *,
    ema: bool = False,
    trust_checkpoint: bool = False,
) -> tuple[Any, bool]:
    """Returns (model in eval mode on `device`, whether its weights are random).

    Args:
        source: folder of a saved model, also of a video autoencoder of diffusers, released
            checkpoint, hub id, or the name of a preset, which gives random weights and a warning.
        name: preset that a checkpoint belongs to, or its released YAML file.
        device: where the model goes.
        console: gets the warning.
        ema, trust_checkpoint: as for `vt.load_model`.

    Raises:
        ValueError, OSError: there is no such model, or it is damaged.
    """
    import vtok_ext as vt

    is_random = name is None and not Path(source).exists() and source in vt.list_models()
    if is_random:
        console.warn(
            f"{source} is the name of a preset: its weights are random, the output will be noise"
        )
        torch.manual_seed(0)
        model = vt.create_model(source)
    else:
        found = None if name is not None or ema else _diffusers_model(source, console)
        options = {"ema": ema, "trust_checkpoint": trust_checkpoint}
        model = found or vt.load_model(source, name=name, **options)
    return model.eval().to(device), is_random


def given_statistics(command: str, path: Path | None, order: str | None) -> LatentStatistics | None:
    """Returns the statistics of `StatisticsOption`, None without a file.

    Raises:
        FileNotFoundError, ValueError: as `read_statistics`, or an order alone.
    """
    if path is not None:
        return read_statistics(path, order)
    if order is not None:
        raise ValueError(f"{command}: --statistics must be given with an order, got {order} alone")
    return None


def _diffusers_model(source: str, console: Console) -> Any:
    """Returns the model of a folder of diffusers; None for others, VidTok's among them."""
    from vtok_ext.diffusers_vae import load_diffusers_vae, patch_diffusers
    from vtok_ext.diffusers_vae._folder import VIDTOK, vae_class_of

    if vae_class_of(source) in (None, VIDTOK):
        return None
    model: Any = load_diffusers_vae(source, patch=False)
    try:
        patch_diffusers(model.vae)
    except ValueError as error:
        console.warn(f"diffusers' own layers are used: {error}")
    return model
