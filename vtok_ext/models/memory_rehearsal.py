"""Peak memory of a computation, known before it runs: a rehearsal on tensors without memory.

The real modules run on fake tensors; after every operation the bytes of all tensors still alive are
added up. What is alive is decided by the code itself, skip connections, states and in-place writes
included. Convolutions are followed into their implementation: its copies of frames and weights and
on a GPU its partial sums count.

Not counted: parameters, what exists already, and scratch memory inside an operation, except that
oneDNN holds a convolution's weights once more in its own order. A GPU's allocator hands out
multiples of 512 bytes, which is not counted either.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from threading import RLock, get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vtok_ext.layers import _frame_pass
from vtok_ext.ops import _causal_conv3d_cpu, _causal_conv3d_cuda
from vtok_ext.ops._causal_conv3d_function import _runs_kernels
from vtok_ext.ops._causal_conv3d_geometry import Geometry

_ACCUMULATION = torch.ops.mkldnn._convolution_pointwise_.binary
_CONVOLUTION = torch.ops.vtok_ext.causal_conv3d_forward.default


def _channels_last(x: Tensor) -> Tensor:
    """Returns x [B, C, T, H, W], or images [B, C, H, W], laid out as oneDNN's results are."""
    volumes = x.dim() == 5
    layout = torch.channels_last_3d if volumes else torch.channels_last
    return x.contiguous(memory_format=layout)


class _LiveBytes(TorchDispatchMode):
    """Adds up the bytes of tensors that operations made and that are still alive."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self.known = {t.untyped_storage()._cdata for t in known}
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.total = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is _CONVOLUTION:
            *tensors, geometry, silu, keep, may_split = args
            run: Any = _causal_conv3d_cpu.forward
            more: tuple[Any, ...] = (Geometry(*geometry), silu, keep)
            if _runs_kernels(args[0]):
                run, more = _causal_conv3d_cuda.forward, (*more, may_split)
            with self:
                return run(*tensors, *more)
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0.5  # the factor of a blend: no size depends on it
        if func is _ACCUMULATION:
            self._count(None, args[2].nbytes)
            return args[0]
        scratch = 0
        if func is torch.ops.aten.mkldnn_convolution.default:
            x, weight, bias, padding, stride, dilation, groups = args
            rest = (stride, padding, dilation, False, [0] * len(padding), groups)
            result = torch.ops.aten.convolution.default(x, weight, bias, *rest)
            result = _channels_last(result)
            scratch = weight.nbytes
        else:
            result = func(*args, **kwargs)
            if func is torch.ops.aten.convolution.default:
                result = _channels_last(result)
                scratch = args[1].nbytes
        self._count(result, scratch)
        return result

    def _count(self, result: Any, scratch: int) -> None:
        for key, (storage, num_bytes) in list(self.alive.items()):
            if storage.expired():
                self.total -= num_bytes
                del self.alive[key]
        for tensor in tree_leaves(result):
            if not isinstance(tensor, Tensor):
                continue
            made = tensor.untyped_storage()
            if made._cdata not in self.alive and made._cdata not in self.known:
                self.alive[made._cdata] = (StorageWeakRef(made), made.nbytes())
                self.total += made.nbytes()
        self.peak = max(self.peak, self.total + scratch)


@contextmanager
def rehearsal(model: nn.Module) -> Iterator[_LiveBytes]:
    """Yields an object whose `peak` is that of what runs within; tensors are made inside.

    Args:
        model: its parameters and buffers are not counted.
    """
    with torch.no_grad(), _without_kernels(), FakeTensorMode(allow_non_fake_inputs=True) as fake:
        known = [fake.from_tensor(t) for t in (*model.parameters(), *model.buffers())]
        with _LiveBytes(known) as live:
            yield live


# One rehearsal at a time: what they replace is put back in the order of a stack.
_ONE_AT_A_TIME = RLock()


@contextmanager
def _without_kernels() -> Iterator[None]:
    """Within it, `layers._frame_pass` and convolutions on a GPU take tensors without memory.

    Their addresses are made up; the norm that writes into a buffer and kernels do nothing. All that
    is so in this thread: others may compute in the meantime.
    """

    def address(tensor: Tensor) -> int:
        return (tensor.untyped_storage()._cdata << 40) + tensor.storage_offset()

    with _ONE_AT_A_TIME, ExitStack() as stack:
        stack.enter_context(_replaced(FakeTensor, "data_ptr", address))
        stack.enter_context(_replaced(_frame_pass, "norm_act_into", lambda *_: None))
        stack.enter_context(_replaced(_causal_conv3d_cuda, "_launch", lambda *_: None))
        types = (Tensor, FakeTensor)
        stack.enter_context(_replaced(_frame_pass, "takes", lambda x: type(x) in types))
        yield


@contextmanager
def _replaced(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Within it, this thread calls `function` as `owner.name`, all others what it was before."""
    had, before, thread = name in vars(owner), getattr(owner, name), get_ident()

    def call(*arguments: Any) -> Any:
        return (function if get_ident() == thread else before)(*arguments)

    setattr(owner, name, call)
    try:
        yield
    finally:
        if had:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


def predicted_bytes(model: nn.Module, run: Callable[[], Any]) -> int:
    """Returns the most bytes that tensors made by `run()` take at once, besides the weights."""
    with rehearsal(model) as live:
        run()
    return live.peak


def free_bytes(device: torch.device) -> int:
    """Returns the memory that a process can still take on `device`, within its cgroup's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            free = 1024 * int(line.split()[1])
    limit, used = (
        "".join(_lines(f"/sys/fs/cgroup/memory.{name}")).strip() for name in ("max", "current")
    )
    if limit.isdigit() and used.isdigit():
        free = min(free, int(limit) - int(used))
    return free


def _lines(path: str) -> list[str]:
    try:
        with open(path) as file:
            return file.readlines()
    except OSError:
        return []
