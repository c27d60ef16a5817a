"""Compare finished runs: one table on the terminal, in Markdown and CSV, and one picture.

Runs that differ in nothing but seed and directory, they and the runs they start from, are one row: mean ± standard
deviation over their seeds. Every number comes from the run directories named below the table: ``eval/results.json``,
``eval-untrained/`` and ``logs/*/metrics.csv``. What is unknown stays blank.
"""

from __future__ import annotations

import csv
import json
import os
import platform
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from math import ceil
from pathlib import Path
from statistics import mean, median, stdev
from textwrap import fill
from typing import Any

import torch
from rich.table import Table

from . import __version__
from .config import config_hash, load_config
from .console import console, write_atomically
from .errors import UserError
from .schema import Config


@dataclass
class Run:
    """What is known of one finished run.

    Attributes:
        curve: rows of the metrics files by step; of a step that was repeated, the row of the continued run.
        untrained: results before training, if they were measured.
    """

    path: Path
    config: Config
    results: dict[str, Any]
    untrained: dict[str, Any] | None
    curve: list[dict[str, float]]

    @property
    def label(self) -> str:
        mechanism = self.config.model.mechanism
        changed = [f"{name}={value}" for name, value in asdict(mechanism.aligner).items() if value is not None]
        layers = [] if mechanism.dense_layers is None else [f"dense {mechanism.dense_layers}"]
        return " ".join([mechanism.preset, *layers, *changed])

    def result(self, *keys: str) -> Any:
        """What the results hold under the nested keys; None if it was not measured."""
        found: Any = self.results
        for key in keys:
            found = (found or {}).get(key)
        return found

    def logged(self, name: str, summary: Callable[[list[float]], float]) -> float | None:
        """Summary of a column of the curve; None if nothing was logged."""
        column = [row[name] for row in self.curve if name in row]
        return summary(column) if column else None


@dataclass
class Row:
    """Runs that differ in seed and directory only, and what tells them from the other rows."""

    runs: list[Run]
    label: str

    @property
    def title(self) -> str:
        return f"{self.label} ({len(self.runs)} seed{'s'[: len(self.runs) > 1]})"

    def spread(self, value: Callable[[Run], float | None], form: str = "{:.3f}", scale: float = 1.0) -> str:
        """Mean over the seeds, ± standard deviation if there are several, empty if unknown."""
        found = [scale * v for v in map(value, self.runs) if v is not None]
        if not found:
            return ""
        return form.format(mean(found)) + (f" ± {form.format(stdev(found))}" if len(found) > 1 else "")


def read_run(path: Path) -> Run:
    """Raises UserError if the run has not been evaluated."""
    if not (path / "config.yaml").is_file():
        raise UserError(f"{path}: not a run directory, it has no config.yaml")
    if not (path / "eval" / "results.json").is_file():
        raise UserError(f"{path}: not evaluated yet; run: lit-eemllm validate {path}")
    untrained = path / "eval-untrained" / "results.json"
    rows: dict[float, dict[str, float]] = {}
    for file in sorted((path / "logs").glob("version_*/metrics.csv"), key=lambda f: int(f.parent.name.split("_")[1])):
        with file.open() as lines:
            for row in csv.DictReader(lines):
                if row.get("loss"):
                    rows[float(row["step"])] = {name: float(value) for name, value in row.items() if value}
    return Run(
        path,
        load_config([path / "config.yaml"]),
        json.loads((path / "eval" / "results.json").read_text()),
        json.loads(untrained.read_text()) if untrained.is_file() else None,
        [rows[step] for step in sorted(rows)],
    )


def anonymous(config: Config, below: tuple[Path, ...] = ()) -> Config:
    """Without seed and directory: equal for runs of one row. In `init_from` a run directory becomes the hash of such a run.

    Args:
        config: of a run.
        below: the runs that led here, each starting from the next.
    """
    start = config.init_from
    if start is not None and (Path(start) / "config.yaml").is_file() and Path(start).resolve() not in below:
        origin = load_config([Path(start) / "config.yaml"])
        start = config_hash(anonymous(origin, (*below, Path(start).resolve())))
    return replace(config, seed=0, out="", resume="auto", init_from=start)


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys of nested sections."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def group(runs: Sequence[Run]) -> list[Row]:
    """One row per configuration, in the order of the runs; a directory that is named twice counts once."""
    by_hash: dict[str, list[Run]] = defaultdict(list)
    for run in {run.path.resolve(): run for run in runs}.values():
        by_hash[config_hash(anonymous(run.config))].append(run)
    rows = [Row(same, same[0].label) for same in by_hash.values()]
    for label in {row.label for row in rows}:
        tell_apart([row for row in rows if row.label == label])
    return rows


def tell_apart(rows: Sequence[Row], most: int = 3) -> None:
    """Add to equal labels the keys in which the rows differ, those with the most different values first."""
    configs = [flat(asdict(anonymous(row.runs[0].config))) for row in rows]
    values = {key: {str(config.get(key)) for config in configs} for config in configs for key in config}
    keys = sorted((key for key in values if len(values[key]) > 1), key=lambda key: -len(values[key]))[:most]
    for row in rows:
        own = flat(asdict(row.runs[0].config))
        row.label = " ".join([row.label, *(f"{key}={own.get(key)}" for key in keys)])


def report(runs: Sequence[Path], out: Path) -> None:
    """Print the comparison and write ``report.md``, ``report.csv`` and ``report.png`` into `out`."""
    rows = group([read_run(path) for path in runs])
    lines = table(rows)
    out.mkdir(parents=True, exist_ok=True)
    print_table(lines)
    notes = [f"{row.title}: {', '.join(str(run.path) for run in row.runs)}" for row in rows]
    warning = incomparable(rows)
    markdown = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
    markdown.insert(1, "|" + "---|" * len(lines[0]))
    text = "\n".join(
        [
            "# Comparison",
            "",
            *markdown,
            "",
            *([warning, ""] if warning else []),
            caption(rows),
            "",
            *(f"- {note}" for note in [*notes, provenance()]),
            "",
        ]
    )
    write_atomically(out / "report.md", text + "\n![curves and scores](report.png)\n")
    with (out / "report.csv").open("w", newline="") as file:
        csv.writer(file).writerows(lines)
    draw(rows, out / "report.png")
    for note in [*([warning] if warning else []), *notes]:
        console.print(note)
    console.print(f"report: {out / 'report.md'}, {out / 'report.png'}")


def print_table(lines: Sequence[Sequence[str]]) -> None:
    """The table on the terminal, in as many parts as its width asks for; headings are broken, cells are not."""
    columns = list(zip(*lines, strict=True))
    widths = [max(min(len(title), 24), *map(len, cells)) for title, *cells in columns]
    parts: list[list[int]] = [[]]
    for i in range(1, len(columns)):
        if parts[-1] and widths[0] + 4 + sum(widths[j] + 3 for j in [*parts[-1], i]) > console.width:
            parts.append([])
        parts[-1].append(i)
    for part in parts:
        terminal = Table(title="comparison")
        for i in (0, *part):
            justify: Any = "right" if i else "left"
            terminal.add_column(
                columns[i][0], min_width=widths[i], max_width=widths[i], overflow="fold", justify=justify
            )
        for line in lines[1:]:
            terminal.add_row(*(line[i] for i in (0, *part)))
        console.print(terminal)


def caption(rows: Sequence[Row]) -> str:
    """What the numbers mean that are there."""
    runs = [run for row in rows for run in row.runs]
    sentences = []
    if types := types_of(rows):
        controlled = any(run.result("types", name, "control") is not None for run in runs for name in types)
        brackets = "; in brackets the same model with images shuffled among the questions of the type"
        sentences.append(f"Exact match per question type{brackets if controlled else ''}.")
    if any(len(row.runs) > 1 for row in rows):
        sentences.append("± is the standard deviation over seeds.")
    if any(run.result("prefill_flops") is not None for run in runs):
        sentences.append("FLOPs: decoder layers, prefill of a mean prompt.")
    if any(run.result("prefill_seconds") is not None for run in runs):
        sentences.append("Prefill time and cache are of up to 32 prompts in one batch, vision encoder included.")
    if any(run.curve for run in runs):
        sentences.append("Step time and peak memory are of training.")
    return " ".join(sentences)


def incomparable(rows: Sequence[Row]) -> str:
    """A sentence if the rows were not evaluated on the same data and number of questions, else nothing."""
    titles: dict[tuple[str, int | None], list[str]] = defaultdict(list)
    for row in rows:
        for key in dict.fromkeys((str(run.result("data") or run.config.data.val), questions(run)) for run in row.runs):
            titles[key].append(row.title)
    data = {Path(val).resolve() for val, _ in titles}
    if len(data) == 1 and len({count for _, count in titles} - {None}) < 2:
        return ""
    found = "; ".join(f"{', '.join(who)}: {val}, {count or 0:,} questions" for (val, count), who in titles.items())
    what = "Exact match and validation loss" if len(data) > 1 else "Exact match"
    return f"{what} of these columns cannot be compared, they come from different data or questions: {found}."


def questions(run: Run) -> int | None:
    """Questions that the run was asked; None if it was asked none."""
    types = run.result("types")
    return sum(kind["questions"] for kind in types.values()) if types else None


def provenance() -> str:
    """Machine, versions and commit that the numbers come from."""
    versions = ", ".join(
        f"{name} {version(name)}" for name in ("torch", "transformers", "lightning", "megatron-energon")
    )
    try:
        git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown (not a git checkout)"
    cpu = next(
        (line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.processor()
    )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return (
        f"{cpu}, {os.cpu_count()} cores, {device}; Python {platform.python_version()}, {versions}; "
        f"lit_eemllm {__version__}, commit {commit}; lit-eemllm {' '.join(sys.argv[1:])}"
    )


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")  # Linux alone names the processor there
    return path.read_text().splitlines() if path.is_file() else []


def table(rows: Sequence[Row]) -> list[list[str]]:
    """A heading and one line per quantity; one column per row of runs, first the quantity's name."""
    lines = [["", *(row.title for row in rows)]]

    def line(name: str, cell: Callable[[Row], str]) -> None:
        cells = [cell(row) for row in rows]
        if any(cells):
            lines.append([name, *cells])

    for name in types_of(rows):

        def both(row: Row, name: str = name) -> str:
            right = row.spread(lambda run: run.result("types", name, "exact_match"))
            control = row.spread(lambda run: run.result("types", name, "control"))
            return f"{right} [{control}]" if control else right

        found = {one.result("types", name, "constant") for row in rows for one in row.runs} - {None}
        constant = f", best constant {found.pop():.3f}" if len(found) == 1 else ""  # else they answered other questions
        line(name + constant, both)
    line("questions", lambda row: row.spread(questions, "{:.0f}").removesuffix(" ± 0"))
    line("average over types", lambda row: row.spread(lambda run: run.result("average")))
    line("average before training", lambda row: row.spread(lambda run: (run.untrained or {}).get("average")))
    line("validation loss", lambda row: row.spread(lambda run: run.result("loss"), "{:.4f}"))
    line("... images shuffled", lambda row: row.spread(lambda run: run.result("loss_shuffled_images"), "{:.4f}"))
    line("parameters (M)", lambda row: row.spread(lambda run: run.result("parameters"), "{:.3f}", 1e-6).split(" ± ")[0])
    line("prefill MFLOPs a question", lambda row: row.spread(lambda run: run.result("prefill_flops"), "{:.1f}", 1e-6))
    line("prefill (ms a question)", lambda row: row.spread(lambda run: run.result("prefill_seconds"), "{:.2f}", 1e3))
    line("key/value cache (KiB)", lambda row: row.spread(lambda run: run.result("cache_bytes"), "{:.1f}", 2**-10))
    line("step time (ms)", lambda row: row.spread(lambda run: run.logged("step_seconds", median), "{:.0f}", 1e3))
    line("peak memory (GiB)", lambda row: row.spread(lambda run: run.logged("memory_gib", max), "{:.2f}"))
    return lines


def types_of(rows: Sequence[Row]) -> list[str]:
    """Question types in the order in which they are met."""
    return list(dict.fromkeys(name for row in rows for run in row.runs for name in run.result("types") or {}))


def draw(rows: Sequence[Row], path: Path) -> None:
    """Training loss over steps and, if questions were asked, exact match per type with its control."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    types = types_of(rows)
    controlled = any(
        run.result("types", name, "control") is not None for row in rows for run in row.runs for name in types
    )
    handles: list[Any] = [Patch(color=f"C{i}", label=fill(row.label, 84)) for i, row in enumerate(rows)]
    handles += [Line2D([], [], color="black", linestyle=":", label="images shuffled")] * controlled
    letters = 150 if types else 90  # that fit side by side
    columns = max(1, letters // (max(len(handle.get_label()) for handle in handles) + 6))
    height = 4.4 + 0.25 * ceil(len(handles) / columns)
    figure = plt.figure(figsize=(13 if types else 8, height), layout="constrained")
    left, *rest = figure.subplots(1, 1 + bool(types), squeeze=False, width_ratios=(1, 1.6)[: 1 + bool(types)])[0]
    draw_curves(left, rows)
    for right in rest:
        draw_scores(right, rows, types)
    legend = figure.legend(handles=handles, frameon=False, loc="outside upper center", ncols=min(columns, len(handles)))
    for text in [*legend.get_texts(), *(text for axis in rest for text in axis.get_xticklabels())]:
        text.set_parse_math(False)  # names may hold a $
    for axis in (left, *rest):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_curves(axis: Any, rows: Sequence[Row]) -> None:
    """Training loss over steps, a line a run; logarithmic if the losses span much."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

    losses = []
    for i, row in enumerate(rows):
        for run in row.runs:
            steps, curve = [step["step"] for step in run.curve], [step["loss"] for step in run.curve]
            axis.plot(steps, curve, color=f"C{i}", alpha=0.8, marker="o" if len(steps) == 1 else None)
            losses += curve
    axis.set(xlabel="optimiser step", ylabel="training loss a token")
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    if losses and 0 < 4 * min(losses) < max(losses):
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())


def draw_scores(axis: Any, rows: Sequence[Row], types: Sequence[str]) -> None:
    """Exact match, a group of bars a question type; rows that were not asked leave no gap."""
    width = 0.8 / len(rows)
    for j, name in enumerate(types):
        asked = [i for i, row in enumerate(rows) if any(run.result("types", name) for run in row.runs)]
        for place, i in enumerate(asked):
            found = [result for run in rows[i].runs if (result := run.result("types", name))]
            x = j + (place - (len(asked) - 1) / 2) * width
            scores = [result["exact_match"] for result in found]
            error = stdev(scores) if len(scores) > 1 else None
            axis.bar(x, mean(scores), width * 0.92, yerr=error, color=f"C{i}")
            controls = [result["control"] for result in found if result["control"] is not None]
            if controls:
                axis.hlines(mean(controls), x - width * 0.46, x + width * 0.46, color="black", linestyle=":")
    axis.set(ylabel="exact match", ylim=(0, 1.02))
    slanted = {"rotation": 30, "ha": "right"} if sum(map(len, types)) > 70 else {}
    axis.set_xticks(range(len(types)), types, **slanted)
