"""Compare finished runs: one table on the terminal, in Markdown and CSV, and one picture.

Runs that differ in nothing but seed and directory are one row: mean ± standard deviation over their seeds. Every number
comes from the run directories named below the table: ``eval/results.json``, ``eval-untrained/`` and ``logs/*/metrics.csv``.
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
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import mean, median, stdev
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
        curve: rows of the metrics file, those of a continued run last where steps repeat.
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


@dataclass
class Row:
    """Runs that differ in seed and directory only."""

    runs: list[Run] = field(default_factory=list)

    def spread(self, value: Callable[[Run], float | None], form: str = "{:.3f}") -> str:
        """Mean over the seeds, ± standard deviation if there are several, empty if unknown."""
        found = [v for v in map(value, self.runs) if v is not None]
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


def group(runs: Sequence[Run]) -> list[Row]:
    """One row per configuration, in the order of the runs."""
    rows: dict[str, Row] = defaultdict(Row)
    for run in runs:
        values = {"seed": 0, "out": "", "init_from": None, "resume": "auto"}
        rows[config_hash(Config(**{**vars(run.config), **values}))].runs.append(run)
    return list(rows.values())


def report(runs: Sequence[Path], out: Path) -> None:
    """Print the comparison and write ``report.md``, ``report.csv`` and ``report.png`` into `out`."""
    rows = group([read_run(path) for path in runs])
    lines = table(rows)
    out.mkdir(parents=True, exist_ok=True)
    terminal = Table(title="comparison", show_lines=False)
    for i, cell in enumerate(lines[0]):
        terminal.add_column(cell, no_wrap=True, justify="left" if i == 0 else "right")
    for line in lines[1:]:
        terminal.add_row(*line)
    console.print(terminal)
    notes = [
        f"{row.runs[0].label}: {len(row.runs)} seed{'s'[: len(row.runs) > 1]}, {', '.join(str(run.path) for run in row.runs)}"
        for row in rows
    ]
    caption = (
        "Exact match per question type; in brackets the same model with images shuffled among the questions of the type. "
        "± is the standard deviation over seeds. FLOPs: decoder layers, prefill of a mean prompt. "
        "Step time and peak memory are of training on this machine."
    )
    markdown = ["| " + " | ".join(line) + " |" for line in lines]
    markdown.insert(1, "|" + "---|" * len(lines[0]))
    text = "\n".join(["# Comparison", "", *markdown, "", caption, "", *(f"- {note}" for note in [*notes, provenance()]), ""])
    write_atomically(out / "report.md", text + "\n![curves and scores](report.png)\n")
    with (out / "report.csv").open("w", newline="") as file:
        csv.writer(file).writerows(lines)
    draw(rows, out / "report.png")
    for note in notes:
        console.print(note)
    console.print(f"report: {out / 'report.md'}, {out / 'report.png'}")


def provenance() -> str:
    """Machine, versions and commit that the numbers come from."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "lightning", "megatron-energon"))
    try:
        git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown (not a git checkout)"
    cpu = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.processor())
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
    types = list(dict.fromkeys(name for row in rows for run in row.runs for name in run.results.get("types", {})))
    lines = [["", *(f"{row.runs[0].label} ({len(row.runs)} seed{'s'[: len(row.runs) > 1]})" for row in rows)]]

    def line(name: str, cell: Callable[[Row], str]) -> None:
        cells = [cell(row) for row in rows]
        if any(cells):
            lines.append([name, *cells])

    def of_type(results: dict[str, Any] | None, name: str, key: str) -> float | None:
        return (results or {}).get("types", {}).get(name, {}).get(key)

    for name in types:

        def both(row: Row, name: str = name) -> str:
            control = row.spread(lambda run: of_type(run.results, name, "control"))
            return row.spread(lambda run: of_type(run.results, name, "exact_match")) + (
                f" [{control}]" if control else ""
            )

        first = rows[0].runs[0].results["types"][name] if name in rows[0].runs[0].results.get("types", {}) else {}
        constant = f", best constant {first['constant']:.3f}" if first else ""
        line(f"{name}{constant}", both)
    line("average over types", lambda row: row.spread(lambda run: run.results.get("average")))
    line("average before training", lambda row: row.spread(lambda run: (run.untrained or {}).get("average")))
    line("validation loss", lambda row: row.spread(lambda run: run.results.get("loss"), "{:.4f}"))
    line("... images shuffled", lambda row: row.spread(lambda run: run.results.get("loss_shuffled_images"), "{:.4f}"))
    line("parameters (M)", lambda row: f"{row.runs[0].results['parameters'] / 1e6:.3f}")
    line(
        "prefill MFLOPs a question",
        lambda row: row.spread(lambda run: (run.results.get("prefill_flops") or 0) / 1e6, "{:.1f}"),
    )
    line(
        "step time (ms)",
        lambda row: row.spread(lambda run: 1e3 * median(step["step_seconds"] for step in run.curve), "{:.0f}"),
    )
    line(
        "peak memory (GiB)", lambda row: row.spread(lambda run: max(step["memory_gib"] for step in run.curve), "{:.2f}")
    )
    return lines


def draw(rows: Sequence[Row], path: Path) -> None:
    """Training loss over steps, and exact match per type with its control."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    types = list(dict.fromkeys(name for row in rows for run in row.runs for name in run.results.get("types", {})))
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.6), width_ratios=(1, 1.6))
    for i, row in enumerate(rows):
        colour = f"C{i}"
        for run in row.runs:
            steps = [step["step"] for step in run.curve]
            left.plot(steps, [step["loss"] for step in run.curve], color=colour, alpha=0.8, label=row.runs[0].label)
        width = 0.8 / len(rows)
        for j, name in enumerate(types):
            found = [run.results["types"][name] for run in row.runs if name in run.results.get("types", {})]
            if not found:
                continue
            x = j + (i - (len(rows) - 1) / 2) * width
            scores = [result["exact_match"] for result in found]
            error = stdev(scores) if len(scores) > 1 else None
            right.bar(
                x, mean(scores), width * 0.92, yerr=error, color=colour, label=row.runs[0].label if j == 0 else None
            )
            controls = [result["control"] for result in found if result["control"] is not None]
            if controls:
                label = "images shuffled" if i == j == 0 else None
                right.hlines(
                    mean(controls), x - width * 0.46, x + width * 0.46, color="black", linestyle=":", label=label
                )
    handles, labels = left.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    left.legend(unique.values(), unique.keys(), frameon=False)
    left.set(xlabel="optimiser step", ylabel="training loss a token", yscale="log")
    right.set(xticks=range(len(types)), xticklabels=types, ylabel="exact match", ylim=(0, 1.02))
    if types:
        right.legend(frameon=False, loc="lower left", ncols=len(rows) + 1, bbox_to_anchor=(0, 1))
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
