"""Batches on their way from a worker to the trainer: the same values, in one block of shared memory."""

from __future__ import annotations

import io
import os
from collections import Counter
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
import torch.multiprocessing  # registers how PyTorch sends a tensor

from lit_eemllm.data.packing import collate
from lit_eemllm.data.samples import EncodedSample, TokenSample
from lit_eemllm.data.sending import received, sent
from lit_eemllm.data.task import Packed

torch.manual_seed(0)
TENSORS = {
    "bytes": torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8),
    "odd": torch.randint(0, 256, (3,), dtype=torch.uint8),
    "long": torch.arange(11),
    "bool": torch.tensor([True, False, True]),
    "bfloat16": torch.randn(3, 2).bfloat16(),
    "double": torch.randn(2, 2, dtype=torch.float64),
    "number": torch.tensor(1.5),
    "empty": torch.zeros(0, 4, dtype=torch.long),
    "view": torch.randn(4, 6).t()[1:3],
}


def batch() -> Packed:
    """With images of two sizes, so a tensor each."""
    samples = [
        EncodedSample(
            TokenSample(f"s{i}", [1, -1, 2, 3], [False, False, False, True], [4], []),
            [torch.randint(0, 256, (3, 2, 2 + i), dtype=torch.uint8)],
            [(2, 2 + i)],
        )
        for i in range(2)
    ]
    return Packed(collate(samples), Counter(bad_image=1), 2, Counter(a=2), Counter(a=14))


def test_values_arrive_as_they_were() -> None:
    value = {"tensors": TENSORS, "nested": [(TENSORS["long"], 7)], "text": "x"}
    found = received(*sent(value))
    assert found["text"] == "x" and found["nested"][0][1] == 7
    assert torch.equal(found["nested"][0][0], TENSORS["long"])
    for name, tensor in TENSORS.items():
        assert found["tensors"][name].dtype == tensor.dtype, name
        assert torch.equal(found["tensors"][name], tensor), name


def test_a_batch_crosses_in_one_block() -> None:
    packed = batch()
    blocks = []

    class Counting(ForkingPickler):
        def reducer_override(self, value):
            blocks.extend([value] if isinstance(value, torch.Tensor) else [])
            return NotImplemented

    file = io.BytesIO()
    Counting(file).dump(packed)
    again = ForkingPickler.loads(file.getvalue())
    for name in ("skipped", "truncated", "samples", "tokens"):
        assert getattr(again, name) == getattr(packed, name), name
    assert again.batch.layout.documents == packed.batch.layout.documents
    assert all(torch.equal(a, b) for a, b in zip(again.batch.pixel_values, packed.batch.pixel_values, strict=True))
    assert len(blocks) == 1 and blocks[0].is_shared()
    images = packed.batch.pixel_values
    assert isinstance(images, list)
    assert len(blocks[0]) >= sum(image.nbytes for image in images)


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="a system without unnamed files in memory")
def test_nothing_of_dev_shm_is_taken() -> None:
    """Of which a container has 64 MB."""
    _, block = sent(batch())
    descriptor, _ = block.untyped_storage()._share_fd_cpu_()
    assert os.readlink(f"/proc/self/fd/{descriptor}").startswith("/memfd:")


@pytest.mark.parametrize("error", [AttributeError, PermissionError])
def test_systems_without_unnamed_files_in_memory(error, monkeypatch) -> None:
    def refuse(name):
        raise error(name)

    monkeypatch.setattr(os, "memfd_create", refuse, raising=False)
    assert torch.equal(received(*sent([TENSORS["long"]]))[0], TENSORS["long"])
