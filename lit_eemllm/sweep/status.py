"""What a sweep shows while it runs: a table on a terminal, a line an event everywhere."""

from __future__ import annotations

import csv
import time
from collections import defaultdict
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from statistics import median

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..console import console, metrics_files
from ..errors import UserError
from .plan import Plan, Task

TAIL = 12  # lines of a log that are shown of a run that failed


def logged(run: Path) -> tuple[int, float | None, str]:
    """Steps taken, seconds a step and the loss, as last logged."""
    for file in reversed(metrics_files(run)):
        with suppress(ValueError, csv.Error), file.open(encoding="utf-8") as lines:  # being written, or torn by a crash
            rows = [row for row in csv.DictReader(lines) if row.get("loss") and row.get("step_seconds")]
            if rows:
                return int(rows[-1]["step"]), float(rows[-1]["step_seconds"]), f"{float(rows[-1]['loss']):.3f}"
    return 0, None, ""


def last_lines(log: Path) -> str:
    if not log.is_file():
        return "(nothing)"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join([f"    {line}" for line in lines if line.strip()][-TAIL:])


def duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 90
        else f"{seconds / 60:.0f} min"
        if seconds < 5400
        else f"{seconds / 3600:.1f} h"
    )


class Board:
    """A table with a row per cell and a column per seed, where a person watches; a line per event in any case.

    Args:
        jobs: tasks at once, for the time left.
    """

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        self._started: dict[str, tuple[float, int]] = {}  # task -> when, at which step
        self._rates: dict[str, float] = {}  # row -> seconds a step
        self._besides: list[float] = []  # seconds of finished tasks that were no training: start, evaluation
        self._drawn = 0.0
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None

    def __enter__(self) -> Board:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def event(self, text: str) -> None:
        console.print(f"{time.strftime('%H:%M:%S')} {text}")

    def started(self, task: Task) -> None:
        step, _ = self._look(task)
        self._started[task.name] = time.monotonic(), step
        self.event(f"started  {task.name}{f', continues at step {step}' if step else ''}")

    def finished(self, task: Task) -> None:
        start, first = self._started[task.name]
        seconds, (step, _) = time.monotonic() - start, self._look(task)
        if task.row in self._rates:
            self._besides.append(max(0.0, seconds - (step - first) * self._rates[task.row]))
        self.event(f"finished {task.name}{' (diverged)' if task.diverged else ''}, {duration(seconds)}")

    def update(self, plan: Plan, running: Collection[str], failed: Collection[str]) -> None:
        """Draw the table, at most once a second."""
        if self._live is None or time.monotonic() - self._drawn < 1:
            return
        self._drawn = time.monotonic()
        places: dict[str, dict[str, list[Task]]] = defaultdict(lambda: defaultdict(list))
        for task in plan.tasks.values():
            places[task.row][task.column].append(task)
        columns = sorted(dict.fromkeys(task.column for task in plan.tasks.values()), key=lambda name: name != "search")
        table = Table("", *columns, box=None, padding=(0, 2, 0, 0))
        for row, tasks in places.items():
            table.add_row(row, *(self._cell(tasks[column], running, failed) for column in columns))
        done = sum(task.done for task in plan.tasks.values())
        left = self._left(plan, failed)
        summary = f"{done} of {len(plan.tasks)} done, {len(running)} running, {len(failed)} failed"
        summary += f"; about {duration(left)} left" if left is not None else ""
        self._live.update(Group(table, Text(summary)), refresh=True)

    def _cell(self, tasks: list[Task], running: Collection[str], failed: Collection[str]) -> str:
        """State of the tasks of one place of the table: stages of a run, or trials."""
        active = [task for task in tasks if task.name in running]
        if len(active) > 1:
            return f"{len(active)} running"
        for task in active:
            step, loss = self._look(task)
            if not task.commands() or task.commands()[0][0] != "fit":
                return "evaluation"
            seconds = self._training(task)
            return (
                f"step {step}/{task.steps}"
                + f", loss {loss}" * bool(loss)
                + (f", {duration(seconds)}" if seconds else "")
            )
        if any(task.name in failed for task in tasks):
            return "failed"
        done = [task for task in tasks if task.done]
        if len(done) < len(tasks):
            return f"{len(done)} of {len(tasks)}" if done else ""
        if tasks and not tasks[-1].trial and tasks[-1].results_file.is_file():
            try:
                average = tasks[-1].results().get("average")
            except UserError:  # which the report tells; the runs go on
                return "unreadable"
            return "done" if average is None else f"{average:.3f}"
        return "done" if tasks else ""

    def _look(self, task: Task) -> tuple[int, str]:
        """Steps taken and the loss; keeps the time they take."""
        step, seconds, loss = logged(task.folder)
        if seconds is not None:
            self._rates[task.row] = seconds
        return step, loss

    def _training(self, task: Task) -> float:
        """Seconds of training that are left of a task; 0 if nothing is known yet."""
        rate = self._rates.get(task.row) or (median(self._rates.values()) if self._rates else 0.0)
        return 0.0 if task.checkpoint is not None else rate * max(0, task.steps - logged(task.folder)[0])

    def _left(self, plan: Plan, failed: Collection[str]) -> float | None:
        """Seconds until all is done, if as many run at once as may; None if nothing is known yet."""
        tasks = [task for task in plan.open() if task.name not in failed]
        if not self._rates or not tasks:
            return None
        besides = median(self._besides) if self._besides else 0.0
        return sum(self._training(task) + besides for task in tasks) / min(self.jobs, len(tasks))
