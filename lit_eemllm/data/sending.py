"""How a worker process hands a batch to the trainer: all its tensors in one block of shared memory.

PyTorch opens a connection between the processes for every tensor it sends, which costs the trainer as well as the worker
more than the tensors' bytes do. One block costs one connection, however many tensors there are (of images of many sizes, one
each). It is an unnamed file in memory: it takes nothing of ``/dev/shm``, which containers keep small, and writing to a file
costs less than touching new memory page by page.
"""

from __future__ import annotations

import io
import os
import pickle
from tempfile import TemporaryFile
from typing import IO, Any

import torch
from torch import Tensor

from lit_eemllm.compat.torch import shared_storage

ALIGNMENT = 64  # bytes at whose multiples tensors begin, enough for every dtype


class _Sender(pickle.Pickler):
    """Leaves tensors out and notes where each will lie."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.placed: list[tuple[int, Tensor]] = []
        self.end = 0  # bytes

    def persistent_id(self, value: Any) -> tuple[int, torch.dtype, torch.Size] | None:
        if not isinstance(value, Tensor):
            return None
        start = -(-self.end // ALIGNMENT) * ALIGNMENT
        self.placed.append((start, value))
        self.end = start + value.nbytes
        return start, value.dtype, value.shape


class _Receiver(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, block: Tensor) -> None:
        super().__init__(file)
        self.block = block

    def persistent_load(self, place: tuple[int, torch.dtype, torch.Size]) -> Tensor:
        start, dtype, shape = place
        return self.block[start : start + shape.numel() * dtype.itemsize].view(dtype).view(shape)


def _unnamed_file() -> IO[bytes]:
    try:
        return open(os.memfd_create("batch"), "wb")
    except (AttributeError, OSError):  # another system, or one that forbids it
        return TemporaryFile()


def sent(value: Any) -> tuple[bytes, Tensor]:
    """A value with tensors in it, taken apart: itself without their content, and that in one shared block of bytes."""
    content = io.BytesIO()
    sender = _Sender(content)
    sender.dump(value)
    with _unnamed_file() as block:  # buffered: it writes all of more than 2 GB
        for start, tensor in sender.placed:
            block.seek(start)
            block.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        block.truncate(sender.end)  # and all is written
        storage = shared_storage(block.fileno(), sender.end)
    return content.getvalue(), torch.empty(0, dtype=torch.uint8).set_(storage)


def received(content: bytes, block: Tensor) -> Any:
    """What `sent` took apart; its tensors are views of the block."""
    return _Receiver(io.BytesIO(content), block).load()
