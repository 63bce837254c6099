"""`vtok decode`: a token or latent file to a video, in constant memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtok_ext.data.video import VideoWriter

from .console import Console, Progress
from .memory_plan import (
    NO_LIMIT,
    MemoryOptions,
    Prepared,
    arrange_freed_memory,
    peak_bytes,
    prepare,
)
from .model_source import load_model_for, resolve_device
from .reconstruct import frames_per_chunk
from .streaming_mode import check_published

if TYPE_CHECKING:
    from vtok_ext.models.latent_statistics import LatentStatistics


def run_decode(
    *,
    source: Path,
    out: Path,
    model_source: str,
    name: str | None,
    ema: bool,
    trust_checkpoint: bool,
    device: str,
    any_weights: bool,
    as_json: bool,
    streaming: str | None = None,
    slices: int | None = None,
    memory: MemoryOptions = NO_LIMIT,
) -> None:
    """Returns None after writing the video; it appears complete or not at all.

    The file says whether it is one of published chunks; `streaming`, unless None, must agree.
    `slices`: see `CoordTok.decode`.
    """
    from vtok_ext.models.encoding_stream import EncodingReader

    console = Console(as_json)
    target = resolve_device(device)
    arrange_freed_memory(memory)
    with EncodingReader(source) as reader:
        mode = "exact" if reader.chunk_frames is None else "reference"
        if streaming not in (None, mode):
            raise ValueError(
                f"decode: --streaming must be {mode}, as {source} was encoded, got {streaming}"
            )
        height, width = reader.size
        options = {"height": height, "width": width, "fps": reader.fps or 30}
        with VideoWriter(out, **options) as writer:  # type: ignore[arg-type]
            model, is_random = load_model_for(
                model_source, name, target, console, ema=ema, trust_checkpoint=trust_checkpoint
            )
            model.check_origin("decode", reader.model_id, any_weights)
            _check_kind(reader, model)
            if slices is not None and not reader.is_planes:
                raise ValueError(f"decode: --slices must be given planes of CoordTok, got {source}")
            statistics = model.require_statistics("decode") if reader.normalized else None
            if mode == "reference":
                check_published("decode", f"{source} in published chunks", model)
                if memory != NO_LIMIT:
                    raise ValueError("decode: --tile and --memory must not meet published chunks")
            chunk_frames = frames_per_chunk(model, height, width)
            size = (height, width, reader.num_frames)
            prepared = prepare(model, "decode", *size, memory, chunk_frames, console)
            start, num_frames = time.monotonic(), 0
            with console.progress("decoding", reader.num_frames) as progress:
                for frames in _decoded(reader, prepared, source, statistics, slices):
                    writer.write(frames[0].cpu())
                    num_frames += frames.shape[2]
                    _show(progress, num_frames, start)
    report = {
        "input": str(source),
        "output": str(out),
        "model": model.name,
        "random_weights": is_random,
        "device": str(target),
        "streaming": mode,
        "frame_rule": reader.frame_rule,
        "frames": num_frames,
        **prepared.facts,
        "peak_bytes": peak_bytes(model),
        "height": height,
        "width": width,
        "seconds": round(time.monotonic() - start, 3),
    }
    line = f"{num_frames} frames of {width}x{height} in {report['seconds']:.1f} s on {target}"
    console.result(report, [line, f"wrote {out}"])


def _show(progress: Progress, num_frames: int, start: float) -> None:
    progress.update(num_frames, f"{num_frames / (time.monotonic() - start):.1f} frames/s")


def _check_kind(reader: Any, model: Any) -> None:
    if reader.kind == "tokens" and not model.is_discrete:
        model.tokenize(None)  # refuses, naming the models that can


def _decoded(
    reader: Any,
    prepared: Prepared,
    source: Path,
    statistics: LatentStatistics | None,
    slices: int | None,
) -> Iterator[Any]:
    """Yields frames [1, 3, t, H, W] uint8, all in all those that the file stands for.

    Args:
        reader, source: the file.
        prepared: the model, and how much of the file it takes at a time.
        statistics: by which the latents were normalised, None if they were not.
        slices: of planes, None for one.
    """
    import torch

    model = prepared.model
    options: dict[str, Any]
    device = next(model.parameters()).device
    if (
        reader.is_planes
        or not model.is_causal
        or (reader.frame_rule == "reference" and reader.chunk_frames is None)
    ):
        with torch.no_grad():
            options = {} if slices is None else {"num_slices": slices}
            yield _decoded_whole(reader, model, source, device, options)
        return
    factor, total = model.temporal_factor, reader.num_frames
    options = {"size": reader.size, "output": "uint8"}
    skip = 0
    if reader.chunk_frames is None:
        options["num_frames"] = total
    else:
        # The published frames of a clip are the last ones of f per latent.
        options["streaming"] = "reference"
        skip = factor * reader.num_latents - (factor - 1) - total
    decoder = model.stream_decoder(**options)
    per_push = max(1, prepared.chunk_frames // factor)
    for latent in reader.chunks(per_push):
        latent = latent.to(device)
        if statistics is not None:
            latent = statistics.restore(latent)
        for frames in decoder.push(latent):
            skip, kept = _after(skip, frames)
            yield from kept
    for frames in decoder.flush():
        skip, kept = _after(skip, frames)
        yield from kept


def _after(skip: int, frames: Any) -> tuple[int, list[Any]]:
    """Returns how many frames remain to be skipped, and what is left of `frames`."""
    rest = frames[:, :, skip:]
    return max(0, skip - frames.shape[2]), [rest] if rest.shape[2] else []


def _decoded_whole(
    reader: Any, model: Any, source: Path, device: Any, options: dict[str, Any]
) -> Any:
    from vtok_ext.models.encoding import Encoding, Tokens

    if reader.kind == "tokens":
        return _as_uint8(model.detokenize(Tokens.load(source), any_weights=True))
    encoding = Encoding.load(source)
    encoding.model_id = ""  # checked already
    latent = encoding.latent
    if isinstance(latent, dict):
        encoding.latent = {name: plane.to(device) for name, plane in latent.items()}
    else:
        encoding.latent = latent.to(device)
    return _as_uint8(model.decode(encoding, **options))


def _as_uint8(video: Any) -> Any:
    """Returns a decoded video in uint8, which would hide NaN and infinity."""
    from vtok_ext.models._video_input import to_uint8

    if not video.isfinite().all():
        raise ValueError("decode: the model must give finite frames, got NaN or infinity")
    return to_uint8(video)
