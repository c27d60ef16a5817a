"""Shapes: a small procedural visual question answering set, made on the spot and the same everywhere.

Pictures are 64 x 64 pixels and of three kinds: coloured shapes on a 4 x 4 grid, bar charts with four bars, and one
short word. Questions are of the types in ``TYPES``; ``compare`` shows two pictures, and a few training rows have none.

What the numbers of a model on this set can and cannot mean:

* Within a type, every answer is equally frequent, for each wording as well, and is independent of what the question
  names. So the best constant answer, and any model that does not see the right picture, scores 1/K (``ANSWERS``).
* In validation, the lazy strategy of naming something that is merely present stays below 1/K + 0.15 for ``colour`` and
  ``shape`` (3 to 6 objects of distinct colours and shapes: 0.24 against 1/6), ``chart`` (four bars of distinct colours:
  0.25 against 1/6) and ``position`` (an object in every quadrant: 1/4, the same as guessing). ``count``, ``word`` and
  ``compare`` ask for the picture as a whole: one who sees it need not read more of the question than its type.
* Training scenes may hold fewer objects than validation scenes, down to a single one: without easy questions, learning
  to look things up starts many times later. They may also have further turns about other objects of the picture.
* A scene is in the validation split if and only if the first byte of the SHA-256 of its *content* is divisible by ten.
  The content leaves out sizes, shifts of a few pixels, shades and the background, so a validation scene is never a
  training scene moved by a pixel, and anything trained on ``is_val(scene) == False`` has never seen a validation scene.
* Every answer is one word, and one token of a vocabulary that knows the set: models of this size learn the second token
  of an answer like "top left" much later than the first, hence the compass.
* Objects sit inside the cells of a 16-pixel grid and there is no noise: a test of plumbing and learning, not of vision.

Use it from Python (``rows``), or write LLaVA-style JSON files and a folder of images::

    python data_recipes/shapes.py --out DIR --train 32000 --val 7000
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import io
import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

SIZE = 64  # pixels, both ways
GRID = 4  # cells, both ways
CELL = SIZE // GRID
STEP = 8  # pixels between the places of a word
BAR_UNIT = 7  # pixels per unit of a bar's height
BAR_HEIGHTS = range(1, 9)
WORD_SCALES = (2, 3)  # pixels per dot of a 5 x 7 letter

COLOURS = {
    "red": (214, 40, 40),
    "green": (40, 150, 60),
    "blue": (40, 80, 210),
    "yellow": (240, 205, 30),
    "purple": (140, 50, 170),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
QUADRANTS = ("northwest", "northeast", "southwest", "southeast")
WORDS = ("CAT", "DOG", "SUN", "CAR", "HAT", "BUS", "CUP", "KEY", "BOX", "MAP", "PEN", "FOX")
COUNTS = ("1", "2", "3", "4", "5", "6")
BACKGROUNDS = ((255, 255, 255), (238, 238, 232), (226, 234, 242), (244, 232, 224))
SHADES = (-14, 0, 14)  # added to each channel of a colour

TEMPLATES: dict[str, tuple[str, ...]] = {
    "colour": (
        "What colour is the {shape}?",
        "Which colour does the {shape} have?",
        "Name the colour of the {shape}.",
        "The {shape} is painted in which colour?",
        "Look at the {shape}: what is its colour?",
    ),
    "shape": (
        "What shape is the {colour} object?",
        "Which shape does the {colour} thing have?",
        "Name the shape that is {colour}.",
        "What is the {colour} figure?",
        "Look at the {colour} object: what shape is it?",
    ),
    "position": (
        "Where, as on a map, is the {colour} {shape}?",
        "In which compass direction from the centre is the {colour} {shape}?",
        "Towards which corner, as on a map, is the {colour} {shape}?",
        "If the top is north, where do I find the {colour} {shape}?",
    ),
    "count": (
        "How many objects are there?",
        "Count the shapes.",
        "What is the number of things in the picture?",
        "How many figures does the picture show?",
    ),
    "chart": (
        "Which bar is the tallest?",
        "What colour is the highest bar of the chart?",
        "Which colour has the largest value?",
        "Which bar is the shortest?",
        "What colour is the lowest bar of the chart?",
        "Which colour has the smallest value?",
    ),
    "word": (
        "What does the sign say?",
        "Which word is written here?",
        "Read the word in the picture.",
        "What is the text of this picture?",
    ),
    "compare": (
        "Which picture shows more objects, the first or the second?",
        "Are there more shapes in the first or in the second picture?",
        "One picture has more figures: the first or the second?",
        "Name the picture with the larger number of objects, first or second.",
    ),
    "text": (
        "What is {a} plus {b}?",
        "Add {a} and {b}.",
        "How much is the sum of {a} and {b}?",
        "{a} and {b} together make how many?",
    ),
}
ANSWERS: dict[str, tuple[str, ...]] = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "position": QUADRANTS,
    "count": COUNTS,
    "chart": tuple(COLOURS),
    "word": WORDS,
    "compare": ("first", "second"),
    "text": tuple(str(n) for n in range(2, 10)),
}
TYPES = ("colour", "shape", "position", "count", "chart", "word", "compare")  # those with pictures
FURTHER_TURNS = 3  # at most, in training rows that ask about one object among several
TEXT_EVERY = 25  # one training row in so many is text only; validation has none: a shuffled picture means nothing there

# Letters as seven rows of five dots, two hexadecimal digits a row, for the letters of WORDS.
_GLYPHS = {
    "A": "0e11111f111111", "B": "1e11111e11111e", "C": "0e11101010110e", "D": "1e11111111111e", "E": "1f10101e10101f",
    "F": "1f10101e101010", "G": "0e11101711110e", "H": "1111111f111111", "K": "11121418141211", "M": "111b1515111111",
    "N": "11191513111111", "O": "0e11111111110e", "P": "1e11111e101010", "R": "1e11111e141211", "S": "0f10100e01011e",
    "T": "1f040404040404", "U": "1111111111110e", "X": "11110a040a1111", "Y": "11110a04040404",
}  # fmt: skip

# A scene is plain data: {"kind": "objects" | "bars" | "word", "background": index, "items": [...]}. Items are
#   objects: (cell, colour, shape, size, dx, dy, shade), sorted by cell = 4 * row + column; pixels from the cell's corner
#   bars:    (colour, height in units, width, dx, shade), left to right
#   word:    one item (word, colour, scale, column, row, dx, dy, shade); columns and rows of 8 pixels, shifts of 0 to 3
Scene = dict[str, Any]


def content(scene: Scene) -> str:
    """What the scene shows, as canonical text, without sizes, small shifts, shades and the background."""
    if scene["kind"] == "objects":
        shown = [item[:3] for item in scene["items"]]
    elif scene["kind"] == "bars":
        shown = [item[:2] for item in scene["items"]]
    else:
        shown = [item[:5] for item in scene["items"]]
    return json.dumps([scene["kind"], shown], separators=(",", ":"))


def is_val(scene: Scene) -> bool:
    """Whether the scene belongs to the validation split (one in ten does)."""
    return hashlib.sha256(content(scene).encode()).digest()[0] % 10 == 0


# ---------------------------------------------------------------- drawing


@functools.cache
def _word_mask(word: str, scale: int) -> Image.Image:
    mask = Image.new("L", (6 * len(word) - 1, 7))
    for index, letter in enumerate(word):
        for y, bits in enumerate(bytes.fromhex(_GLYPHS[letter])):
            for x in range(5):
                if bits >> (4 - x) & 1:
                    mask.putpixel((6 * index + x, y), 255)
    return mask.resize((mask.width * scale, mask.height * scale), Image.Resampling.NEAREST)


def word_box(item: tuple[Any, ...]) -> tuple[int, int, int, int]:
    """Left, top, right and bottom (exclusive) of a word's item, in pixels."""
    word, _, scale, column, row, dx, dy, _ = item
    left, top = STEP * column + dx, STEP * row + dy
    return left, top, left + scale * (6 * len(word) - 1), top + scale * 7


def _draw_shape(draw: ImageDraw.ImageDraw, shape: str, x: int, y: int, size: int, ink: int) -> None:
    """Draw `shape` filling the square of `size` pixels whose corner is (x, y); palette index 0 is the background."""
    right, bottom, half = x + size - 1, y + size - 1, (size - 1) / 2
    if shape == "circle":
        draw.ellipse((x, y, right, bottom), fill=ink)
    elif shape == "square":
        draw.rectangle((x, y, right, bottom), fill=ink)
    elif shape == "triangle":
        draw.polygon(((x, bottom), (right, bottom), (x + half, y)), fill=ink)
    elif shape == "diamond":
        draw.polygon(((x + half, y), (right, y + half), (x + half, bottom), (x, y + half)), fill=ink)
    elif shape == "cross":
        third = size // 3
        draw.rectangle((x + third, y, right - third, bottom), fill=ink)
        draw.rectangle((x, y + third, right, bottom - third), fill=ink)
    else:
        draw.ellipse((x, y, right, bottom), fill=ink)
        draw.ellipse((x + 3, y + 3, right - 3, bottom - 3), fill=0)


def render(scene: Scene) -> Image.Image:
    """The picture of a scene: 64 x 64, palette mode (one entry per object, so the PNG is a few hundred bytes)."""
    image = Image.new("P", (SIZE, SIZE), 0)
    draw = ImageDraw.Draw(image)
    palette = list(BACKGROUNDS[scene["background"]])
    for ink, item in enumerate(scene["items"], start=1):
        if scene["kind"] == "objects":
            cell, colour, shape, size, dx, dy, shade = item
            row, column = divmod(cell, GRID)
            _draw_shape(draw, shape, column * CELL + dx, row * CELL + dy, size, ink)
        elif scene["kind"] == "bars":
            colour, height, width, dx, shade = item
            left = (ink - 1) * CELL + dx
            draw.rectangle((left, SIZE - 2 - BAR_UNIT * height, left + width - 1, SIZE - 3), fill=ink)
        else:
            colour, shade = item[1], item[-1]
            image.paste(ink, word_box(item), _word_mask(item[0], item[2]))
        palette += [min(255, max(0, channel + SHADES[shade])) for channel in COLOURS[colour]]
    if scene["kind"] == "bars":  # the axis
        palette += [90, 90, 90]
        draw.line((0, SIZE - 2, SIZE - 1, SIZE - 2), fill=len(scene["items"]) + 1)
    image.putpalette(palette)
    return image


def quadrant(cell: int) -> str:
    row, column = divmod(cell, GRID)
    return QUADRANTS[2 * (row // 2) + column // 2]


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


# ---------------------------------------------------------------- scenes


def _objects(rng: random.Random, placed: Sequence[tuple[int, str, str]]) -> Scene:
    """A scene of (cell, colour, shape) with random sizes, shifts and shades."""
    items = []
    for cell, colour, shape in sorted(placed):
        size = rng.randint(11, 15)
        dx, dy = rng.randint(0, CELL - size), rng.randint(0, CELL - size)
        items.append((cell, colour, shape, size, dx, dy, rng.randrange(len(SHADES))))
    return {"kind": "objects", "background": rng.randrange(len(BACKGROUNDS)), "items": items}


def _first_then_others(rng: random.Random, first: str, values: Sequence[str], count: int) -> list[str]:
    """`count` distinct values, the given one first."""
    return [first, *rng.sample([value for value in values if value != first], count - 1)]


def _distinct_objects(rng: random.Random, colour: str, shape: str, sparse: bool) -> Scene:
    """3 (sparse: 1) to 6 objects, no two of the same colour or shape, one of them as given."""
    count = rng.randint(1 if sparse else 3, 6)
    colours = _first_then_others(rng, colour, tuple(COLOURS), count)
    shapes = _first_then_others(rng, shape, SHAPES, count)
    return _objects(rng, list(zip(rng.sample(range(GRID * GRID), count), colours, shapes, strict=True)))


def _quadrant_objects(rng: random.Random, colour: str, shape: str, quadrant: int, sparse: bool) -> Scene:
    """As `_distinct_objects`, with the given one in the given quadrant and some in each (sparse: some) of the others."""
    others = rng.sample([q for q in range(4) if q != quadrant], rng.randint(0, 3) if sparse else 3)
    quadrants = [quadrant, *others]
    cells = []
    for q in quadrants:
        row, column = 2 * (q // 2) + rng.randrange(2), 2 * (q % 2) + rng.randrange(2)
        cells.append(GRID * row + column)
    cells += rng.sample([cell for cell in range(GRID * GRID) if cell not in cells], rng.randint(0, 2))
    colours = _first_then_others(rng, colour, tuple(COLOURS), len(cells))
    shapes = _first_then_others(rng, shape, SHAPES, len(cells))
    return _objects(rng, list(zip(cells, colours, shapes, strict=True)))


def _any_objects(rng: random.Random, count: int) -> Scene:
    cells = rng.sample(range(GRID * GRID), count)
    return _objects(rng, [(cell, rng.choice(tuple(COLOURS)), rng.choice(SHAPES)) for cell in cells])


def _bars(rng: random.Random, colour: str, tallest: bool) -> Scene:
    """Four bars of distinct colours and heights; the given colour is the tallest (or the shortest)."""
    heights = sorted(rng.sample(BAR_HEIGHTS, GRID), reverse=tallest)
    bars = list(zip(_first_then_others(rng, colour, tuple(COLOURS), GRID), heights, strict=True))
    rng.shuffle(bars)
    items = []
    for bar in bars:
        width = rng.randint(9, 14)
        items.append((*bar, width, rng.randint(0, CELL - width), rng.randrange(len(SHADES))))
    return {"kind": "bars", "background": rng.randrange(len(BACKGROUNDS)), "items": items}


def _word(rng: random.Random, word: str) -> Scene:
    scale = rng.choice(WORD_SCALES)
    mask = _word_mask(word, scale)
    column, row = rng.randint(0, (SIZE - 3 - mask.width) // STEP), rng.randint(0, (SIZE - 3 - mask.height) // STEP)
    shifts = rng.randint(0, 3), rng.randint(0, 3)
    item = (word, rng.choice(tuple(COLOURS)), scale, column, row, *shifts, rng.randrange(len(SHADES)))
    return {"kind": "word", "background": rng.randrange(len(BACKGROUNDS)), "items": [item]}


def scenes(
    kind: str, wording: int, answer: str, slots: dict[str, str], rng: random.Random, sparse: bool
) -> list[Scene]:
    """The scenes of one question of type `kind` whose answer is `answer`; the text fixes the rest through `slots`.

    `sparse` lets them be emptier than the rest of the set: some easy questions start the learning.
    """
    if kind == "colour":
        return [_distinct_objects(rng, answer, slots["shape"], sparse)]
    if kind == "shape":
        return [_distinct_objects(rng, slots["colour"], answer, sparse)]
    if kind == "position":
        return [_quadrant_objects(rng, slots["colour"], slots["shape"], QUADRANTS.index(answer), sparse)]
    if kind == "count":
        return [_any_objects(rng, int(answer))]
    if kind == "chart":
        return [_bars(rng, answer, tallest=wording < len(TEMPLATES["chart"]) // 2)]
    if kind == "word":
        return [_word(rng, answer)]
    if kind == "compare":
        fewer, more = rng.choice([(few, many) for few in range(1, 7) for many in range(few + 2, 9)])
        counts = (more, fewer) if answer == "first" else (fewer, more)
        return [_any_objects(rng, count) for count in counts]
    return []


# ---------------------------------------------------------------- rows


@functools.lru_cache(maxsize=256)
def _block(kind: str, wordings: int, answers: tuple[str, ...], seed: str, block: int) -> list[tuple[int, str]]:
    """All pairs of wording and answer of a type, in the random order of the `block`-th time through them."""
    pairs = [(wording, answer) for wording in range(wordings) for answer in answers]
    random.Random(f"{seed}:{kind}:{block}").shuffle(pairs)
    return pairs


def nth_pair(kind: str, wordings: int, answers: tuple[str, ...], seed: str, nth: int) -> tuple[int, str]:
    """Number of the wording, and the answer, of the `nth` question of a type: each pair once before any comes again."""
    block, place = divmod(nth, wordings * len(answers))
    return _block(kind, wordings, answers, seed, block)[place]


def llava_row(name: str, kind: str, pictures: int, turns: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """A row in LLaVA's form; its turns are pairs of question and answer."""
    row: dict[str, Any] = {"id": name, "type": kind}
    if pictures:
        row["image"] = f"{name}.png" if pictures == 1 else [f"{name}-{number}.png" for number in range(pictures)]
    row["conversations"] = [
        {"from": speaker, "value": value}
        for turn in turns
        for speaker, value in zip(("human", "gpt"), turn, strict=True)
    ]
    return row


def _further_turns(scene: Scene, slots: dict[str, str], answer: str, rng: random.Random) -> list[tuple[str, str]]:
    """Questions and answers about up to three other objects of the scene: none tells the answer to another."""
    asked = {answer, *slots.values()}
    others = [item for item in scene["items"] if not (item[1] in asked and item[2] in asked)]
    turns = []
    for cell, colour, shape, *_ in rng.sample(others, min(FURTHER_TURNS, len(others))):
        kind = rng.choice(("colour", "shape", "position"))
        question = rng.choice(TEMPLATES[kind]).format(colour=colour, shape=shape)
        turns.append((question, {"colour": colour, "shape": shape, "position": quadrant(cell)}[kind]))
    return turns


def _row(kind: str, index: int, nth: int, split: str, seed: int) -> tuple[dict[str, Any], list[Scene]]:
    """The `nth` question of its type: a LLaVA-style row and its scenes."""
    wording, answer = nth_pair(kind, len(TEMPLATES[kind]), ANSWERS[kind], f"{seed}:{split}", nth)
    rng = random.Random(f"{seed}:{split}:{index}")
    slots = {"colour": rng.choice(tuple(COLOURS)), "shape": rng.choice(SHAPES)}
    if kind == "text":
        first = rng.randint(1, int(answer) - 1)
        slots = {"a": str(first), "b": str(int(answer) - first)}
    while True:  # one draw in ten is a validation scene
        shown = scenes(kind, wording, answer, slots, rng, sparse=split == "train")
        if all(is_val(scene) == (split == "val") for scene in shown):
            break
    question = "<image>\n" * len(shown) + TEMPLATES[kind][wording].format(**slots)
    turns = [(question, answer)]
    if split == "train" and kind in ("colour", "shape", "position"):
        turns += _further_turns(shown[0], slots, answer, rng)
    return llava_row(f"{split}-{index:06d}", kind, len(shown), turns), shown


def rows_and_scenes(
    split: str, count: int, seed: int = 0, types: Sequence[str] = TYPES
) -> Iterator[tuple[dict[str, Any], list[Scene]]]:
    """The first `count` rows of a split, each with its scenes not yet drawn. See `rows`."""
    if split not in ("train", "val"):
        raise ValueError(f"split is {split!r}, expected 'train' or 'val'")
    nth = dict.fromkeys(TEMPLATES, 0)
    for index in range(count):
        if split == "train" and index % TEXT_EVERY == TEXT_EVERY - 1:
            kind = "text"
        else:
            kind = types[index % len(types)]
        yield _row(kind, index, nth[kind], split, seed)
        nth[kind] += 1


def rows(
    split: str, count: int, seed: int = 0, types: Sequence[str] = TYPES
) -> Iterator[tuple[dict[str, Any], list[bytes]]]:
    """The first `count` rows of a split, as LLaVA-style rows with their PNG files in the order of ``row["image"]``.

    Types take turns, and within a type all pairs of wording and answer come once, in random order, before any comes
    again. The same arguments give the same bytes (for one version of Pillow and zlib); a larger count only adds rows.

    Args:
        split: ``"train"`` or ``"val"``. Their scenes are disjoint for all seeds.
        count: number of rows.
        seed: other seeds draw other scenes.
        types: the types that take turns.

    Raises:
        ValueError: for another split.
    """
    for row, shown in rows_and_scenes(split, count, seed, types):
        yield row, [png(render(scene)) for scene in shown]


Rows = Callable[[str, int, int], Iterator[tuple[dict[str, Any], list[bytes]]]]


def write(out: Path, split: str, count: int, seed: int = 0, rows: Rows = rows) -> Path:
    """Write ``out/images/*.png`` and ``out/<split>.json`` of some `rows`; returns the path of the JSON file."""
    images = out / "images"
    images.mkdir(parents=True, exist_ok=True)
    written = []
    for row, files in rows(split, count, seed):
        names = row.get("image", [])
        for name, data in zip([names] if isinstance(names, str) else names, files, strict=True):
            (images / name).write_bytes(data)
        written.append(row)
    path = out / f"{split}.json"
    path.write_text(json.dumps(written, indent=0), encoding="utf-8")
    return path


def main(rows: Rows = rows) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--train", type=int, default=32_000, help="number of training rows")
    parser.add_argument("--val", type=int, default=7_000, help="number of validation rows")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for split in ("train", "val"):
        print(write(arguments.out, split, getattr(arguments, split), arguments.seed, rows))


if __name__ == "__main__":
    main()
