"""One of two processes: gradients of DDP and of FSDP2 against those of one process; see
`test_vidtok_scale.py`. Prints {"ddp": largest relative difference, "fsdp": ..., ...} as JSON."""

import json
import sys
from datetime import timedelta

import torch
from conftest import tiny
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from vtok_ext.training.blocks import sharding_units

NAME, OPTIONS = "vidtok_kl_causal_488_4chn_v1_1", {"ch_mult": (1, 2)}


def loss_of(model, video):
    out = model(video, sample=False)
    return out.reconstruction.square().mean() + 1e-3 * out.encoding.losses["kl_loss"]


def gradients(model) -> dict[str, torch.Tensor]:
    grads = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        grads[name.removeprefix("module.")] = (
            grad.full_tensor() if isinstance(grad, DTensor) else grad
        )
    return grads


def difference(found, expected) -> float:
    """Returns the largest relative difference; gradients that vanish, as that of a bias of keys in
    a softmax, count relative to the others."""
    assert found.keys() == expected.keys()
    least = 1e-4 * max(float(grad.abs().max()) for grad in expected.values())
    return max(
        float((found[n] - expected[n]).abs().max()) / max(least, float(expected[n].abs().max()))
        for n in expected
    )


def main() -> None:
    distributed.init_process_group("gloo", timeout=timedelta(seconds=120))
    rank = distributed.get_rank()
    generator = torch.Generator().manual_seed(0)
    clips = torch.rand((2, 3, 5, 16, 16), generator=generator) * 2 - 1
    mine = clips[rank : rank + 1]

    alone = tiny(NAME, **OPTIONS).train()
    sum(loss_of(alone, clip[None]) / 2 for clip in clips).backward()
    expected = gradients(alone)
    report = {}

    ddp = DistributedDataParallel(tiny(NAME, **OPTIONS).train())
    loss_of(ddp, mine).backward()
    report["ddp"] = difference(gradients(ddp), expected)

    sharded = tiny(NAME, **OPTIONS).train()
    for unit in sharding_units(sharded):  # a unit reads its children's parameters
        fully_shard(unit)
    fully_shard(sharded)
    loss_of(sharded, mine).backward()
    report["fsdp"] = difference(gradients(sharded), expected)
    local = sum(p.to_local().numel() for p in sharded.parameters())
    report["share"] = local / sum(p.numel() for p in alone.parameters())

    optimizer = torch.optim.AdamW(sharded.parameters(), lr=1e-3)
    before = float(loss_of(sharded, mine).detach())
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(sharded, mine).backward()
        optimizer.step()
    report["learns"] = float(loss_of(sharded, mine).detach()) < before
    distributed.destroy_process_group()
    print(json.dumps(report))


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
