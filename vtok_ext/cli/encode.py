"""`vtok encode`: a video of any length to a token or latent file, in constant memory, resumable.

Portions of frames go through the model's stream encoder and what comes out is appended to a file
under a temporary name, which gets its header and its final name at the end. With `resume`, the
state of the stream is saved beside it from time to time, and an encoding that was killed continues
where the last state was saved: the result has the bits of one that was not.
"""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vtok_ext.data.atomic_output import check_output_file, temporary_sibling
from vtok_ext.data.video import VideoInfo, VideoReader

from .console import Console, Progress
from .encode_portions import encode_in_portions, takes_portions
from .memory_plan import (
    NO_LIMIT,
    MemoryOptions,
    Prepared,
    arrange_freed_memory,
    peak_bytes,
    prepare,
    prepare_as_before,
)
from .model_source import load_model_for, resolve_device
from .reconstruct import frames_per_chunk
from .streaming_mode import check_published, check_streaming
from .video_suffixes import OTHER_VIDEO_SUFFIXES, VIDEO_SUFFIXES
from .whole_clip import read_whole

# Enough of a file to tell it from another one of the same size.
_IDENTIFYING_BYTES = 2**20


@dataclass(frozen=True)
class EncodeOptions:
    """What `vtok encode` and `vtok stream` are asked for.

    Attributes:
        source, out: the video and the file to write.
        model, name, ema, trust_checkpoint, device: as in the options of the same names.
        output: "tokens", "latent", or None for tokens where the model has them.
        streaming: "exact" or "reference" (the published chunks of VidTok 1.1).
        frames: "preserve", or "reference" for the published frame rule on the whole clip.
        resume: continue what an interrupted call left, and leave it if interrupted.
        save_every_s: seconds between saved states.
        memory: tile and limit of memory.
    """

    source: Path
    out: Path
    model: str
    name: str | None = None
    ema: bool = False
    trust_checkpoint: bool = False
    device: str = "auto"
    output: str | None = None
    streaming: str = "exact"
    frames: str = "preserve"
    resume: bool = False
    save_every_s: float = 60.0
    memory: MemoryOptions = NO_LIMIT


def run_encode(options: EncodeOptions, *, as_json: bool) -> None:
    """Returns None after writing the file and printing what it holds."""
    console = Console(as_json)
    _check(options)
    check_output_file(options.out, "encode")
    with VideoReader(options.source) as reader:
        if options.out.exists() and options.out.samefile(options.source):
            raise ValueError(
                f"encode: output must be another file than the input, got {options.out}"
            )
        target = resolve_device(options.device)
        arrange_freed_memory(options.memory)
        model, is_random = load_model_for(
            options.model,
            options.name,
            target,
            console,
            ema=options.ema,
            trust_checkpoint=options.trust_checkpoint,
        )
        kind = _kind(options, model)
        saved = _saved_state(options, kind) if options.resume else None
        prepared = _prepared(options, model, reader.info, saved, console)
        start = time.monotonic()
        if options.frames == "reference" or not model.is_causal:
            result = _encode_whole(options, prepared.model, kind, reader)
        else:
            job = _Job(options, prepared, kind, reader.info, saved)
            with console.progress("encoding", reader.info.num_frames) as progress:
                result = job.run(reader, console, progress)
    seconds = time.monotonic() - start
    report = {
        "video": str(options.source),
        "output": str(options.out),
        "kind": kind,
        "model": model.name,
        "model_id": model.model_id,
        "random_weights": is_random,
        "device": str(target),
        "streaming": options.streaming,
        "frame_rule": options.frames,
        **result,
        **prepared.facts,
        "peak_bytes": peak_bytes(model),
        "bytes": options.out.stat().st_size,
        "seconds": round(seconds, 3),
    }
    console.result(report, _summary(report))


def _check(options: EncodeOptions) -> None:
    check_streaming("encode", options.streaming)
    if options.out.suffix.lower() in VIDEO_SUFFIXES + OTHER_VIDEO_SUFFIXES:
        raise ValueError(
            "encode: output must end in no suffix of videos, being a token or latent file, got "
            f"{options.out}; `vtok reconstruct` writes a video"
        )
    choices = {
        "output": (None, "tokens", "latent"),
        "frames": ("preserve", "reference"),
    }
    for name, allowed in choices.items():
        if getattr(options, name) not in allowed:
            words = ", ".join(choice for choice in allowed if choice)
            raise ValueError(
                f"encode: --{name} must be one of {words}, got {getattr(options, name)}"
            )
    if options.frames == "reference" and (options.resume or options.streaming == "reference"):
        raise ValueError(
            "encode: --frames reference must come without --resume and --streaming reference: its "
            "rule needs the whole clip"
        )
    if options.streaming == "reference" and options.memory != NO_LIMIT:
        raise ValueError("encode: --streaming reference must come without --tile and --memory")
    if not options.save_every_s >= 0:
        raise ValueError(f"encode: --save-every must be at least 0, got {options.save_every_s}")


def _kind(options: EncodeOptions, model: Any) -> str:
    """Returns "tokens" or "encoding", the kind of file."""
    if options.output == "tokens" and not model.is_discrete:
        model.tokenize(None)  # refuses, naming the models that can
    if options.streaming == "reference":
        check_published("encode", "--streaming reference", model)
    wanted = options.output or ("tokens" if model.is_discrete else "latent")
    if options.resume and not model.is_causal:
        raise ValueError(f"encode: --resume must be given a causal model, got {model.name}")
    return "tokens" if wanted == "tokens" else "encoding"


def _encode_whole(options: EncodeOptions, model: Any, kind: str, reader: VideoReader) -> dict:
    """Encodes a clip that is written at once; a VTok looks at single frames only."""
    if takes_portions(model, options.frames):
        encoding = encode_in_portions(model, kind, reader)
        size = (encoding.num_frames, *encoding.size)
    else:
        encoding, size = _whole_clip(options, model, kind, reader)
    if kind == "tokens":
        _check_finite(encoding.ids, size[0])
        shape = encoding.ids.shape
    else:
        planes = encoding.latent
        parts = [*planes.values()] if isinstance(planes, dict) else [planes]
        for part in parts if encoding.indices is None else [*parts, encoding.indices]:
            _check_finite(part, size[0])
        encoding.model_id, encoding.indices, encoding.moments = model.model_id, None, None
        shape = (1, *model.token_grid(*size)) if isinstance(planes, dict) else planes.shape
    encoding.save(options.out)
    return {"frames": size[0], "grid": list(shape[1:][-3:]), "resumed_at_frame": 0}


def _whole_clip(
    options: EncodeOptions, model: Any, kind: str, reader: VideoReader
) -> tuple[Any, tuple[int, int, int]]:
    """Returns Tokens or Encoding of a clip that must be in memory at once, and its T, H, W."""
    import torch

    video = read_whole("encode", model, (chunk.frames for chunk in reader.chunks(64)))[None]
    device = next(model.parameters()).device
    fps = float(reader.info.fps) or None
    with torch.no_grad():
        # `tokenize` refuses what a file of tokens cannot record.
        encode = model.tokenize if kind == "tokens" else model.encode
        encoding = encode(video.to(device), fps=fps, frames=options.frames)
    num_frames, height, width = video.shape[2:]
    return encoding, (num_frames, height, width)


def _check_finite(portion: Any, num_frames: int) -> None:
    """Raises ValueError for latents with NaN or infinity, and for ids that come from NaN: -1."""
    ok = portion.isfinite().all() if portion.is_floating_point() else portion.min() >= 0
    if not ok:
        raise ValueError(
            f"encode: the model must give finite latents, got NaN or infinity within "
            f"{num_frames} frames"
        )


@dataclass(frozen=True)
class _SavedState:
    """Where an interrupted encoding goes on.

    Attributes:
        stream: `state_dict()` of its stream encoder.
        num_frames, num_bytes: frames that were pushed, bytes that were written.
        chunk_frames, tile: how it was prepared, see `Prepared`.
    """

    stream: dict[str, Any]
    num_frames: int
    num_bytes: int
    chunk_frames: int
    tile: tuple[int, int] | None


def _state_path(out: Path) -> Path:
    return out.with_name(f"{out.name}.state")


def _saved_state(options: EncodeOptions, kind: str) -> _SavedState | None:
    """Returns what an interrupted call for the same file left, None if there is nothing."""
    from vtok_ext.models.encoding_stream import load_stream_state
    from vtok_ext.models.tiling import check_tile

    path = _state_path(options.out)
    if not path.exists():
        return None
    state, facts = load_stream_state(path)
    for name, mine in (("source", _identity(options.source)), ("kind", kind)):
        if facts.get(name) != mine:
            raise ValueError(
                f"encode: the {name} must be that of {path}, got another; remove the state to "
                f"start anew"
            )
    counts: dict[str, Any] = {
        name: facts.get(name) for name in ("num_frames", "num_bytes", "chunk_frames")
    }
    if not all(isinstance(count, int) and count > 0 for count in counts.values()):
        raise ValueError(f"encode: {path} must hold counts, got {counts}")
    tile = facts.get("tile")
    return _SavedState(state, tile=None if tile is None else check_tile("encode", tile), **counts)


def _prepared(
    options: EncodeOptions, model: Any, info: VideoInfo, saved: _SavedState | None, console: Console
) -> Prepared:
    """Returns the model and the chunk length, those of the saved state if there is one."""
    size, asked = (info.height, info.width), options.memory
    if saved is not None:
        how = (saved.chunk_frames, saved.tile)
        return prepare_as_before(model, "encode", *size, asked, *how, console)
    chunk_frames = frames_per_chunk(model, *size)
    return prepare(model, "encode", *size, info.num_frames, asked, chunk_frames, console)


@dataclass
class _Job:
    """One streamed encoding, from its beginning or from a saved state."""

    options: EncodeOptions
    prepared: Prepared
    kind: str
    info: VideoInfo
    saved: _SavedState | None
    started_at: int = field(default=0, init=False)

    def run(self, reader: VideoReader, console: Console, progress: Progress) -> dict[str, Any]:
        """Returns the facts of the finished file."""
        from vtok_ext.models.encoding_stream import EncodingWriter

        out = self.options.out
        self.identity = _identity(self.options.source)
        self.partial = temporary_sibling(out)
        self.state_path = _state_path(out)
        if self.options.resume:
            self.partial = out.with_name(f"{out.name}.partial")
        streaming = {} if self.options.streaming == "exact" else {"streaming": "reference"}
        output = "tokens" if self.kind == "tokens" else "latent"
        self.model, self.chunk_frames = self.prepared.model, self.prepared.chunk_frames
        self.encoder = self.model.stream_encoder(output, **streaming)
        num_bytes = 0 if self.saved is None else self._continue(self.saved, console)
        self.writer = EncodingWriter(self.partial, self.kind, num_bytes)
        try:
            grid = self._encode(reader, progress)
        except BaseException as error:
            self.writer.close()
            if not self.options.resume:
                self.partial.unlink(missing_ok=True)
            elif not error.args:  # an interruption, which otherwise claims to leave nothing
                error.args = (f"--resume continues from {self.state_path}",)
            raise
        os.replace(self.partial, out)
        self.state_path.unlink(missing_ok=True)
        return {
            "frames": self.encoder.num_frames,
            "grid": grid,
            "resumed_at_frame": self.started_at,
        }

    def _encode(self, reader: VideoReader, progress: Progress) -> list[int]:
        """Returns the grid after everything was written and the header closed it."""
        device = next(self.model.parameters()).device
        num_seen, last_saved = 0, time.monotonic()
        for chunk in reader.chunks(self.chunk_frames):
            num_seen += len(chunk.timestamps)
            if num_seen <= self.started_at:
                continue
            self._append(self.encoder.push(chunk.frames[None].to(device)))
            progress.update(num_seen)
            due = time.monotonic() - last_saved >= self.options.save_every_s
            if self.options.resume and due:
                self._save()
                last_saved = time.monotonic()
        if num_seen < self.started_at:
            raise ValueError(
                f"encode: the video must have the {self.started_at} frames of the state, "
                f"got {num_seen}"
            )
        self._append(self.encoder.flush())
        facts = {
            "num_frames": self.encoder.num_frames,
            "size": list(self.encoder.size),
            "fps": float(self.info.fps) or None,
            "model_id": self.model.model_id,
            "frame_rule": "preserve",
        }
        if self.options.streaming == "reference":
            facts |= {"frame_rule": "reference", "chunk_frames": self.encoder.chunk_frames}
        return self.writer.finish(facts)

    def _append(self, portions: list) -> None:
        for portion in portions:
            _check_finite(portion, self.encoder.num_frames)
            self.writer.append(portion)

    def _save(self) -> None:
        """Saves the state; the bytes that it counts on are on the disk before."""
        from vtok_ext.models.encoding_stream import save_stream_state

        self.writer.flush()
        facts = {
            "source": self.identity,
            "kind": self.kind,
            "chunk_frames": self.chunk_frames,
            "tile": self.prepared.tile,
            "num_frames": self.encoder.num_frames,
            "num_bytes": self.writer.num_bytes,
        }
        save_stream_state(self.state_path, self.encoder.state_dict(), facts)

    def _continue(self, saved: _SavedState, console: Console) -> int:
        """Returns the bytes of the partial file to keep, after loading the state."""
        self.encoder.load_state_dict(saved.stream)
        if self.encoder.num_frames != saved.num_frames:
            raise ValueError(f"encode: {self.state_path} must agree with itself, got other counts")
        self.started_at = saved.num_frames
        console.say(f"continuing after {self.started_at} frames")
        return saved.num_bytes


def _identity(source: Path) -> str:
    """Returns size and beginning of a file in short."""
    with source.open("rb") as file:
        beginning = hashlib.sha256(file.read(_IDENTIFYING_BYTES)).hexdigest()[:16]
    return f"{source.stat().st_size}-{beginning}"


def _summary(report: dict[str, Any]) -> list[str]:
    grid = "x".join(map(str, report["grid"]))
    what = "ids" if report["kind"] == "tokens" else "latents"
    return [
        f"{report['frames']} frames to {grid} {what}, "
        f"{report['bytes']:,} bytes, in {report['seconds']:.1f} s on {report['device']}",
        f"wrote {report['output']}",
    ]
