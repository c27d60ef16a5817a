"""`samples.png`: a few questions with their images, answers and truths."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

from ..console import writing
from ..inputs.conversation import IMAGE
from ..inputs.images import open_image
from .scoring import Answered

matplotlib.use("Agg")


def draw_samples(samples: Sequence[Answered], max_pixels: int, path: Path) -> None:
    """A grid of image, question, answer and truth; right answers green, wrong ones red, others between."""
    from matplotlib import pyplot as plt

    columns = min(4, len(samples))
    rows = -(-len(samples) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.6 * columns, 3.7 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, one in zip(axes.flat, samples, strict=False):
        question = one.question
        pictures = [open_image(data, question.conversation.key, max_pixels) for data in question.images]
        for i, picture in enumerate(pictures):
            picture.thumbnail((400, 400))
            width = 1 / len(pictures)
            inset = axis.inset_axes((i * width, 0.34, width * 0.97, 0.66))
            inset.imshow(picture)
            inset.set(xticks=[], yticks=[])  # the frame stays: a white picture has no other
            inset.spines[:].set_color("lightgrey")
        prompt = question.prompt.replace(IMAGE, "").strip()
        truth = " | ".join(dict.fromkeys(question.truth.answers))
        lines = [*textwrap.wrap(prompt, 42)[:3], f"truth: {textwrap.shorten(printable(truth), 40)}"]
        common: dict[str, Any] = {
            "xycoords": "axes fraction",
            "textcoords": "offset points",
            "ha": "center",
            "va": "top",
        }
        common["parse_math"] = False  # a $ is a dollar
        axis.annotate("\n".join(map(printable, lines)), (0.5, 0.3), (0, 0), fontsize=9, **common)
        said = textwrap.shorten(printable(one.answer), 40) or "(nothing)"
        colour = "tab:green" if one.score >= 1 else "tab:red" if one.score <= 0 else "tab:orange"
        axis.annotate(said, (0.5, 0.3), (0, -12 * len(lines) - 4), fontsize=11, color=colour, weight="bold", **common)
    figure.tight_layout()
    with writing(path):
        figure.savefig(path, dpi=90)
    plt.close(figure)


def printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)
