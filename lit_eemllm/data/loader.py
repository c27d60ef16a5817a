"""Energon's datasets and loaders, put together from a checked `Recipe`; and the position of a batch, for exact resume.

The trainer asks for a batch before it has trained on the one in hand, and worker processes are further ahead still. So a
checkpoint must not hold where the loader *is*, but where it was after the last batch that was trained on. Every batch leaves
`EndlessLoader` with such a `Position`: the last snapshot of the loader's state and how many batches to skip from there. Workers
keep the snapshots themselves and are asked when a checkpoint is written.
"""

from __future__ import annotations

import logging
import queue
import struct
import tarfile
import time
from collections import Counter, deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.energon import SavableDataset, WorkerConfig, reraise_exception

from lit_eemllm import limits
from lit_eemllm.compat.energon import (
    BasicDataLoader,
    CountingLoader,
    DatasetBlendMode,
    EPath,
    LoadedDataset,
    SavableDataLoaderState,
    Shards,
    open_as_files,
    refuse_large,
    shard_of,
)
from lit_eemllm.compat.torch import worker_processes
from lit_eemllm.data.recipe import Recipe, Source
from lit_eemllm.data.samples import OVERSIZE
from lit_eemllm.data.task import PackTask
from lit_eemllm.data.workers import AFTER_DEATH, AFTER_SILENCE, prepare, stop, tidy_errors, watchdog_settings
from lit_eemllm.errors import CheckpointError, UserError
from lit_eemllm.layout import PackedBatch

SLICE = 100
"""Samples read in sequence from a shard before another place is chosen at random: disks like long, shuffling short."""
PREFETCH = 2
"""Batches a worker prepares ahead."""
SNAPSHOT_SECONDS = 10.0
"""Between snapshots, each of which takes some 200 ms with 1,256 samples in the buffers. What came since is computed again on
resume."""

_log = logging.getLogger("lit_eemllm.data")


def worker_config(workers: int, seed: int) -> WorkerConfig:
    """For this rank of the running process group. Errors are raised, never swallowed (Energon's default is to log them)."""
    running = dist.is_available() and dist.is_initialized()
    return WorkerConfig(
        rank=dist.get_rank() if running else 0,
        world_size=dist.get_world_size() if running else 1,
        num_workers=workers,
        seed_offset=seed,
        global_error_handler=reraise_exception,
        restore_error_handler=reraise_exception,
    )


def train_dataset(
    recipe: Recipe, task: PackTask, config: WorkerConfig, shuffle_buffer: int, packing_buffer: int
) -> SavableDataset:
    """Endless, shuffled, blended packs. Raises UserError if some process would have no sample of a source."""
    processes = config.world_size * max(1, config.num_workers)
    least = min(recipe.sources, key=lambda source: source.num_samples)
    if least.num_samples < processes:
        raise UserError(
            f"{recipe.path}: {least.num_samples} samples cannot feed {config.world_size} ranks x "
            f"{max(1, config.num_workers)} workers = {processes} loader processes: those of {least.folder}, whose share others "
            "would take. Lower data.workers or add data."
        )
    if (shards := sum(len(source.shards) for source in recipe.sources)) < processes:
        _log.warning(
            f"{recipe.path}: {shards} shards for {processes} loader processes, so several read from the same file. "
            "Harmless on a local disk; on a slow one make smaller shards (shards make --shard-size)."
        )
    blend = {"weight": DatasetBlendMode.DATASET_WEIGHT, "repetitions": DatasetBlendMode.SAMPLE_REPETITIONS}[
        recipe.blend
    ]
    share = recipe.num_samples // processes  # of which a larger buffer would only hold several copies
    return task.build_train_datasets(
        datasets=[
            LoadedDataset(dataset=_open(source, config, training=True), **{recipe.blend: source.share})
            for source in recipe.sources
        ],
        worker_config=config,
        batch_size=None,
        shuffle_buffer_size=min(shuffle_buffer, share),
        packing_buffer_size=min(packing_buffer, share),
        blend_mode=blend,
    )


def val_dataset(recipe: Recipe, task: PackTask, config: WorkerConfig, packing_buffer: int) -> SavableDataset:
    """Every sample once, in order, packed. Weights play no part."""
    return task.build_val_datasets(
        datasets=[LoadedDataset(dataset=_open(source, config, training=False)) for source in recipe.sources],
        worker_config=config,
        batch_size=None,
        packing_buffer_size=packing_buffer,
    )


def _open(source: Source, config: WorkerConfig, training: bool) -> Shards:
    try:
        dataset = _Shards(
            EPath(source.folder),
            split_part=source.split,
            training=training,
            worker_config=config,
            max_samples_per_sequence=SLICE,
            decoder=None,
            part_filter=lambda extension: not extension.startswith("__"),  # Energon's own fields have such names
        )
    except Exception as error:  # its own readers, which are not those that checked the folder, raise nearly anything
        raise UserError(
            f"{source.folder}: Energon cannot read its index: {error!r:.500}. Run: lit-eemllm shards prepare {source.folder}"
        ) from error
    found = tuple((shard.name, shard.count) for shard in dataset.shards)
    if found != source.shards:
        raise UserError(
            f"{source.folder}: Energon reads other shards than were checked: {found} instead of {source.shards}."
        )
    return dataset


class _Shards(Shards):
    """Energon's dataset of shards, whose readers name the shard that cannot be read."""

    def wrap(self, reader: Any) -> _NamingReader:
        return _NamingReader(reader)


class _NamingReader:
    """Samples by number. Shards were checked when the run began; what goes wrong with one later is a `UserError`."""

    def __init__(self, reader: Any) -> None:
        self.reader = reader
        open_as_files(reader)
        refuse_large(reader, limits.SAMPLE_BYTES, OVERSIZE)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.reader[index]
        except (OSError, ValueError, OverflowError, MemoryError, tarfile.TarError, struct.error) as error:
            raise UserError(
                f"{shard_of(self.reader, index)}: the shard or its index was good when the run began and cannot be read now: {error!r}. Restore "
                f"it, try lit-eemllm shards check {self.reader.base_path}, and repeat the command to continue."
            ) from error


@dataclass
class Position:
    """Where the loader was right after a batch, and what had been skipped until then.

    Attributes:
        counters, next_worker: with workers: batches delivered by each, and whose turn it is.
        snapshot, offset: without workers: an earlier state, and the batches since.
        batches, skipped, truncated, samples, tokens: totals since the run began; the last two by source.
    """

    counters: list[int]
    next_worker: int
    snapshot: SavableDataLoaderState | None = None
    offset: int = 0
    batches: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    truncated: int = 0
    samples: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)


class PositionLoader(CountingLoader):
    """Energon's savable loader, which can also give its state as it was at an earlier `Position`."""

    def __init__(self, dataset: SavableDataset, timeout: float) -> None:
        workers = dataset.worker_config.num_workers
        super().__init__(
            dataset,
            checkpoint_every_sec=SNAPSHOT_SECONDS,
            prefetch_factor=PREFETCH,
            # enough that one is always older than the trainer, which is a few batches behind what was handed out
            n_checkpoints=PREFETCH * max(1, workers) + 8,
            gc_collect_every_n_steps=10 if workers else 0,
            **watchdog_settings(timeout, workers),
        )
        prepare(self)
        self.patience = timeout

    def answers(self, queues: Sequence[Any]) -> Iterator[dict[int, Any]]:
        """Energon would wait for ever for a worker that is dead or hangs. Raises UserError."""
        deadline = time.monotonic() + self.patience
        for answers in queues:
            while True:
                try:
                    yield answers.get(timeout=1)
                    break
                except queue.Empty:
                    workers = worker_processes(self)
                    if not workers or not all(worker.is_alive() for worker in workers):
                        raise UserError(f"a loader process died. {AFTER_DEATH}") from None
                    if time.monotonic() > deadline:
                        raise UserError(
                            f"a loader process has not answered for {self.patience:g} s. {AFTER_SILENCE}"
                        ) from None

    def state_at(self, position: Position) -> SavableDataLoaderState | None:
        """To be restored, and followed by `position.offset` batches to skip. None: the very beginning."""
        if not self.num_workers:
            return position.snapshot
        now, self.counters = self.counters, (position.counters, position.next_worker)
        deadline = time.monotonic() + self.patience
        try:
            while True:
                state = self.save_state_rank()
                # a worker that has not begun, while others have delivered, answers with no state and a batch too many to skip
                if state is None or all(worker.state is not None for worker in state.worker_states):
                    return state
                if time.monotonic() > deadline:
                    raise UserError(f"a loader process has not begun for {self.patience:g} s. {AFTER_SILENCE}")
                time.sleep(0.01)
        finally:
            self.counters = now

    def restore(self, state: SavableDataLoaderState | None) -> None:
        """Continue from what `state_at` gave. Raises CheckpointError."""
        workers = state.worker_states if state is not None and self.num_workers else []
        try:
            if any(worker.state is None for worker in workers):  # an earlier version could write that
                raise ValueError("a loader process has no state")
            self.restore_state_rank(state)
            if workers:
                # Energon leaves out the batches that a worker is yet to skip, and would replay them if saved before its first
                self.counters = [w.state.sample_index + w.offset - 1 for w in workers], self.counters[1]
        except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the loader position in the checkpoint does not fit this data: {error}") from error


class EndlessLoader:
    """What the trainer iterates over: packs for ever. It has no length on purpose: Energon's counts samples, not packs.

    Args:
        loader: fresh, or restored.
        start: totals of the run so far, and the batches to skip from the restored state.
        trained: a trainer will say by `taken` which batch it trains on; it fetches one ahead.

    Attributes:
        last: position of the batch handed out last; of the beginning before the first.
        closed: it failed, or its workers were ended: there will be no more batches, and no position to save.
    """

    def __init__(self, loader: PositionLoader, start: Position, trained: bool) -> None:
        self.loader = loader
        self.last = replace(start, snapshot=None if loader.num_workers else loader.save_state_rank())
        self.trained = trained
        self.closed = False
        self._waiting: deque[tuple[Position, PackedBatch]] = deque()
        self._batches = _positioned(loader, self.last)

    def __iter__(self) -> Iterator[PackedBatch]:
        try:
            # the same iterator in every pass: a trainer with epochs (`limit_train_batches`) goes on where it was
            for position, batch in self._batches:
                self.last = position
                if self.trained:
                    self._waiting.append((position, batch))
                yield batch
        except Exception:
            self.close()
            raise

    def taken(self, batch: PackedBatch) -> Position:
        """The position after this batch, which the trainer begins to train on (maybe a copy: the keys are compared)."""
        if self._waiting and self._waiting[0][1].keys == batch.keys:
            return self._waiting.popleft()[0]
        raise RuntimeError(f"batch {batch.keys} is not the next one that the loader handed out")

    def close(self) -> None:
        self.closed = True
        stop(self.loader)

    def __del__(self) -> None:
        stop(self.loader)


def _positioned(loader: PositionLoader, last: Position) -> Iterator[tuple[Position, PackedBatch]]:
    """Batches with the position after each, from `last` on. (Not a method: a cycle would leave `__del__` to the collector.)"""
    skip, snapshot_time, workers = last.offset, time.monotonic(), loader.num_workers
    for packed in tidy_errors(loader, loader.patience):
        if skip:
            skip -= 1
            continue
        snapshot, offset = last.snapshot, 0 if workers else last.offset + 1
        if not workers and time.monotonic() - snapshot_time > SNAPSHOT_SECONDS:
            snapshot, offset, snapshot_time = loader.save_state_rank(), 0, time.monotonic()
        skipped, truncated = last.skipped + packed.skipped, last.truncated + packed.truncated
        drawn = last.samples + packed.samples, last.tokens + packed.tokens
        last = Position(*loader.counters, snapshot, offset, last.batches + 1, skipped, truncated, *drawn)
        yield last, packed.batch


class FiniteLoader:
    """Validation: every pass starts afresh, whatever was left of the one before, so all passes are equal.

    With several ranks all stop together, when the first has no batch left: a rank that went on would wait for ever.
    """

    def __init__(
        self, recipe: Recipe, task: PackTask, config: WorkerConfig, packing_buffer: int, timeout: float
    ) -> None:
        self.arguments = recipe, task, config, packing_buffer
        self.timeout = timeout

    def __iter__(self) -> Generator[PackedBatch]:
        config = self.arguments[2]
        loader = BasicDataLoader(
            val_dataset(*self.arguments),
            gc_collect_every_n_steps=10 if config.num_workers else 0,
            prefetch_factor=PREFETCH,
            **watchdog_settings(self.timeout, config.num_workers),
        )
        prepare(loader)
        batches, given = (packed.batch for packed in tidy_errors(loader, self.timeout)), 0
        try:
            for batch in _in_step(batches) if config.world_size > 1 else batches:
                given += 1
                yield batch
        finally:
            stop(loader)
        if not given:
            path = self.arguments[0].path
            raise UserError(
                f"{path}: there is no pack to validate on: no sample of a rank can be used. Try: lit-eemllm shards check {path} CONFIG"
            )


def collective_device() -> str:
    """Where a tensor must be that the ranks sum or compare."""
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def _in_step(batches: Iterator[PackedBatch]) -> Iterator[PackedBatch]:
    device = collective_device()
    while True:
        batch = next(batches, None)
        everybody = torch.tensor(int(batch is not None), device=device)
        dist.all_reduce(everybody, dist.ReduceOp.MIN)
        if batch is None or not everybody.item():
            return
        yield batch
