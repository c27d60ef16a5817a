"""`lit-eemllm sweep`: all runs of a sweep file, one command; called again it does what is left, or nothing.

`spec` reads the file, `plan` makes tasks of it, `execute` runs them here and `slurm` on a cluster, `status` shows them.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.table import Table

from ..console import COMMAND, console, write_atomically
from ..errors import ConfigError, UserError
from ..locks import locked
from .execute import Local, Place, missing_data, run_all
from .plan import Plan, Task, make_plan, score, scored_on
from .spec import Search, Sweep, pairs, read_sweep
from .status import Board, logged

__all__ = ["sweep"]

TABLES = INDEX, SEARCHED = "sweep.json", "search.csv"  # what the report is made from, beside the runs


def sweep(
    file: Path,
    overrides: Sequence[str] = (),
    jobs: int | None = None,
    dry_run: bool = False,
    slurm: bool = False,
    imports: Sequence[Path] = (),
    command: Sequence[str] = COMMAND,
    cluster: str = "slurm",
) -> int:
    """Run what is left of a sweep, write ``sweep.json`` and the report.

    Args:
        file: of the sweep.
        overrides: ``key=value`` for all runs, or for keys of the sweep file.
        jobs: tasks at once; default 1, on Slurm all.
        dry_run: only show the tasks.
        imports: the user's own Python files, for every process.
        command: what stands before `fit` and `validate`.
        cluster: submitit's name of it.

    Returns:
        Exit status: 0 all done, 1 something is left, 128 + the signal that stopped it.

    Raises:
        ConfigError: mistakes in the sweep or in any run's configuration, or a run that was made with another one.
        UserError: another sweep is running in the same directory, or devices are missing.
    """
    if jobs is not None and jobs < 1:
        raise UserError(f"--jobs {jobs}: expected 1 or more")
    spec = read_sweep(file, overrides)
    plan = make_plan(spec)
    if plan.changed:
        raise ConfigError(
            "\n  ".join(["the sweep file has changed since these runs were made:", *plan.changed.values()])
        )
    if dry_run:
        show(spec, plan)
        return 0
    options = [word for path in imports for word in ("--import", str(path))]
    write = partial(write_tables, spec, shlex.join(["lit-eemllm", "sweep", str(file), *overrides, *options]))
    failed: dict[str, str] = {}
    stopped = 0
    worked = bool(plan.open())
    if worked:
        place: Place
        if slurm:
            from .slurm import Cluster

            place = Cluster(spec, jobs, command, imports, cluster)
        else:
            place = Local(jobs or 1, command, imports)
            place.check(plan.open())
        with locked(spec.out, "sweep"), Board(jobs or (len(plan.open()) if slurm else 1)) as board:
            plan, failed, stopped = run_all(spec, place, board, write)
    write(plan, failed)
    if stopped:
        console.print(f"{count(plan)}; the same command continues")
        return 128 + stopped
    folder = spec.out / "report"
    if any(plan.tasks[run].done for runs in plan.rows.values() for run in runs):
        if worked or stale(folder / "report.md", spec):
            from ..report import report

            report([spec.out], folder)
        console.print(f"{count(plan)}; report: {folder / 'report.md'}")
    for name, why in failed.items():
        first, *log = why.splitlines()
        console.print(f"failed: {name}: {' '.join([first, *(line.strip() for line in log[-1:])])}")
    if plan.open():
        console.print("The same command tries again what failed.")
    return 1 if plan.open() else 0


def count(plan: Plan) -> str:
    return f"{sum(task.done for task in plan.tasks.values())} of {len(plan.tasks)} done"


def show(spec: Sweep, plan: Plan) -> None:
    """The plan: every task, its state, and why it would be run or not."""
    table = Table("run", "steps", "what", "why", title=f"{spec.title}: {spec.out}", title_justify="left", box=None)
    wanted = {task.name for task in plan.open()}
    for task in plan.tasks.values():
        table.add_row(
            task.name, str(task.steps) if task.checkpoint is None else "none", *state(task, task.name in wanted)
        )
    console.print(table)
    console.print(f"{count(plan)}, {len(wanted)} to run")
    for missing in missing_data(plan.open()):
        console.print(f"missing: {missing}")


def state(task: Task, wanted: bool) -> tuple[str, str]:
    """What would be done with a task, and why."""
    if task.done:
        finished = (
            "its loss or gradient was not a number" if task.diverged else task.results_file if task.evaluated else ""
        )
        return "nothing", f"done: {finished or task.last_checkpoint}"
    if not wanted:
        return "nothing", "what starts from it is done"
    if task.config is None:
        return "later", "its search has not ended"
    what = " and ".join(words[0] for words in task.commands())
    if task.checkpoint is not None:
        return what, f"not trained: {task.checkpoint}"
    if task.last_checkpoint.is_file():
        return what, "trained already"
    step, *_ = logged(task.folder)
    return what, f"was interrupted after step {step}" if step else "new"


def stale(report: Path, spec: Sweep) -> bool:
    """Whether there is no report, or what it is made from was written after it."""
    made = [file.stat().st_mtime_ns for name in TABLES if (file := spec.out / name).is_file()]
    return not report.is_file() or max(made) > report.stat().st_mtime_ns


def write_tables(spec: Sweep, command: str, plan: Plan, failed: dict[str, str]) -> None:
    """Write ``sweep.json``, which tells the report rows and their runs, and ``search.csv``, what was searched."""
    groups = {cell.name: cell.group for cell in spec.cells}
    rows = [
        {
            "name": name,
            "runs": [run for run in runs if plan.tasks[run].done],
            **({} if groups[name] is None else {"group": groups[name]}),
        }
        for name, runs in plan.rows.items()
        if any(plan.tasks[run].done for run in runs)
    ]
    baselines = [name for name in spec.baselines if len(spec.baselines) > 1 or any(row["name"] == name for row in rows)]
    index = {
        "title": spec.title, "command": command, "shape": spec.shape, "rows": rows,
        "baseline": baselines if len(baselines) > 1 else next(iter(baselines), None),
        "failed": [{"run": name, "why": why} for name, why in failed.items()],
        "search": spec.search and describe(spec.search, plan),
    }  # fmt: skip
    write_if_changed(spec.out / INDEX, json.dumps(index, indent=2) + "\n")
    if spec.search is not None:
        write_if_changed(spec.out / SEARCHED, search_csv(spec.search, plan))


def describe(search: Search, plan: Plan) -> str:
    """How a search was made, and on which data it was judged."""
    trials = [task for task in plan.tasks.values() if task.config is not None and task.trial]
    runs = [plan.tasks[run].config for names in plan.rows.values() for run in names]
    by_loss = search.by == "loss"
    data = {task.config.data.val if by_loss else scored_on(task.config) for task in trials if task.config is not None}
    scored = {scored_on(config) for config in runs if config is not None}
    steps = ", ".join(dict.fromkeys(f"{task.steps:,}" for task in trials))
    what = "lowest validation loss" if by_loss else "highest average score"
    text = f"{steps} steps of each value, seed {search.seed}, {what} on {', '.join(sorted(map(str, data)))}"
    return text + ", which the runs are scored on too" * bool(data & scored)


def search_csv(search: Search, plan: Plan) -> str:
    """What was tried for the cells whose search has ended, and what was chosen; diverged trials have no score."""
    from ..report.tables import csv_text

    keys = list(dict(pairs(search.points[0][1])))
    lines: list[list[object]] = [["cell", *keys, "score", "chosen"]]
    for cell, trials in plan.trials.items():
        tasks = {point: plan.tasks[name] for point, name in trials}
        if all(task.done for task in tasks.values()):
            for point, overrides in search.points:
                value, chosen = abs(score(tasks[point], search.by)), point == plan.chosen.get(cell)
                shown = f"{value:.4f}" if value < math.inf else "none"
                lines.append([cell, *dict(pairs(overrides)).values(), shown, "yes" if chosen else ""])
    return csv_text(lines)


def write_if_changed(path: Path, text: str) -> None:
    if not path.is_file() or path.read_bytes() != text.encode():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)
