"""What we use of Megatron-Energon that its documentation does not name: types of the loader's state, and places to step in."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron.energon import CrudeWebdataset, PackingDataset, SavableDataLoader, SavableDataset
from megatron.energon.bracecollapse import collapse
from megatron.energon.epathlib import EPath
from megatron.energon.flavors.webdataset.config import skip_meta_re as SKIPPED_MEMBER
from megatron.energon.flavors.webdataset.config import split_name_re as MEMBER_NAME
from megatron.energon.flavors.webdataset.sample_loader import SliceState
from megatron.energon.metadataset.loader_interface import DatasetBlendMode, LoadedDataset
from megatron.energon.rng import SystemRngState
from megatron.energon.savable_loader import (
    BasicDataLoader,
    SavableDataLoaderState,
    SavableDatasetCheckpoint,
    SavableDatasetState,
    SavableDatasetWrapper,
)
from megatron.energon.state import FlexState
from megatron.energon.watchdog import Watchdog

__all__ = [
    "MEMBER_NAME", "SKIPPED_MEMBER", "STATES", "BasicDataLoader", "CountingLoader", "DatasetBlendMode", "EPath", "FlexState",
    "LoadedDataset", "Packing", "SavableDataLoaderState", "Shards", "Watchdog", "collapse", "open_as_files", "refuse_large",
    "shard_of",
]  # fmt: skip
STATES = (SavableDataLoaderState, SavableDatasetCheckpoint, SavableDatasetState, SystemRngState, SliceState)
"""The dataclasses of which a loader's state is made, beside `FlexState`, a dict."""


# --- reading shards
class Shards(CrudeWebdataset):
    """A dataset of shards whose readers, which give samples by number, a subclass may wrap."""

    def build(self, worker_rotation_offset: int = 0) -> SavableDataset:
        made = super().build(worker_rotation_offset)
        made.dataset.join_readers = [self.wrap(reader) for reader in made.dataset.join_readers]
        return made

    def wrap(self, reader: Any) -> Any:
        raise NotImplementedError


def open_as_files(reader: Any) -> None:
    """Shards are opened directly: Energon's client for object stores counts and times every read."""
    reader.tar_filepaths = [Path(str(path)) for path in reader.tar_filepaths]


def refuse_large(reader: Any, most: int, member: str) -> None:
    """A sample of more bytes comes with nothing but this member, which says how many."""
    read = reader._get_item_by_sample_pointer

    def bounded(pointer: Any, restore_index: Any, match: Any = None) -> Any:
        if pointer.byte_size <= most:
            return read(pointer, restore_index, match)
        found = read(pointer, restore_index, lambda name: False)
        return found and {**found, member: str(pointer.byte_size).encode()}

    reader._get_item_by_sample_pointer = bounded


def shard_of(reader: Any, index: int) -> Path:
    """The shard that holds a reader's sample of that number."""
    return reader.tar_filepaths[reader.shard_tar_file_idxs[bisect_right(reader.shard_count_cumsum, index) - 1]]


# --- packing
class Packing(PackingDataset):
    """Energon's packing, from whose rounds samples may be held back, without a progress bar in every worker."""

    def hold_back(self, samples: Iterable[Any]) -> None:
        """Called while packs are chosen: these come first in the next round."""
        self._reading_buffer.extend(samples)

    def _fill_reading_buffer(self, source_iter: Any, log_progress: bool = False) -> bool:
        return super()._fill_reading_buffer(source_iter)


# --- the loader
class _BetweenBatches(SavableDatasetWrapper):
    """The side of the loader that is in a worker. It takes snapshots where a batch has ended, and nowhere else."""

    def _store_checkpoint(self, force: bool = False) -> None:
        if (
            not force
        ):  # Energon's last, also of a worker that has failed amid a batch, for which samples are already taken
            super()._store_checkpoint()


class CountingLoader(SavableDataLoader):
    """Energon's savable loader, whose place among its workers' batches can be read and set; whose answers a subclass waits for."""

    _worker_sample_counters: list[int]
    _next_worker_id: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.num_workers:
            self.dataset.__class__ = _BetweenBatches  # it is made by name within Energon

    @property
    def counters(self) -> tuple[list[int], int]:
        """Batches delivered by each worker, and whose turn it is."""
        return list(self._worker_sample_counters), self._next_worker_id

    @counters.setter
    def counters(self, value: tuple[list[int], int]) -> None:
        self._worker_sample_counters, self._next_worker_id = value

    def answers(self, queues: Sequence[Any]) -> Iterable[dict[int, Any]]:
        """What each worker puts into its queue of answers."""
        raise NotImplementedError

    def _worker_command(self, *command: Any) -> list[Any]:
        for commands in self.cmd_queues:
            commands.put(command)
        results: dict[int, Any] = {}
        for answer in self.answers(self.result_queues):
            results |= answer
        for result in results.values():
            if isinstance(result, Exception):
                raise result
        return [results[worker] for worker in range(len(results))]
