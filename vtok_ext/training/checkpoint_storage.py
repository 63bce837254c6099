"""What torch.distributed.checkpoint stores its tensors with: safetensors and JSON, no pickles.

    part-0.safetensors     the pieces of tensors that process 0 wrote
    state.json             numbers, and for each tensor its shape, dtype and where its pieces are

torch.distributed.checkpoint decides who writes what (a tensor that all processes hold is written
once) and, when reading, which pieces make up the part that a process wants: any number of processes
can read what any other number has written. Its own storage unpickles files; this one cannot execute
anything.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import StorageReader, StorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

STATE = "state.json"
_FILES = "__files__"


class PartWriter(StorageWriter):
    """Writes the tensors of all processes into one folder.

    Args:
        folder: made by the coordinating process.
        rank: number of this process.
        prepare: called by the coordinating process before anybody writes.
        extra: called on every process; writes files of its own and returns their paths.
        describe: called with a path; returns what is known of a finished file, such as its hash.
        numbers: what JSON can hold, stored beside the tensors.
        complete: called by the coordinating process with {file name: description} when all files
            are there.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        *,
        prepare: Callable[[], None],
        extra: Callable[[], list[Path]],
        describe: Callable[[Path], Any],
        numbers: dict[str, Any],
        complete: Callable[[dict[str, Any]], None],
    ) -> None:
        self.folder, self.rank, self.numbers = folder, rank, numbers
        self.prepare, self.extra = prepare, extra
        self.describe, self.complete = describe, complete

    def reset(self, checkpoint_id=None) -> None:
        """Nothing is kept between checkpoints."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Makes the folder; the others begin after the plan, which comes after this."""
        if is_coordinator:
            self.prepare()

    def prepare_local_plan(self, plan):
        """Returns the plan as it is."""
        return plan

    def prepare_global_plan(self, plans):
        """Returns the plans as they are."""
        return plans

    def write_data(self, plan, planner) -> Future[list[WriteResult]]:
        """Returns, in a finished future, where each piece of this process is."""
        path = self.folder / f"part-{self.rank}.safetensors"
        tensors: dict[str, torch.Tensor] = {}
        results = []
        for item in plan.items:
            if item.type == WriteItemType.BYTE_IO:
                raise TypeError(
                    f"checkpoint: {item.index.fqn} must be a tensor, got another object"
                )
            key = f"{len(tensors)}"
            # A copy of its own: safetensors refuses tensors that share memory.
            piece = planner.resolve_data(item).detach()
            tensors[key] = piece.to("cpu", copy=True).contiguous()
            results.append(WriteResult(item.index, piece.nbytes, (path.name, key)))
        write_part(tensors, path)
        files = {file.name: self.describe(file) for file in [path, *self.extra()]}
        results.append(WriteResult(MetadataIndex(_FILES), 0, files))
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Writes the index and completes the checkpoint."""
        places: dict[MetadataIndex, Any] = {}
        files: dict[str, Any] = {}
        for result in (r for of_process in results for r in of_process):
            if result.index.fqn == _FILES:
                files |= result.storage_data
            else:
                places[result.index] = result.storage_data
        tensors = {
            name: _described(name, entry, places)
            for name, entry in metadata.state_dict_metadata.items()
        }
        path = self.folder / STATE
        path.write_text(json.dumps({"numbers": self.numbers, "tensors": tensors}), encoding="utf-8")
        self.complete({**files, STATE: self.describe(path)})

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id) -> bool:
        """Returns False: a folder is given to the constructor."""
        return False


def write_part(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Returns None after writing the pieces of one process."""
    from safetensors.torch import save_file

    save_file(tensors, path)


def _described(name: str, entry: Any, places: dict[MetadataIndex, Any]) -> dict[str, Any]:
    return {
        "dtype": str(entry.properties.dtype).removeprefix("torch."),
        "shape": list(entry.size),
        "pieces": [
            {
                "offset": list(chunk.offsets),
                "shape": list(chunk.sizes),
                "at": list(places[MetadataIndex(name, chunk.offsets)]),
            }
            for chunk in entry.chunks
        ],
    }


def read_index(folder: Path) -> dict[str, Any]:
    """Returns {"numbers": ..., "tensors": {name: {dtype, shape, pieces}}} of a checkpoint."""
    return json.loads((folder / STATE).read_text(encoding="utf-8"))


class PartReader(StorageReader):
    """Reads what `PartWriter` wrote; its files must have been verified before."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.places: dict[MetadataIndex, tuple[str, str]] = {}

    def reset(self, checkpoint_id=None) -> None:
        """Nothing is kept between checkpoints."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Returns the shapes of tensors and of their pieces."""
        entries: dict[str, Any] = {}
        self.places.clear()
        for name, entry in read_index(self.folder)["tensors"].items():
            chunks = []
            for piece in entry["pieces"]:
                offset, shape = torch.Size(piece["offset"]), torch.Size(piece["shape"])
                chunks.append(ChunkStorageMetadata(offset, shape))
                self.places[MetadataIndex(name, offset)] = tuple(piece["at"])
            properties = TensorProperties(getattr(torch, entry["dtype"]))
            size = torch.Size(entry["shape"])
            entries[name] = TensorStorageMetadata(properties, size, chunks)
        return Metadata(entries)

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """The coordinating process alone reads the index first; the others need it too."""
        if not self.places:
            self.read_metadata()

    def prepare_local_plan(self, plan):
        """Returns the plan as it is."""
        return plan

    def prepare_global_plan(self, plans):
        """Returns the plans as they are."""
        return plans

    @torch.no_grad()
    def read_data(self, plan, planner) -> Future[None]:
        """Returns a finished future after filling the tensors of the plan."""
        from safetensors import safe_open

        for name in sorted({self.places[item.storage_index][0] for item in plan.items}):
            with safe_open(self.folder / name, "pt") as file:
                for item in plan.items:
                    file_name, key = self.places[item.storage_index]
                    if file_name == name:
                        target = planner.resolve_tensor(item).detach()
                        target.copy_(_piece(file, key, item.storage_offsets, item.lengths))
                        planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id) -> bool:
        """Returns False: a folder is given to the constructor."""
        return False


def _piece(file: Any, key: str, offsets: torch.Size, lengths: torch.Size) -> torch.Tensor:
    """Returns a box of a stored tensor; only that is read from the disk."""
    if not lengths:
        return file.get_tensor(key)
    box = tuple(slice(o, o + n) for o, n in zip(offsets, lengths, strict=True))
    return file.get_slice(key)[box]
