"""What is used of PyTorch."""

from __future__ import annotations

import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch

from . import compat, contract, lacks, no_attribute


@contract("torch", "_foreach_mul_ multiplies a list of tensors in place", lacks("torch._foreach_mul_"))
def a_list_is_scaled_in_place():
    tensors = [torch.arange(3.0), torch.ones(2, 2)]
    compat("torch").scale_(tensors, torch.tensor(3.0))
    assert tensors[0].tolist() == [0, 3, 6] and tensors[1].eq(3).all()


@contract(
    "torch",
    "gloo names itself where another rank is gone, NCCL raises a DistError",
    lambda patch: patch.setattr(torch.distributed, "DistError", KeyError),
)
def other_ranks_go():
    store, groups = torch.distributed.HashStore(), {}

    def join(rank: int) -> None:
        groups[rank] = torch.distributed.ProcessGroupGloo(store, rank, 2, timedelta(seconds=10))

    with ThreadPoolExecutor(2) as both:
        list(both.map(join, range(2)))
    del groups[1]
    lost = compat("torch").lost_rank
    with pytest.raises(RuntimeError) as gone:
        groups[0].allreduce([torch.zeros(1)]).wait()
    assert "Connection closed by peer" in (lost(gone.value) or "")
    assert (
        lost(torch.distributed.DistBackendError("NCCL error\nmore")) == "NCCL error" and lost(RuntimeError("x")) is None
    )


@contract(
    "torch",
    "Tensor._version counts changes in place",
    lambda patch: patch.setattr("torch.Tensor._version", property(lambda tensor: 0)),
)
def changes_are_counted():
    before = (changes := compat("torch").changes)(x := torch.zeros(2))
    x.add_(1)
    assert changes(x) > before and changes(x[:1]) == changes(x)


@contract(
    "torch",
    "UntypedStorage._cdata tells storages apart, fake ones too",
    lambda patch: patch.setattr("torch.UntypedStorage._cdata", 0),
)
def storages_without_data_have_numbers():
    module = compat("torch")
    with module.FakeTensorMode():
        a, b = torch.empty(3, device="cpu"), torch.empty(3, device="cpu")
    assert a.device.type == "cpu"
    number = module.storage_id
    assert number(a.untyped_storage()) == number(a[1:].untyped_storage()) != number(b.untyped_storage())


@contract(
    "torch",
    "a mode sees what operators make, and a storage tells when it is gone",
    lambda patch: patch.setattr("lit_eemllm.compat.torch.weakref.finalize", lambda *args: None),
)
def live_bytes_come_and_go():
    mode = compat("torch").FakeTensorMode()
    with mode:
        there = torch.zeros(100)
    with compat("torch").LiveBytes() as live:
        made = there.new_empty(50)
        view = made[:10].view(2, 5)
        there[:3].add_(1)
        assert (live.now, live.peak) == (200, 200)
        (made + 1).sum()
        assert live.peak in (400, 404) and live.now == 200
        del made
        assert live.now == 200  # of the view
        del view
    assert live.now == 0


@contract(
    "torch",
    "_new_shared_fd_cpu maps an open file as a shared storage",
    lambda patch: patch.setattr("torch.UntypedStorage._new_shared_fd_cpu", lambda _, n: torch.UntypedStorage(n)),
)
def a_file_is_a_storage():
    with tempfile.TemporaryFile(buffering=0) as file:
        file.write(bytes(range(8)))
        storage = compat("torch").shared_storage(file.fileno(), 8)
    assert storage.is_shared() and list(storage) == list(range(8))


@contract(
    "torch",
    "dynamo has limits of recompilations",
    lambda patch: patch.setattr("torch._dynamo.config", SimpleNamespace(recompile_limit=8)),
)
def recompiles_may_be_allowed():
    import torch._dynamo

    limits = torch._dynamo.config
    before = limits.recompile_limit, limits.accumulated_recompile_limit
    try:
        compat("torch").allow_recompiles(5000)
        assert (limits.recompile_limit, limits.accumulated_recompile_limit) == (5000, 5000)
    finally:
        limits.recompile_limit, limits.accumulated_recompile_limit = before


@contract(
    "torch",
    "inductor tells its C++ compiler, or that there is none",
    lambda patch: patch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", lambda: "g++"),
)
def a_missing_compiler_is_noticed():
    from torch._inductor import config

    with config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        assert compat("torch").cpp_compiler() is None


@contract(
    "torch",
    "FlopCounterMode can be taught the CPU's fused attention",
    lambda patch: patch.setattr("lit_eemllm.compat.torch.sdpa_flop_count", lambda q, k, v: 0),
)
def fused_attention_is_counted():
    from torch.nn.functional import scaled_dot_product_attention

    q, k, v = (torch.randn(1, 2, rows, 4, requires_grad=True) for rows in (5, 7, 7))
    with compat("torch").flop_counter() as counted:
        scaled_dot_product_attention(q, k, v).sum().backward()
    products = 2 * 5 * 7 * 2 * 4  # of queries and keys: two FLOPs for each head, query, key and number of the head
    assert counted.get_total_flops() == (2 + 4) * products  # and of weights and values; twice as many backwards


class Dies:
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        return index if index < 2 else os._exit(1)


@contract(
    "torch",
    "a DataLoader has processes, which can be ended",
    no_attribute("torch.utils.data.dataloader._MultiProcessingDataLoaderIter", "_workers"),
)
def loaders_have_processes():
    from torch.utils.data import DataLoader

    module, loader = compat("torch"), DataLoader(range(8), num_workers=2, persistent_workers=True)
    assert module.worker_processes(loader) == []
    next(iter(loader))
    processes = module.worker_processes(loader)
    assert len(processes) == 2 and all(process.is_alive() for process in processes)
    module.end_workers(loader)
    for process in processes:
        process.join(10)
    assert not any(process.is_alive() for process in processes) and module.worker_processes(loader) == []


@contract(
    "torch",
    "a dead loader process is told by a RuntimeError that begins so",
    lambda patch: patch.setattr("lit_eemllm.compat.torch.DEAD_WORKER", "a worker died"),
)
def a_dead_process_is_told():
    from torch.utils.data import DataLoader

    with pytest.raises(RuntimeError) as death:
        list(DataLoader(Dies(), num_workers=1, collate_fn=list))  # no tensors, whose connections break first
    assert str(death.value).startswith(compat("torch").DEAD_WORKER), death.value
