"""Released training checkpoints: only tensors are read, and only the model's own are kept."""

from __future__ import annotations

import argparse
import contextlib
import os
import pickle
import re
import threading
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vtok_ext.models._persistence import read_safetensors

PICKLED = (".ckpt", ".pth", ".pt")
# Under these names a training checkpoint keeps the weights: Lightning's, and CoordTok's.
STATE_NAMES = ("state_dict", "model")
# Levels that torch.compile and DistributedDataParallel insert into the names of what they wrap.
WRAPPER_LEVELS = ("_orig_mod", "module")
# Training state beside the model: loss networks, and shadow weights whose names have lost their
# dots.
EMA_PREFIX = "model_ema."
IGNORED_PREFIXES = ("loss.", "decoder.lpips_loss.", EMA_PREFIX)
# The first release whose weights_only loading is safe (CVE-2025-32434).
SAFE_TORCH = (2, 6)
# The first one certain to take the names below, by which files of either NumPy refer to a number.
NUMPY_TORCH = (2, 7)
# The list of harmless types is torch's, one for the whole process.
_HARMLESS_TYPES_LOCK = threading.Lock()
NUMPY_SCALARS = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")


def is_checkpoint(path: str) -> bool:
    """Returns whether `path` is named like a checkpoint file rather than a folder or hub id."""
    return not os.path.isdir(path) and path.lower().endswith((*PICKLED, ".safetensors"))


def read_checkpoint(
    path: str, trust_checkpoint: bool = False, ema: bool = False, op: str = "load_model"
) -> dict[str, Tensor]:
    """Returns the model's tensors of a checkpoint by name, or with `ema` their moving averages.

    Messages begin with `op`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a checkpoint, holds something other than tensors, has no moving
            average of some tensor, or is a pickled one that this torch cannot read safely.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{op}: {path!r} must be a file, got none")
    pickled = path.lower().endswith(PICKLED)
    content = _unpickle(path, trust_checkpoint, op) if pickled else read_safetensors(path, op)
    for name in STATE_NAMES:
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if not isinstance(content, dict):
        raise ValueError(f"{op}: {path!r} must hold a state_dict, got {type(content).__name__}")
    kept = {
        str(k): v for k, v in content.items() if not _unwrapped(str(k)).startswith(IGNORED_PREFIXES)
    }
    if ema:
        kept = _moving_averages(kept, content, path)
    weights: dict[str, Tensor] = {}
    for raw_name, value in kept.items():
        name = _unwrapped(raw_name)
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{op}: {name} must be a tensor, got {type(value).__name__} in {path!r}"
            )
        if name in weights:
            raise ValueError(f"{op}: {name} must occur once, got it twice in {path!r}")
        weights[name] = value
    return weights


def _unwrapped(name: str) -> str:
    return ".".join(level for level in name.split(".") if level not in WRAPPER_LEVELS)


def _part(name: str) -> str:
    """Returns the part of the model that a tensor belongs to."""
    return _unwrapped(name).partition(".")[0]


def _moving_averages(kept: dict[str, Any], content: dict[Any, Any], path: str) -> dict[str, Any]:
    """Returns for each name in `kept` its moving average, called as it is but without dots.

    A part of the model (encoder, decoder, ...) of which no tensor has one did not train: it keeps
    its weights, as long as another part has averages.
    """
    averages: dict[str, str] = {}
    for name in kept:
        for known in (name, _unwrapped(name)):
            average = EMA_PREFIX + known.replace(".", "")
            if average in content:
                averages[name] = average
    trained = {_part(name) for name in averages} or {_part(name) for name in kept}
    missing = [name for name in kept if name not in averages and _part(name) in trained]
    if missing:
        raise ValueError(
            f"load_model: every tensor must have a moving average for ema=True, got none for "
            f"{len(missing)} of {len(kept)} ({', '.join(missing[:3])}) in {path!r}"
        )
    return {name: content[averages[name]] if name in averages else kept[name] for name in kept}


def read_generator_checkpoint(
    path: str, trust_checkpoint: bool = False, ema: bool = True
) -> dict[str, Tensor]:
    """Returns the tensors of a generator's checkpoint: moving averages, or the last weights.

    Such a file is a dict of `ema`, `model`, `opt` and `args`, the latter an argparse.Namespace; it
    may also be the weights alone.

    Raises:
        FileNotFoundError, ValueError: as `read_checkpoint`.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"load_generator: {path!r} must be a file, got none")
    if path.lower().endswith(PICKLED):
        content = _unpickle(path, trust_checkpoint, "load_generator")
    else:
        content = read_safetensors(path, "load_generator")
    wanted = "ema" if ema else "model"
    if isinstance(content, dict) and {"ema", "model"} & set(content):
        content = content.get(wanted)
        if not isinstance(content, dict):
            raise ValueError(f"load_generator: {path!r} must hold {wanted!r}, got none")
    entries = content if isinstance(content, dict) else {}
    weights = {_unwrapped(str(k)): v for k, v in entries.items()}
    if not weights or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError(f"load_generator: {path!r} must hold tensors by name, got another content")
    return weights


@contextlib.contextmanager
def _harmless_types_allowed(version: tuple[int, ...]) -> Iterator[None]:
    """Lets a file hold NumPy numbers and an argparse.Namespace; rebuilding them runs nothing.

    One thread at a time: each puts back the list that it found, without the types of another.
    """
    types: list[Any] = [argparse.Namespace]
    if version >= NUMPY_TORCH:
        kinds = [type(np.dtype(name)) for name in ("float64", "float32", "int64")]
        rebuild = np.float64(0).__reduce__()[0]
        types += [np.dtype, *kinds, *((rebuild, name) for name in NUMPY_SCALARS)]
    with _HARMLESS_TYPES_LOCK:
        before = torch.serialization.get_safe_globals()
        torch.serialization.add_safe_globals(types)
        try:
            yield
        finally:  # torch 2.4 has no torch.serialization.safe_globals(types)
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(before)


def _unpickle(path: str, trust_checkpoint: bool, op: str) -> Any:
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < SAFE_TORCH and not trust_checkpoint:
        raise ValueError(
            f"{op}: torch must be >= 2.6 to read {path!r} safely (CVE-2025-32434), got "
            f"{torch.__version__}; trust_checkpoint=True reads it nevertheless"
        )
    try:
        with _harmless_types_allowed(version):
            # Mapped, so that optimiser states and the weights that are not wanted stay on the disk.
            mapped = zipfile.is_zipfile(path)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        # What is wrong, without torch's advice to execute what the file holds.
        found = re.search(r"WeightsUnpickler error:\s*(.+?)(?:\. |\n|$)", str(error))
        lines = [found[1]] if found else str(error).splitlines()
        reason = lines[0] if lines else type(error).__name__
        raise ValueError(f"{op}: {path!r} must be a checkpoint of tensors, got {reason}") from error
