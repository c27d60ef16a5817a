"""Runs side by side: what each operator is worth in each layer, and what attention text pays to visual tokens there; table and picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from ...console import console, write_atomically
from .operators import OPERATORS, TITLES
from .show import kl_axis, pyplot, save

Results = dict[str, Any]
"""Of a run: `Bench.about`, its directory and preset, and the rows of `Choice.alone` and `attention_to_images`."""


STYLES = {"answers": ("o-", "of rows that predict answers"), "text": ("s:", "of all text after an image")}


def show_beside(runs: Sequence[Results], folder: Path) -> None:
    """Write and print the numbers of all runs."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "beside.json", json.dumps({"runs": runs}, indent=2))
    draw_beside(runs, folder / "beside.png")
    for run in runs:
        console.print(table_of(run))
    console.print(
        "KL: of the output when one operator alone is skipped for visual tokens, in nats a token. Attention: the share that visual "
        "tokens get, mean over heads, of rows that predict answers and of all text after an image."
    )
    console.print(f"numbers and picture: {folder / 'beside.json'}, beside.png beside it")


def label(run: Results) -> str:
    return f"{run['preset']}: {run['run']}"


def table_of(run: Results) -> Table:
    table = Table(title=label(run))
    for heading in ("layer", *(f"KL, {name}" for name in OPERATORS), "attention, answers", "attention, text"):
        table.add_column(heading, no_wrap=True, justify="right")
    kl = {(row["layer"], row["operator"]): f"{row['kl']:.3g}" for row in run["alone"]}
    for row in run["attention"]:
        cells = (kl.get((row["layer"], name), "") for name in OPERATORS)
        table.add_row(str(row["layer"]), *cells, f"{row['answers']:.3f}", f"{row['text']:.3f}")
    return table


def draw_beside(runs: Sequence[Results], path: Path) -> None:
    """A panel for each operator, KL over layers, and one of attention; a colour for each run."""
    plt = pyplot()
    figure, axes = plt.subplots(2, 2, figsize=(12, 8), sharex=True, layout="constrained")
    *panels, last = axes.flat
    for axis, name in zip(panels, OPERATORS, strict=True):
        for number, run in enumerate(runs):
            kl = {row["layer"]: row["kl"] for row in run["alone"] if row["operator"] == name}
            axis.plot(list(kl), list(kl.values()), "o-", color=f"C{number}", label=label(run))
        kl_axis(axis, [row for run in runs for row in run["alone"]])
        axis.set_title(f"{name}: {TITLES[name]}", fontsize="medium")
    for rows, (style, text) in STYLES.items():
        for number, run in enumerate(runs):
            last.plot([row[rows] for row in run["attention"]], style, color=f"C{number}", markerfacecolor="white")
        last.plot([], [], style, color="0.3", markerfacecolor="white", label=text)
    last.set_title("attention to visual tokens", fontsize="medium")
    last.set_ylabel("share, mean over heads")
    last.set_ylim(0, 1.3 * last.get_ylim()[1])  # with room for the legend
    last.legend(frameon=False)
    for axis in axes[-1]:
        axis.set_xlabel("layer")
        axis.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", frameon=False)
    text = "KL when one operator of one layer is skipped for visual tokens, and the attention that they get"
    figure.suptitle(f"{text}\n{runs[0]['samples']:,} conversations with images")
    save(figure, path)
