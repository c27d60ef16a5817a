"""What `bench` has measured: a table for each measure, and a picture of how many times as fast as transformers each system is."""

from __future__ import annotations

import io
from statistics import median
from typing import Any

import torch
from rich.table import Table

BASE = "hf sdpa"
"""The system that all are compared with."""
MEASURES = {
    "prefill": "Prefill of a prompt",
    "second": "A second question about the same picture",
    "decode": "A new token",
    "graph": "A new token, as a CUDA graph",
    "training": "A training step, forward and backward",
}
Result = dict[str, Any]


def exponent(points: list[tuple[int, float]]) -> float | None:
    """Of cost over V, fitted by least squares to the logarithms; None for fewer than three sizes."""
    if len(points) < 3:
        return None
    x, y = torch.tensor(points, dtype=torch.float64).log().T
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x * x).sum())


def _rows(result: Result, what: str) -> dict[str, dict[int, Result]]:
    """Of a measure, by system and number of visual tokens."""
    found: dict[str, dict[int, Result]] = {}
    for row in result["rows"]:
        if row["measure"] == what:
            found.setdefault(row["system"], {})[row["visual"]] = row
    return found


def _times(rows: dict[str, dict[int, Result]]) -> dict[str, dict[int, float]]:
    """Median seconds, where there are any."""
    return {
        system: {v: median(row["seconds"]) for v, row in sizes.items() if row["seconds"]}
        for system, sizes in rows.items()
    }


def _cell(row: Result, times: dict[str, dict[int, float]]) -> str:
    """Milliseconds, in brackets how many times as fast as the base; or why there are none."""
    if not row["seconds"]:
        return str(row["failed"])
    visual, own = row["visual"], median(row["seconds"])
    base = times.get(BASE, {}).get(visual)
    ratio = f" ({base / own:.2f})" if base else ""
    memory = f" {row['peak_gib']:.1f} GiB" if "peak_gib" in row else ""
    return f"{1e3 * own:.3g}{ratio}{memory}"


def report(result: Result) -> str:
    """Markdown: for each measure a row a system and a column a number of visual tokens, and how cost grows with it."""
    rounds = {len(row["seconds"]) for row in result["rows"] if row["seconds"]} or {0}
    texts = ", ".join(
        f"T{'/2' if i == 0 else f' x {2 ** (i - 1)}' if i > 1 else ''}" for i in range(result["documents"])
    )
    lines = [
        "# Mechanisms beside transformers' LLaVA",
        "",
        "![how many times as fast as transformers, over visual tokens](report.png)",
        "",
        f"Milliseconds; in brackets, how many times as fast as transformers' own LLaVA (`{BASE}`) in this run. A decoder of the shape "
        f"{result['shape']}, {result['layers']} layers, {result['dtype']}, threads: {result['threads']}; prompts of T = {result['text']} text tokens and one "
        f"picture of V visual tokens; a training step has a picture with each of the texts of {texts} tokens, padded to the longest by "
        f"transformers and packed here. Random weights, the same for all; the systems take turns, medians of "
        f"{' to '.join(map(str, sorted({min(rounds), max(rounds)})))} rounds. Exponent: of time over V, fitted. Largest relative difference of llava's logits and loss from "
        f"`{BASE}`: " + ", ".join(f"{name} {value:.0e}" for name, value in result["differences"].items())
        + f". Load of the machine before it began: {result['load']:.1f} processes.",
        "",
    ]  # fmt: skip
    for what, title in MEASURES.items():
        if not (rows := _rows(result, what)):
            continue
        times, sizes = _times(rows), sorted({row["visual"] for row in result["rows"]})
        lines += [f"## {title}", "", "| V | " + " | ".join(f"{v:,}" for v in sizes) + " | exponent |"]
        lines += ["|---|" + "---:|" * (len(sizes) + 1)]
        for system, of in rows.items():
            fit = exponent(list(times[system].items()))
            cells = [_cell(of[v], times) if v in of else "" for v in sizes]
            lines.append(f"| {system} | {' | '.join(cells)} | {'' if fit is None else f'{fit:.2f}'} |")
        lines.append("")
    return "\n".join([*lines, f"- {result['provenance']}", ""])


def largest(result: Result) -> Table:
    """For the terminal: all measures at the largest number of visual tokens."""
    visual = max(row["visual"] for row in result["rows"])
    table = Table(
        title=f"{visual:,} visual tokens: ms (times as fast as transformers' own LLaVA, {BASE})", title_justify="left"
    )
    table.add_column("")
    measured = {what: rows for what in MEASURES if (rows := _rows(result, what))}
    for what in measured:
        table.add_column(what, justify="right")
    for system in dict.fromkeys(row["system"] for row in result["rows"]):
        table.add_row(system, *(_cell(rows[system][visual], _times(rows)) for rows in measured.values()))
    return table


def draw(result: Result) -> bytes:
    """A PNG: how many times as fast as the base each system is, over V, a panel for each measure."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    timed = {what: _times(rows) for what in MEASURES if (rows := _rows(result, what))}
    timed = {what: times for what, times in timed.items() if times.get(BASE)}
    sizes = sorted({row["visual"] for row in result["rows"]})
    first = next(iter(timed.values()), {})
    order = sorted(first, key=lambda system: -_speed(first, system))  # the legend, as the lines end
    figure = Figure(figsize=(2.2 + 3.6 * len(timed), 0.8 + max(3.6, 0.19 * len(order))), layout="constrained")
    axes = figure.subplots(1, max(1, len(timed)), squeeze=False)[0]
    colours = colormaps["tab20"].colors  # type: ignore[attr-defined]
    for axis, (what, times) in zip(axes, timed.items(), strict=False):
        for number, system in enumerate(order):
            shared = [v for v in times[system] if v in times[BASE]]
            looks: Any = {"c": "k", "ls": "--", "lw": 2} if system == BASE else {"c": colours[number % 20]}
            looks |= {"ls": ":"} if number >= 20 and system != BASE else {}
            marker = "osD^v<>"[number % 7]
            axis.plot(
                shared,
                [times[BASE][v] / times[system][v] for v in shared],
                marker=marker,
                ms=4,
                label=system,
                **looks,
            )
        axis.set(xscale="log", yscale="log", title=MEASURES[what], xlabel="visual tokens of a picture")
        axis.set_xticks(sizes, [f"{v:,}" for v in sizes])
        axis.set_xticks([], minor=True)
        low, high = axis.get_ylim()
        steps = (1, 1.2, 1.4, 1.7) if high / low < 8 else (1,)
        ticks = [t for power in range(-6, 10) for step in steps if low <= (t := step * 2.0**power) <= high]
        axis.set_yticks(ticks, [f"{t:.2g}x" for t in ticks])
        axis.set_yticks([], minor=True)
        axis.grid(color="0.92")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("times as fast as transformers")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    return file.getvalue()


def _speed(times: dict[str, dict[int, float]], system: str) -> float:
    """Beside the base, at the largest size that both have; 0 without one."""
    both = [v for v in times[system] if v in times[BASE]]
    return times[BASE][max(both)] / times[system][max(both)] if both else 0.0
