"""What a recipe asks for, before anything is trained: parameters, memory, one batch.

Memory is counted, not measured: weights, gradients, moments of the optimisers and moving averages
from the parameters; what autograd keeps for the backward pass from one step on fake tensors, which
have shapes and no content. Transient tensors of single operations are not part of it, nor is what
an allocator loses.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vtok_ext.training.clip_checks import check_first_step, clips_of
from vtok_ext.training.clip_order import ClipOrder, buckets_of, small_buckets, step_batches
from vtok_ext.training.distributed import rank, world_size
from vtok_ext.training.muon import Muon
from vtok_ext.training.setup import build_task
from vtok_ext.training.step import to_device
from vtok_ext.training.task import MicroBatch, Task
from vtok_ext.training.training_memory import SavedBytes

_CLIPS, _MOMENTS = 8, 5
# What an optimiser keeps of the size of a weight: Adam two moments, Muon one.
_MOMENTS_OF_ADAM, _MOMENTS_OF_MUON = 2, 1


@dataclass(frozen=True)
class DryRun:
    """What a recipe asks for.

    Attributes:
        parameters: (part, all parameters, those that train) of every part of every module.
        memory: bytes by purpose, of one process without FSDP2; activations are absent if they
            could not be counted.
        samples_per_step: of all processes.
        samples_per_epoch: of the data set, but for those that fill no micro-batch of their bucket.
        picture: the first micro-batch, clips in rows and moments in columns, [3, H, W] uint8; None
            if it holds no clips.
        notes: what a user should know.
    """

    parameters: list[tuple[str, int, int]]
    memory: dict[str, int]
    samples_per_step: int
    samples_per_epoch: int
    picture: Tensor | None
    notes: list[str]


def dry_run(recipe: Any, device: torch.device) -> DryRun:
    """Returns what a recipe asks for; everything is built as for a training, nothing is written.

    Raises:
        ValueError, OSError: as `train`.
    """
    torch.manual_seed(recipe.run.seed)
    task = build_task(recipe, device)
    task.begin()
    notes = list(task.notes())
    clips, _ = task.data(notes.append)
    run = recipe.run
    order = ClipOrder(
        len(clips),
        run.batch_size,
        run.accumulate,
        rank(),
        world_size(),
        run.seed,
        bucket_of=buckets_of(clips),
    )
    notes += small_buckets(clips, order)
    parts = next(step_batches(clips, order, 0, 1))
    notes += check_first_step(parts)
    data = parts[0]
    pictures = [batch_picture(batch) for batch in clips_of(data)]
    memory = _weights_memory(task)
    try:
        task.prepare()
        memory["activations"] = activation_bytes(task, data)
    except Exception as error:  # whatever an operation cannot do on fake tensors
        reason = " ".join(str(error).split())[:120]
        notes.append(f"the memory of activations could not be counted: {reason}")
    return DryRun(
        parameters=_parameters(task),
        memory=memory,
        samples_per_step=run.batch_size * run.accumulate * world_size(),
        samples_per_epoch=order.clips_per_epoch,
        picture=pictures[0] if pictures else None,
        notes=notes,
    )


def _parameters(task: Task) -> list[tuple[str, int, int]]:
    rows = []
    for prefix, module in task.modules.items():
        parts: list[tuple[str, list[nn.Parameter]]] = [
            (f"{prefix}.{name}", list(child.parameters()))
            for name, child in module.named_children()
        ]
        parts.append((prefix, list(module.parameters(recurse=False))))
        for name, parameters in parts:
            if parameters:
                trained = sum(p.numel() for p in parameters if p.requires_grad)
                rows.append((name, sum(p.numel() for p in parameters), trained))
    return rows


def _weights_memory(task: Task) -> dict[str, int]:
    every = {t for m in task.modules.values() for t in (*m.parameters(), *m.buffers())}
    trained = {t for t in every if t.requires_grad}
    memory = {
        "weights": _bytes(every),
        "gradients": _bytes(trained),
        "optimizer": sum(map(_moments, task.optimizers().values())),
    }
    if task.recipe.optimizer.ema_decay is not None:
        exported = task.networks[task.exported].parameters()
        memory["averages"] = _bytes(p for p in exported if p.requires_grad)
    return memory


def _moments(optimizer: torch.optim.Optimizer) -> int:
    kept = _MOMENTS_OF_MUON if isinstance(optimizer, Muon) else _MOMENTS_OF_ADAM
    return kept * _bytes(p for group in optimizer.param_groups for p in group["params"])


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def activation_bytes(task: Task, data: Any) -> int:
    """Returns how much autograd keeps at most, of one micro-batch with every loss term at work.

    Args:
        task: is not changed.
        data: a collated micro-batch.
    """
    from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

    mode = FakeTensorMode()
    with FakeCopyMode(mode):
        fake, fake_data = copy.deepcopy((task, to_device(data, task.device)))
    fake.call = dict(fake.networks)
    fake.train_mode()
    known = [t for m in fake.modules.values() for t in (*m.parameters(), *m.buffers())]
    count, marks = SavedBytes(known), [0]
    last = task.recipe.run.steps  # by then every term has begun that ever will
    batch = MicroBatch(fake_data, last, range(task.recipe.run.batch_size), 0)
    with mode, torch.autograd.graph.saved_tensors_hooks(count.add, lambda tensor: tensor):
        # A real backward pass frees what its loss kept before the next loss is computed.
        fake.accumulate(batch, lambda loss: marks.append(count.total))
    return max(b - a for a, b in zip(marks, marks[1:], strict=False))


def batch_picture(
    clips: Tensor,  # [B, 3, T, H, W] uint8
) -> Tensor:
    """Returns [3, b H, t W] uint8: the first clips in rows, a few moments of each in columns."""
    count = min(_MOMENTS, clips.shape[2])
    chosen = torch.linspace(0, clips.shape[2] - 1, count).round().long()
    shown = clips[:_CLIPS, :, chosen].cpu()  # [b, 3, t, H, W]
    return shown.permute(1, 0, 3, 2, 4).flatten(3, 4).flatten(1, 2)
