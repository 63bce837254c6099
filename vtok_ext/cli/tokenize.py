"""`vtok tokenize`: videos to shards of latents or tokens, alone or in every process of torchrun.

A shard is made by one process without a word to the others, so that its bytes do not depend on
their number. Rank 0 looks what is missing and divides that, which is fair after a kill too.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vtok_ext.data.atomic_output import output_file, remove_partials
from vtok_ext.data.latent_shards import MANIFEST, Shard, read_object, write_manifest
from vtok_ext.data.tokenize_settings import TokenizeSettings, differences
from vtok_ext.data.tokenizing import tokenize_shard, warmup_latents
from vtok_ext.data.video_list import VideoItem, list_videos
from vtok_ext.data.video_portions import procedural_videos
from vtok_ext.training.distributed import (
    on_rank_0,
    process_group,
    rank,
    wait_for_all,
    world_size,
)

from .console import Console
from .model_source import load_model_for, resolve_device

# What a folder was begun with, so that another call does not mix other latents into it.
_BEGUN = "settings.json"


@dataclass(frozen=True)
class TokenizeOptions:
    """What `vtok tokenize` is asked for; see its options."""

    source: str
    out: Path
    model: str
    name: str | None
    ema: bool
    trust_checkpoint: bool
    output: str | None
    frames: int | None
    max_clips: int | None
    fps: float | None
    size: int | None
    batch_size: int
    videos_per_shard: int
    dtype: str
    workers: int
    root: Path | None
    resume: bool
    device: str


def run_tokenize(options: TokenizeOptions, *, as_json: bool) -> None:
    """Returns None when all shards and the manifest are written."""
    start = time.monotonic()
    with process_group(resolve_device(options.device), patient=True) as place:
        console = Console(as_json or rank() != 0)
        # All processes go by the list of one: another might see another folder.
        videos, procedural = on_rank_0(lambda: _videos(options, console))
        model, _ = load_model_for(
            options.model,
            options.name,
            place,
            console,
            ema=options.ema,
            trust_checkpoint=options.trust_checkpoint,
        )
        settings = _settings(options, model)
        if procedural:  # before anything is written
            settings.check_procedural()
        origin = on_rank_0(lambda: settings.origin(model.model_id, videos))
        digest = origin["settings_hash"]
        num_shards = -(-len(videos) // settings.videos_per_shard)

        def begin() -> list[int]:
            _begin(options, origin)
            shards = (Shard(options.out, n) for n in range(num_shards))
            # What is there is read again: a damaged shard would be taken for a good one for ever.
            return [shard.number for shard in shards if shard.read(digest, verify=True) is None]

        missing = on_rank_0(begin)
        own = missing[rank() :: world_size()]
        total = sum(min(settings.videos_per_shard, len(videos) - n * settings.videos_per_shard)
                    for n in own)  # fmt: skip
        with console.progress("tokenizing", total) as progress:
            done = 0

            def count() -> None:
                nonlocal done
                done += 1
                progress.update(done, f"{done} videos of this process")

            for number in own:
                tokenize_shard(
                    model,
                    videos,
                    settings,
                    Shard(options.out, number),
                    digest,
                    procedural=procedural,
                    num_workers=options.workers,
                    on_video=count,
                )
        wait_for_all()

        def finish() -> dict[str, Any]:
            facts = {**_model_facts(model), **origin}
            return write_manifest(options.out, facts, num_shards)

        manifest = on_rank_0(finish)
        if rank() == 0:
            found = num_shards - len(missing)
            _show(manifest, options, found, time.monotonic() - start, console)


def _videos(options: TokenizeOptions, console: Console) -> tuple[list[VideoItem], bool]:
    """Returns the videos of the source, and whether they are procedural."""
    kind, colon, count = options.source.partition(":")
    if kind == "procedural" and colon:
        if not count.isdigit():
            raise ValueError(f"tokenize: source must be procedural:N, got {options.source}")
        return procedural_videos(int(count)), True
    return list_videos(options.source, root=options.root, warn=console.warn), False


def _settings(options: TokenizeOptions, model: Any) -> TokenizeSettings:
    kind = options.output or ("tokens" if model.is_discrete else "latent")
    if kind == "tokens" and not model.is_discrete:
        raise ValueError(f"tokenize: --output must be latent for {model.name}, got tokens")
    if hasattr(model, "refuse_unrecorded_positions"):  # data sets keep no positions of latents too
        model.refuse_unrecorded_positions("tokenize")
    return TokenizeSettings(
        kind=kind,
        num_frames=options.frames,
        max_clips=options.max_clips,
        fps=options.fps,
        size=None if options.size is None else (options.size, options.size),
        batch_size=options.batch_size,
        videos_per_shard=options.videos_per_shard,
        dtype=options.dtype,
    )


def _begin(options: TokenizeOptions, origin: dict[str, Any]) -> None:
    """Makes the folder, or checks that it holds what this call would make."""
    path = options.out / _BEGUN
    remove_partials(path)  # of a process that was killed before it had begun
    if path.exists() or (options.out.exists() and any(options.out.iterdir())):
        found = read_object("tokenize", path) if path.exists() else {}
        if not options.resume:
            raise ValueError(
                f"tokenize: DST must be a new or empty folder, got {options.out}; "
                "--resume goes on with what is there"
            )
        if found.get("settings_hash") != origin["settings_hash"]:
            other = "; ".join(differences(found, origin)) if found else f"no {_BEGUN}"
            raise ValueError(
                f"tokenize: {options.out} must hold latents of the same model, videos and settings "
                f"to go on, got {other}"
            )
        return
    options.out.mkdir(parents=True, exist_ok=True)
    with output_file(path, "tokenize") as partial:
        partial.write_text(json.dumps(origin, indent=1) + "\n", encoding="utf-8")


def _model_facts(model: Any) -> dict[str, Any]:
    warmup = warmup_latents(model)
    frames = None if warmup is None else warmup * model.temporal_factor
    return {
        "temporal_factor": model.temporal_factor,
        "spatial_factor": model.spatial_factor,
        "is_causal": model.is_causal,
        "codebook_size": model.codebook_size,
        "warmup_latents": warmup,
        "warmup_frames": frames,
    }


def _show(
    manifest: dict[str, Any],
    options: TokenizeOptions,
    skipped: int,
    seconds: float,
    console: Console,
) -> None:
    unreadable = manifest["unreadable"]
    for video in unreadable:
        console.warn(f"left out: {video['video']}: {video['reason']}")
    values = {
        "manifest": str(options.out / MANIFEST),
        "items": manifest["items"],
        "shards": len(manifest["shards"]),
        "shards_found": skipped,
        "left_out": len(unreadable),
        "seconds": round(seconds, 1),
    }
    lines = [
        f"{values['items']} {manifest['kind']} in {values['shards']} shards, "
        f"{len(unreadable)} videos left out, {values['manifest']}"
    ]
    console.result(values, lines)
