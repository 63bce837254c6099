"""One of two processes: gradients of DDP or FSDP2 against those of one process; see
`test_vidtok_scale.py`. Prints {"difference": largest relative difference, ...} as JSON."""

import json
import os
import sys
from datetime import timedelta

import torch
from conftest import tiny
from torch import distributed
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
        is_sharded = hasattr(grad, "full_tensor")
        grads[name.removeprefix("module.")] = grad.full_tensor() if is_sharded else grad
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


def ddp(expected, mine) -> dict[str, float]:
    model = DistributedDataParallel(tiny(NAME, **OPTIONS).train())
    loss_of(model, mine).backward()
    return {"difference": difference(gradients(model), expected)}


def fsdp(expected, mine) -> dict[str, float]:
    from torch.distributed.fsdp import fully_shard

    model = tiny(NAME, **OPTIONS).train()
    for unit in sharding_units(model):  # a unit reads its children's parameters
        fully_shard(unit)
    fully_shard(model)
    loss_of(model, mine).backward()
    report = {"difference": difference(gradients(model), expected)}
    local = sum(p.to_local().numel() for p in model.parameters())
    report["share"] = local / sum(grad.numel() for grad in expected.values())

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before = float(loss_of(model, mine).detach())
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model, mine).backward()
        optimizer.step()
    report["learns"] = float(loss_of(model, mine).detach()) < before
    return report


def main() -> None:
    distributed.init_process_group("gloo", timeout=timedelta(seconds=120))
    rank = distributed.get_rank()
    generator = torch.Generator().manual_seed(0)
    clips = torch.rand((2, 3, 5, 16, 16), generator=generator) * 2 - 1
    mine = clips[rank : rank + 1]

    alone = tiny(NAME, **OPTIONS).train()
    sum(loss_of(alone, clip[None]) / 2 for clip in clips).backward()
    report = {"ddp": ddp, "fsdp": fsdp}[sys.argv[1]](gradients(alone), mine)
    distributed.barrier()  # torch 2.14 once aborted in a process whose peer had left
    distributed.destroy_process_group()
    print(json.dumps(report), flush=True)
    os._exit(0)  # gloo's threads outlive DDP and may abort a process whose interpreter ends


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
