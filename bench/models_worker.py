"""A process of its own that runs one provider of a model when told to: time, memory, result.

python bench/models_worker.py '{"provider": "native", ...}'

A process per provider, because the peak of a process is the memory that a user of it needs, and
because an allocator is chosen when a process starts. Lines of JSON come in and go out: a task's
name in, {"ms", "peak_mb", "frames"} out. `models_runner.py` is its only caller; what a model's
providers and tasks are, its own module says.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import coordtok_tasks
import torch
import vidtok_tasks
from harness import forget_process_peak, process_peak_mb

import vtok_ext as vt


def family(model: str) -> ModuleType:
    """The module with TASKS, `tasks` and `needed_gflop` of a model."""
    return {"vidtok": vidtok_tasks, "coordtok": coordtok_tasks}[model.split("_")[0]]


def build(settings: dict[str, Any]) -> vt.VideoTokenizer:
    """A model with seeded weights, none of them zero: the same in every process."""
    torch.manual_seed(0)
    model = vt.create_model(settings["model"], **settings["overrides"])
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    return model.to(settings["device"], getattr(torch, settings["dtype"]))


def peak_mb(is_cuda: bool) -> float:
    """Highest memory since `forget_peak`, weights included: of the process, or of the GPU."""
    if is_cuda:
        return torch.cuda.max_memory_allocated() / 2**20
    return process_peak_mb()


def forget_peak(is_cuda: bool) -> None:
    """Starts a new peak."""
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        forget_process_peak()


def timed(call: Callable[[], torch.Tensor], is_cuda: bool) -> tuple[float, torch.Tensor]:
    """Milliseconds and result of one call."""
    if is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = call()
    if is_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3, result


def main() -> None:
    """Answers until the input ends."""
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(settings["threads"])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print is no answer
    is_cuda = settings["device"] == "cuda"
    available = family(settings["model"]).tasks(build(settings), settings)
    for line in sys.stdin:
        task = json.loads(line)
        forget_peak(is_cuda)
        with torch.set_grad_enabled(settings["training"]):
            ms, result = timed(available[task["name"]], is_cuda)
        peak = peak_mb(is_cuda)
        if task["save"]:
            torch.save(result.float().cpu(), task["save"])
        frames = result.shape[2] if result.dim() == 5 else settings["frames"]
        print(json.dumps({"ms": ms, "peak_mb": peak, "frames": frames}), file=answers, flush=True)


if __name__ == "__main__":
    main()
