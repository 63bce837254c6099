"""Process 1 of two meets a NaN: torchrun faulty_process.py OUT, which gets result-RANK.json.

Before that, both save their random generators and take them back, from the checkpoint that process
0 found: process 1 can verify none.
"""

import json
import sys
from pathlib import Path

import torch
from tiny_recipe import tiny

from vtok_ext.training import checkpoint, loop
from vtok_ext.training.distributed import process_group, rank
from vtok_ext.training.sentinel import NonFiniteLossError

CPU = torch.device("cpu")
BAD_STEP = 3


def draws_after_restoring(root: Path) -> list[float]:
    """Returns a number drawn after saving, and the one drawn after other draws and restoring."""
    torch.manual_seed(10 + rank())
    checkpoint.CheckpointWriter(root, CPU).save(1, {"x": torch.zeros(1)}, {})
    expected = float(torch.rand(()))
    torch.manual_seed(0)
    if rank() == 1:
        checkpoint.verify_checkpoint = unreadable
    found = checkpoint.latest_checkpoint(root, print)
    assert checkpoint.restore_generators(found, CPU)
    return [expected, float(torch.rand(()))]


def unreadable(folder: Path) -> None:
    raise ValueError(f"{folder} must be readable")


def build_with_fault(recipe, device):
    """A training whose process 1 has NaN behind one layer from the third step on."""
    training = build(recipe, device)

    def spoil(layer, args, output):
        if layer.training and training.step >= BAD_STEP - 1 and rank() == 1:
            return output * float("nan")
        return output

    training.task.model.decoder.mid.block_1.norm2.register_forward_hook(spoil)
    return training


if __name__ == "__main__":
    out = Path(sys.argv[1])
    build, loop.build_training = loop.build_training, build_with_fault
    with process_group(CPU):
        result = {"draws": draws_after_restoring(out / "generators")}
        for parallel in ("ddp", "fsdp"):
            rare = ["run.checkpoint_every=9", "run.validate_every=9"]
            recipe = tiny(f"run.parallel={parallel}", "run.batch_size=1", *rare)
            try:
                loop.train(recipe, out / parallel)
            except NonFiniteLossError as error:
                result[parallel] = str(error)
        (out / f"result-{rank()}.json").write_text(json.dumps(result))
