"""The picture of a comparison: score against prefill FLOPs, learning curves, and score by question type with controls."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, isfinite
from statistics import mean
from textwrap import fill
from typing import Any

from .difference import deviation
from .runs import Row
from .tables import AVERAGE, CONTROL, constant_of, of_type, types_of

PANELS = 8  # question types side by side
MARKERS = "osD^vP*X<>"
GREY = "0.4"
SMALLEST_SPAN = 0.05  # of average scores: smaller differences should not look large


@dataclass
class Styled:
    """A row with the colour and marker that it has everywhere."""

    row: Row
    colour: Any
    marker: str

    def name(self, width: int) -> str:
        return fill(self.row.label, width)


def draw(rows: Sequence[Row]) -> bytes:
    """A PNG. Rows without runs are not in it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import colormaps
    from matplotlib import pyplot as plt
    from matplotlib.text import Text

    rows = [row for row in rows if row.runs]
    colours = colormaps["tab10" if len(rows) <= 10 else "tab20"].colors  # type: ignore[attr-defined]
    styled = [Styled(row, colours[i % len(colours)], MARKERS[i % len(MARKERS)]) for i, row in enumerate(rows)]
    types = types_of(rows)
    panels = [*map(str, types), *([None] if len(types) > 1 else [])]  # None: their average
    priced = any(
        run.result("prefill_flops") is not None and AVERAGE.value(run) is not None for row in rows for run in row.runs
    )

    lines = [panels[i : i + PANELS] for i in range(0, len(panels), PANELS)]
    heights = [4.4, *[0.9 + 0.24 * sum(one.name(26).count("\n") + 1 for one in styled)] * len(lines)]
    handles = legend_handles(styled, types)
    columns = max(1, (150 if types else 90) // (max(len(handle.get_label()) for handle in handles) + 6))
    width, legend = 13 if types else 8, 0.25 * ceil(len(handles) / columns)
    size = width, sum(heights) + legend
    dpi = min(110, 60_000 / max(size))  # Agg draws less than 65,536 pixels
    figure = plt.figure(figsize=size, dpi=dpi, layout="constrained")
    ratios = [heights[0] + legend, *heights[1:]]
    top, *below = figure.subfigures(len(ratios), 1, height_ratios=ratios, squeeze=False)[:, 0]
    top.legend(handles=handles, frameon=False, loc="outside upper center", ncols=min(columns, len(handles)))
    *left, right = top.subplots(1, 1 + priced, squeeze=False)[0]
    draw_curves(right, styled)
    for part, names in zip(below, lines, strict=True):
        axes = part.subplots(1, min(len(panels), PANELS), sharey=True, squeeze=False)[0]
        for axis, name in zip(axes, names, strict=False):
            draw_type(axis, styled, name)
        for axis in axes[len(names) :]:
            axis.set_visible(False)
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # names may hold a $
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    for axis in left:  # last: labels find their places in the finished layout
        draw_prices(axis, styled)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    plt.close(figure)
    return file.getvalue()


def legend_handles(styled: Sequence[Styled], types: Sequence[str]) -> list[Any]:
    """Rows, and what else is drawn."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=one.colour, marker=one.marker, label=one.name(84)) for one in styled]
    rows = [one.row for one in styled]
    if any(row.by_seed(of_type(name, "control").value) for row in rows for name in types):
        handles.append(Line2D([], [], color=GREY, marker="x", linestyle="", label="images shuffled"))
    if any(constant_of(rows, name) is not None for name in types):
        handles.append(Line2D([], [], color=GREY, linestyle=":", label="best constant answer"))
    return handles


def draw_curves(axis: Any, styled: Sequence[Styled]) -> None:
    """Training loss over steps: the mean over a row's runs, and the band that they fill; logarithmic if they span much."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

    losses: list[float] = []
    for one in styled:
        by_step: dict[float, list[float]] = defaultdict(list)
        curves = [run.curve for run in one.row.runs if run.curve]
        for step in (step for curve in curves for step in curve):
            by_step[step["step"]].append(step["loss"])
        steps = sorted(step for step, found in by_step.items() if len(found) == len(curves))  # logged by all of them
        found = [by_step[step] for step in steps]
        marker = one.marker if len(steps) == 1 else None
        axis.plot(steps, list(map(mean, found)), color=one.colour, alpha=0.9, marker=marker)
        axis.fill_between(
            steps, list(map(min, found)), list(map(max, found)), color=one.colour, alpha=0.15, linewidth=0
        )
        losses += [loss for each in found for loss in each if isfinite(loss)]
    axis.set(xlabel="optimiser step", ylabel="training loss a token")
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    if losses and 0 < 4 * min(losses) < max(losses):
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())


def draw_type(axis: Any, styled: Sequence[Styled], name: str | None) -> None:
    """A question type, or the average: a line a row with its mean and deviation over seeds, its control, the best constant."""
    score, shuffled = (AVERAGE, CONTROL) if name is None else (of_type(name, "score"), of_type(name, "control"))
    most = 1.0
    for y, one in enumerate(styled):
        axis.axhline(y, color="0.92", linewidth=0.8, zorder=0)
        if found := list(one.row.by_seed(score.value).values()):
            error = deviation(found) if len(found) > 1 else None
            bar = axis.errorbar(
                mean(found), y, xerr=error, color=one.colour, marker=one.marker, markersize=5, capsize=3
            )
            bar.lines[0].set_clip_on(False)  # the mark alone: beyond the axis there is no score, but the number
            text = f"{mean(found):.3f}".removeprefix("0")
            axis.text(1.04, y, text, transform=axis.get_yaxis_transform(), va="center", fontsize=7, color=GREY)
            most = max(most, *filter(isfinite, found))
        if found := list(one.row.by_seed(shuffled.value).values()):
            axis.plot(mean(found), y, color=GREY, marker="x", linestyle="", clip_on=False)
    constant = None if name is None else constant_of([one.row for one in styled], name)
    if constant is not None:
        axis.axvline(constant, color=GREY, linestyle=":", linewidth=1)
    axis.set_title(
        fill("average" if name is None else name, 20), fontsize="medium", weight="bold" if name is None else None
    )
    axis.set_xlim(0, most)
    axis.set_yticks(range(len(styled)), [one.name(26) for one in styled])
    axis.set_ylim(len(styled) - 0.5, -0.5)


def draw_prices(axis: Any, styled: Sequence[Styled]) -> None:
    """The average score over the prefill FLOPs of a question, labelled points with their deviation over seeds."""
    from matplotlib.ticker import EngFormatter

    points = []
    for one in styled:
        flops = one.row.by_seed(lambda run: run.result("prefill_flops"))
        scores = list(one.row.by_seed(AVERAGE.value).values())
        if flops and scores:
            x, y, error = mean(flops.values()), mean(scores), deviation(scores) if len(scores) > 1 else 0.0
            axis.errorbar(x, y, yerr=error or None, color=one.colour, marker=one.marker, capsize=3)
            points.append((x, y, error, one.name(26), one.colour))
    axis.margins(0.12)
    low, high = axis.get_ylim()
    missing = max(0.0, SMALLEST_SPAN - (high - low)) / 2
    axis.set(xlabel="prefill FLOPs a question", ylabel="average score", ylim=(low - missing, high + missing))
    axis.xaxis.set_major_formatter(EngFormatter())
    place_labels(axis, points)


def place_labels(
    axis: Any, points: Sequence[tuple[float, float, float, str, Any]], others: Sequence[tuple[float, float]] = ()
) -> None:
    """Each label at the nearest place around its point that hides no point, no other label and no edge, or the least of them.

    Args:
        points: x, y and what its error bar reaches up and down, in data; label and colour.
        others: x and y of points without a label.
    """
    from matplotlib.transforms import Bbox

    figure = axis.get_figure(root=True)
    figure.draw_without_rendering()
    frame, unit = axis.get_window_extent(), figure.dpi / 72
    dots = [axis.transData.transform((x, y)) for x, y, *_ in points]
    bars = [[(x, y - error), (x, y + error)] for x, y, error, *_ in points] + [[point, point] for point in others]
    taken = [Bbox(axis.transData.transform(bar)).padded(6) for bar in bars]
    places = [(d, dx, dy) for d in (7, 14, 24, 36, 50, 66, 84) for dx in (1, -1, 0) for dy in (0, 1, -1) if dx or dy]
    for (x, y, _, text, colour), dot in zip(points, dots, strict=True):
        label = axis.annotate(
            text, (x, y), (0, 0), textcoords="offset points", color=colour, size="small", parse_math=False
        )
        size = label.get_window_extent().size

        def at(place: tuple[int, int, int], dot: Any = dot, size: Any = size) -> Any:
            distance, *way = place
            corner = [dot[i] + distance * unit * way[i] + size[i] * (way[i] - 1) / 2 for i in (0, 1)]
            return Bbox.from_bounds(*corner, *size)

        def hidden(box: Any) -> float:
            """Square pixels of what lies below it or beyond the edges, roughly."""
            inside = Bbox.intersection(box, frame)
            outside = box.width * box.height - (inside.width * inside.height if inside else 0.0)
            shared = [both for other in taken if (both := Bbox.intersection(box, other))]
            return outside + sum(both.width * both.height for both in shared)

        best = min(places, key=lambda place: hidden(at(place)))  # the nearest of equals comes first
        taken.append(at(best).padded(1))
        distance, dx, dy = best
        label.set(position=(dx * distance, dy * distance), ha=("center", "left", "right")[dx])
        label.set_va(("center", "bottom", "top")[dy])
        if distance > places[0][0]:
            line = {"arrowstyle": "-", "color": colour, "linewidth": 0.7, "linestyle": ":"}
            axis.annotate("", (x, y), (dx * distance, dy * distance), textcoords="offset points", arrowprops=line)
