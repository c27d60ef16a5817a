"""The sweep file (docs/sweeps.md explains its keys): read strictly, all mistakes at once.

It names configuration files and values, never code.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import limits
from ..config import is_key, nearest_key, strict_yaml
from ..errors import MOST_HINTS, ConfigError, did_you_mean
from ..shipped import find, nowhere

RESERVED = ("search", "report", "slurm")  # folders of a sweep directory that are no cell's
MOST_CELLS = 1000
_KEY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_OURS = {"seed": "`seeds` has them", "out": "each run has its own", "resume": "runs continue by themselves"}
_KINDS = {str: "text", list: "a list", dict: "a section", bool: "true or false", int: "a whole number"}
_TOP: dict[str, type] = {
    "title": str, "base": list, "set": dict, "out": str, "seeds": list, "baseline": list, "shape": str, "cells": dict,
    "grid": dict, "stages": list, "search": dict, "slurm": dict,
}  # fmt: skip
_STAGE: dict[str, type] = {"name": str, "files": list, "set": dict, "shared": bool}
_SEARCH: dict[str, type] = {"grid": dict, "set": dict, "by": str, "seed": int}
SLURM = (
    "timeout_min", "mem_gb", "cpus_per_task", "gpus_per_node", "partition", "account", "qos", "constraint", "gres",
    "nodelist", "exclude", "signal_delay_s", "array_parallelism", "max_num_timeout",
)  # fmt: skip
"""What a sweep may ask of Slurm. Others, such as submitit's `setup`, are commands."""


@dataclass(frozen=True)
class Cell:
    """A row: what its runs have on top of the sweep's.

    Attributes:
        files: ``{stage}`` in their names is the stage's.
        weights: the cell whose checkpoints are evaluated instead of training.
        group: the heading of the report's table under which it stands.
    """

    name: str
    files: tuple[Path, ...] = ()
    overrides: tuple[str, ...] = ()
    weights: str | None = None
    group: str | None = None

    def files_of(self, stage: Stage) -> tuple[Path, ...]:
        return tuple(Path(str(file).replace("{stage}", stage.name)) for file in self.files)


@dataclass(frozen=True)
class Stage:
    """A part of the training. shared: the same for all cells."""

    name: str = ""
    files: tuple[Path, ...] = ()
    overrides: tuple[str, ...] = ()
    shared: bool = False


@dataclass(frozen=True)
class Search:
    """What is tried for every cell. points: name and overrides of each trial."""

    points: tuple[tuple[str, tuple[str, ...]], ...]
    overrides: tuple[str, ...]
    by: str
    seed: int


@dataclass(frozen=True)
class Sweep:
    """A sweep file. last: overrides of the command line; baselines: one, or one a group; stages: at least one."""

    file: Path
    title: str
    files: tuple[Path, ...]
    overrides: tuple[str, ...]
    last: tuple[str, ...]
    out: Path
    seeds: tuple[int, ...]
    baselines: tuple[str, ...]
    shape: str | None
    cells: tuple[Cell, ...]
    stages: tuple[Stage, ...]
    search: Search | None
    slurm: dict[str, Any]


def slug(name: str) -> str:
    """A folder's name, in small letters."""
    return re.sub(r"[^a-z0-9._]+", "-", name.lower()).strip("-.")[:80]


def read_sweep(file: Path, overrides: Sequence[str] = ()) -> Sweep:
    """Read a sweep file.

    Args:
        file: YAML.
        overrides: ``key=value``, of a key of the sweep file such as `seeds`, or of every run's configuration.

    Raises:
        ConfigError: lists every mistake.
    """
    reader = _Reader(file)
    sweep = reader.sweep(list(overrides))
    if reader.mistakes:
        count = "a mistake" if len(reader.mistakes) == 1 else f"{len(reader.mistakes)} mistakes"
        raise ConfigError("\n  ".join([f"{count} in the sweep {file}:", *reader.mistakes]))
    return sweep


class _Reader:
    """Values of the file, with every mistake met on the way; in place of a wrong value stands a harmless one."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.mistakes: list[str] = []

    def fail(self, where: str, text: str) -> None:
        self.mistakes.append(f"{where}: {text}" if where else text)

    def nearest(self, name: str, known: Sequence[str] | dict[str, Any]) -> str:
        """What follows the message of an unknown name: the known name most like it, else all."""
        if len(self.mistakes) >= MOST_HINTS:
            return ""
        return f"; {did_you_mean(name, known) or 'expected ' + '; '.join(known)}"

    def document(self) -> Any:
        file = find(self.file)
        if not file.is_file() or file.suffix not in (".yaml", ".yml"):
            where = "" if file.exists() else nowhere(self.file)
            raise ConfigError(f"{self.file}: expected a sweep file (.yaml), see configs/sweeps/{where}")
        content = strict_yaml.read_bytes(file, limits.CONFIG_BYTES)
        if content is None:
            raise ConfigError(f"{self.file}: more than {limits.CONFIG_BYTES} bytes: not a sweep file")
        return self.parse(content, self.file)

    def parse(self, text: str | bytes, source: str | Path) -> Any:
        try:
            return strict_yaml.parse(text)
        except strict_yaml.BadYAML as error:
            raise ConfigError(f"{error.at(source)}: not valid YAML: {error}") from None

    def sweep(self, overrides: list[str]) -> Sweep:
        document = self.document()
        last = []
        for text in overrides:
            key, _, value = text.partition("=")
            if key in _TOP and isinstance(document, dict):
                document[key] = self.parse(value, f"command line: {key}")
            else:
                last.append(text)
                first = key.partition(".")[0]
                if first in _TOP:
                    self.fail(
                        "command line", f"{key}: `{first}` can only be set as a whole here; change it in the file"
                    )
                elif self.config_key("command line", key) and not is_key(key):
                    self.fail("command line", f"{key}: unknown key; {nearest_key(key, _TOP, without=_OURS)}")
        if isinstance(document, dict) and isinstance(document.get("baseline"), str):
            document["baseline"] = [document["baseline"]]
        top = self.section(document, "", _TOP, required=("out", "seeds"))
        stages = self.stages(top.get("stages", []))
        grid = self.grid(top.get("grid", {}), "grid")
        cells = self.cells(top.get("cells", {}), grid)
        self.folders(cells, stages)
        seeds = self.seeds(top.get("seeds", [0]))
        search = self.search(top["search"], seeds[0]) if "search" in top else None
        for _, values in (*grid[:1], *(search.points[:1] if search else ())):
            for varied, _ in pairs(values):
                for key in (text.partition("=")[0] for text in last):
                    if f"{varied}.".startswith(f"{key}."):
                        self.fail(f"command line: {key}", f"the sweep varies {varied}; change it in the file's grid")
        names = [cell.name for cell in cells]
        if not names:
            self.fail("cells", "required, or `grid`: the rows of the sweep")
        shape = top.get("shape", "none")
        if shape not in ("aligner", "mechanisms", "none"):
            self.fail("shape", f"found {shape!r}, expected aligner, mechanisms or none")
        return Sweep(
            file=self.file,
            title=top.get("title", self.file.stem),
            files=self.files(top.get("base", []), "base"),
            overrides=self.overrides(top.get("set", {}), "set"),
            last=tuple(last),
            out=Path(top.get("out", "")),
            seeds=seeds,
            baselines=self.baselines(top.get("baseline", []), cells),
            shape=None if shape == "none" else shape,
            cells=cells,
            stages=stages,
            search=search,
            slurm=self.slurm(top.get("slurm", {})),
        )

    # --- parts
    def section(self, value: Any, where: str, kinds: dict[str, type], required: Sequence[str] = ()) -> dict[str, Any]:
        """The keys of a section that are as they should be."""
        if not isinstance(value, dict):
            self.fail(where, f"found {value!r}, expected a section with {', '.join(kinds)}")
            return {}
        good = {}
        for name, found in value.items():
            key = f"{where}.{name}" if where else str(name)
            if name not in kinds:
                self.fail(key, f"unknown key{self.nearest(str(name), kinds)}")
            elif type(found) is not kinds[name] or found == "":
                self.fail(key, f"found {found!r}, expected {_KINDS[kinds[name]]}")
            else:
                good[name] = found
        for name in required:
            if name not in value:
                self.fail(f"{where}.{name}" if where else name, "required")
        return good

    def files(self, value: Any, where: str) -> tuple[Path, ...]:
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            self.fail(where, f"found {value!r}, expected a list of files, relative to {self.file.parent}")
            return ()
        return tuple(self.file.parent / name for name in value)

    def config_key(self, where: str, key: Any) -> bool:
        if not isinstance(key, str) or not _KEY.fullmatch(key):
            self.fail(where, f"{key!r} is no key of a configuration, such as optim.lr")
        elif key in _OURS:
            self.fail(where, f"{key} cannot be set: {_OURS[key]}")
        else:
            return True
        return False

    def override(self, key: Any, value: Any, where: str) -> str | None:
        """``key=value`` as on the command line; JSON is the part of YAML in which every value can be written."""
        if not self.config_key(where, key):
            return None
        try:
            return f"{key}={json.dumps(value, allow_nan=False)}"
        except (ValueError, TypeError):  # infinite; a date cannot occur
            self.fail(f"{where}.{key}", f"found {value!r}, expected a finite value")
            return None

    def overrides(self, value: dict[Any, Any], where: str) -> tuple[str, ...]:
        made = [self.override(key, found, where) for key, found in value.items()]
        return tuple(text for text in made if text is not None)

    def grid(self, value: dict[Any, Any], where: str) -> list[tuple[str, tuple[str, ...]]]:
        """Name and overrides of every combination."""
        axes = []
        for key, values in value.items():
            short = str(key).rpartition(".")[2]
            name = short if [str(k).rpartition(".")[2] for k in value].count(short) == 1 else str(key)
            if not isinstance(values, list) or not values:
                self.fail(f"{where}.{key}", f"found {values!r}, expected a list of values to try")
                continue
            texts = [self.override(key, one, where) for one in values]
            if None not in texts and len(set(texts)) < len(texts):
                self.fail(f"{where}.{key}", "a value is given twice")
            axes.append(
                [(f"{name}={_plain(one)}", text) for one, text in zip(values, texts, strict=True) if text is not None]
            )
        if math.prod(map(len, axes)) > MOST_CELLS:
            self.fail(where, f"{math.prod(map(len, axes)):,} combinations, at most {MOST_CELLS:,} are allowed")
            return []
        combinations = itertools.product(*axes) if axes else ()
        return [(", ".join(name for name, _ in chosen), tuple(text for _, text in chosen)) for chosen in combinations]

    def cells(self, value: dict[Any, Any], grid: list[tuple[str, tuple[str, ...]]]) -> tuple[Cell, ...]:
        named = []
        for name, content in value.items():
            where = f"cells.{name}"
            if not isinstance(name, str) or not isinstance(content, dict | None):
                self.fail(where, "expected a name and a section, such as `large: {optim.lr: 1e-3}`")
                continue
            content = dict(content or {})
            files, weights = self.files(content.pop("files", []), where), content.pop("weights", None)
            group = content.pop("group", None)
            if group is not None and (not isinstance(group, str) or not group):
                self.fail(f"{where}.group", f"found {group!r}, expected text: the heading above its rows")
            named.append(Cell(name, files, self.overrides(content, where), weights, group))
        for cell in named:
            if cell.group is None and any(other.group is not None for other in named):
                self.fail(f"cells.{cell.name}.group", "required, since other cells have one")
        order = list(dict.fromkeys(cell.group for cell in named))
        named.sort(key=lambda cell: order.index(cell.group))  # rows of a group stand together
        trained = [cell.name for cell in named if cell.weights is None]
        for cell in named:
            if cell.weights is not None and cell.weights not in trained:
                text = f"found {cell.weights!r}, which is no cell that is trained{self.nearest(str(cell.weights), trained)}"
                self.fail(f"cells.{cell.name}.weights", text)
        if len(named) * len(grid) > MOST_CELLS:
            self.fail("cells", f"{len(named) * len(grid):,} with `grid`, at most {MOST_CELLS:,} are allowed")
            return ()
        if not named or not grid:
            return tuple(named or [Cell(name, overrides=overrides) for name, overrides in grid])
        return tuple(
            Cell(
                f"{c.name}, {name}", c.files, (*c.overrides, *overrides), c.weights and f"{c.weights}, {name}", c.group
            )
            for c in named
            for name, overrides in grid
        )

    def baselines(self, names: list[Any], cells: tuple[Cell, ...]) -> tuple[str, ...]:
        """One for all rows, or one for each group."""
        groups = {cell.name: cell.group for cell in cells}
        known = [name for name in names if isinstance(name, str) and name in groups]
        for name in names:
            if name not in known:
                self.fail("baseline", f"found {name!r}, which is no cell{self.nearest(str(name), list(groups))}")
        if len({groups[name] for name in known}) < len(known):
            self.fail("baseline", f"found {', '.join(known)}: expected one, or one for each group of cells")
        return tuple(known)

    def stages(self, value: list[Any]) -> tuple[Stage, ...]:
        stages = []
        for i, content in enumerate(value):
            where = f"stages[{i}]"
            good = self.section(content, where, _STAGE, required=("name",))
            files, overrides = self.files(good.get("files", []), where), self.overrides(good.get("set", {}), where)
            stages.append(Stage(good.get("name", where), files, overrides, good.get("shared", False)))
        for before, after in itertools.pairwise([*stages, Stage()]):
            if after.shared and not before.shared:
                self.fail(f"stages.{after.name}", "a shared stage starts from no cell: put it before the others")
        if stages and stages[-1].shared:
            self.fail(f"stages.{stages[-1].name}", "if the last stage is shared, all cells are the same")
        return tuple(stages) or (Stage(),)

    def folders(self, cells: tuple[Cell, ...], stages: tuple[Stage, ...]) -> None:
        """Every cell and every stage has a folder of its own."""
        taken: dict[str, str] = {name: f"the sweep's own {name}/" for name in RESERVED}
        for kind, names in (("stage", [s.name for s in stages[:-1]]), ("cell", [cell.name for cell in cells])):
            for name in names:
                folder = slug(name)
                if not folder or re.fullmatch(r"seed\d+", folder):
                    self.fail(f"{kind} {name!r}", "its name becomes a folder: take letters or digits, other than seed0")
                elif folder in taken:
                    self.fail(f"{kind} {name!r}", f"its folder {folder}/ is that of {taken[folder]}; rename one")
                else:
                    taken[folder] = f"the {kind} {name!r}"

    def seeds(self, value: list[Any]) -> tuple[int, ...]:
        if value and all(type(seed) is int for seed in value) and len(set(value)) == len(value):
            return tuple(value)
        self.fail("seeds", f"found {value!r}, expected a list of distinct whole numbers such as [0, 1, 2]")
        return (0,)

    def search(self, value: dict[Any, Any], seed: int) -> Search:
        good = self.section(value, "search", _SEARCH, required=("grid", "by"))
        points = self.grid(good.get("grid", {}), "search.grid")
        if len({slug(name) for name, _ in points}) < max(1, len(points)):
            self.fail("search.grid", "expected values to try, with names of their own")
        if good.get("by", "loss") not in ("loss", "average"):
            self.fail("search.by", f"found {good['by']!r}, expected loss or average")
        overrides = self.overrides(good.get("set", {}), "search.set")
        return Search(tuple(points), overrides, good.get("by", "loss"), good.get("seed", seed))

    def slurm(self, value: dict[Any, Any]) -> dict[str, Any]:
        """Values that stand in lines of a script: nothing that could end such a line."""
        for name, found in value.items():
            if name not in SLURM:
                self.fail(f"slurm.{name}", f"unknown key{self.nearest(str(name), SLURM)}")
            elif type(found) is not int and not (
                isinstance(found, str) and re.fullmatch(r"[\w.,:@%/&|\[\]+-]+", found)
            ):
                self.fail(
                    f"slurm.{name}", f"found {found!r}, expected a whole number, or text without spaces or quotes"
                )
        return value


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def pairs(overrides: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Keys and values of overrides that were made here."""
    for text in overrides:
        key, _, value = text.partition("=")
        yield key, json.loads(value)
