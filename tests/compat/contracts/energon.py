"""What is used of Megatron Energon."""

from __future__ import annotations

import inspect
import time
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from . import compat, contract, lacks


def fresh_shards(folder: Path, training: bool = True, workers: int = 0) -> Any:
    """Of the embedded set's train split, with what `wrap` was given."""
    energon = compat("energon")
    from megatron.energon import WorkerConfig

    class Wrapped(energon.Shards):
        wrapped: list[Any] = []

        def wrap(self, reader: Any) -> Any:
            self.wrapped.append(reader)
            return reader

    worker = WorkerConfig(rank=0, world_size=1, num_workers=workers)
    return Wrapped(energon.EPath(folder), split_part="train", training=training, worker_config=worker, decoder=None)


@contract(
    "energon",
    "CrudeWebdataset.build makes readers, which know the shard of a sample",
    lacks("megatron.energon.BaseWebdatasetFactory.build"),
)
def readers_may_be_wrapped(shapes: Path):
    energon, dataset = compat("energon"), fresh_shards(shapes)
    dataset.build()
    (reader,) = dataset.wrapped
    energon.open_as_files(reader)
    names = [energon.shard_of(reader, index) for index in (0, 39, 40, 159)]
    assert names == [shapes / f"train-{number:06d}.tar" for number in (0, 0, 1, 3)]
    assert "json" in reader[40]
    energon.refuse_large(reader, 100, "oversize")
    assert reader[40].keys() & {"json", "oversize"} == {"oversize"} and int(reader[40]["oversize"]) > 512


def dataset_of(folder: Path, training: bool = True, workers: int = 0) -> Any:
    """Keys of samples: shuffled and without end, or each once."""
    energon = compat("energon")
    from megatron.energon import Cooker, DefaultTaskEncoder, WorkerConfig, stateless

    @stateless
    def cook(sample: Any) -> Any:
        return {"__key__": sample["__key__"], "__restore_key__": sample["__restore_key__"]}

    class Task(DefaultTaskEncoder):
        decoder = None
        cookers = [Cooker(cook)]

        def build_batch(self, dataset: Any, **_: Any) -> Any:
            return dataset

    worker = WorkerConfig(rank=0, world_size=1, num_workers=workers)
    task, loaded = Task(), energon.LoadedDataset(dataset=fresh_shards(folder, training, workers), weight=1.0)
    options = dict(datasets=[loaded], worker_config=worker, batch_size=None, packing_buffer_size=None)
    if not training:
        return task.build_val_datasets(**options)
    mode = energon.DatasetBlendMode.DATASET_WEIGHT
    return task.build_train_datasets(**options, shuffle_buffer_size=8, blend_mode=mode)


def loader_of(folder: Path) -> Any:
    return compat("energon").CountingLoader(dataset_of(folder), checkpoint_every_sec=0)


@contract(
    "energon",
    "SavableDataLoader counts batches by worker, and its state is made of the known types",
    lacks("megatron.energon.state.FlexState"),
)
def a_loader_counts_and_saves(shapes: Path):
    energon, loader = compat("energon"), loader_of(shapes)
    batches = iter(loader)
    first = [next(batches)["__key__"] for _ in range(5)]
    assert loader.counters == ([4], 0)
    loader.counters = [4], 0
    state, found = loader.save_state_rank(), set()

    def walk(value: Any) -> None:
        found.add(type(value))
        if is_dataclass(value):
            value = [getattr(value, field.name) for field in fields(value)]
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
            walk(item)

    walk(state)
    plain = {bool, int, float, str, bytes, type(None), list, tuple, dict, torch.Tensor}
    assert found - plain <= {*energon.STATES, energon.FlexState}, found
    again = loader_of(shapes)
    again.restore_state_rank(state)
    rest = [next(batches)["__key__"] for _ in range(3)]
    assert [batch["__key__"] for batch, _ in zip(again, range(3), strict=False)] == rest and len({*first, *rest}) == 8
    assert isinstance(state, energon.SavableDataLoaderState)


@contract(
    "energon",
    "a worker takes snapshots by _store_checkpoint, and has no state to tell of before its first",
    lacks("megatron.energon.savable_loader.SavableDatasetWrapper._store_checkpoint"),
)
def a_worker_takes_snapshots_between_batches(shapes: Path):
    energon = compat("energon")
    worker = energon.CountingLoader(dataset_of(shapes, workers=1)).dataset
    assert type(worker) is energon._BetweenBatches
    worker._worker_id, worker._save_state = 0, lambda: "state"
    worker._store_checkpoint(force=True)
    assert worker.get_checkpoint([-1]).state is None
    worker._store_checkpoint()
    assert worker.get_checkpoint([-1]).state == "state"


@contract(
    "energon",
    "BasicDataLoader gives what a dataset holds, once",
    lacks("megatron.energon.savable_loader.BasicDataLoader.__iter__"),
)
def a_basic_loader_ends(shapes: Path):
    loader = compat("energon").BasicDataLoader(dataset_of(shapes, training=False))
    keys = [batch["__key__"] for batch in loader]
    assert len(keys) == len(set(keys)) == 160


@contract(
    "energon",
    "PackingDataset fills _reading_buffer by _fill_reading_buffer and chooses packs by pre_packer",
    lacks("megatron.energon.PackingDataset._fill_reading_buffer"),
)
def samples_may_be_held_back(shapes: Path):
    packing = compat("energon").Packing
    assert "_reading_buffer" in packing._savable_fields
    assert list(inspect.signature(packing.__mro__[1]._fill_reading_buffer).parameters)[1:] == [
        "source_iter",
        "log_progress",
    ]
    held = SimpleNamespace(_reading_buffer=[1])
    packing.hold_back(held, [2, 3])
    assert held._reading_buffer == [1, 2, 3]


@contract(
    "energon",
    "SavableDataLoader asks its workers by _worker_command, cmd_queues and result_queues",
    lacks("megatron.energon.SavableDataLoader._worker_command"),
)
def workers_are_asked_by_queues():
    loader = compat("energon").CountingLoader
    assert loader.__mro__[1]._worker_command
    asked: list[Any] = []
    queue = SimpleNamespace(put=asked.append)
    fake = SimpleNamespace(
        cmd_queues=[queue, queue], result_queues=["b", "a"], answers=lambda qs: [{"ab".index(q): q} for q in qs]
    )
    assert loader._worker_command(fake, "state", 3) == ["a", "b"] and asked == [("state", 3)] * 2
    assert {"cmd_queues", "result_queues"} <= loader.__mro__[1].__annotations__.keys()


@contract(
    "energon",
    "names of members are cut at the first dot",
    lacks("megatron.energon.flavors.webdataset.config.split_name_re"),
)
def members_are_named():
    energon = compat("energon")
    assert energon.MEMBER_NAME.match("a/b-1.0.jpg").groups() == ("a/b-1", "0.jpg")
    assert not energon.SKIPPED_MEMBER.match("a/b.jpg") and energon.SKIPPED_MEMBER.match("__x__/y.jpg")
    assert energon.collapse(["t-0.tar", "t-1.tar", "t-2.tar"], keep_order=True) == ["t-{0..2}.tar"]


@contract("energon", "a Watchdog calls back when nothing comes", lacks("megatron.energon.watchdog.Watchdog.watch_iter"))
def a_watchdog_barks():
    calls: list[int] = []
    watchdog = compat("energon").Watchdog(0.05, callback=lambda: calls.append(1), dump_stacks=False, enabled=False)

    def slow() -> Any:
        yield 1
        for _ in range(200):
            time.sleep(0.05)
            if calls:
                break
        yield 2

    assert list(watchdog.watch_iter(slow())) == [1, 2]
    watchdog.finish()
    assert calls
