"""Networks of several processes: DistributedDataParallel or FSDP2.

DDP keeps everything on every process and averages gradients. FSDP2 (`fully_shard`) keeps a part of
each parameter, gradient and optimiser state per process and fetches whole blocks when they run; its
units are the blocks that read their parameters by themselves (residual blocks, attention, changes
of resolution), the rest of a network is one unit more.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vtok_ext.layers.vq import VQ
from vtok_ext.training.blocks import sharding_units
from vtok_ext.training.distributed import is_distributed, world_size


def wrap(
    networks: dict[str, nn.Module], sharded: Iterable[str], device: torch.device
) -> dict[str, Callable[..., Any]]:
    """Returns the networks as they must be called so that gradients are averaged.

    Args:
        networks: by name, on `device`.
        sharded: names of those that FSDP2 divides among the processes, in place; the others get
            DDP, or with one process nothing.
        device: of this process.

    Raises:
        ValueError: FSDP2 would divide a codebook whose dead vectors restart.
    """
    for name in sharded:
        _refuse_restarts(networks[name])
    if not is_distributed():
        return dict(networks)
    # torch has a new name for this option since 2.13, and announces what only code that changes the
    # output of the whole network in place must know.
    warnings.filterwarnings("ignore", message=".*broadcast_buffers. is deprecated")
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    # Buffers stay each process's own: real and fake pass before one backward.
    options: dict[str, Any] = {"broadcast_buffers": False}
    if device.type == "cuda":
        options["device_ids"] = [device]
    calls: dict[str, Callable[..., Any]] = {}
    for name, network in networks.items():
        if name in sharded:
            _shard(network, device)
            calls[name] = network
        elif any(p.requires_grad for p in network.parameters()):
            calls[name] = DistributedDataParallel(network, **options)
        else:
            calls[name] = network
    return calls


def _refuse_restarts(network: nn.Module) -> None:
    # A restart would write into the fetched whole, of which FSDP2 keeps nothing.
    if any(isinstance(m, VQ) and m.restarts_parameters for m in network.modules()):
        raise ValueError(
            "train: run.parallel must be ddp for a VQ with restart_dead true and codebook "
            "gradient, got fsdp, which would lose the restarts; codebook ema keeps them"
        )


def _shard(network: nn.Module, device: torch.device) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    try:
        from torch.distributed.fsdp import fully_shard
    except ImportError as error:
        raise ValueError(
            f"train: run.parallel must be ddp with torch {torch.__version__}, got fsdp: "
            "FSDP2 needs torch 2.6"
        ) from error
    mesh = init_device_mesh(device.type, (world_size(),))
    for unit in sharding_units(network):
        fully_shard(unit, mesh=mesh)
    fully_shard(network, mesh=mesh)


def plain_class(network: nn.Module) -> Any:
    """Returns the class that a network has without FSDP2, which puts one of its own in front."""
    bases = type(network).__mro__
    names = [base.__name__ for base in bases]
    return bases[names.index("FSDPModule") + 1] if "FSDPModule" in names else bases[0]


def is_sharded(network: Any) -> bool:
    """Returns whether FSDP2 has divided a network among the processes."""
    return plain_class(network) is not type(network)


@contextmanager
def gradients_shared(calls: Iterable[Any], last: bool) -> Iterator[None]:
    """Within it, gradients go to the other processes only for the last micro-batch of a step."""
    with ExitStack() as stack:
        for network in calls:
            if isinstance(network, DistributedDataParallel) and not last:
                stack.enter_context(network.no_sync())
            elif is_sharded(network):
                network.set_requires_gradient_sync(last)
        yield


@contextmanager
def partial_backward(network: Any) -> Iterator[None]:
    """Within it, a gradient may be taken through a network before its real backward pass.

    FSDP2 would else take the first backward pass for the whole one, reduce what is there and free
    the weights.
    """
    if not is_sharded(network):
        yield
        return
    network.set_is_last_backward(False)
    network.set_reshard_after_backward(False)
    try:
        yield
    finally:
        network.set_is_last_backward(True)
        network.set_reshard_after_backward(True)


def reshard(network: nn.Module) -> None:
    """Frees whole weights that FSDP2 still holds, so that the next call fetches present ones."""
    for module in network.modules():
        if is_sharded(module):
            module.reshard()  # type: ignore[operator]


def is_part(tensor: Tensor) -> bool:
    """Returns whether a tensor is one that FSDP2 has divided among the processes."""
    return hasattr(tensor, "full_tensor")


def local(tensor: Tensor) -> Tensor:
    """Returns the part of a tensor that this process holds: itself but for FSDP2."""
    return tensor.to_local() if is_part(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """Returns the whole of a tensor; with FSDP2 all processes must ask."""
    return tensor.full_tensor() if is_part(tensor) else tensor  # type: ignore[attr-defined]
