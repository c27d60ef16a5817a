"""Checkpoint files and model folders: written atomically, read without executing anything, found and checked for `resume`."""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from ..compat.bitsandbytes import adamw8bit_state
from ..compat.lightning import saved_packs
from ..config import current_key, flat
from ..config.keys import ModelConfig, OptimConfig
from ..console import unfinished, writing
from ..data.module import ShardDataModule
from ..errors import CheckpointError, UserError, WriteError
from . import sharded
from .tuning import moments

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from ..config.keys import Config

FOLDER = "checkpoints"
_NAME = re.compile(r"step-(\d+)\.ckpt")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its final name, flushes it to disk and renames it: it exists whole or not at all."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        path = Path(path)
        part = unfinished(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError from OSError
            reason = error if isinstance(error, OSError) else (error.__context__ or error)
            raise WriteError(
                f"{path} could not be written: {reason}. Earlier checkpoints are as they were; make room (of optim.keep, one "
                "is removed after the next is written) and repeat the command to continue from the newest."
            ) from error
        finally:
            with contextlib.suppress(OSError):  # the error above says what is wrong with the disk
                part.unlink(missing_ok=True)

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)
        for folder in sharded.folders_of(Path(path)):
            shutil.rmtree(folder)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        return read_checkpoint(Path(path), verified=True)  # `fit` compared checksums before it built anything


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A temporary folder to fill, renamed to `out` once complete. Raises UserError if `out` exists, or WriteError."""
    if out.exists():
        raise UserError(f"{out} exists already: remove it, or name another folder")
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
            folder = Path(temporary) / out.name
            folder.mkdir()
            yield folder
            for file in filter(Path.is_file, folder.rglob("*")):  # safetensors makes files that only the owner can read
                file.chmod(folder.stat().st_mode & 0o666)  # the folder's mode follows the umask
            folder.rename(out)


def save(trainer: Trainer, path: Path) -> None:
    """`Trainer.save_checkpoint`. Only rank 0 writes; if it cannot, all ranks raise its WriteError, so that none waits forever for the
    others."""
    error = None
    try:
        trainer.save_checkpoint(path)
    except WriteError as raised:
        error = raised
        trainer.strategy.barrier("Trainer.save_checkpoint")  # where the other ranks wait
    message = trainer.strategy.broadcast(None if error is None else str(error))
    if message is not None:
        raise WriteError(message) from error


def read_checkpoint(path: Path, verified: bool = False, shares: Collection[str] = sharded.SECTIONS) -> dict[str, Any]:
    """The contents of a checkpoint, on the CPU.

    Args:
        path: the file.
        verified: its checksums were just compared, so do not compare them again: it takes as long as reading.
        shares: sections whose sharded tensors are read; in others these are on "meta", with a shape and dtype only.

    Raises:
        CheckpointError: it is missing, damaged, foreign or would execute code. Where its run has earlier ones that are whole,
            the newest of them is named.
    """
    try:
        return _read(path, verified, shares)
    except CheckpointError as error:
        ours = path.parent.name == FOLDER and _NAME.fullmatch(path.name)
        others = (
            [other for other in all_checkpoints(path.parent.parent) if step_of(other) < step_of(path)] if ours else []
        )
        whole = next(filter(_is_whole, reversed(others)), None)
        if whole is None:
            raise
        raise CheckpointError(
            f"{error}. The newest before it that is whole is {whole}: to go on from it, name it (resume=FILE, init_from=FILE or "
            "--checkpoint FILE)."
        ) from error


def _read(path: Path, verified: bool, shares: Collection[str] = ()) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        if not verified:
            _compare_checksums(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever is wrong with the bytes: torch and pickle raise nearly anything
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(f"{path}: not readable as a checkpoint: {reason}") from error
    if not isinstance(checkpoint, dict) or not {"lit_eemllm", "state_dict"} <= checkpoint.keys():
        raise CheckpointError(f"{path}: not a checkpoint of lit_eemllm (no section 'lit_eemllm' or 'state_dict')")
    try:
        if (folder := sharded.folder_of(checkpoint, path)) is not None:
            sharded.fill(checkpoint, folder, shares)
    except CheckpointError:
        raise
    except Exception as error:  # likewise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(f"{path}: its shares are not readable: {reason}") from error
    return checkpoint


@contextlib.contextmanager
def blaming(path: Path | None, begun: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """A context whose CheckpointErrors name the checkpoint, if there is one, until `begun` says that it is no longer read."""
    try:
        yield
    except CheckpointError as error:
        if path is None or begun() or str(path) in str(error):
            raise
        raise CheckpointError(f"{path}: {error}") from error


@contextlib.contextmanager
def using(path: Path) -> Iterator[None]:
    """A context that reads from a checkpoint and does nothing else. Its sections may hold anything, which Lightning does not check, so
    errors that this causes become CheckpointErrors.

    Raises:
        CheckpointError: with the path; also where something is missing, or of another type or shape than `fit` writes.
    """
    try:
        with blaming(path):
            yield
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        reason = next(iter(str(error).splitlines()), "")
        raise CheckpointError(
            f"{path}: a section is not as `fit` writes it ({type(error).__name__}: {reason}). Continue from another checkpoint "
            "(resume=FILE), or begin a new run."
        ) from error


def _is_whole(path: Path) -> bool:
    try:
        _read(path, verified=False)
    except CheckpointError:
        return False
    return True


def _compare_checksums(path: Path) -> None:
    """Compare the checksums that torch writes for every tensor but never checks: a page of zeros would load. Raises ValueError."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        packed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
        if packed or sum(member.file_size for member in members) > path.stat().st_size:  # a zip bomb
            raise ValueError("it is not stored as torch stores it")
        if (name := archive.testzip()) is not None:
            raise ValueError(f"its bytes have changed since they were written (the checksum of {name} is another)")


def tensors(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights that a checkpoint holds, by name. Raises TypeError if something else is among them."""
    state = checkpoint["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise TypeError("state_dict does not hold tensors by their names")
    return state


def newest_checkpoint(run: Path) -> Path | None:
    """The checkpoint with the most steps in a run directory."""
    return next(reversed(all_checkpoints(run)), None)


def all_checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run directory, sorted by step."""
    return sorted((path for path in (run / FOLDER).glob("*.ckpt") if _NAME.fullmatch(path.name)), key=step_of)


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint, such as 40 in ``step-40.ckpt``."""
    return int(path.stem.removeprefix("step-"))


def set_aside(run: Path, start: Path, step: int) -> Path | None:
    """Move the checkpoints that a run saved after the one it continues from into a folder ``abandoned-N``, where `newest_checkpoint`
    does not look. If it continues from another run's checkpoint, all of its own are moved.

    Args:
        run: the run directory.
        start: the checkpoint that it continues from.
        step: the step of that checkpoint.

    Returns:
        the folder, if anything was moved.
    """
    ours = start.resolve().parent == (run / FOLDER).resolve()
    later = [path for path in all_checkpoints(run) if not ours or step_of(path) > step]
    if not later:
        return None
    names = (run / FOLDER / f"abandoned-{number}" for number in count(1))
    folder = next(name for name in names if not name.exists())
    folder.mkdir()
    for path in later:
        path.rename(folder / path.name)
        for shares in sharded.folders_of(path):
            shares.rename(folder / shares.name)
    return folder


def refuse_incomplete(checkpoint: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that lacks a section: Lightning would continue without restoring it.

    Raises:
        CheckpointError: a section is missing. LookupError, AttributeError or TypeError: a section is malformed, see `using`.
    """
    sections: dict[str, Any] = {"loops": dict, "optimizer_states": list, "lr_schedulers": list, "rng": list}
    sections |= {"global_step": int, ShardDataModule.__qualname__: dict}
    if missing := [name for name, kind in sections.items() if not isinstance(checkpoint.get(name), kind)]:
        raise CheckpointError(
            f"the checkpoint holds no {' and no '.join(missing)}, or not as `fit` writes it, so a run cannot continue from it. "
            "Continue from another, or begin a new run from its weights (init_from)."
        )
    for group in checkpoint["optimizer_states"][0]["param_groups"]:  # which torch loads unchecked
        numbers = [group["lr"], group["initial_lr"], group["weight_decay"], group["eps"], *group["betas"]]
        if len(numbers) != 6 or not all(isinstance(x, float | int) and math.isfinite(x) for x in numbers):
            raise TypeError("optimizer_states: found lr, weight_decay, eps or betas that are not finite numbers")


def refuse_moments(checkpoint: Mapping[str, Any], trained: Mapping[str, Tensor], states: str) -> None:
    """Refuse AdamW moments that do not fit their weights: AdamW loads any shape and dtype, and fails in the next step or, worse,
    computes something else.

    Args:
        states: ``optim.states``.
        trained: the trained weights by name, in the order of the optimiser. A weight without moments has had no gradient yet.

    Raises:
        CheckpointError: naming the first weight whose moments do not fit. Others as in `refuse_incomplete`.
    """
    (saved,) = checkpoint["optimizer_states"]
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    if numbers != list(range(len(trained))) or not saved["state"].keys() <= set(numbers):
        raise CheckpointError(
            f"its optimiser has trained {len(numbers)} tensors and has moments of {len(saved['state'])}, this configuration "
            f"trains {len(trained)}. Set optim.tuning as it was, or begin a new run from its weights (init_from)."
        )
    for (name, weight), number in zip(trained.items(), numbers, strict=True):
        if number not in saved["state"]:
            continue
        own = {"step": 0 if states == "8bit" else torch.zeros(()), **moments(weight, states)}
        held = adamw8bit_state(saved["state"][number])
        found, expected = ({key: _kind(some[key]) for key in sorted(some)} for some in (held, own))
        if found != expected or not 0 < saved["state"][number]["step"] < math.inf:
            raise CheckpointError(
                f"the optimiser's moments of {name} do not fit it: found {found}, expected {expected}. Continue from another "
                "checkpoint (resume=FILE), or begin a new run from its weights (init_from)."
            )


def _kind(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def refuse_changes(checkpoint: dict[str, Any], config: Config, ranks: int) -> None:
    """Refuse to continue a run with another configuration. Raises CheckpointError naming every key that may not change.

    May change: ``trainer.*`` but the precision and the packs per step (gradient accumulation x ranks), the attention backend,
    activation checkpointing and where that keeps inputs, the number of steps, how often the run logs, saves, validates and shows samples, and its patience. The data module checks its
    own keys.
    """
    packs_seen = saved_packs(checkpoint)["current"]
    if packs_seen["processed"] < packs_seen["ready"]:
        raise CheckpointError(
            "the checkpoint was saved in the middle of a step, before one that went wrong: it holds good weights, but not the "
            "gradients of the step so far. Begin a new run from them (init_from)."
        )
    free = {
        "attention",
        "compile",
        "activation_checkpointing",
        "activation_offload",
        "max_steps",
        "save_every",
        "val_every",
        "val_batches",
        "log_every",
        "keep",
        "samples_every",
        "patience",
    }
    was, now = checkpoint["lit_eemllm"]["config"], asdict(config)
    pairs: dict[str, Any] = {"trainer.precision": (was["trainer"].get("precision"), now["trainer"].get("precision"))}
    hint = ""
    packs = [
        (section["trainer"].get("accumulate_grad_batches", 1), count)
        for section, count in ((was, checkpoint["lit_eemllm"].get("ranks", ranks)), (now, ranks))
    ]
    if packs[0][0] * packs[0][1] != packs[1][0] * packs[1][1]:
        pairs["trainer.accumulate_grad_batches x ranks"] = [f"{count} x {many}" for count, many in packs]
        hint = _other_ranks(*packs[0], was["data"]["workers"], ranks)
    for section, kind in (("model", ModelConfig), ("optim", OptimConfig)):
        before = {
            f"{section}.{key}": value for key, value in flat(asdict(kind())).items()
        }  # of keys that its version had not
        before |= {current_key(f"{section}.{key}"): value for key, value in flat(was[section]).items()}
        after = {f"{section}.{key}": value for key, value in flat(now[section]).items()}
        keys = [key for key in before | after if key.partition(".")[2] not in free]
        pairs |= {key: (before.get(key), after.get(key)) for key in keys}
    pairs["seed"] = was["seed"], now["seed"]
    if (done := checkpoint.get("global_step", 0)) > config.optim.steps:
        raise CheckpointError(
            f"optim.max_steps={config.optim.steps:,}, but the run has {done:,} steps already: set as many or more, or go back to an "
            "earlier checkpoint (resume=FILE)."
        )
    # a key that only one of the two has is null in the other
    changed = [f"{key} was {old} and is {new}" for key, (old, new) in pairs.items() if old != new]
    if changed:
        raise CheckpointError(
            f"the run cannot continue as something else: {'; '.join(changed)}. {hint}"
            "Set it back, or begin a new run (another `out`), from these weights if you like (init_from)."
        )


def _other_ranks(accumulate: int, was: int, workers: int, ranks: int) -> str:
    """A hint: the settings with which a run of `was` ranks can continue on `ranks`, or else the numbers of ranks that it can. Packs
    per step and the total of workers must stay the same, and every worker must give equally many packs to each step
    (`ShardDataModule`)."""
    packs, streams = accumulate * was, workers * was
    dealt = streams and packs % streams == 0
    fitting = [n for n in range(1, packs + 1) if n == was or (dealt and streams % n == 0)]
    if ranks not in fitting:
        return f"It goes on with {' or '.join(map(str, fitting))} ranks. "
    settings = f"trainer.accumulate_grad_batches={packs // ranks} data.workers={streams // ranks}"
    return f"With {ranks} rank{'s' * (ranks > 1)} it goes on with {settings}. "
