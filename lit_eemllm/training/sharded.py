"""Sharded checkpoints: each rank writes its shards of what FSDP2 shards, into safetensors files beside the checkpoint.

A *share* here is what PyTorch calls a shard of a tensor: a rank's part of it. (Data shards are something else.)

    step-40.ckpt          everything else; of a tensor that is in shares only name, shape and dtype (a tensor on "meta")
    step-40.shards-1/     a file for each rank, written and read by torch.distributed.checkpoint

A thread writes the shares while training goes on. The checkpoint, which names them, appears last, so it exists whole or not at all.
Any number of ranks can read it, each the part it needs; a single process reads whole tensors.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import warnings
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future
from copy import deepcopy
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor

from ..errors import CheckpointError

SECTIONS = ("state_dict", "optimizer_states")
"""The sections of a checkpoint whose tensors may be in shares."""
SHARDS = "shards"
"""The section that names the folder of the shares and, for each file, its size and checksum."""


def folders_of(path: Path) -> list[Path]:
    """All folders with shares of a checkpoint, even those left by a process that was killed while saving, which it does not name."""
    return sorted(path.parent.glob(f"{path.stem}.shards-*"))


def forget_unfinished(folder: Path) -> None:
    """Delete shares that no checkpoint in a folder names, left by a process that was killed while saving."""
    named = set()
    for path in folder.glob("*.ckpt"):
        with contextlib.suppress(Exception):  # reading a damaged one reports it
            named.add(torch.load(path, map_location="cpu", weights_only=True, mmap=True)[SHARDS]["folder"])
    for shares in folder.glob("*.shards-*"):
        if shares.name not in named:
            shutil.rmtree(shares)


def _each(values: Any, name: str) -> Iterator[tuple[str, Any, Any, Tensor]]:
    """Name, container and key of every tensor in a section, however deep."""
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in list(items):
        if isinstance(value, Tensor):
            yield f"{name}.{key}", values, key, value
        else:
            yield from _each(value, f"{name}.{key}")


def _copied(values: Any) -> Any:
    """A copy of nested dictionaries and lists; their other values are shared."""
    if isinstance(values, dict):
        return {key: _copied(value) for key, value in values.items()}
    return [_copied(value) for value in values] if isinstance(values, list) else values


class _Writer(HuggingFaceStorageWriter):
    """Calls `finished` on rank 0 once the files of all ranks are written."""

    def __init__(self, folder: Path, finished: Callable[[], None]) -> None:
        super().__init__(str(folder), save_distributed=True)
        self.finished = finished

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        self.finished()


def begin_saving(
    checkpoint: dict[str, Any], path: Path, write: Callable[[dict[str, Any], Path], None], group: dist.ProcessGroup
) -> Future[Any]:
    """Save on all ranks together. Returns once everything is copied; a thread goes on writing.

    Args:
        checkpoint: with a DTensor for whatever is in shares.
        path: of the checkpoint.
        write: writes a checkpoint without shares, atomically.
        group: of all ranks, on the CPU, used for nothing else.

    Returns:
        a future; its `result` raises what went wrong, on all ranks.
    """
    rest = {**checkpoint, **{section: _copied(checkpoint[section]) for section in SECTIONS}}
    shares: dict[str, DTensor] = {}
    for section in SECTIONS:
        for name, values, key, x in _each(rest[section], section):
            if isinstance(x, DTensor):
                shares[name], values[key] = x, torch.empty(x.shape, dtype=x.dtype, device="meta")
    rest = deepcopy(rest)  # counters and generator states change while the thread writes
    names = (path.parent / f"{path.stem}.shards-{number}" for number in count(1))
    folder = [next(name for name in names if not name.exists())]
    dist.broadcast_object_list(folder, src=0, group=group)

    def finished() -> None:
        files = sorted(folder[0].iterdir())
        for file in files:
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        entries = {file.name: [file.stat().st_size, _checksum(file)] for file in files}
        write({**rest, SHARDS: {"folder": folder[0].name, "files": entries}}, path)
        for old in folders_of(path):
            if old != folder[0]:
                shutil.rmtree(old)

    path.parent.mkdir(parents=True, exist_ok=True)
    saving: Future[Any] = dcp.async_save(shares, storage_writer=_Writer(folder[0], finished), process_group=group)  # type: ignore[assignment]
    return saving


def _checksum(file: Path) -> int:
    crc = 0
    with file.open("rb") as opened:
        while part := opened.read(1 << 24):
            crc = zlib.crc32(part, crc)
    return crc


def folder_of(checkpoint: Mapping[str, Any], path: Path) -> Path | None:
    """The folder with a checkpoint's shares, if it has any. Raises CheckpointError for missing files or other sizes than were saved."""
    if SHARDS not in checkpoint:
        return None
    section = checkpoint[SHARDS]
    folder = path.parent / section["folder"]
    names = [section["folder"], *section["files"]]
    if any(Path(name).name != name or name in ("", "..") for name in names):
        raise CheckpointError(
            f"{path}: its shares are called {names}, which are no plain names: expected a folder and files beside it"
        )
    if not folder.is_dir():
        raise CheckpointError(f"{path}: its shares are not there: copy the folder {folder.name} beside it")
    sizes = {file.name: file.stat().st_size for file in folder.iterdir()}
    if wrong := [name for name, (size, _) in section["files"].items() if sizes.get(name) != size]:
        raise CheckpointError(f"{folder}: {', '.join(wrong)} is missing or not as long as it was written")
    asked = sum(x.numel() * x.itemsize for name in SECTIONS for *_, x in _each(checkpoint[name], "") if x.is_meta)
    if asked > sum(sizes.values()):
        raise CheckpointError(f"{path}: its tensors have {asked:,} bytes, its shares {sum(sizes.values()):,}")
    return folder


def changed(checkpoint: Mapping[str, Any], folder: Path, part: slice = slice(None)) -> list[str]:
    """Files whose checksum is not the one saved with them. `part` selects some of the files, sorted by name."""
    files = sorted(checkpoint[SHARDS]["files"].items())[part]
    return [str(folder / name) for name, (_, checksum) in files if _checksum(folder / name) != checksum]


def fill(checkpoint: dict[str, Any], folder: Path, sections: Collection[str]) -> None:
    """Read whole tensors into these sections, in place of those on "meta". With all sections filled, the checkpoint is like any other.
    Raises CheckpointError for files that have changed."""
    places = [place for section in sections for place in _each(checkpoint[section], section) if place[3].is_meta]
    if not places:
        return
    if wrong := changed(checkpoint, folder):
        raise CheckpointError(f"{', '.join(wrong)}: its bytes have changed since they were written")
    if set(SECTIONS) <= set(sections):
        del checkpoint[SHARDS]
    _read(folder, {name: torch.empty_like(x, device="cpu") for name, *_, x in places}, places)


def fill_shares(checkpoint: dict[str, Any], folder: Path, like: Callable[[str], Tensor]) -> None:
    """Read this rank's shares, in place of tensors on "meta". All ranks call it.

    Args:
        like: from a name, such as ``state_dict.model.x`` or ``optimizer_states.0.state.3.exp_avg``, to the parameter as sharded here.
    """
    places = [place for section in SECTIONS for place in _each(checkpoint[section], section) if place[3].is_meta]
    _read(folder, {name: torch.empty_like(like(name), dtype=x.dtype) for name, *_, x in places}, places)


def _read(folder: Path, tensors: dict[str, Tensor], places: list[tuple[str, Any, Any, Tensor]]) -> None:
    reader = HuggingFaceStorageReader(str(folder))
    stored = reader.read_metadata().state_dict_metadata
    for name, x in tensors.items():  # torch would load other dtypes, and the first rows of a larger tensor
        entry = stored.get(name)
        found = (entry.size, entry.properties.dtype) if isinstance(entry, TensorStorageMetadata) else None
        if found != (x.shape, x.dtype):
            raise CheckpointError(
                f"{folder}: not readable as shares of a checkpoint: {name} is {found}, expected {x.shape}, {x.dtype}"
            )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is")
            dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
    except CheckpointException as error:  # a BaseException
        reasons = {next(iter(str(each[0]).splitlines()), type(each[0]).__name__) for each in error.failures.values()}
        raise CheckpointError(
            f"{folder}: not readable as shares of a checkpoint: {'; '.join(sorted(reasons))}"
        ) from error
    for name, values, key, _ in places:
        values[key] = tensors[name]
