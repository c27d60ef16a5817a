"""Compare finished runs, or a sweep: one table on the terminal, in Markdown, CSV and HTML, and one picture.

Every number comes from a run directory that is named beside it: below the table, in the page, and in ``numbers.csv``.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from textwrap import shorten

from ..console import console, write_atomically
from ..doctor import provenance
from .page import page
from .plots import draw
from .runs import Comparison, compare, read_run
from .tables import Lines, numbers_csv, print_tables, report_csv, tables
from .words import caption, incomparable, incomplete, machines, search_heading, searches

__all__ = ["read_run", "report"]


def report(runs: Sequence[Path], out: Path | None = None, baseline: str | None = None) -> None:
    """Print the comparison and write ``report.md``, ``.csv``, ``.html``, ``.png`` and ``numbers.csv``.

    Args:
        runs: run directories, or one sweep.
        out: folder; None is ``report`` in the sweep, else ``runs/report``.
        baseline: name of a row or one of its run directories; None is the sweep's, if any.
    """
    compared = compare(runs, baseline)
    if out is None:
        out = runs[0] / "report" if (runs[0] / "sweep.json").is_file() else Path("runs/report")
    out.mkdir(parents=True, exist_ok=True)
    if found := tables(compared):
        print_tables(found, compared.title)
    notes = [f"{row.title}: {', '.join(str(run.path) for run in row.runs) or 'no run'}" for row in compared.rows]
    warnings = [warning for warning in (incomparable(compared.rows), incomplete(compared.rows)) if warning]
    failed = [f"failed: {run}: {shorten(why, 300)}" for run, why in compared.failed.items()]
    made = [f"made by: {compared.made}"] if compared.made else []
    made += [*machines(compared.rows), f"this report: {provenance()}"]
    picture = draw(compared.rows)
    write_atomically(out / "report.md", markdown(compared, warnings, [*notes, *failed, *made]))
    write_atomically(out / "report.csv", report_csv(compared))
    write_atomically(out / "numbers.csv", numbers_csv(compared.rows))
    write_atomically(out / "report.html", page(compared, picture, warnings, [*notes, *made], out))
    write_atomically(out / "report.png", picture)
    for note in [*warnings, *notes, *failed]:
        console.print(note)
    console.print(f"report: {out / 'report.md'}, {out / 'report.html'}, {out / 'report.png'}")


def markdown(compared: Comparison, warnings: Sequence[str], notes: Sequence[str]) -> str:
    """The tables, what they mean, what was searched, and where all of it comes from."""
    parts = [f"# {plain(compared.title)}"]
    headings = {row.group for row in compared.rows}
    parts += [markdown_table(lines, headings) for lines in tables(compared)]
    parts += map(plain, warnings)
    parts.append(plain(" ".join(caption(compared))))
    parts.append("![score against FLOPs, learning curves, scores by question type](report.png)")
    if searched := searches(compared, plain, "**{}**"):
        parts += [plain(search_heading(compared)), "\n".join(f"- {line}" for line in searched)]
    parts.append("\n".join(f"- {plain(note)}" for note in notes))
    return "\n\n".join(part for part in parts if part) + "\n"


def markdown_table(lines: Lines, headings: Collection[str | None] = ()) -> str:
    """Lines of cells as a table, of which `headings` alone on their line stand out."""
    table = []
    for line in lines:
        cells = [plain(cell).replace("|", "\\|") for cell in line]
        if line[0] in headings and not any(line[1:]):
            cells[0] = f"**{cells[0]}**"
        table.append("| " + " | ".join(cells) + " |")
    return "\n".join([table[0], "|" + "---|" * len(lines[0]), *table[1:]])


def plain(text: str) -> str:
    """One line without HTML, links and pictures."""
    return " ".join(text.split()).replace("<", "&lt;").replace("](", "]\\(")
