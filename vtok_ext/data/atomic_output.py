"""Files and folders that appear complete or not at all.

Work goes to a hidden sibling on the same file system and is renamed at the end, so that a reader
never meets a half-written result and a failure (full disk, Ctrl-C) leaves nothing behind.
"""

from __future__ import annotations

import glob
import os
import shutil
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path


def temporary_sibling(path: Path) -> Path:
    """Returns a hidden, unused name in the folder of `path`, ending in the same suffix.

    The suffix is kept because encoders choose a container by it.
    """
    return path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.partial{path.suffix}")


def remove_partials(path: Path) -> None:
    """Returns None after removing what killed processes left of their tries to write `path`.

    Args:
        path: a file that nobody else is writing now; itself it stays.
    """
    for partial in path.parent.glob(f".{glob.escape(path.stem)}.*.partial{path.suffix}"):
        partial.unlink(missing_ok=True)


def check_output_file(path: Path, op: str, name: str = "output") -> None:
    """Returns None if a file can be created at `path`; checked before hours of work, not after.

    Args:
        path: the file to be written; an existing regular file will be replaced.
        op: name used in front of the error.
        name: what the error calls the file.

    Raises:
        ValueError: `path` is a folder, its parent is not a folder, or the parent is read-only.
    """
    if path.is_dir():
        raise ValueError(f"{op}: {name} must be a file, got the folder {path}")
    if not path.parent.is_dir():
        raise ValueError(f"{op}: {name} must lie in an existing folder, got {path}")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"{op}: {name} must lie in a writable folder, got {path}")


@contextmanager
def output_file(path: str | Path, op: str = "output_file") -> Iterator[Path]:
    """Yields a temporary name; on success it is renamed to `path`, on any exception removed.

    Args:
        path: final name; an existing file is replaced only at the moment of success.
        op: name used in front of an error.

    Raises:
        ValueError: `path` cannot be a file here (see `check_output_file`).
        OSError: writing failed, for instance for want of space.
    """
    final = Path(path)
    check_output_file(final, op)
    partial = temporary_sibling(final)
    try:
        yield partial
        os.replace(partial, final)
    finally:
        partial.unlink(missing_ok=True)


def _is_empty_or_replaceable(folder: Path, replaceable: Callable[[Path], bool]) -> bool:
    return next(folder.iterdir(), None) is None or replaceable(folder)


def check_output_folder(folder: Path, replaceable: Callable[[Path], bool], op: str) -> None:
    """Returns None if `folder` can be created, or replaces something that may be replaced.

    Args:
        folder: the folder to be written.
        replaceable: says of an existing, non-empty folder whether it may be replaced.
        op: name used in front of the error.

    Raises:
        ValueError: a file is in the way, the parent is no writable folder, or what is there
            must not be replaced.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{op}: output must be a folder, got the file {folder}")
    if folder.is_dir() and not _is_empty_or_replaceable(folder, replaceable):
        raise ValueError(
            f"{op}: output must be a new or empty folder, or one made by the same command, "
            f"got {folder}"
        )
    parent = folder.absolute().parent
    if not parent.is_dir():
        raise ValueError(f"{op}: output must lie in an existing folder, got {folder}")
    if not os.access(parent, os.W_OK):
        raise ValueError(f"{op}: output must lie in a writable folder, got {folder}")


def refuse_foreign_files(folder: Path, own: Collection[str], op: str) -> None:
    """Returns None if `folder` holds nothing but files that one command wrote.

    Args:
        folder: one that the command is about to replace, which deletes what is in it.
        own: names of these files, relative to `folder`, with slashes; they need not all be there.
        op: name used in front of the error.

    Raises:
        ValueError: there is another file; it is named.
    """
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name not in own and (path.is_symlink() or not path.is_dir()):
            raise ValueError(
                f"{op}: output must be a folder with nothing but what the same command wrote to be "
                f"replaced, got {folder} with {name}"
            )


@contextmanager
def output_folder(
    folder: str | Path, *, replaceable: Callable[[Path], bool], op: str = "output_folder"
) -> Iterator[Path]:
    """Yields a temporary folder; on success it takes the place of `folder`, else it is removed.

    Args:
        folder: final name.
        replaceable: says of an existing, non-empty folder whether it may be replaced.
        op: name used in front of an error.

    Raises:
        ValueError: see `check_output_folder`.
        OSError: writing failed, for instance for want of space.
    """
    final = Path(folder).absolute()
    check_output_folder(final, replaceable, op)
    partial = temporary_sibling(final)
    previous = temporary_sibling(final)
    partial.mkdir()
    try:
        yield partial
        if final.exists():
            check_output_folder(final, replaceable, op)  # again: files may have come meanwhile
            os.replace(final, previous)
        try:
            os.replace(partial, final)
        except OSError:
            if previous.exists():
                os.replace(previous, final)
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(previous, ignore_errors=True)
