"""Builds from a recipe what is trained and what it is trained on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vtok_ext.data.atomic_output import check_output_file
from vtok_ext.data.clips import Augmentation, Clips, ProceduralClips, VideoClips
from vtok_ext.data.frame_sampling import FrameSampling
from vtok_ext.data.video_list import VideoItem, list_videos
from vtok_ext.data.video_scan import VideoFacts, VideoIndex
from vtok_ext.training.blocks import compile_blocks, recompute_activations
from vtok_ext.training.distributed import on_rank_0, rank
from vtok_ext.training.parallel import wrap
from vtok_ext.training.recipe import DataRecipe, Recipe
from vtok_ext.training.state import Training
from vtok_ext.training.task import Task
from vtok_ext.training.tasks import task_class

# Beyond any number of training clips, so that the held-out ones are none of them.
_VALIDATION_SEED = 1_000_000_000
# Videos that are scanned, in seconds to minutes, before the other processes hear of it: they wait
# for no longer than 10.
_SCANNED_AT_ONCE = 1024
_INDEX: ContextVar[Path | None] = ContextVar("index of videos", default=None)


def build_task(recipe: Recipe, device: torch.device) -> Task:
    """Returns the task that a recipe names. Raises as `build_training`."""
    return task_class(recipe.task)(recipe, device)


def build_training(recipe: Recipe, device: torch.device) -> Training:
    """Returns a training at step 0, the same on every process.

    Raises:
        ValueError, OSError: what the task needs cannot be had.
    """
    torch.manual_seed(recipe.run.seed)
    task = build_task(recipe, device)
    # From the inside out: compiled, recomputed, divided.
    for network in task.networks.values():
        if recipe.run.compile:
            compile_blocks(network)
        if recipe.run.checkpoint_activations:
            recompute_activations(network)
    sharded = (task.exported,) if recipe.run.parallel == "fsdp" else ()
    return Training(task, wrap(task.networks, sharded, device))


def build_clips(
    recipe: DataRecipe, seed: int, warn: Callable[[str], None]
) -> tuple[Clips, list[torch.Tensor]]:
    """Returns the clips to train on and the held-out ones [3, T, H, W] uint8.

    Args:
        recipe: which clips.
        seed: decides where windows of video files begin.
        warn: called with one line for every file that is left out.

    Raises:
        ValueError: no usable files, fewer held-out ones than wanted, or a `damage_log` that cannot
            be written.
    """
    shape = (recipe.num_frames, recipe.height, recipe.width)
    wanted = recipe.validation_clips
    if recipe.folder is None:
        motion = recipe.motion
        held_out: Clips = ProceduralClips(max(1, wanted), *shape, _VALIDATION_SEED, motion)
        procedural = ProceduralClips(recipe.num_clips, *shape, 0, motion)
        return procedural, [held_out[0, i] for i in range(wanted)]
    clips = _video_clips(recipe, seed, warn)
    sources, chosen = [clips], []
    if wanted:
        if recipe.validation_folder is None:
            raise ValueError(
                "train: data.validation_folder must be given for data.validation_clips "
                f"{wanted}, got null"
            )
        sources.append(held_out_clips(recipe, warn))
        chosen = list(sources[1].readable(wanted).values())  # first: it may find damaged ones
    for source in sources:
        for line in source.unreadable:
            warn(f"left out: {line}")
        if source.unreadable:
            number = len(source.unreadable)
            warn(f"left out: {number} of {source.num_listed} videos")
    if len(chosen) < wanted:
        raise ValueError(
            f"train: data.validation_folder must hold {wanted} usable files, got {len(chosen)}"
        )
    return clips, chosen


@contextmanager
def index_kept_in(path: Path) -> Iterator[None]:
    """Within this context scans of videos go by the index file `path`, see `VideoIndex`."""
    token = _INDEX.set(path)
    try:
        yield
    finally:
        _INDEX.reset(token)


def _listed(
    source: str, warn: Callable[[str], None], scan: bool = True, **options: Any
) -> tuple[list[VideoItem], list[VideoFacts | str] | None]:
    """Returns the videos of a source and what a scan finds of each, None without one.

    The first process looks and tells the others: each by itself might find something else, at a
    passing failure of the storage, and would then have another order of clips.
    """
    videos = on_rank_0(lambda: list_videos(source, warn=warn, **options))
    if not scan:
        return videos, None
    path = _INDEX.get()
    index = VideoIndex(path if rank() == 0 else None)
    facts: list[VideoFacts | str] = []
    for start in range(0, len(videos), _SCANNED_AT_ONCE):
        part = videos[start : start + _SCANNED_AT_ONCE]
        facts += on_rank_0(partial(index.scan, part))
    on_rank_0(index.save)
    return videos, facts


def _check_damage_log(path: Path) -> None:
    """Returns None if lines can be appended to a file at `path`, which is not made yet."""
    check_output_file(path, "train", "data.damage_log")
    if path.exists() and not os.access(path, os.W_OK):
        raise ValueError(f"train: data.damage_log must be a writable file, got {path}")


def _video_clips(recipe: DataRecipe, seed: int, warn: Callable[[str], None]) -> VideoClips:
    damage_log = None if recipe.damage_log is None else Path(recipe.damage_log)
    if damage_log is not None:
        on_rank_0(partial(_check_damage_log, damage_log))
    options = {"root": recipe.root, "fraction": recipe.fraction}
    videos, facts = _listed(str(recipe.folder), warn, recipe.scan, **options)
    rate = recipe.fps
    return VideoClips(
        videos,
        FrameSampling(
            recipe.num_frames,
            None if not rate else rate[0] if len(rate) == 1 else (rate[0], rate[1]),
            recipe.sampling,
            shortest=recipe.least_frames,
        ),
        recipe.all_buckets(),
        augmentation=Augmentation(recipe.crop, recipe.zoom, recipe.flip, recipe.resize),
        seed=seed,
        scan=recipe.scan,
        facts=facts,
        damage_log=damage_log,
    )


def held_out_clips(recipe: DataRecipe, warn: Callable[[str], None]) -> VideoClips:
    """Returns the clips at the beginning of each held-out video, see `DataRecipe`."""
    rule = "timestamps" if recipe.validation_fps is None else recipe.sampling
    sampling = FrameSampling(recipe.num_frames, recipe.validation_fps, rule, "first")
    root = recipe.root if recipe.validation_root is None else recipe.validation_root
    videos, facts = _listed(str(recipe.validation_folder), warn, root=root)
    height, width = recipe.validation_size or (recipe.height, recipe.width)
    return VideoClips(
        videos,
        sampling,
        [(recipe.num_frames, height, width)],
        augmentation=Augmentation(resize=recipe.resize),
        facts=facts,
    )
