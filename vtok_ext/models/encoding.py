"""What encoding a video returns, and its file form: one safetensors file with JSON in the header.

    Encoding   latent and all that decoding and training need
    Tokens     integer ids of a discrete model
    Output     reconstruction and encoding, the result of `forward`

Both files are written under a temporary name and renamed; loading checks names, dtypes and shapes
in the header before it allocates anything, and executes nothing.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from typing import Any

import torch
from torch import Tensor

from vtok_ext.models._persistence import atomic_path
from vtok_ext.models._video_input import FRAME_RULES

FORMAT_VERSION = 1
# Layout of a latent that was written in portions: [t, C, h, w] of one clip.
TIME_FIRST = "time_first"
ID_DTYPES = (torch.int32, torch.int64)
# Tensors of an encoding that not every model gives.
_OPTIONAL = ("indices", "moments", "positions")


@dataclasses.dataclass
class Encoding:
    """An encoded clip.

    Attributes:
        latent: [B, C, t, h, w] in the model's dtype; or a dict of planes [B, rows, columns, C] by
            name.
        num_frames: T of the clip; decoding returns that many frames.
        size: (H, W) of the clip; decoding returns that size.
        indices: int32 [B, t, h, w] codebook indices; None for a continuous model.
        moments: [B, 2 C, t, h, w] posterior mean and log variance; None for a discrete model.
        losses: scalar training losses by name (`kl_loss`, `aux_loss`), for the whole batch.
        fps: frames per second of the clip, None when unknown.
        frame_rule: "preserve" or "reference", how frames and latents correspond; see `encode`.
        model_id: `VideoTokenizer.model_id` of the model it is from, "" when unknown: `encode`
            leaves it empty, files that the command line writes have it.
        positions: int32 [B, L, 2] of a sequence latent [B, L, D]: frame and slot of each token, see
            `VTok`; None for other latents.
        normalized: whether the latent was normalised by the model's statistics (`normalize=True`).
        chunk_frames: frames per chunk after the first frame, of a clip encoded in the published
            chunks of VidTok 1.1 and decoded so (see `vidtok_published`); None for any other.
    """

    latent: Tensor | dict[str, Tensor]
    num_frames: int
    size: tuple[int, int]
    indices: Tensor | None = None
    moments: Tensor | None = None
    losses: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    fps: float | None = None
    frame_rule: str = "preserve"
    model_id: str = ""
    positions: Tensor | None = None
    normalized: bool = False
    chunk_frames: int | None = None

    def save(self, path: str | os.PathLike) -> None:
        """Writes everything but `losses` to `path`. Raises OSError when that is impossible."""
        planes = self.latent if isinstance(self.latent, dict) else {"": self.latent}
        tensors = {f"latent.{k}" if k else "latent": v for k, v in planes.items()}
        for name in _OPTIONAL:
            if getattr(self, name) is not None:
                tensors[name] = getattr(self, name)
        facts = {
            "num_frames": self.num_frames,
            "size": list(self.size),
            "fps": self.fps,
            "frame_rule": self.frame_rule,
            "model_id": self.model_id,
            **({"normalized": True} if self.normalized else {}),
            **_chunk_facts(self.chunk_frames),
        }
        _save(path, "encoding", tensors, facts)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Encoding:
        """Returns the Encoding saved at `path`, on the CPU. Raises ValueError when it is none."""
        with _EncodingFile(path, "encoding") as reader:
            names = reader.shapes.keys() - set(_OPTIONAL)
            if names != {"latent"} and not all(name.startswith("latent.") for name in names):
                allowed = ", ".join(("latent", *_OPTIONAL))
                reader.fail(f"tensors must be {allowed}, got {sorted(names)[:4]}")
            tensors = {name: reader.tensor(name) for name in reader.shapes}
            if (
                reader.facts.get("layout") == TIME_FIRST
                and len(reader.shapes.get("latent", ())) == 4
            ):
                tensors["latent"] = tensors["latent"].transpose(0, 1)[None]
            planes = {name.partition(".")[2]: tensors[name] for name in sorted(names)}
            return cls(
                latent=planes if "" not in planes else planes[""],
                num_frames=reader.integer("num_frames"),
                size=reader.size(),
                indices=tensors.get("indices"),
                moments=tensors.get("moments"),
                positions=tensors.get("positions"),
                fps=reader.fps(),
                frame_rule=reader.frame_rule(),
                model_id=reader.model_id(),
                normalized=reader.facts.get("normalized") is True,
                chunk_frames=reader.chunk_frames(),
            )


@dataclasses.dataclass
class Tokens:
    """A clip as integers.

    Attributes:
        ids: int32 [B, t, h, w] codebook indices (int64 above 2^31 codes).
        grid: (t, h, w).
        num_frames, size, fps, frame_rule, chunk_frames: as in Encoding.
        model_id: `VideoTokenizer.model_id` of the model that made them; "" when unknown.
    """

    ids: Tensor
    grid: tuple[int, ...]
    num_frames: int
    size: tuple[int, int]
    fps: float | None = None
    model_id: str = ""
    frame_rule: str = "preserve"
    chunk_frames: int | None = None

    def __post_init__(self) -> None:
        """Checks that ids and grid agree."""
        self.grid, self.size = tuple(self.grid), tuple(self.size)  # type: ignore[assignment]
        if self.ids.dtype not in ID_DTYPES:
            raise TypeError(f"Tokens: ids must be int32 or int64, got {self.ids.dtype}")
        if tuple(self.ids.shape[1:]) != self.grid:
            raise ValueError(
                f"Tokens: ids must be [B, {', '.join(map(str, self.grid))}], "
                f"got {list(self.ids.shape)}"
            )

    def save(self, path: str | os.PathLike) -> None:
        """Writes the tokens to `path`. Raises OSError when that is impossible."""
        facts = {
            "grid": list(self.grid),
            "num_frames": self.num_frames,
            "size": list(self.size),
            "fps": self.fps,
            "model_id": self.model_id,
            "frame_rule": self.frame_rule,
            **_chunk_facts(self.chunk_frames),
        }
        _save(path, "tokens", {"ids": self.ids}, facts)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Tokens:
        """Returns the Tokens saved at `path`, on the CPU. Raises ValueError when it holds none."""
        with _EncodingFile(path, "tokens") as reader:
            if set(reader.shapes) != {"ids"}:
                reader.fail(f"the only tensor must be ids, got {sorted(reader.shapes)[:4]}")
            grid = reader.integers("grid", len(reader.shapes["ids"]) - 1)
            if tuple(reader.shapes["ids"][1:]) != grid:
                reader.fail(f"ids must have the grid {list(grid)}, got {reader.shapes['ids']}")
            return cls(
                ids=reader.tensor("ids"),
                grid=grid,
                num_frames=reader.integer("num_frames"),
                size=reader.size(),
                fps=reader.fps(),
                model_id=reader.model_id(),
                frame_rule=reader.frame_rule(),
                chunk_frames=reader.chunk_frames(),
            )


@dataclasses.dataclass
class Output:
    """Result of a training or reconstruction pass.

    Attributes:
        reconstruction: [B, 3, T, H, W] float, nominally in [-1, 1], not clamped; of CoordTok with
            `points`, their patches.
        encoding: the Encoding it was decoded from, with its losses.
    """

    reconstruction: Tensor
    encoding: Encoding


def _chunk_facts(chunk_frames: int | None) -> dict[str, int]:
    return {} if chunk_frames is None else {"chunk_frames": chunk_frames}


def _save(path, kind: str, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    header = {"format": f"vtok_ext.{kind}", "version": FORMAT_VERSION, **facts}
    plain, storages = {}, set()
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        # The mean of a posterior is a view of its moments; safetensors refuses shared memory.
        storage = value.untyped_storage().data_ptr()
        plain[name] = value.clone() if storage in storages else value
        storages.add(storage)
    with atomic_path(path) as temporary:
        save_file(plain, temporary, metadata={"vtok_ext": json.dumps(header)})


class _EncodingFile:
    """An open file of the given kind whose header has been checked."""

    def __init__(self, path: str | os.PathLike, kind: str) -> None:
        self.path, self.kind = os.fspath(path), kind

    def __enter__(self) -> _EncodingFile:
        from safetensors import SafetensorError, safe_open

        if not os.path.isfile(self.path):
            raise FileNotFoundError(f"{self.kind}: {self.path!r} must be a file, got none")
        try:
            # Opening maps the file and checks every tensor's extent against the file size.
            self._file = safe_open(self.path, framework="pt").__enter__()
        except SafetensorError as error:
            raise ValueError(
                f"{self.kind}: {self.path!r} must be a {self.kind} file, got {error}"
            ) from error
        try:
            self.facts = self._header()
            names = self._file.keys()
            self.shapes = {name: self._file.get_slice(name).get_shape() for name in names}
        except BaseException:
            self._file.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *error) -> None:
        self._file.__exit__(*error)

    def fail(self, requirement: str):
        raise ValueError(f"{self.kind}: in {self.path!r} {requirement}")

    def tensor(self, name: str) -> Tensor:
        return self._file.get_tensor(name)

    def part(self, name: str, axis: int, start: int, stop: int) -> Tensor:
        """Returns the rows start..stop of an axis; only they are read."""
        return self._file.get_slice(name)[(slice(None),) * axis + (slice(start, stop),)]

    def chunk_frames(self) -> int | None:
        return None if self.facts.get("chunk_frames") is None else self.integer("chunk_frames")

    def integer(self, name: str) -> int:
        value = self.facts.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            self.fail(f"{name} must be an integer >= 1, got {value!r}")
        return value  # type: ignore[return-value]

    def integers(self, name: str, count: int) -> tuple[int, ...]:
        value = self.facts.get(name)
        ok = isinstance(value, list) and len(value) == count
        if not ok or not all(isinstance(v, int) and v > 0 for v in value):  # type: ignore
            self.fail(f"{name} must be {count} integers >= 1, got {value!r}")
        return tuple(value)  # type: ignore[arg-type]

    def size(self) -> tuple[int, int]:
        height, width = self.integers("size", 2)
        return height, width

    def fps(self) -> float | None:
        value = self.facts.get("fps")
        if value is None:
            return None
        if not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
            self.fail(f"fps must be a number > 0 or null, got {value!r}")
        return float(value)

    def frame_rule(self) -> str:
        value = self.facts.get("frame_rule", "preserve")
        if value not in FRAME_RULES:
            self.fail(f"frame_rule must be one of {FRAME_RULES}, got {value!r}")
        return value

    def model_id(self) -> str:
        value = self.facts.get("model_id", "")
        if not isinstance(value, str):
            self.fail(f"model_id must be text, got {value!r}")
        return value

    def _header(self) -> dict[str, Any]:
        try:
            facts = json.loads((self._file.metadata() or {}).get("vtok_ext", "null"))
        except json.JSONDecodeError:
            facts = None
        if not isinstance(facts, dict) or facts.get("format") != f"vtok_ext.{self.kind}":
            self.fail(f"the header must be that of a vtok_ext {self.kind} file, got another")
        if facts.get("version") != FORMAT_VERSION:
            self.fail(f"version must be {FORMAT_VERSION}, got {facts.get('version')!r}")
        return facts
