"""The numbers of a comparison as lines of text: tables for Markdown and the terminal, CSV, and what they mean in words.

A few rows are the columns of one table, a line a quantity. Many are lines themselves, in two tables: scores, in the shape
of Tables 4 and 6 of the EE-MLLM paper, and costs. The best constant answer stands among the scores like a row of its own.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import mean, median

from rich.table import Table

from ..console import console
from .difference import deviation, difference, weights_of_average
from .runs import Comparison, Row, Run

FEW = 4  # rows that stand side by side
Lines = Sequence[Sequence[str]]
"""A heading and lines of as many cells, the first of each a title."""


@dataclass(frozen=True)
class Quantity:
    """A number of a run.

    Attributes:
        key: its name in ``results.json`` or in the metrics files, and in CSV.
        scale: shown is the number times this.
        fixed: no seed should change it; a deviation is shown only if there is one.
    """

    key: str
    title: str
    value: Callable[[Run], float | None]
    form: str = "{:.3f}"
    scale: float = 1.0
    fixed: bool = False

    def text(self, row: Row) -> str:
        """Mean over the seeds, ± standard deviation if there are several, empty if unknown."""
        found = [self.scale * value for value in row.by_seed(self.value).values()]
        if not found:
            return ""
        spread = len(found) > 1 and not (self.fixed and len(set(found)) == 1)
        return self.form.format(mean(found)) + (f" ± {self.form.format(deviation(found))}" if spread else "")


@dataclass(frozen=True)
class Column:
    """A quantity as it is shown.

    Attributes:
        quantity: what the cell is about; None if that is no number.
        constant: what the best constant answer would get.
    """

    title: str
    cell: Callable[[Row], str]
    quantity: Quantity | None = None
    constant: str = ""


def of_type(name: str, what: str) -> Quantity:
    """The score of a question type, its control with shuffled images, or that of the best constant answer."""
    return Quantity(f"types.{name}.{what}", name, lambda run: run.result("types", name, what))


AVERAGE = Quantity("average", "average", lambda run: run.result("average"))
CONTROL = Quantity("average_control", "average", lambda run: run.result("average_control"))


def costs(rows: Sequence[Row]) -> list[Quantity]:
    """All quantities that are not scores of question types."""

    def plain(key: str, title: str, form: str, scale: float = 1.0, fixed: bool = False) -> Quantity:
        return Quantity(key, title, lambda run: run.result(key), form, scale, fixed)

    def unit(key: str, base: float, names: str) -> tuple[str, float]:
        """The largest unit in which no row is below one, and the scale to it."""
        least = min((abs(v) for row in rows for run in row.runs if (v := run.result(key))), default=1.0)
        power = max((i for i in range(len(names)) if base ** (i + 1) <= least), default=0)
        return names[power], base ** -(power + 1)

    (flops, of_flops), (size, of_size) = unit("prefill_flops", 1e3, "KMGT"), unit("cache_bytes", 2**10, "KMG")
    parameters, of_parameters = unit("parameters", 1e3, "KMGT")
    return [
        Quantity("questions", "questions", asked, "{:.0f}", fixed=True),
        Quantity("untrained.average", "average before training", lambda run: run.before("average")),
        plain("loss", "validation loss", "{:.4f}"),
        plain("loss_shuffled_images", "... images shuffled", "{:.4f}"),
        plain("parameters", f"parameters ({parameters.replace('G', 'B')})", "{:.3f}", of_parameters, fixed=True),
        plain("prefill_flops", f"prefill {flops}FLOPs a question", "{:.1f}", of_flops, fixed=True),
        plain("prefill_seconds", "prefill (ms a question)", "{:.2f}", 1e3),
        plain("cache_bytes", f"key/value cache ({size}iB)", "{:.1f}", of_size, fixed=True),
        Quantity("step_seconds", "step time (ms)", lambda run: run.logged("step_seconds", median), "{:.0f}", 1e3),
        Quantity("memory_gib", "peak memory (GiB)", lambda run: run.logged("memory_gib", max), "{:.2f}"),
    ]


def asked(run: Run) -> float | None:
    """Questions that the run was asked; None if it was asked none."""
    counts = [run.result("types", name, "questions") or 0 for name in run.types]
    return sum(counts) if counts else None


def types_of(rows: Iterable[Row]) -> list[str]:
    """Question types in the order in which they are met."""
    return list(dict.fromkeys(name for row in rows for run in row.runs for name in run.types))


def constant_of(rows: Sequence[Row], name: str) -> float | None:
    """Score of the best constant answer to a question type; None if it is unknown or the rows differ in it."""
    found = {run.result("types", name, "constant") for row in rows for run in row.runs} - {None}
    return found.pop() if len(found) == 1 else None


# --- tables
def score_columns(compared: Comparison) -> list[Column]:
    """Question types, their average, and its difference to the baseline; before them, in its shape, the aligner's parts."""

    def score(name: str) -> Column:
        right, control = of_type(name, "score"), of_type(name, "control")

        def cell(row: Row) -> str:
            shuffled = row.by_seed(control.value).values()
            return right.text(row) + (f" [{mean(shuffled):.3f}]" if shuffled else "")

        constant = constant_of(compared.rows, name)
        return Column(name, cell, right, "" if constant is None else f"{constant:.3f}")

    def mark(part: str) -> Callable[[Row], str]:
        return lambda row: next((aligner_mark(run, part) for run in row.runs), "")

    parts = {"value": "V", "output": "O", "ffn": "FFN"} if compared.shape == "aligner" else {}
    names = types_of(compared.rows)
    scored = [run for row in compared.rows for run in row.runs if run.types]
    weights = weights_of_average(scored) if scored else {}
    known = [w * c for name, w in weights.items() if (c := constant_of(compared.rows, name)) is not None]
    constant = f"{sum(known):.3f}" if known and len(known) == len(names) else ""
    return [
        *(Column(title, mark(part)) for part, title in parts.items()),
        *map(score, names),
        Column(AVERAGE.title, AVERAGE.text, AVERAGE, constant),
        Column("difference of the average", gap),
    ]


def aligner_mark(run: Run, part: str) -> str:
    """Whether that weight of a layer updates visual states; a dash if there is no layer in which they do not query."""
    mechanism = run.results.get("mechanism") or {}
    if mechanism.get("dense_layers") == "all" or mechanism.get("cross_layers") == "none":
        return "–"
    return "✓" if (mechanism.get("aligner") or {}).get(part) else ""


def gap(row: Row) -> str:
    """Difference of the average to the baseline's, with its interval."""
    if row.baseline is None:
        return ""
    if row is row.baseline:
        return "baseline"
    found = difference(row, row.baseline)
    return found.text() if found else ""


def columns_of(compared: Comparison) -> tuple[list[Column], list[Column]]:
    """Scores, and costs, without columns of which nothing is known."""

    def known(columns: Iterable[Column]) -> list[Column]:
        return [column for column in columns if any(map(column.cell, compared.rows))]

    others = (Column(quantity.title, quantity.text, quantity) for quantity in costs(compared.rows))
    return known(score_columns(compared)), known(others)


def lines_of(compared: Comparison, columns: Sequence[Column]) -> list[list[str]]:
    """A line a row, and before a group of rows one with its heading."""
    lines = [["", *(column.title for column in columns)]]
    for group, rows in compared.by_group():
        lines += [[group, *("" for _ in columns)]] if group is not None else []
        lines += [[row.title, *(column.cell(row) for column in columns)] for row in rows]
    if any(column.constant for column in columns):
        lines.append(["best constant answer", *(column.constant for column in columns)])
    return lines


def tables(compared: Comparison) -> list[Lines]:
    """What Markdown and the terminal show."""
    scores, others = columns_of(compared)
    if compared.shape is None and len(compared.rows) <= FEW and not any(row.group for row in compared.rows):
        return [list(zip(*lines_of(compared, [*scores, *others]), strict=True))]
    return [lines_of(compared, columns) for columns in (scores, others) if columns]


def print_tables(found: Sequence[Lines], title: str) -> None:
    """One table on the terminal. Columns for which it is too narrow go on below; words are broken, numbers are not."""
    blocks = [list(zip(*lines, strict=True)) for lines in found]
    for most in range(max(map(len, blocks)) - 1, 0, -1):
        parts = [[names, *columns[i : i + most]] for names, *columns in blocks for i in range(0, len(columns), most)]
        first = min(24, max(len(name) for part in parts for name in part[0]))
        widths = [max(width_of(part[k]) for part in parts if len(part) > k) for k in range(1, most + 1)]
        if first + sum(widths) + 3 * most + 4 <= console.width:
            break
    terminal = Table(title=title)
    terminal.add_column(min_width=first, overflow="fold")
    headings = [heading for heading, *_ in parts[0][1:]] + [""] * most
    for heading, width in zip(headings, widths, strict=False):
        terminal.add_column(heading, justify="right", min_width=width, max_width=width, overflow="fold")
    for part in parts:
        heads, *lines = zip(*part, strict=True)
        if part is not parts[0]:
            terminal.add_row(*heads, style="bold")
        for line in lines:
            terminal.add_row(*line)
        terminal.add_section()
    console.print(terminal)


def width_of(column: Sequence[str]) -> int:
    heading, *cells = column
    return max(min(len(heading), 20), *map(len, cells))


# --- CSV
def numbers_csv(rows: Sequence[Row]) -> str:
    """Every number of every run, unscaled, with the run directory that it comes from."""
    lines: list[Sequence[object]] = [("row", "seed", "quantity", "value", "run")]
    quantities = every(rows)
    for row in rows:
        for run in row.runs:
            for quantity in quantities:
                if (value := quantity.value(run)) is not None:
                    lines.append((row.label, run.config.seed, quantity.key, value, run.path))
    return csv_text(lines)


def report_csv(compared: Comparison) -> str:
    """A line a row and quantity, unscaled: mean and deviation over seeds, difference to the baseline and its interval."""

    def six(*values: float) -> list[str]:
        return [f"{value:.6g}" for value in values]

    heading = ["row", "quantity", "seeds", "mean", "standard deviation"]
    heading += ["difference", "low", "high", "paired by", "pairs"]
    lines: list[Sequence[object]] = [heading]
    quantities = every(compared.rows)
    for row in compared.rows:
        for quantity in quantities:
            found = list(row.by_seed(quantity.value).values())
            if not found:
                continue
            line = [
                row.label,
                quantity.key,
                len(found),
                *six(mean(found)),
                *(six(deviation(found)) if len(found) > 1 else [""]),
            ]
            name = quantity.title if quantity.key.endswith(".score") else None
            compares = name is not None or quantity is AVERAGE
            to = difference(row, row.baseline, name) if compares and row.baseline not in (None, row) else None
            if to is not None:
                interval = ["", ""] if to.half is None else six(to.mean - to.half, to.mean + to.half)
                line += [*six(to.mean), *interval, to.over, to.count]
            lines.append(line + [""] * (len(heading) - len(line)))
    return csv_text(lines)


def every(rows: Sequence[Row]) -> list[Quantity]:
    """All quantities."""
    return [
        *(of_type(name, what) for name in types_of(rows) for what in ("score", "control", "constant")),
        AVERAGE,
        *costs(rows),
    ]


def csv_text(lines: Iterable[Sequence[object]]) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(lines)
    return file.getvalue()
