"""`explain`: the table of a mechanism, on the terminal and as a picture; what each layer does with visual tokens, and its share of the
FLOPs of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from rich import box
from rich.table import Table as Grid
from torch import Tensor

from ..console import console, quiet_libraries, writing
from ..core.decoder import Inner
from ..core.families import FAMILIES
from ..core.select import ALL, Routed, Select, Share, Top
from ..core.table import PARTS, LayerPlan
from ..layout import Chunk, Run, SequenceLayout, Visibility, span
from ..mechanisms import PRESETS, Mechanism, Sizes, configured_mechanism
from ..mechanisms.connectors import DEFAULT
from ..mechanisms.schedule import Schedule
from .estimate import prompt_of, si
from .formulas import layer_flops, prefill_flops

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..config.keys import Config

SMALL = SequenceLayout.of([[Run(False, 2), Run(True, 5), Run(False, 3)]])
"""The document whose masks are drawn."""
TEXT, IMAGE, SELF, NONE = "#3b6ea5", "#e08e45", "#f3d2b3", "#f2f2f2"
COLUMNS = {
    "tokens": "visual tokens here",
    "attend": "they see",
    "update": "updated by",
    "seen": "text sees",
    "source": "come from",
}
MOST_MASKS = 4  # kinds of layers whose mask is drawn


def explain(
    config: Config,
    *,
    shape: str | None,
    text: int,
    visual: int | None,
    out: Path | None,
    image: tuple[int, int] | None = None,
) -> None:
    """Print the table of the configured mechanism, and draw it.

    Args:
        config: parts and mechanism; needs their config files, no weights.
        shape: what `weightless.parts_of_shape` takes, instead of the parts of the configuration.
        text: text tokens of the document whose FLOPs are counted.
        visual: its visual tokens; None = as many as the encoder makes of an image, at most.
        out: a picture (.png, .svg or .pdf); None = none.
        image: width and height of its image, in place of `visual`.
    """
    from .weightless import parts_of

    quiet_libraries()
    parts = parts_of(config, shape)
    preset, layers = config.model.mechanism.preset, parts.decoder.num_hidden_layers
    mechanism = configured_mechanism(config.model.mechanism, layers)
    visual = prompt_of(parts, text, visual, image)
    sizes = Sizes.of(parts.decoder, parts.vision_width)
    with torch.device("meta"):
        blocks = [mechanism.block(layer, sizes) for layer in range(layers)]
    modules = ["–" if block is None else "inside it" if isinstance(block, Inner) else "before it" for block in blocks]
    connected: dict[str, Any] = {"connector": parts.connector, "view": parts.view}
    dense = prefill_flops(PRESETS["llava"], parts.decoder, text, visual)

    def show(one: Mechanism) -> list[int]:
        flops = layer_flops(one, parts.decoder, text, visual, parts.vision_width, **connected)
        console.print(grid(one.table(layers), flops, modules))
        total = sum(flops)
        console.print(
            f"{si(total)} FLOPs in the decoder's layers, {total / dense:.1%} of llava's.{notes(one, parts.decoder)}\n"
        )
        return flops

    what = f"{preset} in {layers} layers of {shape or config.model.decoder}"
    what += f", connector {parts.connector}" if parts.connector != DEFAULT else ""
    head = f"{what}: a document of {visual:,} visual and {text:,} text tokens"
    console.print(f"{head}\n")
    flops = show(mechanism)
    schedule = Schedule.of(config, mechanism, parts.decoder)
    for entry in schedule.entries[:-1]:
        console.print(f"trained by a schedule: {entry.text}\n", markup=False, highlight=False)
        show(entry.mechanism)
        if entry.teacher is not None:
            console.print("and its teacher\n")
            show(entry.teacher)
    console.print(
        "A layer updates visual tokens only if a later one reads them: so does the program, and so FLOPs are counted."
    )
    if out is not None:
        draw(mechanism.table(layers), flops, head, out)
        console.print(f"picture: {out}")


def notes(mechanism: Mechanism, decoder: Any) -> str:
    """What is not in the table."""
    found = []
    windows = ranges(FAMILIES[decoder.model_type].windows(decoder))
    for size in {window for *_, window in windows if window is not None}:
        where = [str(a) if a == b else f"{a}–{b}" for a, b, window in windows if window == size]
        name = "chunk" if isinstance(size, Chunk) else "window"
        found.append(f"The decoder's {name} in layers {', '.join(where)}: {span(size):,} tokens.")
    if mechanism.visual_positions != "sequence":
        found.append(f"Rotary positions of images: {mechanism.visual_positions}.")
    if mechanism.freeze_prefix:
        found.append("Text before the first image takes no attention.")
    if type(mechanism).block is not Mechanism.block:
        found.append("FLOPs of modules that it adds are counted.")
    return "".join(f" {text}" for text in found)


def cells(row: LayerPlan) -> dict[str, str]:
    """Its columns, for people."""
    columns = {name: str(value) for name, value in row.to_dict().items()}
    fed = columns.pop("ffn")
    if isinstance(row.tokens, Top):
        columns["tokens"] = (
            f"{1 - row.tokens.dropped:.4g} left by rank in {'the encoder' if row.tokens.by_encoder else row.tokens.layer}"
        )
    if row.seen == row.tokens != ALL:
        columns["seen"] = "these"
    words = {"none": "–", "causal": "all before", "image": "all before, their image"}
    columns["attend"] = words.get(columns["attend"], f"{row.attend} before")
    columns["source"] = {"stream": "the layer before", "own": "a projector"}[columns["source"]]
    if row.tokens.empty or row.idle:
        return {**columns, "attend": "–", "update": "–", "seen": "–", "source": "–"}
    if fed != "all":
        columns["update"] = columns["update"].replace("ffn", f"ffn ({fed})")
    return {name: "–" if value == "none" else value for name, value in columns.items()}


Row = TypeVar("Row")


def ranges(table: Sequence[Row]) -> list[tuple[int, int, Row]]:
    """First and last layer of each stretch of equal rows, and the row."""
    found, first = [], 0
    for row, same in groupby(table):
        length = len(list(same))
        found.append((first, first + length - 1, row))
        first += length
    return found


def grid(table: tuple[LayerPlan, ...], flops: list[int], modules: list[str]) -> Grid:
    """A line for each stretch of equal rows, where modules added to its layers are."""
    drawn, total = Grid(box=box.SIMPLE_HEAD, pad_edge=False), sum(flops)
    added = {*modules} != {"–"}
    shown = {
        name: text for name, text in COLUMNS.items() if name != "source" or any(row.source == "own" for row in table)
    }
    for heading in ("layers", *shown.values(), *["module"] * added, "FLOPs a layer", "share"):
        drawn.add_column(heading, no_wrap=True, justify="right" if heading in ("FLOPs a layer", "share") else "left")
    for first, last, (row, module) in ranges(list(zip(table, modules, strict=True))):
        part = flops[first : last + 1]
        each = si(min(part)) if min(part) == max(part) else f"{si(min(part))} – {si(max(part))}"
        where = str(first) if first == last else f"{first}–{last}"
        told = cells(row)
        drawn.add_row(where, *(told[name] for name in shown), *[module] * added, each, f"{sum(part) / total:.1%}")
    return drawn


# --- the picture
def pictured(select: Select) -> Select:
    """In place of those that only scores can tell, as many tokens evenly spaced."""
    if isinstance(select, Routed):
        return Share(select.share)
    return Share(1 - select.dropped) if isinstance(select, Top) else select


def mask(row: LayerPlan) -> Tensor:
    """What sees what in a layer, for `SMALL`, [S, S] of 0 nothing, 1 a look, 2 itself by the aligner, 3 a row that is not there."""
    layout, size = SMALL, SMALL.num_tokens
    lengths = layout.image_lengths
    visual, here, seen = (torch.zeros(size, dtype=torch.bool) for _ in range(3))
    visual[layout.visual_index] = True
    here[layout.visual_index] = pictured(row.tokens).flags(lengths)
    seen[layout.visual_index] = pictured(row.seen).flags(lengths)
    causal = layout.mask(Visibility(True))
    image_S = layout.image_of_row()
    if row.attend == "image":
        causal |= (image_S[:, None] == image_S[None]) & visual[:, None]
    place = here.cumsum(0)
    near = causal & (place[:, None] - place[None] <= (row.attend if isinstance(row.attend, int) else 0)) & here[None]
    of_text = causal & (~visual | seen)[None]
    of_images = causal & (~visual | here)[None] if row.dense else near if row.queries else torch.zeros_like(causal)
    found = torch.where(visual[:, None], of_images, of_text).int()
    itself = torch.eye(size, dtype=torch.bool) & (visual & here)[:, None]
    if not row.queries and row.update:
        found[itself] = 2
    gone = visual & ~here
    found[gone] = 0
    found[gone, gone.nonzero().flatten()] = 3
    return found


def draw_mask(axis: Axes, row: LayerPlan, title: str) -> None:
    """Rows are queries, columns keys."""
    from matplotlib.patches import Rectangle

    visual, found = set(SMALL.visual_index.tolist()), mask(row)
    for q in range(SMALL.num_tokens):
        for k in range(SMALL.num_tokens):
            colour = [NONE, IMAGE if k in visual else TEXT, SELF, "white"][int(found[q, k])]
            axis.add_patch(Rectangle((k, q), 0.92, 0.92, color=colour))
        mark, colour = ("V", IMAGE) if q in visual else ("t", TEXT)
        axis.text(-0.4, q + 0.5, mark, ha="center", va="center", color=colour, fontsize=8)
        axis.text(q + 0.46, -0.5, mark, ha="center", va="center", color=colour, fontsize=8)
    axis.set(xlim=(-1, SMALL.num_tokens), ylim=(SMALL.num_tokens, -1), aspect="equal")
    axis.set_title(title, fontsize=9)
    axis.axis("off")


def draw_table(axis: Axes, table: tuple[LayerPlan, ...], flops: list[int]) -> None:
    """A line for each layer, colours for what is on; the bar is the layer's share of the FLOPs."""
    from matplotlib.patches import Rectangle

    parts = [f"updated by {part}" for part in PARTS]
    headings = ["tokens here", "they query", *parts, "text sees", "own source", "FLOPs"]
    most = max(flops)
    for layer, row in enumerate(table):
        count = SMALL.num_visual
        there = row.tokens.count(count) / count
        values = [
            there,
            (1.0 if row.dense else 0.4) * row.queries * (there > 0),
            *((part in row.update) * there for part in PARTS[:2]),
            row.fed(count) / count,
            row.seen.count(count) / count,
            float(row.source == "own"),
        ]
        for x, value in enumerate(values):
            axis.add_patch(Rectangle((x, layer), 0.94, 0.9, color=NONE))
            if value:
                axis.add_patch(Rectangle((x, layer), 0.94, 0.9, color=IMAGE, alpha=0.35 + 0.65 * value))
        axis.add_patch(Rectangle((len(values), layer), 1.9 * flops[layer] / most, 0.9, color="0.45"))
    axis.set_xticks([x + 0.47 for x in range(len(headings))], headings, rotation=40, ha="left", fontsize=8)
    step = max(1, len(table) // 16)
    numbers = range(0, len(table), step)
    axis.set_yticks([n + 0.45 for n in numbers], list(map(str, numbers)), fontsize=8)
    axis.set(xlim=(0, len(headings) + 1), ylim=(len(table), 0), ylabel="layer")
    axis.xaxis.tick_top()
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)


def draw(table: tuple[LayerPlan, ...], flops: list[int], title: str, out: Path) -> None:
    """The table, and beside it the mask of each kind of layer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    kinds: dict[LayerPlan, list[str]] = {}
    for first, last, row in ranges(table):
        kinds.setdefault(row, []).append(str(first) if first == last else f"{first}–{last}")
    shown = list(kinds.items())[:MOST_MASKS]
    figure = plt.figure(figsize=(5.2 + 3.1 * len(shown), 5.2), layout="constrained")
    axes: Any = figure.subplots(1, 1 + len(shown), width_ratios=(1.5, *[1.0] * len(shown)))
    first_axis, *others = axes
    draw_table(first_axis, table, flops)
    for axis, (row, layers) in zip(others, shown, strict=True):
        draw_mask(axis, row, f"layers {', '.join(layers)}" if len(layers) < 5 else f"{len(layers)} stretches of layers")
    figure.suptitle(title, fontsize=11)
    left = f"; {len(kinds) - len(shown)} more kinds of layers" if len(kinds) > len(shown) else ""
    note = "masks: rows query, columns are keys; orange: an image is seen, blue: text is seen, pale: its own weights, no attention"
    figure.supxlabel(note + left, fontsize=8, color="0.35")
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=110)
    plt.close(figure)
