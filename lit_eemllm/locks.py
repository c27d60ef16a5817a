"""One process at a time in a folder: sweeps, and trainings."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from .console import writing
from .errors import UserError


def try_lock(file: IO[str], lock: Callable[[Any, int], None] = fcntl.flock) -> bool:
    """Whether nobody else holds it. `fcntl.flock` is given back when all processes that have inherited the file have closed it,
    `fcntl.lockf` when the process that locked it ends."""
    try:
        lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:  # some network file systems have no locks; to go on without is better than not at all
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    return True


@contextmanager
def locked(
    folder: Path, what: str, name: str = ".lock", lock: Callable[[Any, int], None] = fcntl.flock
) -> Iterator[None]:
    """Nobody else does the same in the folder meanwhile. Where it fails before it has made anything, nothing is left.

    Args:
        folder: made if it is not there.
        what: is done, such as "sweep", for the message.
        name: of the file that is locked.
        lock: see `try_lock`.

    Raises:
        UserError: another process does.
    """
    path, was_there = folder / name, folder.exists()
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    with file:
        # held, but perhaps of a file that who had it has removed meanwhile
        if not try_lock(file, lock) or not path.exists() or not os.path.samestat(path.stat(), os.fstat(file.fileno())):
            file.seek(0)
            raise UserError(
                f"{folder}: another {what} is running here ({file.read().strip() or 'just started'}). Wait for it, or end it; "
                "what it has done is kept."
            )
        with writing(path):
            file.truncate(0)
            os.write(file.fileno(), f"process {os.getpid()} on {os.uname().nodename}\n".encode())
        try:
            yield
        except BaseException:
            with suppress(OSError):  # what went wrong is being told
                if list(folder.iterdir()) == [path]:
                    path.unlink()
                    if not was_there:
                        folder.rmdir()
            raise
