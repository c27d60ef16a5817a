"""The comparison as one HTML page that needs nothing else: a table to sort, every number with the runs that it comes from.

All text is escaped. The page's policy runs no script but the one below, by its hash, and loads nothing.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from ..console import PAGE_POLICY
from .difference import difference
from .runs import Comparison, Row, Run
from .tables import Column, Quantity, columns_of, of_type
from .words import caption, search_heading, searches


def page(compared: Comparison, picture: bytes, warnings: Sequence[str], notes: Sequence[str], out: Path) -> str:
    """The page.

    Args:
        picture: a PNG.
        notes: lines for its foot.
        out: the folder that the page will lie in; links to runs are relative to it.
    """
    scores, others = columns_of(compared)
    columns = [*scores, *others]
    heads = "".join(f"<th><button>{escape(title)}</button></th>" for title in ("row", *(c.title for c in columns)))
    bodies = "\n".join(table_body(group, rows, columns, out) for group, rows in compared.by_group())
    foot = "".join(f"<td>{escape(column.constant)}</td>" for column in columns)
    foot = f"<tfoot><tr><th>best constant answer</th>{foot}</tr></tfoot>" if any(c.constant for c in columns) else ""
    sections = [
        *(f'<p class="warning">{escape(warning)}</p>' for warning in warnings),
        f'<div class="wide"><table id="t"><thead><tr>{heads}</tr></thead>\n{bodies}\n{foot}</table></div>',
        f"<p>{escape(' '.join(caption(compared)))} Point at a number to see those of its runs; the numbers after a row's "
        "name are its seeds and lead to the results of the run. A heading sorts.</p>",
        f'<img alt="score against FLOPs, learning curves, scores by question type" src="data:image/png;base64,'
        f'{base64.b64encode(picture).decode()}">',
        searched(compared),
        failures(compared),
        f"<ul>{''.join(f'<li>{escape(note)}</li>' for note in notes)}</ul>",
    ]
    script = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    body = "\n".join(section for section in sections if section)
    return _PAGE.format(policy=PAGE_POLICY, title=escape(compared.title), body=body, hash=script, script=_SCRIPT)


def table_body(group: str | None, rows: Sequence[Row], columns: Sequence[Column], out: Path) -> str:
    """The rows of a group, below its heading if it has one."""
    span = f' colspan="{1 + len(columns)}" scope="rowgroup"'
    heading = f"<tbody><tr><th{span}>{escape(group)}</th></tr></tbody>\n" if group is not None else ""
    return heading + "<tbody>\n" + "\n".join(table_line(row, columns, out) for row in rows) + "\n</tbody>"


def table_line(row: Row, columns: Sequence[Column], out: Path) -> str:
    """A row: its name with links to its runs' results, and its numbers."""
    links = " ".join(f'<a href="{escape(link(run, out))}">{run.config.seed}</a>' for run in row.runs)
    cells = []
    for column in columns:
        found = row.by_seed(column.quantity.value) if column.quantity else {}
        value = f' data-v="{sum(found.values()) / len(found)!r}"' if found else ""
        hint = "\n".join(origins(row, column.quantity)) if column.quantity else ""
        cells.append(f'<td{value} title="{escape(hint)}">{escape(column.cell(row))}</td>')
    return f"<tr><th>{escape(row.title)} {links}</th>{''.join(cells)}</tr>"


def origins(row: Row, quantity: Quantity) -> list[str]:
    """The number of each run, unscaled; of a question type also its control, and the difference to the baseline."""
    of_a_type = quantity.key.endswith(".score")
    lines = []
    for run in row.runs:
        control = of_type(quantity.title, "control").value(run) if of_a_type else None
        shuffled = "" if control is None else f" [{control:g}]"
        if (value := quantity.value(run)) is not None:
            lines.append(f"seed {run.config.seed}: {value:g}{shuffled} in {run.path}")
    if row.baseline not in (None, row) and of_a_type:
        to = difference(row, row.baseline, quantity.title)
        lines += [f"difference to {row.baseline.label}: {to.text()}, by {to.over}"] if to else []
    return lines


def link(run: Run, out: Path) -> str:
    """Relative and quoted, so that a colon in a name makes no scheme of it."""
    return quote(os.path.relpath((run.path / "eval" / "results.json").resolve(), out.resolve()))


def searched(compared: Comparison) -> str:
    """What was searched and chosen for each cell."""
    lines = [f"<li>{line}</li>" for line in searches(compared, escape, "<b>{}</b>")]
    return f"<p>{escape(search_heading(compared))}</p><ul>{''.join(lines)}</ul>" if lines else ""


def failures(compared: Comparison) -> str:
    """Runs that are in no row, with the whole reason."""
    lines = [
        f"<details><summary>{escape(run)}</summary><pre>{escape(why)}</pre></details>"
        for run, why in compared.failed.items()
    ]
    return f"<h2>Failed</h2>{''.join(lines)}" if lines else ""


_SCRIPT = """
for (const head of document.querySelectorAll("#t thead th")) head.firstChild.onclick = () => {
  const up = head.ariaSort !== "ascending", i = head.cellIndex;
  for (const other of head.parentNode.cells) other.ariaSort = "none";
  head.ariaSort = up ? "ascending" : "descending";
  const key = row => { const c = row.cells[i], v = parseFloat(c.dataset.v ?? c.textContent); return [v, c.textContent]; };
  const order = (a, b) => {
    const [x, s] = key(a), [y, t] = key(b);
    if (isNaN(x) !== isNaN(y)) return isNaN(x) ? 1 : -1;
    return (isNaN(x) ? s.localeCompare(t) : x - y) * (up ? 1 : -1);
  };
  for (const body of document.querySelectorAll("#t tbody")) body.append(...[...body.rows].sort(order));
};
"""
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta http-equiv="Content-Security-Policy" content="{policy}; script-src 'sha256-{hash}'">
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #223; margin: 2em }}
p, ul, details {{ max-width: 70em }} img {{ max-width: 100%; display: block; margin: 1.5em 0 }}
.warning {{ border-left: 4px solid #b00; padding-left: 1em }}
.wide {{ overflow-x: auto }} table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9em }}
th, td {{ border-bottom: 1px solid #dde; padding: .35em .7em; text-align: right; white-space: nowrap }}
th:first-child {{ text-align: left; position: sticky; left: 0; background: #fff }}
thead th {{ vertical-align: bottom; white-space: normal }} tfoot {{ color: #667 }}
button {{ all: unset; cursor: pointer; font-weight: bold }} button:focus-visible {{ outline: 2px solid #36c }}
[aria-sort=ascending] button::after {{ content: " ▲" }} [aria-sort=descending] button::after {{ content: " ▼" }}
pre {{ white-space: pre-wrap; background: #f6f7f9; padding: 1em }}
</style></head><body><h1>{title}</h1>
{body}
<script>{script}</script></body></html>
"""
