"""Puzzles: a procedural set of questions that need several of many visual tokens, and are harder the more is shown.

A picture is a square of `GRID` x `GRID` cells of 16 pixels, meant for patches of 8: 256 visual tokens each at the usual
grid of 8. It shows objects of two by two patches, bars below letters, or coloured words. Some types of question
show two to four pictures, and ask about one of them that is named, or for what is in one of them.

An object has an upper and a lower half, each full, round or pointed; its shape is the pair (a house is pointed above and
full below), so no patch tells a shape.

`things` is the difficulty: how many objects, bars or words a picture shows. It is drawn from `THINGS`, or is given,
as is the number of pictures, and so scores can be drawn over either (tools/evidence.py curves). Where more are counted, more are shown; there is
room for half as many objects as cells, and for a bar a letter and a word a colour.

As in shapes.py: within a type every answer is equally frequent, for each wording, and independent of what the question
names, so the best constant answer scores 1/K (``ANSWERS``); answers are one word and one token; half of the training
scenes are emptier, and training rows may have further turns of the same type about other things of the picture (these
may hint at each other) and end with a description of it (without, models of this size hardly learn to bind); rows of the
other splits have one question. Scenes belong to splits by the SHA-256 of their *content* (without sizes, small shifts,
shades and backgrounds): its first byte modulo ten is 0 in ``val``, 1 in ``search`` (for choosing
learning rates and the like, so that nothing is chosen by what is reported) and more in ``train``.

Lazy strategies, on validation rows (bounded by tests/data_recipes/test_puzzles.py): a colour, shape, letter or word that
is merely present, or the most frequent one, scores at most 1/K + 0.2. Reading half of a question scores more: 0.5 of ``shape`` (something of the
colour that is asked for, wherever) and ``tallest`` (or shortest), 0.4 of ``outermost`` (in any direction), ``beside`` (any neighbour) and
``picture`` (any of them).

Use it from Python (``rows``), or write LLaVA-style JSON files and a folder of images::

    python data_recipes/puzzles.py --out DIR --train 32000 --val 2800
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parent))
import shapes as easy
from shapes import BACKGROUNDS, CELL, COLOURS, QUADRANTS, SHADES, Scene

GRID = 8  # cells, both ways
PATCH = 8  # pixels, both ways; a cell is two by two patches
HALVES = ("full", "round", "pointed")
SHAPES = {  # upper and lower half
    "square": ("full", "full"),
    "pot": ("full", "round"),
    "shield": ("full", "pointed"),
    "dome": ("round", "full"),
    "circle": ("round", "round"),
    "cone": ("round", "pointed"),
    "house": ("pointed", "full"),
    "drop": ("pointed", "round"),
    "diamond": ("pointed", "pointed"),
}
LETTERS = tuple("ABCDEFGHKMNP")
# Of each first letter, every pair of a vowel and a last letter: no two letters tell the word
WORDS = ("CAT", "CUT", "CAP", "CUP", "BAT", "BUT", "BAG", "BUG", "HAT", "HUT", "HAM", "HUM")
SIDES = {"to the left of": (0, -1), "to the right of": (0, 1), "above": (-1, 0), "below": (1, 0)}  # rows, columns
EXTREMES = {
    "topmost": (0, 1),
    "lowest": (0, -1),
    "leftmost": (1, 1),
    "rightmost": (1, -1),
}  # row or column, least or most
ORDINALS = ("first", "second", "third", "fourth")

TEMPLATES: dict[str, tuple[str, ...]] = {
    "outermost": ("What colour is the {extreme} object?", "Which colour does the {extreme} thing have?"),
    "shape": ("What shape is the {extreme} {colour} object?", "Which shape does the {extreme} {colour} thing have?"),
    "beside": (
        "What colour is the object {side} the {colour} {shape}?",
        "Which colour does the thing {side} the {colour} {shape} have?",
    ),
    "count_colour": ("How many {colour} objects are there?", "What is the number of {colour} things?"),
    "tallest": ("What colour is the {height} bar?", "Which colour does the {height} bar have?"),
    "count_bars": ("How many {colour} bars are there?", "What is the number of {colour} bars?"),
    "word": ("Which word is {colour}?", "Read the word written in {colour}."),
    "find": ("What shape is the only {colour} object?", "Which shape does the only {colour} thing have?"),
    "picture": (
        "What shape is the {colour} object in the {ordinal} picture?",
        "In the {ordinal} picture, which shape does the {colour} thing have?",
    ),
    "which": (
        "Which picture has the {colour} object, the first, the second or the third?",
        "Is the {colour} thing in the first, the second or the third picture?",
    ),
}
ANSWERS: dict[str, tuple[str, ...]] = {
    "outermost": tuple(COLOURS),
    "shape": tuple(SHAPES),
    "beside": tuple(COLOURS),
    "count_colour": tuple("012345"),
    "tallest": tuple(COLOURS),
    "count_bars": tuple("012345"),
    "word": WORDS,
    "find": tuple(SHAPES),
    "picture": tuple(SHAPES),
    "which": ORDINALS[:3],
}
HARDER = ("picture", "which")  # in minutes, the tiny models learn nothing of it
TYPES = tuple(kind for kind in TEMPLATES if kind not in HARDER)
DESCRIBE = "Describe what is shown."
# Training rows of these types have up to three further turns; of the others, such turns would favour an answer
FURTHER = ("outermost", "shape", "beside", "count_colour", "tallest", "count_bars", "word", "find", "picture")
FURTHER_TURNS = 3
THINGS = {"objects": (8, 16), "bars": (6, 12), "words": (3, 6)}  # fewest and most of a picture
SPARSE = {"objects": (2, 7), "bars": (2, 5), "words": (1, 3)}  # of half of the training scenes
PICTURES = (2, 4)  # of the types "find" and "picture"
SPLITS = {"val": (0,), "search": (1,), "train": tuple(range(2, 10))}  # the first byte of the content's hash modulo ten

# A scene is plain data: {"kind": "objects" | "bars" | "words", "grid": cells, "background": index, "items": [...]}. Items:
#   objects: (cell, colour, shape, size, dx, dy, shade), sorted by cell = grid * row + column; pixels from the cell's corner
#   bars:    (column of patches, letter, height in patches, colour, width, dx, shade), left to right
#   words:   (row, column of patches, word, colour, shade), in reading order
SHOWN = {"objects": 3, "bars": 4, "words": 4}  # how many entries of an item are content


def content(scene: Scene) -> str:
    """What the scene shows, as canonical text, without what questions are never about."""
    shown = [item[: SHOWN[scene["kind"]]] for item in scene["items"]]
    return json.dumps([scene["kind"], scene["grid"], shown], separators=(",", ":"))


def split_of(scene: Scene) -> str:
    """The split that the scene belongs to: eight in ten are of ``train``, one of ``search`` and one of ``val``."""
    part = hashlib.sha256(content(scene).encode()).digest()[0] % 10
    return next(split for split, parts in SPLITS.items() if part in parts)


# ---------------------------------------------------------------- drawing


def _draw_shape(draw: ImageDraw.ImageDraw, shape: str, x: int, y: int, size: int, ink: int) -> None:
    """Draw `shape` filling the square of `size` pixels whose corner is (x, y)."""
    right, bottom, middle, tip = x + size - 1, y + size - 1, y + size // 2, x + (size - 1) / 2
    upper, lower = SHAPES[shape]
    for half, near, far, start in ((upper, middle - 1, y, 180), (lower, middle, bottom, 0)):
        if half == "full":
            draw.rectangle((x, min(near, far), right, max(near, far)), fill=ink)
        elif half == "round":
            draw.pieslice((x, y, right, bottom), start, start + 180, fill=ink)
        else:
            draw.polygon(((x, near), (right, near), (tip, far)), fill=ink)


def render(scene: Scene) -> Image.Image:
    """The picture of a scene: 16 pixels a cell, palette mode (a few colours, so the PNG is a few hundred bytes)."""
    grid, size = scene["grid"], CELL * scene["grid"]
    image = Image.new("P", (size, size), 0)
    draw = ImageDraw.Draw(image)
    letters = len(scene["items"]) + 1  # the ink of the letters above bars
    palette = list(BACKGROUNDS[scene["background"]])
    for ink, item in enumerate(scene["items"], start=1):
        if scene["kind"] == "objects":
            cell, colour, shape, pixels, dx, dy, shade = item
            row, column = divmod(cell, grid)
            _draw_shape(draw, shape, column * CELL + dx, row * CELL + dy, pixels, ink)
        elif scene["kind"] == "bars":
            column, letter, height, colour, width, dx, shade = item
            left, top = column * PATCH + dx, size - PATCH * height
            draw.rectangle((left, top + 3, left + width - 1, size - 1), fill=ink)
            image.paste(letters, (column * PATCH + 1, top - PATCH), easy._word_mask(letter, 1))
        else:
            row, column, word, colour, shade = item
            for place, letter in enumerate(word):
                image.paste(ink, ((column + place) * PATCH + 1, row * PATCH), easy._word_mask(letter, 1))
        palette += [min(255, max(0, channel + SHADES[shade])) for channel in COLOURS[colour]]
    image.putpalette([*palette, 25, 25, 25])
    return image


def patches(scene: Scene) -> list[list[dict[str, str]]]:
    """What each patch shows by itself, by row and column: colour, part and letter, or nothing ({}).

    A part is "full", "bar", "top" (of a bar), or the half of an object with the corner of the object that the patch is.
    """
    side = 2 * scene["grid"]
    shown: list[list[dict[str, str]]] = [[{} for _ in range(side)] for _ in range(side)]
    for item in scene["items"]:
        if scene["kind"] == "objects":
            cell, colour, shape = item[:3]
            row, column = divmod(cell, scene["grid"])
            for corner, name in enumerate(QUADRANTS):
                half = SHAPES[shape][corner // 2]
                part = half if half == "full" else half + name
                shown[2 * row + corner // 2][2 * column + corner % 2] = {"colour": colour, "part": part}
        elif scene["kind"] == "bars":
            column, letter, height, colour = item[:4]
            shown[side - height - 1][column] = {"letter": letter}
            for row in range(side - height, side):
                shown[row][column] = {"colour": colour, "part": "top" if row == side - height else "bar"}
        else:
            row, column, word, colour = item[:4]
            for place, letter in enumerate(word):
                shown[row][column + place] = {"colour": colour, "letter": letter}
    return shown


# ---------------------------------------------------------------- answers


def outermost(items: Sequence[Any], extreme: str, grid: int) -> list[Any]:
    """The objects furthest out in the direction `extreme`: several if they are equally far."""
    axis, sign = EXTREMES[extreme]
    places = [sign * divmod(item[0], grid)[axis] for item in items]
    return [item for item, place in zip(items, places, strict=True) if place == min(places)]


def solve(kind: str, scenes: Sequence[Scene], slots: dict[str, str]) -> str | None:
    """The answer to a question of type `kind` that names `slots`; None if the scene has none or several."""
    items, grid = scenes[0]["items"], scenes[0]["grid"]
    found: list[str] = []  # candidates: exactly one is an answer
    if kind == "outermost":
        found = [item[1] for item in outermost(items, slots["extreme"], grid)]
    elif kind == "shape":
        named = [item for item in items if item[1] == slots["colour"]]
        found = [item[2] for item in outermost(named, slots["extreme"], grid)]
    elif kind == "beside":
        named = [divmod(item[0], grid) for item in items if item[1:3] == (slots["colour"], slots["shape"])]
        if len(named) != 1:
            return None
        (row, column), (down, right) = named[0], SIDES[slots["side"]]
        found = [item[1] for item in items if divmod(item[0], grid) == (row + down, column + right)]
    elif kind == "count_colour":
        found = [str(sum(item[1] == slots["colour"] for item in items))]
    elif kind == "tallest":
        extreme = (max if slots["height"] == "tallest" else min)(item[2] for item in items)
        found = [item[3] for item in items if item[2] == extreme]
    elif kind == "count_bars":
        found = [str(sum(item[3] == slots["colour"] for item in items))]
    elif kind == "find":
        found = [item[2] for scene in scenes for item in scene["items"] if item[1] == slots["colour"]]
    elif kind == "word":
        found = [item[2] for item in items if item[3] == slots["colour"]]
    elif kind == "picture":
        place = ORDINALS.index(slots["ordinal"])
        asked = scenes[place]["items"] if place < len(scenes) else []
        found = [item[2] for item in asked if item[1] == slots["colour"]]
    else:  # which
        shown = [any(item[1] == slots["colour"] for item in scene["items"]) for scene in scenes]
        found = [name for name, there in zip(ORDINALS, shown, strict=False) if there]
    return found[0] if len(found) == 1 and found[0] in ANSWERS[kind] else None


# ---------------------------------------------------------------- scenes


def _other(rng: random.Random, values: Sequence[str], *but: str) -> str:
    return rng.choice([value for value in values if value not in but])


def _scene(kind: str, grid: int, items: list[Any], rng: random.Random) -> Scene:
    return {"kind": kind, "grid": grid, "background": rng.randrange(len(BACKGROUNDS)), "items": sorted(items)}


def _place(rng: random.Random, grid: int, placed: Sequence[tuple[int, str, str]]) -> Scene:
    """A scene of (cell, colour, shape) with random sizes, shifts and shades."""
    items = []
    for cell, colour, shape in placed:
        size = rng.randint(CELL - 2, CELL)
        dx, dy = rng.randint(0, CELL - size), rng.randint(0, CELL - size)
        items.append((cell, colour, shape, size, dx, dy, rng.randrange(len(SHADES))))
    return _scene("objects", grid, items, rng)


def _objects(kind: str, answer: str, slots: dict[str, str], rng: random.Random, grid: int, things: int) -> Scene:
    """A scene of about `things` objects that may have the answer wanted; `solve` decides whether it has."""
    colours, shapes = tuple(COLOURS), tuple(SHAPES)
    colour, shape = slots.get("colour", ""), slots.get("shape", "")
    cells = rng.sample(range(grid * grid), grid * grid)
    some = [(rng.choice(colours), rng.choice(shapes)) for _ in range(things)]
    if kind == "outermost":  # the first is the answer, and the furthest out
        extreme = outermost([(cell,) for cell in cells[:things]], slots["extreme"], grid)[0][0]
        cells = [extreme, *(cell for cell in cells if cell != extreme)]
        given = [(answer, rng.choice(shapes))]
    elif kind in ("shape", "picture"):  # of several of the colour, the first; of a picture, there is one
        number = 1 if kind == "picture" else rng.randint(1 + (things >= 8), max(1, things // 4))
        mine = cells[:number]
        first = outermost([(cell,) for cell in mine], slots["extreme"], grid)[0][0] if kind == "shape" else mine[0]
        given = [(colour, answer), *((colour, rng.choice(shapes)) for _ in mine[1:])]
        cells = [first, *(cell for cell in mine if cell != first), *(cell for cell in cells if cell not in mine)]
        some = [(_other(rng, colours, colour), rng.choice(shapes)) for _ in range(things)]
    elif kind == "beside":
        given = [(colour, shape), (answer, rng.choice(shapes))]
        row, column = divmod(cells[0], grid)
        steps = rng.sample(
            list(SIDES.values()), len(SIDES)
        )  # the next to the named object, where asked for and elsewhere
        steps = [SIDES[slots["side"]], *(step for step in steps if step != SIDES[slots["side"]])]
        around = [(row + down, column + right) for down, right in steps]
        inside = [grid * r + c for r, c in around if 0 <= r < grid and 0 <= c < grid]
        cells = [cells[0], *inside, *(cell for cell in cells[1:] if cell not in inside)]
        some = [item for item in some if item != (colour, shape)]
    else:  # count_colour
        given = [(colour, rng.choice(shapes)) for _ in range(int(answer))]
        some = [(_other(rng, colours, colour), rng.choice(shapes)) for _ in range(things)]
    shown = [*given, *some][: max(things, len(given))]
    return _place(rng, grid, [(cell, *item) for cell, item in zip(cells, shown, strict=False)])


def _bars(kind: str, answer: str, slots: dict[str, str], rng: random.Random, grid: int, things: int) -> Scene:
    """Bars of distinct heights below distinct letters: of the tallest, the first is asked for; of a number, the first are of the colour."""
    if kind == "count_bars":
        things = max(things, int(answer))
    heights, letters = rng.sample(range(1, 2 * grid - 1), things), rng.sample(LETTERS, things)
    if kind == "tallest":
        heights.sort(reverse=slots["height"] == "tallest")
        twice = [colour for colour in COLOURS for _ in range(1 + (colour != answer))]
        colours = [answer, *rng.sample(twice, things - 1)]  # none is more than twice there
    else:
        others = [_other(rng, tuple(COLOURS), slots["colour"]) for _ in range(things)]
        colours = [*[slots["colour"]] * int(answer), *others][:things]
    bars = list(zip(letters, heights, colours, strict=True))
    rng.shuffle(bars)
    items = []
    for column, bar in zip(sorted(rng.sample(range(2 * grid), things)), bars, strict=True):
        width = rng.randint(5, 7)
        items.append((column, *bar, width, rng.randint(0, PATCH - width), rng.randrange(len(SHADES))))
    return _scene("bars", grid, items, rng)


def _words(written: Sequence[tuple[str, str]], rng: random.Random, grid: int) -> Scene:
    """Words in colours, (word, colour) each, one below the other or side by side."""
    slots = rng.sample([(row, column) for row in range(2 * grid) for column in range(0, 2 * grid - 3, 4)], len(written))
    items = [
        (row, column + rng.randrange(2), word, colour, rng.randrange(len(SHADES)))
        for (row, column), (word, colour) in zip(slots, written, strict=True)
    ]
    return _scene("words", grid, items, rng)


def _scenes(
    kind: str, answer: str, slots: dict[str, str], rng: random.Random, grid: int, things: int, pictures: int
) -> list[Callable[[], Scene]]:
    """What draws each picture of a question, which may have the answer wanted; `solve` decides whether they have."""
    if kind in ("tallest", "count_bars"):
        return [partial(_bars, kind, answer, slots, rng, grid, things)]
    if kind == "word":
        colours = rng.sample(tuple(COLOURS), len(COLOURS))
        colours = [slots["colour"], *(colour for colour in colours if colour != slots["colour"])][:things]
        words = [answer, *rng.sample([word for word in WORDS if word != answer], len(colours) - 1)]
        return [partial(_words, list(zip(words, colours, strict=True)), rng, grid)]
    if kind == "which":
        return [
            partial(_objects, "count_colour", str(int(name == answer)), slots, rng, grid, things)
            for name in ORDINALS[:3]
        ]
    if kind == "find":
        drawn = [("picture", answer), *[("count_colour", "0")] * (pictures - 1)]
        return [partial(_objects, *one, slots, rng, grid, things) for one in rng.sample(drawn, pictures)]
    if kind == "picture":
        asked = ORDINALS.index(slots["ordinal"])
        others = rng.sample([shape for shape in SHAPES if shape != answer], pictures)
        shown = [answer if place == asked else other for place, other in enumerate(others)]
        return [partial(_objects, kind, shape, slots, rng, grid, things) for shape in shown]
    return [partial(_objects, kind, answer, slots, rng, grid, things)]


def _slots(kind: str, rng: random.Random, pictures: int) -> dict[str, str]:
    """What a question of type `kind` names."""
    values = {
        "colour": rng.choice(tuple(COLOURS)),
        "shape": rng.choice(tuple(SHAPES)),
        "side": rng.choice(tuple(SIDES)),
        "extreme": rng.choice(tuple(EXTREMES)),
        "height": rng.choice(("tallest", "shortest")),
        "ordinal": rng.choice(ORDINALS[:pictures]),
    }
    return {name: value for name, value in values.items() if f"{{{name}}}" in TEMPLATES[kind][0]}


# ---------------------------------------------------------------- rows


def _of_split(split: str, draw: Callable[[], Scene]) -> Scene:
    """The first that is drawn of the split."""
    return next(scene for scene in iter(draw, None) if split_of(scene) == split)


def _further_turns(kind: str, scenes: list[Scene], slots: dict[str, str], rng: random.Random) -> list[tuple[str, str]]:
    """Questions of the same type about other things of the pictures, with their answers."""
    turns: list[tuple[str, str]] = []
    asked = [slots]
    for _ in range(8 * FURTHER_TURNS):
        named = _slots(kind, rng, len(scenes))
        answer = None if named in asked else solve(kind, scenes, named)
        if answer is not None and len(turns) < FURTHER_TURNS:
            turns.append((rng.choice(TEMPLATES[kind]).format(**named), answer))
            asked.append(named)
    return turns


def describe(scene: Scene) -> str:
    """Colour and shape of objects, colour and letter of bars, colour and text of words, in reading order."""
    shown = {"objects": (1, 2), "bars": (3, 1), "words": (3, 2)}[scene["kind"]]
    return " ".join(str(item[entry]) for item in scene["items"] for entry in shown)


def _row(
    kind: str, index: int, nth: int, split: str, seed: int, grid: int, things: int | None, pictures: int | None
) -> tuple[dict[str, Any], list[Scene]]:
    """The `nth` question of its type: a LLaVA-style row and its scenes."""
    wording, answer = easy.nth_pair(kind, len(TEMPLATES[kind]), ANSWERS[kind], f"{seed}:{split}", nth)
    rng = random.Random(f"{seed}:{split}:{index}")
    shows = "bars" if kind in ("tallest", "count_bars") else "words" if kind == "word" else "objects"
    sparse = split == "train" and rng.random() < 0.5
    count = pictures or rng.randint(*PICTURES)
    slots = _slots(kind, rng, count)
    most = {"objects": grid * grid // 2, "bars": min(2 * grid - 2, len(LETTERS)), "words": len(COLOURS)}[shows]
    while True:
        number = min(most, things or rng.randint(*(SPARSE if sparse else THINGS)[shows]))
        shown = [_of_split(split, draw) for draw in _scenes(kind, answer, slots, rng, grid, number, count)]
        if solve(kind, shown, slots) == answer:
            break
    turns = [("<image>\n" * len(shown) + TEMPLATES[kind][wording].format(**slots), answer)]
    if split == "train" and kind in FURTHER:
        turns += _further_turns(kind, shown, slots, rng)
    if split == "train":
        turns.append((DESCRIBE, " and ".join(map(describe, shown))))
    return easy.llava_row(f"{split}-{index:06d}", kind, len(shown), turns), shown


def rows_and_scenes(
    split: str,
    count: int,
    seed: int = 0,
    types: Sequence[str] = TYPES,
    grid: int = GRID,
    things: int | None = None,
    pictures: int | None = None,
) -> Iterator[tuple[dict[str, Any], list[Scene]]]:
    """The first `count` rows of a split, each with its scenes not yet drawn. See `rows`."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, expected one of {', '.join(map(repr, SPLITS))}")
    nth = dict.fromkeys(TEMPLATES, 0)
    for index in range(count):
        kind = types[index % len(types)]
        yield _row(kind, index, nth[kind], split, seed, grid, things, pictures)
        nth[kind] += 1


def rows(
    split: str, count: int, seed: int = 0, types: Sequence[str] = TYPES
) -> Iterator[tuple[dict[str, Any], list[bytes]]]:
    """The first `count` rows of a split with their PNG files; arguments and promises are those of `shapes.rows`.

    Splits are ``"train"``, ``"search"`` and ``"val"``.
    """
    for row, shown in rows_and_scenes(split, count, seed, types):
        yield row, [easy.png(render(scene)) for scene in shown]


def write(out: Path, split: str, count: int, seed: int = 0) -> Path:
    """Write ``out/images/*.png`` and ``out/<split>.json`` and return the path of the JSON file."""
    return easy.write(out, split, count, seed, rows)


def write_search(out: Path, split: str, count: int, seed: int = 0) -> Path:
    """As `write`, with the questions of the search split for validation."""
    return write(out, "search" if split == "val" else split, count, seed)


if __name__ == "__main__":
    easy.main(rows)
