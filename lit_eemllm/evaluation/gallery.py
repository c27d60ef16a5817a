"""`gallery.html`, the worst and the best answers of every set and type, and `samples.html`, what a model said of a few while it was
trained: questions with their images, on one page without scripts."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from pathlib import Path

from PIL import Image

from ..console import PAGE_POLICY, write_atomically
from ..inputs.conversation import IMAGE
from ..inputs.images import open_image
from .questions import Picture
from .scoring import Answered, by

CASES = 200  # shown at most, shared out among the types
EACH = 6  # of the worst, and of the best, answers of a type at most
SIDE = 220  # pixels of a thumbnail
LONGEST = 600  # characters of a text
CHANGES = 30  # answers to one question at most, the newest


@dataclass(frozen=True)
class Past:
    """What a model said in a step of its training to the question of that key, and the score of it."""

    step: int
    key: str
    answer: str
    score: float


def write_gallery(answered: Sequence[Answered], title: str, max_pixels: int, path: Path) -> None:
    """A page that needs no other file. What comes from data and model is escaped, and bounded in length and size."""
    groups = by(answered, lambda one: f"{one.set} / {one.question.type}" if one.question.conversation.type else one.set)
    each = max(1, min(EACH, CASES // (2 * len(groups))))
    sections = []
    for name, mine in sorted(groups.items()):
        worst, best = extremes(mine, each)
        parts = [f"<h3>{word}</h3>" + "".join(card(one, answers(one), max_pixels) for one in some)
                 for word, some in (("worst", worst), ("best", best)) if some]  # fmt: skip
        mean = sum(one.score for one in mine) / len(mine)
        note = f"{len(mine):,} questions, {escape(mine[0].question.metric or '')}, mean score of an answer {mean:.3f}"
        sections.append(f'<section><h2>{escape(name)}</h2><p class="note">{note}</p>{"".join(parts)}</section>')
    _write_page(title, "\n".join(sections), path)


def write_history(shown: Sequence[Answered], past: Sequence[Past], title: str, max_pixels: int, path: Path) -> None:
    """A page likewise: to each question the answers of all steps, the newest first, equal ones after each other as one."""
    cards = []
    for one in shown:
        mine = [each for each in past if each.key == one.question.conversation.key]
        runs = [list(same) for _, same in groupby(mine, lambda each: (each.answer, each.score))]
        lines = [answer_line(same[0].answer, same[0].score, steps(same)) for same in runs[: -CHANGES - 1 : -1]]
        cards.append(card(one, lines, max_pixels))
    _write_page(title, "\n".join(cards), path)


def steps(same: Sequence[Past]) -> str:
    first, last = same[0].step, same[-1].step
    return f"step {first:,}" if first == last else f"steps {first:,} – {last:,}"


def _write_page(title: str, body: str, path: Path) -> None:
    page = _PAGE.format(policy=PAGE_POLICY, title=escape(title), body=body)
    write_atomically(path, page.encode("ascii", "xmlcharrefreplace"))  # UTF-8 has no lone surrogates, an answer may


def extremes(answered: Sequence[Answered], each: int) -> tuple[list[Answered], list[Answered]]:
    """The lowest and the highest scores, as they come among equal ones; nothing twice, and nothing fully right among the worst."""
    order = sorted(answered, key=lambda one: one.score)
    worst = [one for one in order[:each] if one.score < 1]
    best = sorted(order[len(worst) :], key=lambda one: -one.score)
    return worst, [one for one in best[:each] if one.score > 0]


def answer_line(answer: str, score: float, note: str) -> str:
    right = "right" if score >= 1 else "wrong" if score <= 0 else "partly"
    return f'<p class="{right}">{shown(answer)}<b>{note}</b></p>'


def answers(one: Answered) -> list[str]:
    """The answer with its score, and those with other images."""
    others = [f'<p class="other"><i>with other images</i> {shown(other)}</p>' for other in one.others[:3]]
    return [answer_line(one.answer, one.score, f"{one.score:.2f}"), *others]


def card(one: Answered, answers: Sequence[str], max_pixels: int) -> str:
    """A question with its images, the truth and what was answered."""
    question = one.question
    pictures = "".join(thumbnail(picture, max_pixels) for picture in question.pictures[:4])
    asked = question.prompt.replace(IMAGE, "").strip()
    truths = " | ".join(dict.fromkeys(question.truth.answers))
    lines = [f'<p class="asked">{shown(asked)}</p>', f"<p><i>truth</i> {shown(truths)}</p>", *answers]
    return f'<article>{pictures}<div>{"".join(lines)}<p class="note">{shown(question.conversation.key)}</p></div></article>'


def shown(text: str) -> str:
    """Escaped, not too long, and visible if it is empty."""
    cut = text if len(text) <= LONGEST else f"{text[:LONGEST]} …"
    return escape(cut) if cut.strip() else "<em>nothing</em>"


def thumbnail(picture: Picture, max_pixels: int) -> str:
    image = open_image(picture.read(), picture.name, max_pixels)
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "PNG" if max(picture.size) <= SIDE else "JPEG", quality=85)
    kind = "png" if max(picture.size) <= SIDE else "jpeg"
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img src="data:image/{kind};base64,{data}" alt="" title="{escape(picture.name)}">'


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta http-equiv="Content-Security-Policy" content="{policy}">
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #223; max-width: 1100px; margin: 2em auto; padding: 0 1em }}
h1 {{ font-size: 1.5em; margin: 0 }} h2 {{ margin: 1.6em 0 0 }} h3 {{ font-size: .95em; margin: 1em 0 .2em }}
p {{ margin: .15em 0; overflow-wrap: anywhere; white-space: pre-wrap }}
article {{ display: inline-flex; vertical-align: top; gap: .8em; width: 350px; box-sizing: border-box; border: 1px solid #cfd5df; border-radius: 8px;
  padding: .7em; margin: .3em .3em .3em 0; flex-wrap: wrap }}
article div {{ flex: 1 1 180px }}
img {{ max-width: 100%; min-width: 96px; align-self: flex-start; border: 1px solid #e3e6ec; border-radius: 4px }}
.note, .other, i, em {{ color: #667; font-size: .85em }} i {{ font-style: normal }}
.right, .partly, .wrong {{ font-weight: 600; border-left: 4px solid; padding-left: .5em }} b {{ float: right; font-weight: 400 }}
.right {{ color: #1a7f37 }} .partly {{ color: #9a6700 }} .wrong {{ color: #c1121f }}
</style></head><body><h1>{title}</h1>
{body}
</body></html>
"""
