"""Token and latent files written and read in portions, and the saved state of a stream.

`EncodingWriter` makes the files of `Tokens.save` and `Encoding.save` without holding their content:
it leaves room for the header, appends portions in order of time and writes the header last. Latents
lie time first, [t, C, h, w]. A state file is a safetensors file with JSON in the header.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import torch
from torch import Tensor

from vtok_ext.models._persistence import atomic_path
from vtok_ext.models.encoding import FORMAT_VERSION, TIME_FIRST, _EncodingFile

# Length field and header of a safetensors file; the header is padded with spaces to fill it.
_HEADER_BYTES = 4096
_DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.int64: "I64",
}
STATE_FORMAT = "vtok_ext.stream_state"


class EncodingWriter:
    """Writes the encoding of one video in portions; the file is none until `finish`.

    Args:
        path: file to write, or to go on writing.
        kind: "tokens" or "encoding".
        num_bytes: how much of an existing file to keep, `num_bytes` of the writer that began it; 0
            starts anew.

    Raises:
        ValueError: the file is shorter than `num_bytes`.
        OSError: writing failed.
    """

    def __init__(self, path: str | os.PathLike, kind: str, num_bytes: int = 0) -> None:
        self.path, self.kind = os.fspath(path), kind
        self.shape: tuple[int, ...] | None = None  # of one moment: [h, w] or [C, h, w]
        self.dtype: torch.dtype | None = None
        found = os.path.getsize(self.path) if num_bytes else 0
        if found < num_bytes:
            raise ValueError(
                f"encoding_writer: {self.path!r} must have {num_bytes} bytes to go on, got {found}"
            )
        self._file: BinaryIO = open(self.path, "r+b" if num_bytes else "wb")
        self.num_bytes = num_bytes or _HEADER_BYTES
        self._file.truncate(self.num_bytes)
        self._file.seek(self.num_bytes)

    def append(self, portion: Tensor) -> None:
        """Writes the next ids [1, t, h, w] or latents [1, C, t, h, w].

        Raises:
            ValueError: not a single clip, or another size or dtype than before.
        """
        rank = 4 if self.kind == "tokens" else 5
        if portion.dim() != rank or portion.shape[0] != 1 or portion.dtype not in _DTYPES:
            raise ValueError(
                f"encoding_writer: a portion must be one clip of rank {rank}, "
                f"got {list(portion.shape)} {portion.dtype}"
            )
        rows = portion.detach()[0] if rank == 4 else portion.detach()[0].transpose(0, 1)
        shape = tuple(rows.shape[1:])
        if self.shape not in (None, shape) or self.dtype not in (None, rows.dtype):
            raise ValueError(
                f"encoding_writer: every portion must be {self.shape} {self.dtype} as before, "
                f"got {shape} {rows.dtype}"
            )
        self.shape, self.dtype = shape, rows.dtype
        content = rows.cpu().contiguous().view(torch.uint8).numpy().tobytes()
        self._file.write(content)
        self.num_bytes += len(content)

    def flush(self) -> None:
        """Returns when all that was written is on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def finish(self, facts: Mapping[str, Any]) -> list[int]:
        """Returns [t, h, w] after writing the header and closing the file.

        Args:
            facts: num_frames, size, fps, model_id and frame_rule, as in `Tokens` and `Encoding`.

        Raises:
            ValueError: nothing was appended.
        """
        if self.shape is None or self.dtype is None:
            raise ValueError("encoding_writer: an encoding must have latents, got none")
        row_bytes = self.dtype.itemsize
        for extent in self.shape:
            row_bytes *= extent
        count = (self.num_bytes - _HEADER_BYTES) // row_bytes
        description = {"format": f"vtok_ext.{self.kind}", "version": FORMAT_VERSION, **facts}
        if self.kind == "tokens":
            name, shape = "ids", [1, count, *self.shape]
            description["grid"] = shape[1:]
        else:
            name, shape = "latent", [count, *self.shape]
            description["layout"] = TIME_FIRST
        header = {
            "__metadata__": {"vtok_ext": json.dumps(description)},
            name: {
                "dtype": _DTYPES[self.dtype],
                "shape": shape,
                "data_offsets": [0, self.num_bytes - _HEADER_BYTES],
            },
        }
        text = json.dumps(header).encode().ljust(_HEADER_BYTES - 8)
        if len(text) > _HEADER_BYTES - 8:
            raise ValueError("encoding_writer: facts must fit into 4 kB, got more")
        self._file.seek(0)
        self._file.write(len(text).to_bytes(8, "little") + text)
        self.flush()
        self._file.close()
        return [count, *self.shape[-2:]]

    def close(self) -> None:
        """Returns None after closing the file as it is; safe to call twice."""
        self._file.close()


class EncodingReader:
    """A file of `Tokens`, `Encoding` or `EncodingWriter`, read in portions of one clip.

    Use as a context manager.

    Attributes:
        kind: "tokens" or "encoding".
        is_planes: whether there are no portions: a dict of planes, or a sequence [1, L] or
            [1, L, D].
        num_latents: t; 0 without portions.
        num_frames, size, fps, frame_rule, model_id: as in `Tokens` and `Encoding`.
        normalized: whether latents were normalised by the model's statistics, as in `Encoding`.
        chunk_frames: of the published chunked encoding, None for any other.

    Raises:
        FileNotFoundError, ValueError: not such a file, or more than one clip.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.kind = encoding_kind(path)
        self._reader = _EncodingFile(path, self.kind)

    def __enter__(self) -> EncodingReader:
        reader = self._reader.__enter__()
        self._name = "ids" if self.kind == "tokens" else "latent"
        planes = [shape for name, shape in reader.shapes.items() if name.startswith("latent.")]
        self.is_planes = self.kind == "encoding" and bool(planes)
        shape: Any = reader.shapes.get(self._name)
        time_first = reader.facts.get("layout") == TIME_FIRST
        rank = 4 if self.kind == "tokens" or time_first else 5
        if shape is not None and not time_first and len(shape) == rank - 2:
            self.is_planes, one_clip = True, shape[0] == 1
        elif self.is_planes:
            shape, one_clip = f"{planes[0][:1]} clips of planes", planes[0][:1] == [1]
        else:
            one_clip = shape is not None and len(shape) == rank and (time_first or shape[0] == 1)
        if not one_clip:
            self.__exit__(None, None, None)
            reader.fail(f"{self._name} must be those of one clip, got {shape}")
        self._axis = 0 if time_first else rank - 3
        self.num_latents = 0 if self.is_planes else shape[self._axis]
        self.num_frames, self.size, self.fps = (
            reader.integer("num_frames"),
            reader.size(),
            reader.fps(),
        )
        self.frame_rule, self.model_id = reader.frame_rule(), reader.model_id()
        self.chunk_frames = reader.chunk_frames()
        self.normalized = reader.facts.get("normalized") is True
        return self

    def __exit__(self, *error: object) -> None:
        self._reader.__exit__(*error)

    def chunks(self, num_latents: int) -> Iterator[Tensor]:
        """Yields ids [1, t, h, w] or latents [1, C, t, h, w], t = `num_latents` but for the end."""
        for start in range(0, self.num_latents, num_latents):
            portion = self._reader.part(self._name, self._axis, start, start + num_latents)
            yield portion if self._axis else portion.transpose(0, 1)[None]


def encoding_kind(path: str | os.PathLike) -> str:
    """Returns "tokens" or "encoding". Raises FileNotFoundError or ValueError for another file."""
    for kind in ("tokens", "encoding"):
        try:
            with _EncodingFile(path, kind):
                return kind
        except ValueError as error:
            reason = error
    raise ValueError(
        f"encoding: {os.fspath(path)!r} must be a token or latent file, got another"
    ) from reason


def save_stream_state(
    path: str | os.PathLike, state: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> None:
    """Writes what `state_dict()` of a stream gives and JSON values; complete or not at all."""
    from safetensors.torch import save_file

    header = {"format": STATE_FORMAT, "version": FORMAT_VERSION, "facts": dict(facts)}
    with atomic_path(path) as temporary:
        save_file(dict(state), temporary, metadata={"vtok_ext": json.dumps(header)})


def load_stream_state(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns (state, facts) of `save_stream_state`.

    Sizes are checked against the file before anything is allocated.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it is another one.
    """
    from safetensors import SafetensorError, safe_open

    if not os.path.isfile(path):
        raise FileNotFoundError(f"stream state: {os.fspath(path)!r} must be a file, got none")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("vtok_ext", "null"))
            known = isinstance(header, dict) and header.get("format") == STATE_FORMAT
            if not known or header.get("version") != FORMAT_VERSION:
                raise ValueError("another kind of file or version")
            if not isinstance(header.get("facts"), dict):
                raise ValueError("no facts")
            return {name: file.get_tensor(name) for name in file.keys()}, header["facts"]
    except (SafetensorError, ValueError) as error:
        raise ValueError(
            f"stream state: {os.fspath(path)!r} must be the state of a stream, got {error}"
        ) from error
