"""How many bytes a video file lacks, read from its container structure alone.

Decoders end a truncated file silently: the last frames are just not there. The structure says how
long the file should be. ISO base media (mp4, mov; ISO/IEC 14496-12, section 4.2) is a chain of
boxes [size: u32 big endian, type: 4 bytes], size 1 meaning a u64 size follows and 0 "to the end of
the file". Matroska (RFC 8794, RFC 9559) is an EBML header element followed by one Segment element.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

_ISO_FIRST_BOXES = {b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot"}
_ISO_ESSENTIAL_BOXES = {b"ftyp", b"moov", b"mdat", b"moof"}
_EBML_HEADER_ID = b"\x1a\x45\xdf\xa3"
_SEGMENT_ID = b"\x18\x53\x80\x67"


def missing_bytes(path: Path) -> int:
    """Returns the number of bytes that the container promises beyond the end of the file.

    0 for a complete file, and for container formats other than ISO base media and Matroska.

    Args:
        path: a regular file.
    """
    file_size = os.path.getsize(path)
    with path.open("rb") as file:
        head = file.read(8)
        file.seek(0)
        if head[4:8] in _ISO_FIRST_BOXES:
            end = _iso_end(file, file_size)
        elif head[:4] == _EBML_HEADER_ID:
            end = _matroska_end(file)
        else:
            return 0
    return max(0, end - file_size)


def _iso_end(file: BinaryIO, file_size: int) -> int:
    """Returns the offset at which the last top-level box that a player needs ends."""
    position = 0
    has_index = False
    while position < file_size:
        file.seek(position)
        header = file.read(16)
        if len(header) < 8:
            return file_size if has_index else position + 8
        size, kind = int.from_bytes(header[:4], "big"), header[4:8]
        if size == 1:
            size = int.from_bytes(header[8:16], "big")
        if kind not in _ISO_ESSENTIAL_BOXES and position + size > file_size:
            return file_size  # a trailer of some other kind: players do not mind, nor do we
        if size < 8:  # 0 means "to the end of the file", anything else is no box
            return file_size
        has_index = has_index or kind == b"moov"
        position += size
    return position


def _matroska_end(file: BinaryIO) -> int:
    """Returns the offset at which the Segment ends, 0 if it does not say (a live stream)."""
    file.seek(4)
    header_size = _ebml_size(file)
    if header_size is None:
        return 0
    file.seek(header_size, os.SEEK_CUR)
    if file.read(4) != _SEGMENT_ID:
        return 0
    segment_size = _ebml_size(file)
    return 0 if segment_size is None else file.tell() + segment_size


def _ebml_size(file: BinaryIO) -> int | None:
    """Returns the data size that stands at the current position, None if unknown.

    The count of leading zero bits of the first byte gives the number of further bytes.
    """
    first = file.read(1)
    if not first or first[0] == 0:
        return None
    length = 9 - first[0].bit_length()
    value = int.from_bytes(bytes([first[0] & (0xFF >> length)]) + file.read(length - 1), "big")
    return None if value == (1 << (7 * length)) - 1 else value
