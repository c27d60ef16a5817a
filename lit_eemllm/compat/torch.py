"""What we use of PyTorch that is private, or that its versions name differently."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

__all__ = [
    "DEAD_WORKER", "FakeTensorMode", "LiveBytes", "allow_recompiles", "changes", "cpp_compiler", "end_workers", "flop_counter", "lost_rank",
    "scale_", "shared_storage", "storage_id", "worker_processes",
]  # fmt: skip

DEAD_WORKER = "DataLoader worker"
"""How the message of the RuntimeError begins that tells of a dead loader process."""


# --- tensors
def scale_(tensors: list[Tensor], factor: Tensor) -> None:
    """Multiply all in place by a number that stays on their device: few launches, however many tensors there are."""
    torch._foreach_mul_(tensors, factor)


def changes(tensor: Tensor) -> int:
    """How often a tensor was changed in place: a number that differs if its content does, at no cost."""
    return tensor._version


def storage_id(storage: torch.UntypedStorage) -> int:
    """A number of a storage while it lives, also of one without data, whose address is 0."""
    return storage._cdata


def shared_storage(descriptor: int, nbytes: int) -> torch.UntypedStorage:
    """The memory of an open file as a storage that is sent to another process without a copy."""
    return torch.UntypedStorage._new_shared_fd_cpu(descriptor, nbytes)  # type: ignore[attr-defined]


# --- compiling and counting
def allow_recompiles(number: int) -> None:
    """Let dynamo compile a function for so many shapes before it goes on uncompiled."""
    for limit in ("recompile_limit", "accumulated_recompile_limit"):
        setattr(torch._dynamo.config, limit, max(number, getattr(torch._dynamo.config, limit)))


def cpp_compiler() -> str | None:
    """The C++ compiler that torch.compile calls; None if there is none."""
    from torch._inductor.cpp_builder import get_cpp_compiler  # they take a second to import
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return get_cpp_compiler()
    except InvalidCxxCompiler:
        return None


def flop_counter() -> FlopCounterMode:
    """PyTorch's, taught the fused attention of the CPU."""

    def forward(q: Any, k: Any, v: Any, *args: Any, **options: Any) -> int:
        return sdpa_flop_count(q, k, v)

    def backward(gradient: Any, q: Any, k: Any, v: Any, *args: Any, **options: Any) -> int:
        return 2 * sdpa_flop_count(q, k, v)

    fused: dict[Any, Callable[..., int]] = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: forward,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    return FlopCounterMode(display=False, custom_mapping=fused)


class LiveBytes(TorchDispatchMode):
    """Counts what operators make while it is entered; views, and what was there before, are not counted.

    Attributes:
        now, peak: bytes of the storages that are alive, and the most there were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(found):
            if isinstance(x, Tensor) and id(x.untyped_storage()) not in given | self._alive:
                self._add(x.untyped_storage())
        return found

    def _add(self, storage: torch.UntypedStorage) -> None:
        self._alive.add(id(storage))
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, id(storage), storage.nbytes())

    def _remove(self, key: int, size: int) -> None:
        self._alive.remove(key)
        self.now -= size


# --- other ranks
def lost_rank(error: BaseException) -> str | None:
    """What gloo or NCCL say where another process of the group is gone, in a line; None if that is not it."""
    text = str(error)
    if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in text):
        return next(iter(text.splitlines()), type(error).__name__)
    return None


# --- loader processes
def worker_processes(loader: Any) -> list[BaseProcess]:
    """Of a DataLoader that is being iterated over; none without workers, or before and after."""
    return list(loader._iterator._workers) if loader.num_workers and loader._iterator is not None else []


def end_workers(loader: Any) -> None:
    """Tell the processes of a DataLoader to end, and forget them."""
    if loader.num_workers and loader._iterator is not None:
        loader._iterator._shutdown_workers()
        loader._iterator = None
