"""Checkpoints that are either complete and verified, or not there.

    checkpoints/step-00000010/
        state.json, part-0.safetensors       everything, see `checkpoint_storage`
        rank-0.json, rank-0.safetensors      what each process has for itself: its random generators
        manifest.json                        step, metric, and size and SHA-256 of every file

A checkpoint is written into a hidden folder, flushed to the disk, and renamed: a kill at any moment
leaves the earlier ones as they were. Reading verifies every hash; a damaged checkpoint is set aside
under another name and the one before it is used.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed
from torch.distributed import checkpoint
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.api import CheckpointException

from vtok_ext.data.file_hash import sha256_of
from vtok_ext.training.checkpoint_storage import STATE, PartReader, PartWriter, read_index
from vtok_ext.training.distributed import (
    any_rank,
    is_distributed,
    on_rank_0,
    rank,
    world_size,
)
from vtok_ext.training.parallel import local
from vtok_ext.training.tensor_tree import first_non_finite, read_tree, write_tree

FORMAT = 2
_NAME = re.compile(r"step-(\d{8,})")
_MANIFEST = "manifest.json"
_PARTIAL = ".partial-"
_DAMAGED = "damaged-"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: where it is, after how many steps, of how many processes."""

    folder: Path
    step: int
    world_size: int
    metric: float | None


class CheckpointWriter:
    """Writes checkpoints of all processes, in the background if wanted.

    All processes make one together and call its methods together.

    Args:
        root: folder of the checkpoints.
        device: whose random generator is saved, beside those of the CPU, Python and numpy.
    """

    def __init__(self, root: Path, device: torch.device) -> None:
        self.root, self.device = root, device
        # A group of its own: its messages must not meet those of the training.
        self._group = distributed.new_group(backend="gloo") if is_distributed() else None
        self._pending: Any = None
        _let_one_process_be()

    def save(
        self,
        step: int,
        tensors: dict[str, torch.Tensor],
        numbers: dict[str, Any],
        *,
        metric: float | None = None,
        keep_last: int | None = None,
        background: bool = False,
    ) -> Path:
        """Returns the folder of a new checkpoint, after the one before is complete.

        Args:
            step: steps done.
            tensors: by name; with FSDP2 each process gives its part.
            numbers: what JSON can hold; those of rank 0 are written.
            metric: of the validation at this step, lower is better.
            keep_last: remove older ones than the last so many, except that with the lowest metric.
            background: return as soon as all tensors are copied; `wait` ends it.

        Raises:
            ValueError: a tensor is not finite; nothing is written.
            OSError: writing this one, or the one before, failed; earlier ones are as they were.
        """
        self.wait()
        bad = first_non_finite({name: local(tensor) for name, tensor in tensors.items()})
        if any_rank(bad is not None, self.device):
            where = bad or "another process"
            raise ValueError(
                f"save_checkpoint: every tensor must be finite, got NaN or inf in {where}"
            )
        final = self.root / f"step-{step:08d}"
        writer = self._writer(final, step, numbers, metric, keep_last)
        plan = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        options: dict[str, Any] = {"storage_writer": writer, "planner": plan}
        options["process_group"] = self._group
        with _as_os_error(final):
            if background:
                self._pending = final, checkpoint.async_save(tensors, **options)
            else:
                checkpoint.save(tensors, **options)
        return final

    def wait(self) -> None:
        """Returns None once nothing is being written; raises OSError if that failed."""
        if self._pending is not None:
            (final, future), self._pending = self._pending, None
            with _as_os_error(final):
                getattr(future, "upload_completion", future).result()

    def _writer(
        self,
        final: Path,
        step: int,
        numbers: dict[str, Any],
        metric: float | None,
        keep_last: int | None,
    ) -> PartWriter:
        partial = self.root / f"{_PARTIAL}{final.name}"
        # As they are now, not when the background comes to it.
        generators, number = random_generators(self.device), rank()

        def prepare() -> None:
            self.root.mkdir(parents=True, exist_ok=True)
            for left in self.root.glob(f"{_PARTIAL}*"):  # of a process that was killed
                shutil.rmtree(left)
            partial.mkdir()

        def extra() -> list[Path]:
            stem = partial / f"rank-{number}"
            write_tree(generators, stem)
            return [stem.with_suffix(".json"), stem.with_suffix(".safetensors")]

        def complete(files: dict[str, Any]) -> None:
            _write_manifest(partial, step, metric, files)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)
            _flush(self.root)
            if keep_last is not None:
                _prune(self.root, keep_last)

        return PartWriter(
            partial,
            number,
            prepare=prepare,
            extra=extra,
            describe=_described,
            numbers=numbers,
            complete=complete,
        )


@contextmanager
def _as_os_error(folder: Path) -> Iterator[None]:
    """Within it, the failure of any process to read or write is an OSError or ValueError."""
    try:
        yield
    except CheckpointException as error:
        number, (cause, _) = next(iter(error.failures.items()))
        kind = OSError if isinstance(cause, OSError) else ValueError
        raise kind(f"checkpoint: {folder} failed on process {number}, got {cause}") from error


def _let_one_process_be() -> None:
    """Returns None after telling torch not to warn, from any thread, that a process is alone."""
    warnings.filterwarnings("ignore", message=".*assuming the intent is to (save|load)")


def latest_checkpoint(root: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """Returns the newest undamaged checkpoint, None if there never was one.

    Rank 0 alone looks, so that all processes, which call this together, have the same one. Damaged
    ones are reported and renamed to `damaged-...`; partial ones of a killed process are ignored.

    Args:
        root: folder of the checkpoints.
        warn: called, on rank 0, with one line for each damaged one.

    Raises:
        ValueError: there are checkpoints, but all of them are damaged.
        OSError: the folder cannot be read, or a damaged one not be renamed.
    """
    return on_rank_0(lambda: _newest_undamaged(root, warn))


def _newest_undamaged(root: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    found = sorted(_folders(root), reverse=True)
    damaged = []
    result = None
    for step, folder in found:
        try:
            result = verify_checkpoint(folder)
            break
        except ValueError as error:
            damaged.append(folder)
            earlier = [s for s, _ in found if s < step]
            remedy = f"trying step {max(earlier)}" if earlier else "there is none before it"
            warn(f"{error}; {remedy}")
    for folder in damaged:
        aside = root / f"{_DAMAGED}{folder.name}"
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(folder, aside)
    remains = _set_aside(root)
    if result is None and remains:  # of now or before: never begin anew over a run's remains
        raise ValueError(
            f"checkpoint: at least one must be undamaged, got {len(remains)} damaged ones in "
            f"{root}, set aside as {_DAMAGED}*; remove them to begin anew"
        )
    return result


def _set_aside(root: Path) -> list[Path]:
    """Returns the damaged checkpoints that have been renamed."""
    return sorted(root.glob(f"{_DAMAGED}*"))


def has_checkpoints(root: Path) -> bool:
    """Returns whether there are checkpoints in `root`; they may be damaged."""
    return bool(_folders(root) or _set_aside(root))


def newest_checkpoint(root: Path) -> Path | None:
    """Returns the folder of the newest complete checkpoint, which may be damaged, None for none."""
    return max(_folders(root), default=(0, None))[1]


def verify_checkpoint(folder: Path) -> Checkpoint:
    """Returns the checkpoint in `folder` after comparing the hash of every file.

    Raises:
        ValueError: a file is absent, incomplete, changed or cannot be read.
    """
    try:
        return _verified(folder)
    except OSError as error:
        raise ValueError(f"checkpoint: {folder} must be readable, got {error}") from error


def _verified(folder: Path) -> Checkpoint:
    manifest = _read_manifest(folder)
    for name, wanted in manifest["files"].items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != wanted["bytes"]:
            got = "none" if size is None else f"{size} bytes"
            raise ValueError(f"checkpoint: {path} must have {wanted['bytes']} bytes, got {got}")
        digest = sha256_of(path)
        if digest != wanted["sha256"]:
            raise ValueError(
                f"checkpoint: {path} must have SHA-256 {wanted['sha256'][:12]}..., "
                f"got {digest[:12]}..."
            )
    return Checkpoint(folder, manifest["step"], manifest["world_size"], manifest["metric"])


def read_numbers(found: Checkpoint) -> dict[str, Any]:
    """Returns the `numbers` that were saved."""
    return read_index(found.folder)["numbers"]


def read_shapes(found: Checkpoint) -> dict[str, torch.Size]:
    """Returns the whole shapes of the tensors that were saved."""
    tensors = read_index(found.folder)["tensors"]
    return {name: torch.Size(entry["shape"]) for name, entry in tensors.items()}


def read_tensors(found: Checkpoint, into: dict[str, torch.Tensor]) -> None:
    """Returns None after filling tensors with those saved under their names.

    All processes call this together; with FSDP2 each gets its part, whatever parts were saved.

    Raises:
        ValueError: a name or shape is not that of a saved tensor.
    """
    plan = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    reader = PartReader(found.folder)
    _let_one_process_be()
    with _as_os_error(found.folder):
        checkpoint.load(into, storage_reader=reader, planner=plan)


def restore_generators(found: Checkpoint, device: torch.device) -> bool:
    """Returns whether this process found its random generators and took them over."""
    stem = found.folder / f"rank-{rank()}"
    if found.world_size != world_size():
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


def _described(path: Path) -> dict[str, Any]:
    """Returns size and hash of a file that is on the disk."""
    _flush(path)
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _write_manifest(partial: Path, step: int, metric: float | None, files: dict[str, Any]) -> None:
    manifest = {
        "format": FORMAT,
        "step": step,
        "world_size": world_size(),
        "metric": metric,
        "files": files,
    }
    path = partial / _MANIFEST
    path.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
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
    if not _is_manifest(manifest) or f"step-{manifest['step']:08d}" != folder.name:
        raise ValueError(f"checkpoint: {path} must be a manifest of {folder.name}, got another")
    if not {STATE} <= set(manifest["files"]):
        raise ValueError(f"checkpoint: {path} must name the state's files, got others")
    return manifest


def _is_manifest(found: Any) -> bool:
    """Returns whether JSON has the fields of a manifest, of their types."""
    if not (isinstance(found, dict) and found.get("format") == FORMAT):
        return False
    integers = isinstance(found.get("step"), int) and isinstance(found.get("world_size"), int)
    files = found.get("files")
    return (
        integers
        and isinstance(found.get("metric", ""), int | float | None)
        and isinstance(files, dict)
        and all(isinstance(f, dict) and {"bytes", "sha256"} <= f.keys() for f in files.values())
        and all(isinstance(f["sha256"], str) for f in files.values())
    )


def _prune(root: Path, keep_last: int) -> None:
    folders = sorted(_folders(root))
    metrics = {}
    for _, folder in folders:
        try:
            metric = _read_manifest(folder)["metric"]
        except (ValueError, OSError):
            continue
        if metric is not None:
            metrics[folder] = metric
    best = min(metrics, key=lambda folder: metrics[folder], default=None)
    for _, folder in folders[:-keep_last]:
        if folder != best:
            doomed = root / f"{_PARTIAL}{folder.name}"
            os.replace(folder, doomed)  # a half-removed checkpoint does not look like one
            shutil.rmtree(doomed)


def _flush(path: Path) -> None:
    """Returns None once what was written to a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
