"""Where videos are: a folder, VidTok's CSV, JSON lines, or WebDataset tars; as one sorted list.

    folder       all video files in it and below; if it has none, all its .tar files
    *.csv        a column `videos` with paths below `root`, UTF-8 or else ISO-8859-1 as published
    *.jsonl      an object per line: "video" (or "path"), and anything else as fields
    *.tar        WebDataset: files of one name before the first dot are one sample

A video within a tar is known by its place, so that tars are read in any order like files. Nothing
is extracted, names lead nowhere outside the tar.
"""

from __future__ import annotations

import csv
import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v")
_FIELD_KINDS = ("json", "txt", "cls")
_MAX_FIELD_BYTES = 1 << 20


@dataclass(frozen=True)
class VideoItem:
    """One video.

    Attributes:
        name: unique within the list; the path relative to the source.
        path: the file, or the tar that holds it.
        offset, size: place in the tar; None for a file of its own.
        fields: what else the source says of it, such as a caption or a label.
    """

    name: str
    path: Path
    offset: int | None = None
    size: int | None = None
    fields: dict[str, Any] = field(default_factory=dict, compare=False)

    def content(self) -> bytes | None:
        """Returns the bytes of a video within a tar, None for a file of its own.

        Raises:
            OSError: the tar is shorter than it was.
        """
        if self.offset is None or self.size is None:
            return None
        with self.path.open("rb") as file:
            file.seek(self.offset)
            content = file.read(self.size)
        if len(content) != self.size:
            raise OSError(f"list_videos: {self.path} must hold {self.name}, got a shorter file")
        return content


def source_exists(source: str | Path) -> bool:
    """Returns whether there is a source as `list_videos` takes it; a pattern may match nothing."""
    path = Path(source)
    return _is_pattern(path) or path.is_dir() or path.is_file()


def _is_pattern(path: Path) -> bool:
    return "*" in path.name


def list_videos(
    source: str | Path,
    *,
    root: str | Path | None = None,
    fraction: float = 1.0,
    warn: Callable[[str], None] = lambda line: None,
) -> list[VideoItem]:
    """Returns the videos of a source, in an order that depends on nothing else.

    Args:
        source: folder, .csv, .jsonl or .tar file, or a pattern of tars such as "shards/*.tar".
        root: where the paths of a CSV or JSONL begin; default the folder of that file.
        fraction: keep the first so many of the list (VidTok's `data_frac`), in (0, 1].
        warn: called with one line for every entry that is left out.

    Raises:
        FileNotFoundError: there is no such source.
        ValueError: it is of another kind, or damaged as a whole, or has no videos.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"list_videos: fraction must be in (0, 1], got {fraction}")
    path = Path(source)
    if not source_exists(path):
        raise FileNotFoundError(f"list_videos: source must exist, got {path}")
    if _is_pattern(path):
        tars = sorted(path.parent.glob(path.name))
        items = [item for tar in tars for item in _of_tar(tar, warn)]
    elif path.is_dir():
        items = _of_folder(path, warn)
    elif path.suffix == ".tar":
        items = list(_of_tar(path, warn))
    elif path.suffix in (".csv", ".jsonl"):
        read = _of_csv if path.suffix == ".csv" else _of_json_lines
        items = list(read(path, path.parent if root is None else Path(root), warn))
    elif path.suffix.lower() in VIDEO_SUFFIXES:
        items = [VideoItem(path.name, path)]
    else:
        raise ValueError(
            f"list_videos: source must be a folder, .csv, .jsonl, .tar or video file, got {path}"
        )
    kept = items[: max(1, round(len(items) * fraction))]
    if not kept:
        raise ValueError(f"list_videos: source must name videos, got none in {path}")
    return kept


def _of_folder(folder: Path, warn: Callable[[str], None]) -> list[VideoItem]:
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in VIDEO_SUFFIXES)
    if files:
        return [VideoItem(p.relative_to(folder).as_posix(), p) for p in files]
    return [
        item
        for tar in sorted(folder.rglob("*.tar"))
        for item in _of_tar(tar, warn, tar.relative_to(folder).as_posix())
    ]


def _of_csv(path: Path, root: Path, warn: Callable[[str], None]) -> Iterator[VideoItem]:
    with path.open(encoding=_encoding_of(path), newline="") as file:
        rows = csv.reader(file)
        header = next(rows, [])
        if "videos" not in header:
            raise ValueError(f"list_videos: {path} must have a column videos, got {header}")
        column = header.index("videos")
        for row in _rows(path, rows, warn):
            if len(row) > len(header) or len(row) <= column or not row[column].strip():
                if row:
                    warn(f"{path}, line {rows.line_num}: no video, got {','.join(row)[:80]!r}")
                continue
            others = {
                name: value
                for i, (name, value) in enumerate(zip(header, row, strict=False))
                if i != column
            }
            yield VideoItem(row[column], root / row[column], fields=others)


def _encoding_of(path: Path) -> str:
    """Returns UTF-8, with or without a mark in front, if all of a file is; else ISO-8859-1.

    The latter, and to skip bad lines, is the published reader's way. It takes any bytes, and its
    accented letters are hardly ever UTF-8 by chance.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for _ in file:
                pass
    except UnicodeDecodeError:
        return "iso-8859-1"
    return "utf-8-sig"


def _rows(path: Path, rows: Any, warn: Callable[[str], None]) -> Iterator[list[str]]:
    """Yields the rows of a csv.reader, past those that it cannot read."""
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            warn(f"{path}, line {rows.line_num}: no row, got {error}")
            continue
        if any("\n" in value for value in row):
            warn(
                f"{path}, line {rows.line_num}: a value goes over several lines; if it should not, "
                "a quote before is not closed, and what is between is lost"
            )
        yield row


def _of_json_lines(path: Path, root: Path, warn: Callable[[str], None]) -> Iterator[VideoItem]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                values = json.loads(line.decode("utf-8-sig"))
                name = values.pop("video", None) or values.pop("path")
                yield VideoItem(str(name), root / str(name), fields=values)
            except (ValueError, KeyError, AttributeError, TypeError):
                shown = line.decode("utf-8", "replace").strip()[:80]
                warn(f"{path}, line {number}: no object with a video, got {shown!r}")


def _of_tar(
    path: Path, warn: Callable[[str], None], source: str | None = None
) -> Iterator[VideoItem]:
    """Yields the samples of an uncompressed tar, sorted by name.

    Args:
        path: the tar.
        warn: called with one line for every member of a sample that is left out, and one for all
            members that are neither video nor field.
        source: what names of videos begin with; None for the name of the tar.
    """
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    others: list[str] = []
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isdir() and not _add(samples, member, path, warn):
                    others.append(member.name)
    except tarfile.TarError as error:
        warn(f"{path} must be an uncompressed tar, got {error}")
    if others:
        warn(f"{path}: {len(others)} members are no video or field, the first {others[0]}")
    for key in sorted(samples):
        sample = samples[key]
        if "video" not in sample:
            warn(f"{path}: sample {key} has no video")
            continue
        video = sample.pop("video")
        name = f"{path.name if source is None else source}/{video.name}"
        fields = _read_fields(path, key, sample, warn)
        yield VideoItem(name, path, video.offset_data, video.size, fields)


def _add(
    samples: dict[str, dict[str, tarfile.TarInfo]],
    member: tarfile.TarInfo,
    path: Path,
    warn: Callable[[str], None],
) -> bool:
    """Returns whether a member is a video or field; it is put in its sample, or named if left out.

    Of two for one place the later counts, as the later of one name does within any tar.
    """
    name = PurePosixPath(member.name)
    stem, _, kind = name.name.partition(".")
    kind, key = kind.lower(), str(name.parent / stem)
    is_video = f".{kind}" in VIDEO_SUFFIXES
    if not member.isfile():
        return False
    if not is_video and kind not in _FIELD_KINDS:
        if name.suffix.lower() not in VIDEO_SUFFIXES:
            return False
        warn(f"{path}: {member.name} must have one dot, that of its kind; it is left out")
        return True
    if not is_video and member.size > _MAX_FIELD_BYTES:
        warn(f"{path}: {member.name} must be <= 1 MiB, got {member.size} bytes; it is left out")
        return True
    sample, place = samples.setdefault(key, {}), "video" if is_video else kind
    if place in sample:
        what = "video" if is_video else f".{kind}"
        warn(f"{path}: sample {key} must have one {what}, {sample[place].name} is left out")
    sample[place] = member
    return True


def _read_fields(
    path: Path, key: str, members: dict[str, tarfile.TarInfo], warn: Callable[[str], None]
) -> dict[str, Any]:
    """Returns the text and JSON members of a sample: .json is merged, .txt is the caption, ..."""
    found: dict[str, Any] = {}
    with path.open("rb") as file:
        for kind, member in members.items():
            file.seek(member.offset_data)
            try:
                text = file.read(member.size).decode("utf-8")
                if kind == "json":
                    values = json.loads(text)
                    found |= values if isinstance(values, dict) else {"json": values}
                elif kind in ("txt", "cls"):
                    found[{"txt": "caption", "cls": "label"}[kind]] = text.strip()
            except ValueError as error:
                warn(f"{path}: {key}.{kind} is left out, {error}")
    return found
