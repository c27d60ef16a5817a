"""From a sweep file to its tasks: run directories, each with a frozen configuration and the tasks it needs.

    <out>/<cell>/seed0/                the run that is evaluated: the last stage
    <out>/<cell>/<stage>/seed0/        an earlier stage of the cell
    <out>/<stage>/seed0/               an earlier stage that all cells share
    <out>/search/<cell>/<values>/      a trial of the search

The plan is a function of the file and of what the trials have found; everything that is known of a task lies in its folder.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from ..config import config_hash, flat, load_config, to_yaml
from ..config.keys import Config, Mistake
from ..console import read_object, write_atomically
from ..errors import ConfigError
from ..names import check_names, check_options
from .spec import Cell, Stage, Sweep, slug

_HOW = "Set it back; or remove the folder, to run it anew; or rename the cell, or the sweep's `out`, to keep both."


@dataclass(frozen=True)
class Task:
    """A run directory to be filled.

    Attributes:
        name: of the directory, below the sweep's.
        folder: the directory.
        row, column: where it stands in the table of the status.
        steps: of its training.
        config, frozen: the configuration, and as its text; None if its search has not ended.
        needs: names of tasks that come before.
        checkpoint: evaluated instead of training.
        evaluated: it ends with `validate`.
        trial: of a search.
    """

    name: str
    folder: Path
    row: str
    column: str
    steps: int
    config: Config | None
    frozen: str | None
    needs: tuple[str, ...] = ()
    checkpoint: Path | None = None
    evaluated: bool = True
    trial: bool = False

    @property
    def last_checkpoint(self) -> Path:
        return self.folder / "checkpoints" / f"step-{self.steps}.ckpt"

    @property
    def diverged(self) -> bool:
        """A trial that came to a loss or gradient that is not a number: an answer, which another attempt would repeat."""
        return self.trial and any((self.folder / "nan").glob("step-*.json"))

    @property
    def done(self) -> bool:
        """Evaluated runs need their checkpoints no longer."""
        if self.config is None:
            return False
        finished = self.results_file if self.evaluated else self.last_checkpoint
        return finished.is_file() or self.diverged

    @property
    def results_file(self) -> Path:
        return self.folder / "eval" / "results.json"

    def results(self) -> dict[str, Any]:
        """Raises UserError where the file is torn, by a full disk say."""
        return read_object(self.results_file, mend="remove it; the sweep evaluates that run again")

    def commands(self) -> list[list[str]]:
        """What is left to do, as words after `lit-eemllm`."""
        words = []
        if self.checkpoint is None and not self.last_checkpoint.is_file():
            words.append(["fit", str(self.folder)])
        if self.evaluated and not self.results_file.is_file():
            words.append(["validate", str(self.folder)])
            words[-1] += ["--checkpoint", str(self.checkpoint)] if self.checkpoint is not None else []
        return words

    def freeze(self) -> None:
        """Write the configuration, unless it stands there already."""
        assert self.frozen is not None
        file = self.folder / "config.yaml"
        if not file.is_file() or file.read_bytes() != self.frozen.encode():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(file, self.frozen)


@dataclass
class Plan:
    """The tasks in the order in which they are to be started.

    Attributes:
        rows: cell -> names of its runs, one per seed.
        trials: cell -> its trials: (point, name of the task).
        chosen: cell -> the best point of its search; cells whose search has not ended are missing.
        changed: task -> how its frozen configuration differs from what the file says now.
        hopeless: task -> why it cannot be run.
    """

    tasks: dict[str, Task] = field(default_factory=dict)
    rows: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    trials: dict[str, list[tuple[str, str]]] = field(default_factory=lambda: defaultdict(list))
    chosen: dict[str, str] = field(default_factory=dict)
    changed: dict[str, str] = field(default_factory=dict)
    hopeless: dict[str, str] = field(default_factory=dict)

    def open(self) -> list[Task]:
        """What is not done and wanted, after what it needs. What nobody needs any more is not wanted."""
        found: dict[str, Task] = {}

        def visit(name: str) -> None:
            task = self.tasks[name]
            if name not in found and not task.done:
                for need in task.needs:
                    visit(need)
                found[name] = task

        wanted = {name for runs in self.rows.values() for name in runs} | {
            t.name for t in self.tasks.values() if t.trial
        }
        for name in self.tasks:
            if name in wanted:
                visit(name)
        return list(found.values())


def make_plan(sweep: Sweep) -> Plan:
    """All tasks of a sweep.

    Raises:
        ConfigError: lists the mistakes of all configurations, those of all values of a search included.
    """
    planner = _Planner(sweep)
    planner.plan_all()
    if planner.mistakes:
        cells = len(sweep.cells)
        lines = [
            f"{'all cells' if len(who) == cells > 1 else ', '.join(who)}: {text}"
            for text, who in planner.mistakes.items()
        ]
        raise ConfigError("\n  ".join([f"mistakes in configurations of {sweep.file}:", *lines]))
    return planner.made


def _check_place(config: Config) -> Iterator[Mistake]:
    """A run of a sweep is given its devices, on one machine."""
    devices = config.trainer.get("devices", "auto")
    if devices != "auto" and (type(devices) is not int or devices < 1):
        yield (
            ("trainer.devices",),
            f"found {devices!r}, expected a number: the sweep chooses which, of those that are free",
        )
    if config.trainer.get("num_nodes", 1) != 1:
        yield ("trainer.num_nodes",), "each run of a sweep is on one machine; tools/slurm.sh starts one on several"


@cache  # plans are made again and again
def _load(files: tuple[Path, ...], overrides: tuple[str, ...]) -> tuple[Config, str]:
    config = load_config(files, overrides, checks=(check_names, check_options, _check_place))
    return config, to_yaml(config, comments=True)


class _Planner:
    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep
        self.made = Plan()
        self.mistakes: dict[str, list[str]] = {}  # what is wrong -> in which cells
        self.keys: dict[str, str] = {}  # task -> what it computes, wherever it lies
        self.places: dict[str, str] = {}  # the reverse

    def plan_all(self) -> None:
        cells = {cell.name: cell for cell in self.sweep.cells}
        for cell in cells.values():
            if self.sweep.search is not None and cell.weights is None:
                self.search(cell)
        for seed in self.sweep.seeds:  # all cells have a first result before any has a second
            for cell in cells.values():
                if cell.weights is None:
                    self.made.rows[cell.name].append(self.last_stage(cell, seed))
        for seed in self.sweep.seeds:
            for cell in cells.values():
                if cell.weights is not None:
                    self.made.rows[cell.name].append(self.untrained(cell, cells[cell.weights], seed))
        self.made.rows = {name: self.made.rows[name] for name in cells}

    # --- tasks
    def before(self, cell: Cell, seed: int) -> str | None:
        """Name of the task from whose weights the cell's last stage starts."""
        previous = None
        for stage in self.sweep.stages[:-1]:
            name = f"{slug(stage.name)}/seed{seed}"
            place = name if stage.shared else f"{slug(cell.name)}/{name}"
            row = f"{stage.name} (shared)" if stage.shared else cell.name
            config = self.load(cell, place, stage, seed, previous)
            previous = self.add(place, row, f"seed {seed}", config, True, previous, evaluated=False)
        return previous

    def search(self, cell: Cell) -> None:
        search, stage = self.sweep.search, self.sweep.stages[-1]
        assert search is not None
        previous = self.before(cell, search.seed)
        cheap = ("eval.samples=0",) if search.by == "loss" else ()
        for point, values in search.points:
            place = f"search/{slug(cell.name)}/{slug(point)}"
            config = self.load(cell, place, stage, search.seed, previous, (*cheap, *search.overrides, *values))
            if config is not None and search.by == "loss" and config[0].data.val is None:
                self.note("data.val: required, since the search is judged by the loss on it", cell.name)
            name = self.add(place, cell.name, "search", config, True, previous, trial=True)
            self.made.trials[cell.name].append((point, name))
            chosen = f"{slug(cell.name)}/seed{search.seed}"
            self.load(cell, chosen, stage, search.seed, previous, values)  # what may be chosen: for its mistakes
        trials = {point: self.made.tasks[name] for point, name in self.made.trials[cell.name]}
        if all(task.done for task in trials.values()):
            scores = {point: score(task, search.by) for point, task in trials.items()}
            best = min(scores, key=scores.__getitem__)
            if scores[best] < math.inf:
                self.made.chosen[cell.name] = best

    def last_stage(self, cell: Cell, seed: int) -> str:
        place, previous = f"{slug(cell.name)}/seed{seed}", self.before(cell, seed)
        values, known = self.found(cell)
        config = self.load(cell, place, self.sweep.stages[-1], seed, previous, values)
        trials = [name for _, name in self.made.trials.get(cell.name, ())]
        name = self.add(place, cell.name, f"seed {seed}", config, known, previous, needs=trials)
        if not known and all(self.made.tasks[trial].done for trial in trials):
            assert self.sweep.search is not None
            self.made.hopeless[name] = f"no trial of its search ended with a finite {self.sweep.search.by}"
        return name

    def untrained(self, cell: Cell, trained: Cell, seed: int) -> str:
        """The other cell's checkpoint, evaluated with this cell's settings on top of the other's."""
        place, source = f"{slug(cell.name)}/seed{seed}", self.made.rows[trained.name][self.sweep.seeds.index(seed)]
        both = replace(cell, files=(*trained.files, *cell.files), overrides=(*trained.overrides, *cell.overrides))
        values, known = self.found(trained)
        previous = self.before(trained, seed)
        config = self.load(both, place, self.sweep.stages[-1], seed, previous, values)
        checkpoint = self.made.tasks[source].last_checkpoint
        column = f"seed {seed}"
        return self.add(place, cell.name, column, config, known, previous, needs=[source], checkpoint=checkpoint)

    def found(self, cell: Cell) -> tuple[tuple[str, ...], bool]:
        """Overrides that the search has chosen; while it has not, any of its points, and False."""
        if self.sweep.search is None:
            return (), True
        points = dict(self.sweep.search.points)
        best = self.made.chosen.get(cell.name)
        return (points[best], True) if best is not None else (self.sweep.search.points[0][1], False)

    def add(
        self,
        name: str,
        row: str,
        column: str,
        loaded: tuple[Config, str] | None,
        known: bool,
        previous: str | None,
        needs: Sequence[str] = (),
        **options: Any,
    ) -> str:
        """Take a task into the plan. Returns its name, or that of one that computes the same.

        loaded: the configuration, and as text; None if it has mistakes.
        known: whether it is final.
        previous: the task from whose weights it starts.
        """
        before = () if previous is None else (previous,)
        steps = loaded[0].optim.steps if loaded is not None else 0
        config, frozen = loaded if loaded is not None and known else (None, None)
        task = Task(name, self.sweep.out / name, row, column, steps, config, frozen, (*before, *needs), **options)
        if loaded is not None and task.evaluated and scored_on(loaded[0]) is None:
            self.note("data.val: required (or eval.data, eval.suite), since the runs of a sweep are evaluated", row)
        if config is not None:
            start = None if previous is not None else config.init_from
            what = config_hash(replace(config, out="", init_from=start))
            self.keys[name] = json.dumps([what, *map(self.keys.get, before), task.evaluated, str(task.checkpoint)])
            place = self.places.setdefault(self.keys[name], name)
            if place != name:
                return place
            text = changed(task, previous is not None)
            if text is not None:
                self.made.changed[name] = text
        self.made.tasks[name] = task
        return name

    # --- configurations
    def load(
        self, cell: Cell, place: str, stage: Stage, seed: int, previous: str | None, values: tuple[str, ...] = ()
    ) -> tuple[Config, str] | None:
        """The configuration of a stage, and as text; None if it has mistakes, which are noted."""
        sweep = self.sweep
        files, own = ((), ()) if stage.shared else (cell.files_of(stage), cell.overrides)
        start = [f"init_from={json.dumps(str(sweep.out / previous))}"] if previous is not None else []
        placed = [f"seed={seed}", f"out={json.dumps(str(sweep.out / place))}", *start]
        overrides = (*sweep.overrides, *stage.overrides, *own, *values, *sweep.last, *placed)
        try:
            loaded = _load((*sweep.files, *stage.files, *files), overrides)
        except ConfigError as error:
            for line in str(error).split("\n  ")[1:]:
                self.note(line.removeprefix("command line: "), cell.name)
            return None
        if loaded[0].optim.max_steps is None:  # what is done is known by the number of the last step
            self.note("optim.epochs: a sweep sets optim.max_steps; `fit` says how many steps an epoch has", cell.name)
            return None
        if loaded[0].optim.patience is not None:
            self.note(
                "optim.patience: the runs of a sweep have equally many steps, by which it knows what is done; set it to null",
                cell.name,
            )
            return None
        return loaded

    def note(self, mistake: str, cell: str) -> None:
        cells = self.mistakes.setdefault(mistake, [])
        cells += [cell] if cell not in cells else []


def scored_on(config: Config) -> str | None:
    """Where the questions of an evaluation come from."""
    return config.eval.suite or config.eval.data or config.data.val


def score(task: Task, by: str) -> float:
    """What a trial has found; less is better, infinite if there is nothing to compare."""
    if task.diverged:
        return math.inf
    value: Any = task.results().get(by)
    good = isinstance(value, int | float) and math.isfinite(value)
    return math.inf if not good else value if by == "loss" else -value


def changed(task: Task, starts_from_another: bool) -> str | None:
    """Why the folder's frozen configuration is not that of the task; None if it is, or if there is none.

    starts_from_another: `init_from` is the plan's, a folder of the sweep, which may have been moved.
    """
    assert task.config is not None and task.frozen is not None
    file = task.folder / "config.yaml"
    if not file.is_file() or file.read_bytes() == task.frozen.encode():
        return None
    try:
        old, new = (flat(asdict(config)) for config in (load_config([file]), task.config))
    except ConfigError as error:
        return f"{task.folder} has a configuration that cannot be read: {error}"
    same = {"out", "init_from"} if starts_from_another else {"out"}
    keys = [key for key in {**old, **new} if key not in same and old.get(key) != new.get(key)]
    listed = "; ".join(f"{key} was {old.get(key)} and is {new.get(key)}" for key in keys)
    return f"{task.folder} was made with other settings: {listed}. {_HOW}" if keys else None
