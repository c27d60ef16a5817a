"""The processes of a loader: how they start, what their end means in words, and how they are ended."""

from __future__ import annotations

import atexit
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator
from functools import partial
from multiprocessing.connection import wait
from typing import Any
from weakref import WeakSet

import torch
from PIL import Image

from lit_eemllm.compat.energon import BasicDataLoader, Watchdog
from lit_eemllm.compat.torch import DEAD_WORKER, end_workers, worker_processes
from lit_eemllm.data.task import Packed
from lit_eemllm.errors import UserError

AFTER_DEATH = (
    "Most often memory ran out: lower data.workers, data.shuffle_buffer or data.packing_buffer. "
    "Repeat the command to continue from the last checkpoint."
)
AFTER_SILENCE = (
    "A disk or network file system hangs or is slow, or the buffers take long to fill: see above where the loader processes "
    "stand, raise data.timeout or lower data.shuffle_buffer. Repeat the command to continue from the last checkpoint."
)
_USER_ERROR = f"{UserError.__module__}.{UserError.__qualname__}: "
_started: WeakSet[Any] = WeakSet()  # loaders that may have processes
_reading: WeakSet[Generator[Packed]] = WeakSet()  # what `tidy_errors` has given


def tidy_errors(loader: Any, timeout: float) -> Generator[Packed]:
    """The packs of a loader; what happens to it is told in words.

    A `UserError` from a worker arrives wrapped in the worker's traceback; people get the message alone.

    When there is no batch for so many seconds, the workers are killed, or without workers the read is interrupted, which ends
    the waiting wherever it is. (PyTorch's own time-out does not see a worker that is stopped after it has announced a batch
    and before it has handed it over.)
    """
    reading = _tidy_errors(loader, timeout)
    _reading.add(reading)
    return reading


def _tidy_errors(loader: Any, timeout: float) -> Generator[Packed]:
    silent = threading.Event()

    def end_silence() -> None:
        silent.set()
        if not loader.num_workers:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGALRM)
        for worker in worker_processes(loader):
            worker.kill()

    watchdog = Watchdog(timeout, callback=end_silence, dump_stacks=not loader.num_workers, enabled=False)
    try:
        yield from watchdog.watch_iter(loader if loader.num_workers else _interruptible(loader, timeout))
    except UserError as error:
        raise UserError(str(error).rpartition(_USER_ERROR)[2].rstrip()) from None
    except (RuntimeError, OSError, EOFError) as error:
        died = lost_worker(error) or _gone_with_a_batch(error, loader)
        if silent.is_set():
            raise UserError(f"no batch came within {timeout:g} s (data.timeout). {AFTER_SILENCE}") from None
        raise died or error from None
    finally:
        watchdog.finish()


def _interruptible(loader: Any, timeout: float) -> Iterator[Packed]:
    """SIGALRM ends the waiting for a batch; in between it belongs to others."""

    def end(number: int, frame: Any) -> None:
        raise TimeoutError(f"no answer for {timeout:g} s (data.timeout)")

    batches = iter(loader)
    while True:
        before = signal.signal(signal.SIGALRM, end)
        try:
            batch = next(batches)
        except StopIteration:
            return
        finally:
            signal.signal(signal.SIGALRM, before)
        yield batch


def lost_worker(error: BaseException) -> UserError | None:
    """What PyTorch's message about a worker that died means, if that is what it is.

    A death is noticed by a signal, so the exception may come from anywhere in the process of the trainer.
    """
    text = str(error)
    if not isinstance(error, RuntimeError) or not text.startswith(DEAD_WORKER):
        return None
    return UserError(f"a loader process died: {text.splitlines()[0]} {AFTER_DEATH}")


def _gone_with_a_batch(error: BaseException, loader: Any) -> UserError | None:
    """A worker that dies while its batch is fetched (the block of its tensors comes over a connection) shows as that broken."""
    if not loader.num_workers or not isinstance(error, ConnectionError | EOFError | FileNotFoundError):
        return None
    workers = worker_processes(loader)
    try:
        dead = wait([worker.sentinel for worker in workers], timeout=5)
        for worker in workers:
            if worker.sentinel in dead:
                worker.join()  # PyTorch's handler of signals has nothing to say of it then, wherever we are by that time
    except RuntimeError as death:  # the handler was faster
        return lost_worker(death)
    return UserError(f"a loader process died: {error!r}. {AFTER_DEATH}") if dead else None


def stop(loader: BasicDataLoader) -> None:
    """End the worker processes now. Left to the garbage collector, which may close their queues first, it can take 10 s."""
    if workers := worker_processes(loader):
        end_workers(loader)
        for worker in workers:  # one that hangs does not hear that it should end, and ignores SIGTERM (`_start_worker`)
            if worker.is_alive():
                worker.kill()


@atexit.register  # after multiprocessing's own, so it comes before: that waits for processes that it has only asked to end
def _stop_all() -> None:
    """A script that has not read to the end of its data ends nevertheless. Readers wait for a thread when they are closed, and once
    Python takes itself down, as it does from 3.13 on, that thread never ends."""
    for loader in list(_started):
        stop(loader)
    for reading in list(_reading):
        reading.close()


def watchdog_settings(timeout: float, workers: int) -> dict[str, Any]:
    """A batch that takes longer: a worker prints where it stands, before it is killed; without workers, where the system does
    not interrupt a read, the process ends."""
    return {"watchdog_timeout_seconds": 0.75 * timeout if workers else 2 * timeout, "fail_on_timeout": workers == 0}


def prepare(loader: BasicDataLoader) -> None:
    # starting an iterator draws a seed: from here, not from the global generator, whose state a resumed run must match
    loader.generator = torch.Generator()
    loader.pin_memory = torch.cuda.is_available()
    if loader.num_workers:
        loader.worker_init_fn = partial(_start_worker, loader.worker_init_fn, os.getpid())
        _started.add(loader)


def _start_worker(prepared: Callable[[int], None], trainer: int, worker: int) -> None:
    """Ctrl-C and schedulers signal every process of a job; a worker must serve until the trainer has ended its step.

    It ends when told, or when the trainer, a process by its number, is gone. (PyTorch's workers look for that too, while they wait
    for orders, and not if it was gone before they looked first.)
    """

    def end_with_it() -> None:
        while os.getppid() == trainer:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=end_with_it, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Image.core.set_blocks_max(4)  # of 16 MiB: pictures get the memory of those before, not new pages of the system each
    prepared(worker)
