"""Tasks become processes: started when what they need is done, as many at once as asked for, each with its own devices."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path
from typing import IO, Any, Protocol

from ..config.keys import Config
from ..errors import UserError
from ..locks import try_lock
from ..shipped import find, nowhere
from .plan import Plan, Task, make_plan
from .spec import Sweep
from .status import Board, last_lines

STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
POLL = 0.2  # seconds


class Job:
    """The commands of a task, one after the other, each its own process; what they print goes to the folder's `log.txt`.

    Submitit pickles it for Slurm, where `checkpoint` is called before the job's time is up.
    """

    def __init__(
        self, task: Task, command: Sequence[str], imports: Sequence[Path], environment: dict[str, str]
    ) -> None:
        self.command, self.options = command, [word for file in imports for word in ("--import", str(file))]
        self.words = task.commands()
        self.folder, self.environment = task.folder, environment
        self.process: subprocess.Popen[bytes] | None = None
        self.stopped = False

    def __call__(self) -> int:
        """Run them. Returns the first exit status that is not 0, else 0."""
        with (self.folder / ".lock").open("a+") as lock, (self.folder / "log.txt").open("ab", buffering=0) as log:
            self._end_what_an_earlier_call_left(lock, log)
            for words in self.words:
                if self.stopped:
                    return 128 + signal.SIGTERM
                log.write(f"$ lit-eemllm {shlex.join([*words, *self.options])}\n".encode())
                # The process keeps the lock: if this one is killed, the next call finds the process by it. A session of
                # its own: Ctrl-C is for the sweep, which asks its processes once.
                self.process = process = subprocess.Popen(
                    [*self.command, *words, *self.options], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                    env={**os.environ, **self.environment}, start_new_session=True, pass_fds=[lock.fileno()],
                )  # fmt: skip
                lock.truncate(0)
                print(os.uname().nodename, process.pid, file=lock, flush=True)
                try:
                    if self.stopped:  # meanwhile
                        process.terminate()
                    status = process.wait()
                finally:
                    if process.poll() is None:  # this process is being ended
                        process.terminate()
                        process.wait()
                if status:
                    return status
        return 0

    def _end_what_an_earlier_call_left(self, lock: IO[str], log: IO[bytes]) -> None:
        """A process of a sweep that was killed may still train here: ask it to save, wait for it."""
        if try_lock(lock):
            return
        lock.seek(0)
        host, _, pid = lock.read().strip().partition(" ")
        log.write(f"waiting for process {pid} on {host}, which an earlier call has left, to save and end\n".encode())
        if pid and host == os.uname().nodename:  # elsewhere, on a shared file system, it cannot be asked
            with suppress(ProcessLookupError):  # its loader processes are about to end
                os.kill(int(pid), signal.SIGTERM)
        while not try_lock(lock) and not self.stopped:
            time.sleep(POLL)

    def stop(self) -> None:
        """`fit` saves and ends; asked again, it ends at once."""
        self.stopped = True
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()

    def checkpoint(self) -> Any:
        """Stop. Returns what goes on later: the same."""
        from submitit.helpers import DelayedSubmission

        self.stop()
        if self.process is not None:
            with suppress(ChildProcessError):  # waited for already
                # not by Popen.wait: this is called in a signal handler, which may have interrupted just that
                os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        self.process, self.stopped = None, False
        return DelayedSubmission(self)


class Place(Protocol):
    """Where tasks run."""

    def start(self, tasks: Sequence[Task]) -> list[Task]:
        """Start those for which there is room; returns them."""

    def ended(self) -> list[tuple[Task, str]]:
        """Tasks that have ended since the last call, and how, in words."""

    def stop(self) -> None:
        """Ask all to save and end; again: to end."""


class Local:
    """Processes of this machine.

    Args:
        jobs: tasks at once.
    """

    def __init__(self, jobs: int, command: Sequence[str], imports: Sequence[Path]) -> None:
        self.jobs, self.command, self.imports = jobs, command, imports
        self.free = visible_devices()
        self.all_devices = len(self.free)
        self._threads = ThreadPoolExecutor(jobs)
        self._running: dict[str, tuple[Task, Job, Future[int], list[str]]] = {}

    def start(self, tasks: Sequence[Task]) -> list[Task]:
        started = []
        for task in tasks:
            assert task.config is not None
            count = devices(task.config) if self.all_devices else 0
            if len(self._running) == self.jobs or count > len(self.free):
                break
            mine, self.free = self.free[:count], self.free[count:]
            environment = {"CUDA_VISIBLE_DEVICES": ",".join(mine)} if mine else {}
            if not mine and "OMP_NUM_THREADS" not in os.environ:
                environment["OMP_NUM_THREADS"] = str(max(1, cores() // self.jobs))
            job = Job(task, self.command, self.imports, environment)
            self._running[task.name] = task, job, self._threads.submit(job), mine
            started.append(task)
        return started

    def check(self, tasks: Sequence[Task]) -> None:
        """Raises UserError, before anything is started, if something that they need is not here."""
        missing = missing_data(tasks)
        most = max((devices(task.config) for task in tasks if task.config is not None), default=0)
        if 0 < self.all_devices < most:
            missing.append(
                f"trainer.devices={most}, but only {self.all_devices} are visible here (CUDA_VISIBLE_DEVICES)"
            )
        if missing:
            raise UserError("\n  ".join(["what the runs need is missing:", *missing]))

    def ended(self) -> list[tuple[Task, str]]:
        found = []
        for name, (task, _, future, mine) in list(self._running.items()):
            if future.done():
                del self._running[name]
                self.free += mine
                error = future.exception()  # a command that cannot be started, a full disk
                status = future.result() if error is None else 0
                how = f"{type(error).__name__}: {error}" if error is not None else f"exit status {status}"
                found.append((task, signal.Signals(-status).name if status < 0 else how))
        return found

    def stop(self) -> None:
        for _, job, _, _ in self._running.values():
            job.stop()


def missing_data(tasks: Sequence[Task]) -> list[str]:
    """What of the data that they name is not here."""
    configs = [task.config for task in tasks if task.config is not None]
    data = [(c.data.train, c.data.val, c.eval.data, c.eval.images, c.eval.suite) for c in configs]
    paths = dict.fromkeys(path for some in data for path in some if path is not None)
    return [f"{path}: no such data{nowhere(path)}" for path in paths if not find(path).exists()]


def devices(config: Config) -> int:
    """CUDA devices that a run takes where there are any; `auto` is one, or results would depend on the machine."""
    if config.trainer.get("accelerator", "auto") not in ("auto", "gpu", "cuda"):
        return 0
    count = config.trainer.get("devices", "auto")
    return 1 if count == "auto" else count


def visible_devices() -> list[str]:
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return list(takewhile(re.compile(r"\s*(\d|GPU-|MIG-)").match, named.split(",")))  # CUDA reads no further
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def noted_signals() -> Iterator[list[int]]:
    """What asks the sweep to stop is noted, instead of stopping it."""
    received: list[int] = []
    in_main = threading.current_thread() is threading.main_thread()
    asked = [one for one in STOP if in_main and signal.getsignal(one) is not signal.SIG_IGN]  # nohup ignores one
    before = {one: signal.signal(one, lambda number, _: received.append(number)) for one in asked}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_all(
    sweep: Sweep, place: Place, board: Board, write: Callable[[Plan, dict[str, str]], object]
) -> tuple[Plan, dict[str, str], int]:
    """Run all that is left of a sweep, and `write` what has ended and what failed whenever one has, so that there can be a report meanwhile.

    Returns:
        the plan as it is in the end; tasks that failed, and why; the signal that ended it, or 0.
    """
    failed: dict[str, str] = {}
    running: dict[str, Task] = {}
    heard, news = 0, True
    plan = make_plan(sweep)
    try:
        with noted_signals() as received:
            while True:
                if news and not received:
                    ready = []
                    for task in plan.open():
                        if task.name in failed or task.name in running:
                            continue
                        if (why := refusal(task, plan, failed)) is not None:
                            failed[task.name] = why
                            board.event(f"not run  {task.name}: {why}")
                        elif task.config is not None:
                            task.freeze()
                            ready += [task] if all(plan.tasks[need].done for need in task.needs) else []
                    for task in place.start(ready):
                        running[task.name] = task
                        board.started(task)
                if news:
                    write(plan, failed)
                news = False
                board.update(plan, running, failed)
                if not running:
                    return plan, failed, received[0] if received else 0
                time.sleep(POLL)
                if len(received) > heard:
                    heard = len(received)
                    place.stop()
                    text = f"{signal.Signals(received[-1]).name}: {len(running)} running save and end"
                    board.event(text + ("; once more ends them at once" if heard == 1 else ""))
                for task, how in place.ended():
                    del running[task.name]
                    news = True
                    if task.done:
                        board.finished(task)
                    elif not received:
                        log = task.folder / "log.txt"
                        failed[task.name] = f"{how}; {log} ends:\n{last_lines(log)}"
                        board.event(f"failed   {task.name}: {failed[task.name]}")
                    if task.trial:
                        plan = make_plan(sweep)
    finally:
        if running:  # an error of this program
            place.stop()


def refusal(task: Task, plan: Plan, failed: dict[str, str]) -> str | None:
    """Why a task cannot be run; None if it can, now or later."""
    for found in (plan.changed, plan.hopeless):
        if task.name in found:
            return found[task.name]
    broken = [need for need in task.needs if need in failed]
    return f"it needs {broken[0]}, which failed" if broken else None
