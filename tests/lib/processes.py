"""Processes that have the program's imports, which take seconds, from the start: forks of one that has made them and done nothing else.

A test of the command itself, of how it starts or ends as a Python program, uses `subprocess`.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import socket
import sys
import tempfile
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["lit_eemllm.cli", "lit_eemllm.training.fit", "tiny"])


def _within(
    folder: str,
    environment: dict[str, str],
    session: bool,
    stdout: Connection,
    stderr: str,
    function: Any,
    arguments: Any,
) -> None:
    gc.freeze()  # see tests/conftest.py
    if session:
        os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ |= environment
    os.dup2(stdout.fileno(), 1)
    stdout.close()
    with open(stderr, "w") as file:
        os.dup2(file.fileno(), 2)
    function(*arguments)


def run_code(code: str) -> None:
    """As `python -c` does."""
    exec(code, {"__name__": "__main__"})  # noqa: S102


def network(count: int = 2) -> dict[str, str]:
    """What Lightning reads of the environment of so many ranks, on loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count), "NODE_RANK": "0"}


def run_command(*words: object) -> None:
    """`lit-eemllm` with these arguments; of one device, as Lightning starts others by what stands in `sys.argv`."""
    from lit_eemllm.cli import main

    sys.exit(main([*map(str, words)]))


class Started:
    """A process, under the names of `subprocess.Popen`.

    Args:
        function: to call in it, of a module that it can import.
        session: in a session of its own, which a signal can be sent to as a whole.
        environment: beside this process's own.
    """

    def __init__(
        self, function: Callable[..., None], *arguments: Any, session: bool = False, **environment: str
    ) -> None:
        self._stderr = tempfile.NamedTemporaryFile()  # noqa: SIM115  gone with this object
        self._reader, writer = CONTEXT.Pipe(duplex=False)
        self.stdout = os.fdopen(os.dup(self._reader.fileno()), errors="replace")
        about = (os.getcwd(), {**os.environ, **environment}, session, writer, self._stderr.name)
        self._process = CONTEXT.Process(target=_within, args=(*about, function, arguments))
        self._process.start()
        writer.close()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float) -> int | None:
        self._process.join(timeout)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def said(self) -> str:
        """To standard error."""
        return Path(self._stderr.name).read_text(errors="replace")

    def communicate(self, timeout: float) -> tuple[str, str]:
        """The rest of standard output, and standard error. A process that has not ended by then is killed."""
        timer = threading.Timer(timeout, self.kill)
        timer.start()
        try:
            rest = self.stdout.read()
            self._process.join()
        finally:
            timer.cancel()
        return rest, self.said()


def run_ranks(function: Callable[..., None], *arguments: Any, count: int = 2, timeout: float = 600) -> None:
    """Call a function as each of so many ranks, until all have ended."""
    shared = network(count)
    ranks = [Started(function, *arguments, **shared, LOCAL_RANK=str(rank)) for rank in range(count)]
    try:
        said = ["\n".join(rank.communicate(timeout))[-3000:] for rank in ranks]
        assert [rank.returncode for rank in ranks] == [0] * count, "\n\n".join(said)
    finally:
        for rank in ranks:
            rank.kill()
