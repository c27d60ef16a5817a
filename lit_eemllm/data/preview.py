"""Show a batch as the model gets it: what is supervised, which pixels, where documents and packs begin. HTML and PNG.

Everything is read back from the `PackedBatch`, not from the samples, so what is shown is what is trained.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, replace
from html import escape
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from lit_eemllm.console import PAGE_POLICY, write_atomically, writing
from lit_eemllm.data.module import ShardDataModule
from lit_eemllm.layout import PackedBatch

if TYPE_CHECKING:
    from lit_eemllm.config.keys import DataConfig
    from lit_eemllm.inputs.chat import ChatTemplate
    from lit_eemllm.inputs.images import Transform

TEXT, TARGET, VISUAL = "#dfe3ea", "#f6b26b", "#8fb8de"
DOCUMENTS_IN_PNG = 5
CONTEXT = 8
"""Tokens before a token with which it is decoded, so that pieces of words and of characters read right."""


@dataclass
class Piece:
    """A run of a document: a picture with its number of visual tokens, or text tokens, each with "is a target"."""

    picture: Image.Image | None
    tokens: list[tuple[str, bool]]
    length: int


@dataclass
class Document:
    key: str
    pieces: list[Piece]

    def count(self, kind: str) -> int:
        if kind == VISUAL:
            return sum(piece.length for piece in self.pieces if piece.picture)
        return sum(target == (kind == TARGET) for piece in self.pieces for _, target in piece.tokens)


def inspect(
    config: DataConfig,
    template: ChatTemplate,
    transform: Transform,
    out: Path,
    *,
    split: str = "train",
    packs: int = 2,
    seed: int = 0,
) -> list[Path]:
    """Write ``<split>.html`` (all of the first packs) and ``<split>.png`` (the beginning of each) into `out`.

    Args:
        config: section `data` of the configuration; `data.train` or `data.val` says what is shown.
        template, transform: as in training.
        out: folder, made if need be.
        split: "train" or "val".
        packs: how many, at least 1.
        seed: of the shuffling, as in training.

    Returns:
        The paths written. Raises UserError as training would.
    """
    module = ShardDataModule(replace(config, workers=0), seed)
    module.connect(template, transform)
    loader = module.train_dataloader() if split == "train" else module.val_dataloader()
    shown = [read_pack(batch, template.tokenizer, transform) for batch in islice(loader, packs)]
    html, picture = out / f"{split}.html", out / f"{split}.png"
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    write_atomically(html, to_html(shown, config.pack_tokens, f"{split} packs"))
    with writing(picture):
        to_png(shown, config.pack_tokens, f"{split} packs").save(picture)
    return [html, picture]


def read_pack(batch: PackedBatch, tokenizer: Any, transform: Transform) -> list[Document]:
    """Take a pack apart into documents of readable pieces."""
    text_rows = batch.layout.text_index.tolist()
    targets = {text_rows[row + 1] for row in batch.target_rows.tolist()}
    ids = batch.input_ids.tolist()
    images = [] if batch.pixel_values is None else list(batch.pixel_values)
    parts = [image.split(1) if runs > 1 else [image] for image, runs in zip(images, batch.image_runs, strict=True)]
    pictures = chain(*parts)  # where an image has several runs, each is a tile
    documents, row = [], 0
    for key, runs in zip(batch.keys, batch.layout.documents, strict=True):
        document = Document(key, [])
        for run in runs:
            rows = range(row, row + run.length)
            if run.visual:
                document.pieces.append(Piece(transform.picture(next(pictures)), [], run.length))
            else:
                texts = token_texts(tokenizer, [ids[i] for i in rows])
                tokens = [(text, i in targets) for text, i in zip(texts, rows, strict=True)]
                document.pieces.append(Piece(None, tokens, run.length))
            row += run.length
        documents.append(document)
    return documents


def token_texts(tokenizer: Any, ids: list[int]) -> list[str]:
    """What each token adds to the decoded text. Joined, they are the decoded text."""
    texts = []
    for i in range(len(ids)):
        window = ids[max(0, i - CONTEXT) : i + 1]
        before, after = tokenizer.decode(window[:-1]), tokenizer.decode(window)
        texts.append(after[len(before) :] if after.startswith(before) else tokenizer.decode(window[-1:]))
    return texts


def to_html(packs: list[list[Document]], budget: int, title: str) -> str:
    """One self-contained page. All text of the samples is escaped; there is no script."""
    body = []
    for number, documents in enumerate(packs):
        strip = "".join(
            f'<div class="doc" style="flex:{sum(p.length for p in d.pieces)}" title="{escape(d.key)}">'
            + "".join(f'<i style="flex:{n};background:{kind}"></i>' for kind, n in _stretches(d))
            + "</div>"
            for d in documents
        )
        free = budget - sum(p.length for d in documents for p in d.pieces)
        strip += f'<div class="free" style="flex:{max(free, 0)}"></div>'
        cards = "".join(_card(document) for document in documents)
        body.append(f'<section><h2>Pack {number}</h2><p class="note">{escape(_summary(documents, budget))}</p>'
                    f'<div class="strip">{strip}</div>{cards}</section>')  # fmt: skip
    legend = "".join(f'<span><b style="background:{c}"></b>{name}</span>' for c, name in _LEGEND)
    return _PAGE.format(
        policy=PAGE_POLICY,
        title=escape(title),
        legend=legend,
        body="\n".join(body),
        text=TEXT,
        target=TARGET,
        visual=VISUAL,
    )


def _card(document: Document) -> str:
    parts = []
    for piece in document.pieces:
        if piece.picture:
            file = io.BytesIO()
            piece.picture.save(file, "PNG")
            data = base64.b64encode(file.getvalue()).decode()
            parts.append(f'<figure><img src="data:image/png;base64,{data}" alt="">'
                         f"<figcaption>{piece.length} visual tokens</figcaption></figure>")  # fmt: skip
        for text, target in piece.tokens:
            shown = escape(text).replace("\n", "<em>⏎</em><br>") or "<em>·</em>"
            parts.append(f'<span class="{"target" if target else "token"}">{shown}</span>')
    return (f'<article><h3>{escape(document.key)}</h3><p class="note">{_counts(document)}</p>'
            f'<div class="prompt">{"".join(parts)}</div></article>')  # fmt: skip


def _counts(document: Document) -> str:
    visual, target, text = (document.count(kind) for kind in (VISUAL, TARGET, TEXT))
    return f"{visual + target + text} tokens: {visual} visual, {text} text, {target} supervised"


def _summary(documents: list[Document], budget: int) -> str:
    visual, target, text = (sum(d.count(kind) for d in documents) for kind in (VISUAL, TARGET, TEXT))
    total = visual + target + text
    return (f"{len(documents)} documents, {total:,} of {budget:,} tokens ({total / budget:.1%}): "
            f"{visual:,} visual, {text:,} text, {target:,} supervised")  # fmt: skip


def _stretches(document: Document) -> list[tuple[str, int]]:
    """Colours of a document from left to right with their lengths."""
    stretches: list[tuple[str, int]] = []
    for piece in document.pieces:
        kinds = [VISUAL] * piece.length if piece.picture else [TARGET if target else TEXT for _, target in piece.tokens]
        for kind in kinds:
            if stretches and stretches[-1][0] == kind:
                stretches[-1] = kind, stretches[-1][1] + 1
            else:
                stretches.append((kind, 1))
    return stretches


def to_png(packs: list[list[Document]], budget: int, title: str, width: int = 1200) -> Image.Image:
    """The beginning of each pack as a picture; the same colours as the page."""
    page = _Page(width)
    page.line(title, 26)
    page.legend()
    for number, documents in enumerate(packs):
        page.gap(18)
        page.line(f"Pack {number}", 21)
        page.line(_summary(documents, budget), 14, "#667")
        page.strip(documents, budget)
        for document in documents[:DOCUMENTS_IN_PNG]:
            page.document(document)
        if len(documents) > DOCUMENTS_IN_PNG:
            page.line(f"… and {len(documents) - DOCUMENTS_IN_PNG} more documents", 14, "#667")
    return page.image.crop((0, 0, width, page.y + 24))


class _Page:
    """A sheet of paper that is written from top to bottom."""

    margin = 32
    thumbnail = 112

    def __init__(self, width: int) -> None:
        self.image = Image.new("RGB", (width, 2000), "white")
        self.draw = ImageDraw.Draw(self.image)
        self.width, self.y = width, 24

    def gap(self, height: int) -> None:
        """Move down; a longer sheet if need be."""
        self.y += height
        if self.y > self.image.height - 800:
            longer = Image.new("RGB", (self.width, self.image.height * 2), "white")
            longer.paste(self.image)
            self.image, self.draw = longer, ImageDraw.Draw(longer)

    def line(self, text: str, size: int, colour: str = "#223") -> None:
        self.draw.text((self.margin, self.y), text, colour, _font(size))
        self.gap(int(size * 1.5))

    def legend(self) -> None:
        x = self.margin
        for colour, name in _LEGEND:
            self.draw.rounded_rectangle((x, self.y + 2, x + 14, self.y + 16), 3, colour)
            self.draw.text((x + 20, self.y), name, "#445", _font(14))
            x += 44 + int(_font(14).getlength(name))
        self.gap(24)

    def strip(self, documents: list[Document], budget: int) -> None:
        """The pack drawn to scale, a gap between documents."""
        left, scale = float(self.margin), (self.width - 2 * self.margin) / max(budget, 1)
        self.draw.rectangle((left, self.y, self.width - self.margin, self.y + 22), "#fafbfc", "#e3e6ec")
        for document in documents:
            for colour, length in _stretches(document):
                self.draw.rectangle((left, self.y, left + length * scale, self.y + 22), colour)
                left += length * scale
            self.draw.line((left, self.y - 3, left, self.y + 25), "#223", 1)
        self.gap(40)

    def document(self, document: Document) -> None:
        """A card: pictures and text flow from left to right, bottoms aligned; a line break shows as a sign."""
        top = self.y
        self.gap(10)
        left, right, font, small = self.margin + 14, self.width - self.margin - 14, _font(15), _font(12)
        self.draw.text((left, self.y), document.key, "#223", _font(14))
        self.gap(20)
        self.draw.text((left, self.y), _counts(document), "#667", small)
        self.gap(24)
        row: list[tuple[Image.Image | str, str, int]] = []  # what, its colour, its width

        def flush() -> None:
            height = max((item[0].height + 18 for item in row if not isinstance(item[0], str)), default=20)
            x = left
            for item, colour, width in row:
                if isinstance(item, str):
                    self.draw.rounded_rectangle((x, self.y + height - 20, x + width, self.y + height), 2, colour)
                    self.draw.text((x, self.y + height - 20), item, "#223", font)
                else:
                    self.image.paste(item, (x, self.y))
                    self.draw.text((x, self.y + item.height + 2), colour, "#36679a", small)
                x += width + 1
            row.clear()
            self.gap(height + 4)

        def put(item: Image.Image | str, colour: str, width: int) -> None:
            if row and left + sum(w + 1 for *_, w in row) + width > right:
                flush()
            row.append((item, colour, width))

        for piece in document.pieces:
            if piece.picture:
                picture = piece.picture.copy()
                picture.thumbnail((self.thumbnail, self.thumbnail))
                caption = f"{piece.length} visual tokens"
                put(picture, caption, max(picture.width, int(small.getlength(caption))) + 8)
            for text, target in piece.tokens:
                shown = text.replace("\n", "⏎")
                put(shown, TARGET if target else "#f2f4f7", int(font.getlength(shown)))
                if "\n" in text and all(isinstance(item, str) for item, *_ in row):  # beside a picture there is room
                    flush()
        flush()
        self.gap(10)
        self.draw.rounded_rectangle((self.margin, top, self.width - self.margin, self.y - 4), 8, outline="#cfd5df")
        self.gap(8)


def _font(size: int) -> Any:
    """DejaVu Sans, which knows most alphabets."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


_LEGEND = ((TARGET, "supervised: the model learns to say it"), (TEXT, "text, read only"), (VISUAL, "visual tokens"))
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta http-equiv="Content-Security-Policy" content="{policy}">
<style>
body {{ font: 15px/1.55 system-ui, sans-serif; color: #223; max-width: 1100px; margin: 2em auto; padding: 0 1em }}
h1 {{ font-size: 1.5em; margin: 0 }} h2 {{ margin: 0 }} section {{ border-left: 4px solid #223; padding-left: 1.2em; margin: 2.4em 0 }} h3 {{ font-size: .95em; margin: 0; overflow-wrap: anywhere }}
.note {{ color: #667; font-size: .85em; margin: .1em 0 .6em }}
.legend span {{ margin-right: 1.4em; font-size: .85em; color: #445 }}
.legend b {{ display: inline-block; width: 1em; height: 1em; border-radius: 3px; margin-right: .4em; vertical-align: -.15em }}
.strip {{ display: flex; height: 22px; border: 1px solid #e3e6ec; margin-bottom: 1em; overflow: hidden }}
.strip .doc {{ display: flex; border-right: 2px solid #223; min-width: 0 }} .strip i {{ min-width: 0 }} .free {{ background: #fafbfc }}
article {{ border: 1px solid #cfd5df; border-radius: 8px; padding: .8em 1em; margin: .8em 0 }}
.prompt {{ overflow-wrap: anywhere; white-space: pre-wrap }}
.token, .target {{ border-radius: 3px; background: #f2f4f7; box-shadow: inset -1px 0 #fff }} .target {{ background: {target} }}
em {{ color: #99a; font-style: normal }}
figure {{ margin: .3em 0 .5em }} figure img {{ display: block; max-width: 280px; border-bottom: 4px solid {visual} }}
figcaption {{ color: #36679a; font-size: .8em }}
</style></head><body><h1>{title}</h1><p class="legend">{legend}</p>
{body}
</body></html>
"""
