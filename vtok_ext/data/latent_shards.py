"""Tokenized data sets on disk, and as a data set of latents for generators.

    FOLDER/manifest.json                what made it; written when everything is there
    FOLDER/shards/00000.safetensors     latents, or ids, of some videos
    FOLDER/shards/00000.json            one entry per latent, the videos left out, hash of the above

A latent is [C, t, h, w], ids are int32 [t, h, w], planes [rows, columns, C] are tensors KEY.PLANE.
Everything is a function of model, videos and settings: made again, a shard has the same bytes.
"""

from __future__ import annotations

import json
import operator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, SupportsIndex

from torch import Tensor

from vtok_ext.data.atomic_output import output_file, remove_partials
from vtok_ext.data.file_hash import sha256_of
from vtok_ext.models.latent_statistics import Latent, LatentStatistics

FORMAT = "vtok_ext.latents"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_MAX_JSON_BYTES = 1 << 30
_FACTS = {"settings", "sha256", "bytes", "entries", "unreadable"}


@dataclass(frozen=True)
class Shard:
    """One shard of a folder: `number` from 0."""

    folder: Path
    number: int

    @property
    def tensors(self) -> Path:
        """File of the latents."""
        return self.folder / "shards" / f"{self.number:05d}.safetensors"

    @property
    def entries(self) -> Path:
        """File of what they are; its existence says that the shard is complete."""
        return self.folder / "shards" / f"{self.number:05d}.json"

    def write(
        self,
        tensors: dict[str, Tensor],
        entries: list[dict[str, Any]],
        unreadable: list[dict[str, str]],
        settings: str,
    ) -> None:
        """Returns None when both files are there; a kill leaves an incomplete or a complete shard.

        What earlier kills left of this shard is removed; nobody else may write it at the same time.

        Args:
            tensors: of all entries, by key.
            entries: facts of each latent, JSON values; see `tokenizing`.
            unreadable: name and reason of every video left out.
            settings: hash of what the shard is made with.
        """
        from safetensors.torch import save_file

        self.tensors.parent.mkdir(parents=True, exist_ok=True)
        for path in (self.tensors, self.entries):
            remove_partials(path)
        self.entries.unlink(missing_ok=True)  # of other settings: it must not vouch for new tensors
        with output_file(self.tensors, "tokenize") as partial:
            save_file(tensors, partial, {"format": FORMAT})
            digest, size = sha256_of(partial), partial.stat().st_size
        facts = {
            "settings": settings,
            "sha256": digest,
            "bytes": size,
            "entries": entries,
            "unreadable": unreadable,
        }
        with output_file(self.entries, "tokenize") as partial:
            partial.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")

    def read(self, settings: str | None = None, *, verify: bool = False) -> dict[str, Any] | None:
        """Returns the facts of a complete shard, None if it is not complete.

        Args:
            settings: the hash it must have; None for any.
            verify: read the latents, whose bytes must have the recorded hash too.
        """
        try:
            facts = read_object("LatentDataset", self.entries)
            size = self.tensors.stat().st_size
            right = facts.keys() >= _FACTS and facts["bytes"] == size
            right = right and isinstance(facts["entries"], list)
            right = right and settings in (None, facts["settings"])
            right = right and (not verify or sha256_of(self.tensors) == facts["sha256"])
        except (OSError, ValueError):
            return None
        return facts if right else None


def write_manifest(folder: Path, facts: dict[str, Any], num_shards: int) -> dict[str, Any]:
    """Returns the manifest after writing it.

    Args:
        folder: of the data set.
        facts: what made it.
        num_shards: all of which must be complete.

    Raises:
        ValueError: a shard is missing.
    """
    shards, num_items, unreadable = [], 0, []
    for number in range(num_shards):
        shard = Shard(folder, number)
        found = shard.read(facts["settings_hash"])
        if found is None:
            raise ValueError(f"tokenize: shard {number} must be complete, got none in {folder}")
        shards.append({"items": len(found["entries"]), "sha256": found["sha256"]})
        num_items += len(found["entries"])
        unreadable += found["unreadable"]
    manifest = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        **facts,
        "items": num_items,
        "unreadable": unreadable,
        "shards": shards,
    }
    remove_partials(folder / MANIFEST)
    with output_file(folder / MANIFEST, "tokenize") as partial:
        partial.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


class LatentDataset:
    """Latents of a folder that `vtok tokenize` wrote: index -> latent, or (latent, label).

    A latent is a Tensor [C, t, h, w], a dict of planes, or for tokens integer ids [t, h, w]. An
    index may be an integer, or (epoch, index) as `step_batches` asks for. Only what is asked for is
    read; objects can be copied to workers.

    Args:
        folder: where it is.
        label: field of the videos (a class number, a caption) that comes with each latent; None for
            latents alone.
        statistics: normalise latents by these, such as `model.latent_statistics`; None not to.
        verify: compare each shard with its recorded hash before the first latent of it is read,
            which takes reading all of it.

    Attributes:
        manifest: what made the data set: `model_id`, `kind`, `temporal_factor`, ...
        entries: facts of every latent: video, timestamps in `time_base`, fps (their mean rate, None
            for a single frame), num_frames, size, padded size, fields of the video.

    Raises:
        FileNotFoundError, ValueError: no such data set, an incomplete or damaged one, or one whose
            videos lack the label.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        label: str | None = None,
        statistics: LatentStatistics | None = None,
        verify: bool = False,
    ) -> None:
        self.folder, self.label, self.statistics = Path(folder), label, statistics
        self._verify = verify
        path = self.folder / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(
                f"LatentDataset: folder must be a finished one of vtok tokenize, got {folder}"
            )
        self.manifest = read_object("LatentDataset", path)
        if self.manifest.get("format") != FORMAT or self.manifest.get("version") != FORMAT_VERSION:
            raise ValueError(f"LatentDataset: {path} must be a manifest of latents, got another")
        if statistics is not None and self.manifest["kind"] != "latent":
            raise ValueError("LatentDataset: statistics must be None for tokens, got some")
        self.entries: list[dict[str, Any]] = []
        self._shard_of: list[int] = []
        for number, listed in enumerate(self.manifest["shards"]):
            facts = Shard(self.folder, number).read(self.manifest["settings_hash"])
            if facts is None or facts["sha256"] != listed["sha256"]:
                raise self._damaged(number)
            self.entries += facts["entries"]
            self._shard_of += [number] * len(facts["entries"])
        lacking = [e["video"] for e in self.entries if label and label not in e["fields"]]
        if lacking:
            raise ValueError(
                f"LatentDataset: every video must have the field {label!r}, got none of "
                f"{len(lacking)}, the first {lacking[0]}"
            )
        self._open: dict[int, Any] = {}

    def __len__(self) -> int:
        """Number of latents."""
        return len(self.entries)

    def __getitem__(self, place: SupportsIndex | tuple[int, int]) -> Any:
        """Returns the latent, or (latent, label), at an index."""
        index = operator.index(place[1] if isinstance(place, tuple | list) else place)
        latent = self._normalized(self._read(index, slice(None)))
        if self.label is None:
            return latent
        return latent, self.entries[index]["fields"][self.label]

    def window(self, index: int, start: int, count: int) -> tuple[Tensor, int]:
        """Returns (latent, n): latent frames start .. start + count - 1, and n before them.

        The n frames warm the decoder up: with them in front it gives the same video as from the
        whole latent, once what it makes of them is thrown away.

        Args:
            index: of the latent.
            start, count: in latent frames.

        Raises:
            ValueError: the window is not within the latent, the latents are planes, or the decoder
                needs everything before (`warmup_latents` is null).
        """
        warmup, length = self.manifest["warmup_latents"], self.entries[index]["latent_frames"]
        if warmup is None or length is None or not 0 <= start < start + count <= length:
            raise ValueError(
                f"LatentDataset: a window must lie in 0..{length} of a latent that can be cut, "
                f"got {start}..{start + count}"
            )
        before = min(start, warmup)
        latent = self._normalized(self._read(index, slice(start - before, start + count)))
        assert isinstance(latent, Tensor)  # planes have no latent frames
        return latent, before

    def _normalized(self, latent: Latent) -> Latent:
        if self.statistics is None:
            return latent
        if isinstance(latent, Tensor):
            return self.statistics.normalize_as_given(latent[None])[0]  # type: ignore[index]
        batch = {name: plane[None] for name, plane in latent.items()}
        found = self.statistics.normalize_as_given(batch)
        return {name: plane[0] for name, plane in found.items()}  # type: ignore[union-attr]

    def _read(self, index: int, frames: slice) -> Latent:
        from safetensors import safe_open

        number, entry = self._shard_of[index], self.entries[index]
        if number not in self._open:
            shard = Shard(self.folder, number)
            if self._verify and shard.read(verify=True) is None:
                raise self._damaged(number)
            self._open[number] = safe_open(shard.tensors, framework="pt").__enter__()
        file = self._open[number]
        if entry["planes"]:
            return {name: file.get_tensor(f"{entry['key']}.{name}") for name in entry["planes"]}
        if frames == slice(None):
            return file.get_tensor(entry["key"])
        axes = (frames,) if self.manifest["kind"] == "tokens" else (slice(None), frames)
        return file.get_slice(entry["key"])[axes]

    def _damaged(self, number: int) -> ValueError:
        return ValueError(
            f"LatentDataset: shard {number} of {self.folder} must be complete and as it was "
            "written, got another; vtok tokenize --resume makes it again"
        )

    def __getstate__(self) -> dict[str, Any]:
        """Open files stay with the process that opened them."""
        return {**self.__dict__, "_open": {}}


def read_object(op: str, path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file.

    Args:
        op: name in front of messages.
        path: the file.

    Raises:
        OSError: it cannot be read.
        ValueError: it holds something else.
    """
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise ValueError(f"{op}: {path} must be <= 1 GiB, got a larger file")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{op}: {path} must be JSON, got {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{op}: {path} must be an object, got {type(values).__name__}")
    return values
