"""Draw docs/mechanism.png: what a visual token does in a decoder layer, under self-attention and under EE-MLLM.

    python tools/draw_mechanism.py [OUT.png]

The masks are those the code uses (`SequenceLayout.mask`), for two documents packed together.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from lit_eemllm.layout import Run, SequenceLayout, Visibility

TEXT, VISUAL, SELF, EMPTY = "#3b6ea5", "#e08e45", "#f3d2b3", "#f2f2f2"
LAYOUT = SequenceLayout.of([[Run(False, 2), Run(True, 5), Run(False, 3)], [Run(True, 3), Run(False, 2)]])


def draw_mask(axis: plt.Axes, dense: bool, title: str) -> None:
    """Rows are queries, columns keys; a composite layer has no visual query, its aligner is drawn on the diagonal."""
    visual = set(LAYOUT.visual_index.tolist())
    mask = LAYOUT.mask(Visibility(visual_queries=dense))
    rows = range(LAYOUT.num_tokens) if dense else LAYOUT.text_index.tolist()
    for s in range(LAYOUT.num_tokens):
        for k in range(LAYOUT.num_tokens):
            colour = EMPTY
            if s in rows and mask[list(rows).index(s), k]:
                colour = VISUAL if k in visual else TEXT
            elif s == k:
                colour = SELF
            axis.add_patch(plt.Rectangle((k, s), 0.92, 0.92, color=colour))
    for s in range(LAYOUT.num_tokens):
        mark, colour = ("V", VISUAL) if s in visual else ("t", TEXT)
        axis.text(-0.5, s + 0.5, mark, ha="center", va="center", color=colour, fontsize=9)
        axis.text(s + 0.46, -0.5, mark, ha="center", va="center", color=colour, fontsize=9)
    axis.set(xlim=(-1, LAYOUT.num_tokens), ylim=(LAYOUT.num_tokens, -1), aspect="equal", title=title)
    axis.axis("off")


def draw_layer(axis: plt.Axes) -> None:
    """The data flow of one EE-MLLM layer."""

    def box(x: float, y: float, text: str, colour: str, width: float = 2.7) -> None:
        axis.add_patch(
            FancyBboxPatch((x - width / 2, y - 0.32), width, 0.64, boxstyle="round,pad=0.06", fc=colour, ec="none")
        )
        axis.text(x, y, text, ha="center", va="center", fontsize=9, color="white" if colour != SELF else "black")

    def arrow(*points: float) -> None:
        x0, y0, x1, y1 = points
        axis.add_patch(FancyArrowPatch((x0, y0), (x1, y1), arrowstyle="-|>", mutation_scale=11, color="0.35"))

    for x, colour, name in ((1.6, VISUAL, "visual states"), (5.4, TEXT, "text states")):
        box(x, 0, name, colour)
        arrow(x, 0.4, x, 0.95)
    box(1.6, 1.35, "keys, values", VISUAL)
    box(5.4, 1.35, "queries, keys, values", TEXT, 3.1)
    arrow(5.4, 1.75, 5.4, 2.35)
    arrow(3.05, 1.45, 4.2, 2.5)
    box(5.4, 2.75, "attention over [V; t]", TEXT, 3.1)
    arrow(1.6, 1.75, 1.6, 2.35)
    box(1.6, 2.75, "value (aligner)", SELF)
    for x in (1.6, 5.4):
        arrow(x, 3.15, x, 3.75)
        arrow(x, 4.55, x, 5.15)
        arrow(x, 5.95, x, 6.5)
    axis.add_patch(FancyBboxPatch((0.2, 3.8), 6.8, 0.7, boxstyle="round,pad=0.05", fc="0.35", ec="none"))
    axis.text(
        3.6,
        4.15,
        "output projection: one product for both, the layer's own weights",
        ha="center",
        va="center",
        color="w",
        fontsize=8,
    )
    axis.add_patch(FancyBboxPatch((0.2, 5.2), 6.8, 0.7, boxstyle="round,pad=0.05", fc="0.35", ec="none"))
    axis.text(3.6, 5.55, "feed-forward network: likewise", ha="center", va="center", color="w", fontsize=8)
    box(1.6, 6.9, "visual states", VISUAL)
    box(5.4, 6.9, "text states", TEXT)
    axis.set(xlim=(-0.2, 7.4), ylim=(7.5, -0.6), title="one EE-MLLM layer")
    axis.axis("off")


def main(out: Path) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(14, 5), width_ratios=(1, 1, 0.95))
    draw_mask(axes[0], True, "llava: every token queries")
    draw_mask(axes[1], False, "ee_mllm: only text queries")
    draw_layer(axes[2])
    note = "rows: queries   columns: keys   orange: an image is seen   blue: text is seen   pale: the aligner, no attention"
    figure.text(0.33, 0.02, note, ha="center", fontsize=9, color="0.3")
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(out, dpi=100)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("docs/mechanism.png"))
