"""Checkpoints that are either complete and verified, or not there.

    checkpoints/step-00000010/
        state.json, state.safetensors        everything that all processes share
        rank-0.json, rank-0.safetensors      what each process has for itself: its random generators
        manifest.json                        step, metric, and size and SHA-256 of every file

A checkpoint is written into a hidden folder, flushed to the disk, and renamed: a kill at any moment
leaves the earlier ones as they were. Reading verifies every hash; a damaged checkpoint is set aside
under another name and the one before it is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vtok_ext.training.distributed import any_rank, rank, wait_for_all, world_size
from vtok_ext.training.tensor_tree import first_non_finite, read_tree, write_tree

FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})")
_MANIFEST = "manifest.json"
_PARTIAL = ".partial-"
_DAMAGED = "damaged-"
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: where it is, after how many steps, of how many processes."""

    folder: Path
    step: int
    world_size: int
    metric: float | None


def save_checkpoint(
    root: Path,
    step: int,
    tensors: dict[str, torch.Tensor],
    numbers: dict[str, Any],
    *,
    device: torch.device,
    metric: float | None = None,
    keep_last: int | None = None,
    generators: Any = None,
) -> Path:
    """Returns the folder of a new checkpoint of all processes, which must all call this.

    Args:
        root: folder of the checkpoints.
        step: steps done.
        tensors: by name; those of rank 0 are written.
        numbers: what JSON can hold.
        device: whose random generator is saved, beside those of the CPU, Python and numpy.
        metric: of the validation at this step, lower is better.
        keep_last: remove older ones than the last so many, except that with the lowest metric.
        generators: from `random_generators`; default as they are now.

    Raises:
        ValueError: a tensor is not finite; nothing is written.
        OSError: writing failed; earlier checkpoints are as they were.
    """
    bad = first_non_finite(tensors)
    if any_rank(bad is not None, device):
        where = bad or "another process"
        raise ValueError(f"save_checkpoint: every tensor must be finite, got NaN or inf in {where}")
    final = root / f"step-{step:08d}"
    partial = root / f"{_PARTIAL}{final.name}"
    if rank() == 0:
        root.mkdir(parents=True, exist_ok=True)
        for left in root.glob(f"{_PARTIAL}*"):  # of a process that was killed while writing
            shutil.rmtree(left)
        partial.mkdir()
    wait_for_all()
    write_tree(generators or random_generators(device), partial / f"rank-{rank()}")
    if rank() == 0:
        write_tree({"tensors": tensors, "numbers": numbers}, partial / "state")
    wait_for_all()
    if rank() == 0:
        _complete(partial, step, metric)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        _flush(root)
        if keep_last is not None:
            _prune(root, keep_last)
    wait_for_all()
    return final


def latest_checkpoint(root: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """Returns the newest undamaged checkpoint, None if there never was one.

    Damaged ones are reported and, by rank 0, renamed to `damaged-...`; partial ones of a killed
    process are ignored.

    Args:
        root: folder of the checkpoints.
        warn: called with one line for each damaged one.

    Raises:
        ValueError: there are checkpoints, but all of them are damaged.
    """
    found = sorted(_folders(root), reverse=True)
    damaged = []
    result = None
    for step, folder in found:
        try:
            result = verify_checkpoint(folder)
            break
        except ValueError as error:
            damaged.append((folder, str(error)))
            earlier = [s for s, _ in found if s < step]
            remedy = f"trying step {max(earlier)}" if earlier else "there is none before it"
            warn(f"{error}; {remedy}")
    wait_for_all()  # nobody reads any more what is renamed now
    if rank() == 0:
        for folder, _ in damaged:
            aside = root / f"{_DAMAGED}{folder.name}"
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(folder, aside)
    wait_for_all()
    if result is None and damaged:
        raise ValueError(
            f"checkpoint: at least one must be undamaged, got {len(damaged)} damaged ones in "
            f"{root}, set aside as {_DAMAGED}*"
        )
    return result


def verify_checkpoint(folder: Path) -> Checkpoint:
    """Returns the checkpoint in `folder` after comparing the hash of every file.

    Raises:
        ValueError: a file is absent, incomplete or changed.
    """
    manifest = _read_manifest(folder)
    for name, wanted in manifest["files"].items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != wanted["bytes"]:
            got = "none" if size is None else f"{size} bytes"
            raise ValueError(f"checkpoint: {path} must have {wanted['bytes']} bytes, got {got}")
        digest = _sha256(path)
        if digest != wanted["sha256"]:
            raise ValueError(
                f"checkpoint: {path} must have SHA-256 {wanted['sha256'][:12]}..., "
                f"got {digest[:12]}..."
            )
    return Checkpoint(folder, manifest["step"], manifest["world_size"], manifest["metric"])


def read_numbers(checkpoint: Checkpoint) -> dict[str, Any]:
    """Returns the `numbers` of `save_checkpoint`."""
    return read_tree(checkpoint.folder / "state")["numbers"]


def read_shapes(checkpoint: Checkpoint) -> dict[str, torch.Size]:
    """Returns the shapes of the `tensors` of `save_checkpoint`."""
    saved = read_tree(checkpoint.folder / "state")["tensors"]
    return {name: tensor.shape for name, tensor in saved.items()}


@torch.no_grad()
def read_tensors(checkpoint: Checkpoint, into: dict[str, torch.Tensor]) -> None:
    """Returns None after copying the `tensors` of `save_checkpoint` into those of their names."""
    saved = read_tree(checkpoint.folder / "state")["tensors"]
    for name, tensor in into.items():
        tensor.copy_(saved[name])


def restore_generators(checkpoint: Checkpoint, device: torch.device) -> bool:
    """Returns whether this process found its random generators and took them over."""
    stem = checkpoint.folder / f"rank-{rank()}"
    if checkpoint.world_size != world_size():
        return False
    set_random_generators(read_tree(stem), device)
    return True


def random_generators(device: torch.device) -> dict[str, Any]:
    """Returns the states of Python's, numpy's, the CPU's and the device's global generators."""
    numpy_state: Any = np.random.get_state()
    kind, keys, position, has_gauss, gauss = numpy_state
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [str(kind), torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss],
        "cpu": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_generators(state: dict[str, Any], device: torch.device) -> None:
    """Returns None after putting the generators into a state of `random_generators`."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def _folders(root: Path) -> list[tuple[int, Path]]:
    if not root.is_dir():
        return []
    matches = ((_NAME.fullmatch(path.name), path) for path in root.iterdir() if path.is_dir())
    return [(int(match[1]), path) for match, path in matches if match]


def _complete(partial: Path, step: int, metric: float | None) -> None:
    """Writes the manifest and flushes every file, so that the rename comes last on the disk too."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(partial.iterdir())
    }
    manifest = {
        "format": FORMAT,
        "step": step,
        "world_size": world_size(),
        "metric": metric,
        "files": files,
    }
    (partial / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for path in partial.iterdir():
        _flush(path)
    _flush(partial)


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / _MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"checkpoint: {folder} must hold {_MANIFEST}, got none") from None
    except ValueError as error:
        raise ValueError(f"checkpoint: {path} must be JSON, got {error}") from error
    known = isinstance(manifest, dict) and manifest.get("format") == FORMAT
    keys = {"step", "world_size", "metric", "files"}
    if not known or not keys <= set(manifest) or f"step-{manifest['step']:08d}" != folder.name:
        raise ValueError(f"checkpoint: {path} must be a manifest of {folder.name}, got another")
    if not {"state.json", "state.safetensors"} <= set(manifest["files"]):
        raise ValueError(f"checkpoint: {path} must name the state's files, got others")
    return manifest


def _prune(root: Path, keep_last: int) -> None:
    folders = sorted(_folders(root))
    metrics = {}
    for _, folder in folders:
        try:
            metric = _read_manifest(folder)["metric"]
        except ValueError:
            continue
        if metric is not None:
            metrics[folder] = metric
    best = min(metrics, key=lambda folder: metrics[folder], default=None)
    for _, folder in folders[:-keep_last]:
        if folder != best:
            doomed = root / f"{_PARTIAL}{folder.name}"
            os.replace(folder, doomed)  # a half-removed checkpoint does not look like one
            shutil.rmtree(doomed)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    """Returns None once what was written to a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
