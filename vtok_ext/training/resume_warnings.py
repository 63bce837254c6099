"""What a resumed run says first: where its recipe and its processes are not those of before."""

from __future__ import annotations

from typing import Any

from vtok_ext.layers.vq import VQ
from vtok_ext.training.task import Task


def resume_warnings(
    recipes: tuple[dict[str, Any], dict[str, Any]],
    sizes: tuple[int, int],
    samples: int,
    videos: tuple[dict[str, Any] | None, dict[str, Any] | None] = (None, None),
    *,
    in_buckets: bool,
    of_micro_batches: bool,
) -> list[str]:
    """Returns a line for everything that changes what the run would have computed.

    Args:
        recipes: of before and now, as `Recipe.to_dict`.
        sizes: numbers of processes, before and now.
        samples: seen so far.
        videos: count and hash of the names of the video files, before and now; None if not known.
        in_buckets: whether the clips of a micro-batch are those of a bucket.
        of_micro_batches: see `sees_micro_batches`.
    """
    lines = [f"resuming with another recipe: {line}" for line in _differences(*recipes)]
    runs = [recipe["run"] for recipe in recipes]
    # Clips of a micro-batch, over all processes.
    old_part, new_part = (r["batch_size"] * n for r, n in zip(runs, sizes, strict=True))
    old, new = old_part * runs[0]["accumulate"], new_part * runs[1]["accumulate"]
    if old != new:
        lines.append(
            f"a step had {old} samples and has {new} now: the order of samples goes on at number "
            f"{samples}"
        )
    if old_part != new_part and in_buckets:
        lines.append(
            f"a micro-batch of all processes had {old_part} clips of a bucket and has {new_part} "
            "now: other clips share a batch, and this epoch may repeat some"
        )
    before, now = videos
    if before is not None and now is not None and before != now:
        lines.append(
            f"the {before['count']} videos of before are {now['count']} now, or others: clips come "
            "in another order, and this epoch may repeat some"
        )
    if runs[0]["accumulate"] != runs[1]["accumulate"] and of_micro_batches:
        lines.append(
            f"run.accumulate was {runs[0]['accumulate']} and is {runs[1]['accumulate']}: the "
            "quantizer averages over the clips of a micro-batch, so that its loss changes"
        )
    return lines


def sees_micro_batches(task: Task) -> bool:
    """Returns whether a quantizer that trains looks at all clips of a micro-batch together.

    The entropy of FSQ and LFQ is that of their average use, the moving averages of a VQ take one
    step per micro-batch.
    """
    frozen = {layer for part in task.frozen() for layer in part.modules()}
    layers = {layer for network in task.networks.values() for layer in network.modules()}
    return any(
        getattr(layer, "entropy_weight", 0) > 0
        or (isinstance(layer, VQ) and (layer.follows_averages or layer.restart_dead))
        for layer in layers - frozen
    )


def _differences(old: Any, new: Any, name: str = "") -> list[str]:
    """Returns "run.steps was 10, is 20" for every value of two recipes that differs."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [f"{name} was {old!r}, is {new!r}"]
    return [
        line
        for key, value in new.items()
        for line in _differences(old.get(key), value, f"{name}.{key}" if name else key)
    ]
