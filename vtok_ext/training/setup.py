"""Builds from a recipe what is trained and what it is trained on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from vtok_ext.data.clips import Augmentation, Clips, ProceduralClips, VideoClips
from vtok_ext.data.frame_sampling import FrameSampling
from vtok_ext.data.video_list import list_videos
from vtok_ext.training.blocks import compile_blocks, recompute_activations
from vtok_ext.training.parallel import wrap
from vtok_ext.training.recipe import DataRecipe, Recipe
from vtok_ext.training.state import Training
from vtok_ext.training.task import Task
from vtok_ext.training.tasks import task_class

# Beyond any number of training clips, so that the held-out ones are none of them.
_VALIDATION_SEED = 1_000_000_000


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
        ValueError: no usable files, or fewer held-out ones than wanted.
    """
    shape = (recipe.num_frames, recipe.height, recipe.width)
    wanted = recipe.validation_clips
    if recipe.folder is None:
        motion = recipe.motion
        held_out: Clips = ProceduralClips(max(1, wanted), *shape, _VALIDATION_SEED, motion)
        procedural = ProceduralClips(recipe.num_clips, *shape, 0, motion)
        return procedural, [held_out[0, i] for i in range(wanted)]
    clips = _video_clips(recipe, seed, warn)
    sources = [clips]
    if wanted:
        if recipe.validation_folder is None:
            raise ValueError(
                "train: data.validation_folder must be given for data.validation_clips "
                f"{wanted}, got null"
            )
        sources.append(held_out_clips(recipe, warn))
        if len(sources[1]) < wanted:
            raise ValueError(
                f"train: data.validation_folder must hold {wanted} usable files, "
                f"got {len(sources[1])}"
            )
    for source in sources:
        for line in source.unreadable:
            warn(f"left out: {line}")
        if source.unreadable:
            number = len(source.unreadable)
            warn(f"left out: {number} of {number + len(source)} videos")
    return clips, [sources[-1][0, i] for i in range(wanted)]


def _video_clips(recipe: DataRecipe, seed: int, warn: Callable[[str], None]) -> VideoClips:
    videos = list_videos(str(recipe.folder), root=recipe.root, fraction=recipe.fraction, warn=warn)
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
        augmentation=Augmentation(recipe.crop, recipe.zoom, recipe.flip),
        seed=seed,
        scan=recipe.scan,
        damage_log=None if recipe.damage_log is None else Path(recipe.damage_log),
    )


def held_out_clips(recipe: DataRecipe, warn: Callable[[str], None]) -> VideoClips:
    """Returns the clips at the beginning of each held-out video, see `DataRecipe`."""
    rule = "timestamps" if recipe.validation_fps is None else recipe.sampling
    sampling = FrameSampling(recipe.num_frames, recipe.validation_fps, rule, "first")
    root = recipe.root if recipe.validation_root is None else recipe.validation_root
    videos = list_videos(str(recipe.validation_folder), root=root, warn=warn)
    height, width = recipe.validation_size or (recipe.height, recipe.width)
    return VideoClips(videos, sampling, [(recipe.num_frames, height, width)])
