"""A training run that kills itself: python killed_run.py OUT KILL_AT [recipe overrides].

Under torchrun process 1 alone does so, the first time. OUT may be two folders, A:B: then the same
run is made in B when that in A has ended.

KILL_AT: "never"; "step N" after the log line of step N; "state N" while the checkpoint of step N is
being written; "rename N" when it is complete but not yet in place.
"""

import os
import signal
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from tiny_recipe import tiny

from vtok_ext.training import checkpoint, checkpoint_storage, loop
from vtok_ext.training.distributed import process_group
from vtok_ext.training.run_log import RunLog


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def arm(kind: str, number: int) -> None:
    write, replace = RunLog.write, os.replace
    write_part = checkpoint_storage.write_part

    def write_log(self, line_kind, step, **values):
        write(self, line_kind, step, **values)
        if kind == "step" and line_kind == "train" and step == number:
            die()

    def write_state(tensors, path):
        write_part(tensors, path)
        if kind == "state" and path.parent.name.endswith(f"step-{number:08d}"):
            path.write_bytes(b"half")
            die()

    def rename(source, target):
        if kind == "rename" and Path(target).name == f"step-{number:08d}":
            die()
        replace(source, target)

    RunLog.write, checkpoint.os.replace = write_log, rename
    checkpoint_storage.write_part = write_state


if __name__ == "__main__":
    torch.set_num_threads(1)
    out, kill_at, *overrides = sys.argv[1:]
    chosen = (os.environ.get("RANK", "1"), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if kill_at != "never" and chosen == ("1", "0"):
        kind, number = kill_at.split()
        arm(kind, int(number))
    with process_group(torch.device("cpu")):
        for folder in out.split(":"):
            loop.train(tiny(*overrides), Path(folder), resume="auto")
