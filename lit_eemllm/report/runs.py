"""What a report compares, read from run directories: runs, and rows of runs that differ in nothing but seed and directory.

Numbers come from ``eval/results.json``, ``eval-untrained/`` and ``logs/*/metrics.csv`` of a run, machines from ``logs/*/machine.csv``
and the results; what is unknown stays None. A sweep's ``sweep.json`` names the rows; without it, runs are one row if they and the
runs they start from are equal.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shlex
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from statistics import mean
from typing import Any

from ..config import config_hash, flat, load_config
from ..config.keys import Config, ConnectorConfig
from ..console import metrics_files, progress, read_object
from ..errors import ConfigError, UserError
from ..shipped import nowhere


@dataclass
class Run:
    """What is known of one finished run.

    Attributes:
        curve: rows of the metrics files by step; of a step that was repeated, the row of the continued run.
        trained_on: machine, versions and commit of each start of its training, the last stage alone.
        evaluated_on: the same of its evaluation; None of an earlier version.
        untrained: results before training, if they were measured.
    """

    path: Path
    config: Config
    results: dict[str, Any]
    untrained: dict[str, Any] | None
    curve: list[dict[str, float]]
    trained_on: set[str]
    evaluated_on: str | None

    @property
    def label(self) -> str:
        mechanism = self.config.model.mechanism
        own = {**asdict(mechanism.aligner), **mechanism.options}
        changed = [f"{name}={value}" for name, value in own.items() if value is not None and type(value) is not dict]
        layers = [] if mechanism.dense_layers is None else [f"dense {mechanism.dense_layers}"]
        scheduled = ["scheduled"] * (self.config.optim.mechanisms is not None)
        connector = self.config.model.connector
        behind = [connector.name, *(f"{name}={value}" for name, value in connector.options.items())]
        behind = behind if connector != ConnectorConfig() else []
        return " ".join([mechanism.preset, *layers, *changed, *behind, *scheduled])

    @property
    def types(self) -> dict[str, dict[str, Any]]:
        """Results by question type; empty if no question was asked."""
        return self.results.get("types") or {}

    @property
    def data(self) -> str:
        """What it was evaluated on, as it was named."""
        return str(self.results.get("data") or self.config.data.val)

    @cached_property
    def asked(self) -> tuple[Any, ...]:
        """Question types with their counts and metrics: equal for scores that can be compared, see also `questions_hash`."""
        metrics = {name: str(kind.get("metric")) for name, kind in sorted(self.types.items())}
        return tuple((name, self.result("types", name, "questions"), metric) for name, metric in metrics.items())

    @cached_property
    def predictions(self) -> dict[tuple[bytes, int], tuple[str, str, float]]:
        """Question -> its set, its type and the answer's score; empty if the run saved no scores.

        A question is the hash of what was asked and the number of times that it was asked before.
        """
        found: dict[tuple[bytes, int], tuple[str, str, float]] = {}
        times: Counter[bytes] = Counter()
        path = self.path / "eval" / "predictions.jsonl"
        if not path.is_file():
            return found
        with path.open("rb") as lines:
            for line_number, line in enumerate(lines, 1):
                try:
                    row = json.loads(line)
                    score = row.get("score")
                except (ValueError, AttributeError, RecursionError) as error:
                    where = f"{path}:{line_number}"
                    raise UserError(f"{where}: not a prediction ({error}); validate the run again") from error
                if not isinstance(score, int | float):
                    return {}
                about = {key: row.get(key) for key in ("set", "type", "key", "prompt", "truth", "answers")}
                question = hashlib.blake2b(json.dumps(about).encode(), digest_size=16).digest()
                found[question, times[question]] = str(row.get("set")), str(row.get("type")), score
                times[question] += 1
        return found

    @cached_property
    def questions_hash(self) -> str | None:
        """Equal for the same questions with the same truths; None if the run saved no scores."""
        questions = b"".join(sorted(question for question, _ in self.predictions))
        return hashlib.blake2b(questions, digest_size=4).hexdigest() if questions else None

    def result(self, *keys: str) -> float | None:
        """The number that the results hold under the nested keys; None if it was not measured."""
        return number(self.results, keys, self.path / "eval" / "results.json")

    def before(self, *keys: str) -> float | None:
        """The same of the results before training."""
        return number(self.untrained or {}, keys, self.path / "eval-untrained" / "results.json")

    def logged(self, name: str, summary: Callable[[list[float]], float]) -> float | None:
        """Summary of a column of the curve; None if nothing was logged."""
        column = [row[name] for row in self.curve if name in row]
        return summary(column) if column else None


@dataclass
class Row:
    """Runs that differ in seed and directory only, and what tells them from the other rows.

    Attributes:
        planned: seeds that a sweep meant to run.
        group: the heading under which it stands, such as a resolution; all rows have one, or none has.
        baseline: the row that it is compared with, itself if it is one.
    """

    runs: list[Run]
    label: str
    planned: int = 0
    group: str | None = None
    baseline: Row | None = field(default=None, repr=False, compare=False)

    @property
    def title(self) -> str:
        seeds = len({run.config.seed for run in self.runs})
        many = max(seeds, self.planned)
        return f"{self.label} ({f'{seeds} of ' * (seeds < many)}{many} seed{'s' * (many != 1)})"

    def by_seed(self, value: Callable[[Run], float | None]) -> dict[int, float]:
        """Seed -> the number, the mean where runs share a seed; without the seeds for which it is unknown."""
        found: dict[int, list[float]] = defaultdict(list)
        for run in self.runs:
            if (number := value(run)) is not None:
                found[run.config.seed].append(number)
        return {seed: mean(found[seed]) for seed in sorted(found)}


@dataclass
class Comparison:
    """All that a report shows.

    Attributes:
        shape: of the table of scores: ``aligner`` marks the parts of the aligner, ``mechanisms`` is one line a row.
        made: the command that made the runs.
        failed: run -> why it is in no row.
        searched: lines of a sweep's ``search.csv``.
        search: how it was searched.
    """

    rows: list[Row]
    title: str = "Comparison"
    shape: str | None = None
    made: str = ""
    failed: dict[str, str] = field(default_factory=dict)
    searched: list[dict[str, str]] = field(default_factory=list)
    search: str = ""

    def by_group(self) -> list[tuple[str | None, list[Row]]]:
        """Headings and the rows below each, in the order of the rows."""
        return [(group, list(rows)) for group, rows in groupby(self.rows, lambda row: row.group)]


def compare(paths: Sequence[Path], baseline: str | None = None) -> Comparison:
    """Read a sweep's directory, or run directories.

    Args:
        paths: one sweep or any number of runs.
        baseline: name of a row or directory of one of its runs; None takes the sweep's, of which each group may have one.

    Raises:
        UserError: something named is no sweep and no evaluated run, or the baseline is unknown.
    """
    sweeps = [path for path in paths if (path / "sweep.json").is_file()]
    if sweeps and len(paths) > 1:
        raise UserError(f"{sweeps[0]} is a sweep: it is reported alone; name its runs to compare them with others")
    if sweeps:
        found, chosen = read_sweep(sweeps[0])
    else:
        runs = []
        with progress("reading runs", len(paths)) as advance:
            for path in paths:
                runs.append(read_run(path))
                advance(1)
        found, chosen = Comparison(group(runs)), []
    if not any(row.runs for row in found.rows):
        why = [f"{run}: {reason}" for run, reason in found.failed.items()]
        raise UserError("\n  ".join([f"{paths[0]}: no run to report", *why]))
    names = [baseline] if baseline else chosen
    for name in names:
        place = Path(name).resolve()
        base = next(
            (r for r in found.rows if name in (r.label, r.title) or any(run.path.resolve() == place for run in r.runs)),
            None,
        )
        if base is None and baseline:
            labels = ", ".join(row.label for row in found.rows)
            raise UserError(f"baseline {name}: found no such row, expected one of {labels}, or one of their runs")
        if base is None:
            found.failed[f"baseline {name}"] = "it has no evaluated run, so there are no differences"
            continue
        for row in found.rows:
            if len(names) == 1 or row.group == base.group:
                row.baseline = base
    return found


def read_run(path: Path) -> Run:
    """Raises UserError if the run has not been evaluated."""
    if not (path / "config.yaml").is_file():
        where = "" if path.exists() else nowhere(path)
        raise UserError(f"{path}: not a run directory, it has no config.yaml{where}")
    if not (path / "eval" / "results.json").is_file():
        raise UserError(f"{path}: not evaluated yet; run: lit-eemllm validate {path}")
    untrained = path / "eval-untrained" / "results.json"
    rows: dict[float, dict[str, float]] = {}
    for file in metrics_files(path):
        for row in read_table(file)[1]:
            try:
                if row.get("loss"):
                    rows[float(row["step"])] = {name: float(value) for name, value in row.items() if value}
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(f"{file}: not metrics of a run: {row} ({error})") from error
    starts = [row for file in path.glob("logs/version_*/machine.csv") for row in read_table(file)[1][:1]]
    results = read_results(path / "eval" / "results.json")
    try:
        config = load_config([path / "config.yaml"])
    except ConfigError as error:
        raise UserError(f"{path / 'config.yaml'}: not the configuration of a run: {error}") from error
    return Run(
        path,
        config,
        results,
        read_results(untrained) if untrained.is_file() else None,
        [rows[step] for step in sorted(rows)],
        {row["machine"] for row in starts if row.get("machine")},
        results.get("machine"),
    )


def read_sweep(folder: Path) -> tuple[Comparison, list[str]]:
    """The rows that ``sweep.json`` names, and the names of its baselines. A run that cannot be read counts as failed."""
    file = folder / "sweep.json"
    plan = read_object(file, mend="the command of the sweep writes it again")
    try:
        named = [
            (
                Row([], str(row["name"]), group=None if row.get("group") is None else str(row["group"])),
                [inside(folder, run) for run in row["runs"]],
            )
            for row in plan["rows"]
        ]
        why = {str(inside(folder, one["run"])): str(one["why"]) for one in plan.get("failed") or []}
    except (TypeError, KeyError) as error:
        expected = 'expected "rows": [{"name": ..., "runs": [...]}] and "failed": [{"run": ..., "why": ...}]'
        raise UserError(f"{file}: {expected} ({type(error).__name__}: {error})") from error
    if (shape := plan.get("shape")) not in (None, "aligner", "mechanisms"):
        raise UserError(f"{file}: shape: found {shape!r}, expected aligner, mechanisms or null")
    with progress("reading runs", sum(len(runs) for _, runs in named)) as advance:
        for row, runs in named:
            for path in runs:
                try:
                    row.runs.append(read_run(path))
                except UserError as error:
                    why.setdefault(str(path), str(error))
                advance(1)
    found = [row for row, _ in named]
    seeds = len({run.config.seed for row in found for run in row.runs})
    for row in found:
        row.planned = seeds
    compared = Comparison(found, str(plan.get("title") or folder.name), shape=shape, failed=why)
    compared.made, compared.search = (str(plan.get(name) or "") for name in ("command", "search"))
    if (folder / "search.csv").is_file():
        compared.searched = read_search(folder / "search.csv")
    chosen = plan.get("baseline") or []
    return compared, [chosen] if isinstance(chosen, str) else [str(name) for name in chosen]


def read_search(path: Path) -> list[dict[str, str]]:
    """Lines of the values that were tried for each cell, with their score and whether they were chosen."""
    columns, lines = read_table(path)
    if not {"cell", "score", "chosen"} <= set(columns):
        found = ", ".join(columns) or "none"
        raise UserError(f"{path}: found columns {found}; expected cell, the values', score, chosen")
    return lines


def read_table(path: Path) -> tuple[Sequence[str], list[dict[str, str]]]:
    """The names in the first line of a CSV file, and by them its other lines; what has no name is left out.

    Raises:
        UserError: it is none.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            table = csv.DictReader(file, restkey="", restval="")
            columns = table.fieldnames or []
            return columns, [{name: line[name] for name in columns} for line in table]
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path}: not a table in CSV: {error}") from error


def inside(folder: Path, run: Any) -> Path:
    """A run of a sweep. Raises UserError if it lies outside of it."""
    if not isinstance(run, str) or os.path.isabs(run) or Path(os.path.normpath(run)).parts[:1] == ("..",):
        raise UserError(f"{folder / 'sweep.json'}: run {run!r}: expected a path inside of {folder}")
    return folder / run


def read_results(path: Path) -> dict[str, Any]:
    """Raises UserError if a section is none."""
    untrained = " --checkpoint none" * (path.parent.name == "eval-untrained")
    found = read_object(path, mend=f"make it again: lit-eemllm validate {shlex.quote(str(path.parents[1]))}{untrained}")
    if not isinstance(machine := found.get("machine"), str | None):
        raise UserError(f"{path}: machine: found {machine!r}, expected a text; validate the run again")
    types = found.get("types") or {}
    for name, section in {"mechanism": found.get("mechanism") or {}, "types": types}.items():
        if not isinstance(section, dict):
            raise UserError(f"{path}: {name}: found {section!r}, expected an object; validate the run again")
    for name, section in types.items():
        if not isinstance(section, dict):
            raise UserError(f"{path}: types.{name}: found {section!r}, expected an object; validate the run again")
    return found


def number(values: dict[str, Any], keys: Sequence[str], file: Path) -> float | None:
    """What lies under the nested keys; None if nothing does. Raises UserError if it is no number."""
    found: Any = values
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    if found is not None and (isinstance(found, bool) or not isinstance(found, int | float)):
        raise UserError(f"{file}: {'.'.join(keys)}: found {found!r}, expected a number; validate the run again")
    return found


def group(runs: Sequence[Run]) -> list[Row]:
    """One row per configuration, in the order of the runs; a directory that is named twice counts once."""
    by_hash: dict[str, list[Run]] = defaultdict(list)
    for run in {run.path.resolve(): run for run in runs}.values():
        by_hash[config_hash(anonymous(run.config, run.path))].append(run)
    rows = [Row(same, same[0].label) for same in by_hash.values()]
    for label in {row.label for row in rows}:
        tell_apart([row for row in rows if row.label == label])
    return rows


def anonymous(config: Config, path: Path, below: tuple[Path, ...] = ()) -> Config:
    """Without seed and directory: equal for runs of one row. In `init_from` a run directory becomes the hash of such a run.

    Args:
        config: of a run.
        path: of the run.
        below: the runs that led here, each starting from the next.
    """
    start = config.init_from
    if start is not None:
        # named where the run was made, like `out`: from there the way is the same wherever the report is made
        for origin in (path / os.path.relpath(start, config.out), Path(start)):
            if (origin / "config.yaml").is_file() and origin.resolve() not in below:
                found = load_config([origin / "config.yaml"])
                start = config_hash(anonymous(found, origin, (*below, origin.resolve())))
                break
    return replace(config, seed=0, out="", resume="auto", init_from=start)


def tell_apart(rows: Sequence[Row], most: int = 3) -> None:
    """Add to equal labels the keys in which the rows differ, those with the most different values first."""
    configs = [flat(asdict(anonymous(row.runs[0].config, row.runs[0].path))) for row in rows]
    values = {key: {str(config.get(key)) for config in configs} for config in configs for key in config}
    keys = sorted((key for key in values if len(values[key]) > 1), key=lambda key: -len(values[key]))[:most]
    for row in rows:
        own = flat(asdict(row.runs[0].config))
        row.label = " ".join([row.label, *(f"{key}={own.get(key)}" for key in keys)])
