"""Puzzles: a procedural set of questions that need several of many visual tokens, and are harder the more is shown.

A picture is a square of `GRID` x `GRID` cells of 16 pixels, meant for patches of 8: 256 visual tokens each at the usual
grid of 8. It shows objects of two by two patches, bars below letters, or coloured words. ``find`` shows several
pictures, and asks for what is in one of them.

An object has an upper and a lower half, each full, round or pointed; its shape is the pair (a house is pointed above and
full below), so no patch tells a shape.

`things` is the difficulty: how many objects, bars or words a picture shows. It is drawn from the type's `THINGS`, or
is given, as is the number of pictures, and so scores can be drawn over either (tools/evidence.py curves). Where more
are counted, more are shown; there is room for half as many objects as cells, and for a bar a letter and a word a colour.

As in shapes.py: within a type every answer of first questions is equally frequent, for each wording, and independent of
what the question names, so the best constant answer scores 1/K (``ANSWERS``); answers are one word and one token; half of
the training scenes are sparser, and training rows may have further turns of the same type about other things of the picture
(these may hint at each other, and half of the further counts are 0; ``most`` has none by its nature, and ``find``, which
is learnt soonest, is given none) and end with a description of it (without, models of this size hardly learn to bind);
rows of the other splits have one question. Scenes belong to splits by the SHA-256 of their
*content* (without sizes, small shifts, shades and backgrounds): its first byte modulo ten is 0 in ``val``, 1 in
``search`` (for choosing learning rates and the like, so that they are not chosen by what is reported) and more in ``train``.

Lazy strategies, on validation rows (bounded by tests/data_recipes/test_puzzles.py): a colour, shape or word that is
merely present, the rarest or the most frequent one, scores at most 1/K + 0.2, but for ``most``, where it is the answer.
Reading half of a question scores more: 0.42 of ``outermost`` (in any direction), 0.55 of ``shape`` and 0.5 of ``word``
(topmost or lowest, which are the first and the last in reading order), 0.55 of ``tallest`` (or second tallest, and so for
the shortest), 0.41 of ``find`` (any that is the only one of its colour), 0.34 of ``count_colour`` and 0.43 of
``count_bars`` (the number of the most frequent colour). Of ``most``, counting one too few scores 0.33, counting half of
the picture 0.48.

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
EXTREMES = {  # row or column, least or most
    "topmost": (0, 1),
    "lowest": (0, -1),
    "leftmost": (1, 1),
    "rightmost": (1, -1),
}
HEIGHTS = {"tallest": -1, "second tallest": -2, "second shortest": 1, "shortest": 0}  # place among the sorted heights

TEMPLATES: dict[str, tuple[str, ...]] = {
    "outermost": ("What colour is the {extreme} object?", "Which colour does the {extreme} thing have?"),
    "shape": ("What shape is the {extreme} object?", "Which shape does the {extreme} thing have?"),
    "most": ("What colour do the most objects have?", "Which colour is the most frequent?"),
    "count_colour": ("How many {colour} objects are there?", "What is the number of {colour} things?"),
    "tallest": ("What colour is the {height} bar?", "Which colour does the {height} bar have?"),
    "count_bars": ("How many {colour} bars are there?", "What is the number of {colour} bars?"),
    "word": ("Which word is the {extreme} one?", "Read the {extreme} word."),
    "find": ("What shape is the only {colour} object?", "Which shape does the only {colour} thing have?"),
}
ANSWERS: dict[str, tuple[str, ...]] = {
    "outermost": tuple(COLOURS),
    "shape": tuple(SHAPES),
    "most": tuple(COLOURS),
    "count_colour": tuple("012345"),
    "tallest": tuple(COLOURS),
    "count_bars": tuple("012345"),
    "word": WORDS,
    "find": tuple(SHAPES),
}
TYPES = tuple(TEMPLATES)
# Patches come row by row, and models of this size hardly learn columns: of two types only the first or last row is asked for
EXTREMES_OF = {"outermost": tuple(EXTREMES), "shape": ("topmost", "lowest"), "word": ("topmost", "lowest")}
DESCRIBE = "Describe what is shown."
FURTHER_TURNS = 3
# Fewest and most of a picture; half of the training scenes are sparse: they have fewer than the fewest, down to a third
THINGS = {
    "outermost": (8, 16),
    "shape": (8, 16),
    "most": (8, 16),
    "count_colour": (8, 16),
    "tallest": (6, 12),
    "count_bars": (6, 12),
    "word": (3, 6),
    "find": (16, 28),
}
PICTURES = (2, 4)  # of "find"
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


def outermost(at: Sequence[tuple[int, int]], extreme: str) -> list[int]:
    """The indices of the places (row, column) furthest out in the direction `extreme`: several if equally far."""
    axis, sign = EXTREMES[extreme]
    far = [sign * place[axis] for place in at]
    return [index for index, value in enumerate(far) if value == min(far)]


def place_of(item: Any, grid: int) -> tuple[int, int]:
    """Row and column of an object's cell, or of a word's first letter."""
    return divmod(item[0], grid) if isinstance(item[1], str) else item[:2]


def solve(kind: str, scenes: Sequence[Scene], slots: dict[str, str]) -> str | None:
    """The answer to a question of type `kind` that names `slots`; None if the scene has none or several."""
    items = scenes[0]["items"]
    found: list[str] = []  # candidates: exactly one is an answer
    if kind in ("outermost", "shape", "word"):
        entry = 1 if kind == "outermost" else 2
        at = [place_of(item, scenes[0]["grid"]) for item in items]
        found = [items[index][entry] for index in outermost(at, slots["extreme"])]
    elif kind == "most":
        colours = [item[1] for item in items]
        found = [colour for colour in COLOURS if colours.count(colour) == max(map(colours.count, colours))]
    elif kind == "count_colour":
        found = [str(sum(item[1] == slots["colour"] for item in items))]
    elif kind == "tallest":
        ranked = sorted(items, key=lambda item: item[2])
        found = [ranked[HEIGHTS[slots["height"]]][3]]
    elif kind == "count_bars":
        found = [str(sum(item[3] == slots["colour"] for item in items))]
    else:  # find
        found = [item[2] for scene in scenes for item in scene["items"] if item[1] == slots["colour"]]
    return found[0] if len(found) == 1 and found[0] in ANSWERS[kind] else None


# ---------------------------------------------------------------- scenes


def _other(rng: random.Random, values: Sequence[str], but: str) -> str:
    return rng.choice([value for value in values if value != but])


def _scene(kind: str, grid: int, items: list[Any], rng: random.Random) -> Scene:
    return {"kind": kind, "grid": grid, "background": rng.randrange(len(BACKGROUNDS)), "items": sorted(items)}


def _place(rng: random.Random, grid: int, cells: Sequence[int], shown: Sequence[tuple[str, str]]) -> Scene:
    """A scene of objects (colour, shape) in the first of the cells, with random sizes, shifts and shades."""
    items = []
    for cell, (colour, shape) in zip(cells, shown, strict=False):
        size = rng.randint(CELL - 2, CELL)
        dx, dy = rng.randint(0, CELL - size), rng.randint(0, CELL - size)
        items.append((cell, colour, shape, size, dx, dy, rng.randrange(len(SHADES))))
    return _scene("objects", grid, items, rng)


def _counted(rng: random.Random, colour: str, number: int, things: int) -> list[str]:
    """Colours of which `number` are the one that is asked for; of one more there may be as many: the most frequent tells little."""
    also = _other(rng, tuple(COLOURS), colour)
    others = [_other(rng, tuple(COLOURS), colour) for _ in range(things)]
    return [*[colour] * number, *[also] * rng.randint(0, 5), *others][: max(things, number)]


def _most(rng: random.Random, colour: str, things: int) -> list[str]:
    """Colours of which there are the most of one, as few as may be if of two there is one less, and of three two less at most."""
    number = (things + 13) // 6
    first, second, *rest = rng.sample([other for other in COLOURS if other != colour], len(COLOURS) - 1)
    fewer = rng.sample([other for other in rest for _ in range(number - 2)], len(rest) * (number - 2))
    return [*[colour] * number, *[first, second] * (number - 1), *fewer][:things]


def _objects(kind: str, answer: str, slots: dict[str, str], rng: random.Random, grid: int, things: int) -> Scene:
    """A scene of about `things` objects that may have the answer wanted; `solve` decides whether it has."""
    colours, shapes = tuple(COLOURS), tuple(SHAPES)
    cells = rng.sample(range(grid * grid), grid * grid)
    shown = [(rng.choice(colours), rng.choice(shapes)) for _ in range(things)]
    if kind in ("outermost", "shape"):  # the first is the answer, and the furthest out
        first = outermost([divmod(cell, grid) for cell in cells[:things]], slots["extreme"])[0]
        cells[0], cells[first] = cells[first], cells[0]
        asked = (answer, rng.choice(shapes)) if kind == "outermost" else (rng.choice(colours), answer)
        shown = [asked, *shown[:-1]]
    else:
        most = kind == "most"
        drawn = _most(rng, answer, things) if most else _counted(rng, slots["colour"], int(answer), things)
        shown = [(colour, rng.choice(shapes)) for colour in drawn]
    return _place(rng, grid, cells, shown)


def _crowd(given: Sequence[tuple[str, str]], fill: Sequence[str], rng: random.Random, grid: int, things: int) -> Scene:
    """A scene of the (colour, shape) given among others of the colours `fill`."""
    things = max(things, len(given))
    cells, others = rng.sample(range(grid * grid), things), range(things - len(given))
    return _place(rng, grid, cells, [*given, *((rng.choice(fill), rng.choice(tuple(SHAPES))) for _ in others)])


def _bars(kind: str, answer: str, slots: dict[str, str], rng: random.Random, grid: int, things: int) -> Scene:
    """Bars of distinct heights below distinct letters: of a rank, the first is asked for."""
    things = max(things, int(answer) if kind == "count_bars" else 2)  # of one bar there is no second tallest
    heights, letters = rng.sample(range(1, 2 * grid - 1), things), rng.sample(LETTERS, things)
    if kind == "tallest":
        asked = heights.index(sorted(heights)[HEIGHTS[slots["height"]]])
        heights[0], heights[asked] = heights[asked], heights[0]
        twice = [colour for colour in COLOURS for _ in range(1 + (colour != answer))]
        colours = [answer, *rng.sample(twice, things - 1)]  # none is more than twice there
    else:
        colours = _counted(rng, slots["colour"], int(answer), things)
    bars = list(zip(letters, heights, colours, strict=True))
    rng.shuffle(bars)
    items = []
    for column, bar in zip(sorted(rng.sample(range(2 * grid), things)), bars, strict=True):
        width = rng.randint(5, 7)
        items.append((column, *bar, width, rng.randint(0, PATCH - width), rng.randrange(len(SHADES))))
    return _scene("bars", grid, items, rng)


def _words(answer: str, extreme: str, rng: random.Random, grid: int, things: int) -> Scene:
    """Distinct words in distinct colours, one below the other or side by side; the first is furthest out."""
    words = [answer, *rng.sample([word for word in WORDS if word != answer], things - 1)]
    free = [(row, column) for row in range(2 * grid) for column in range(0, 2 * grid - 3, 4)]
    at = [(row, column + rng.randrange(2)) for row, column in rng.sample(free, things)]
    first = outermost(at, extreme)[0]
    at[0], at[first] = at[first], at[0]
    items = [
        (*place, word, colour, rng.randrange(len(SHADES)))
        for place, word, colour in zip(at, words, rng.sample(tuple(COLOURS), things), strict=True)
    ]
    return _scene("words", grid, items, rng)


def _scenes(
    kind: str, answer: str, slots: dict[str, str], rng: random.Random, grid: int, things: int, pictures: int
) -> list[Callable[[], Scene]]:
    """What draws each picture of a question, which may have the answer wanted; `solve` decides whether they have."""
    if kind in ("tallest", "count_bars"):
        return [partial(_bars, kind, answer, slots, rng, grid, things)]
    if kind == "word":
        return [partial(_words, answer, slots["extreme"], rng, grid, things)]
    if kind == "find":
        also, second, *fill = rng.sample([one for one in COLOURS if one != slots["colour"]], len(COLOURS) - 1)
        given: list[list[tuple[str, str]]] = [[] for _ in range(pictures)]
        for colour in (slots["colour"], also, second):  # three are there once, so that the question has to be read
            shape = answer if colour == slots["colour"] else rng.choice(tuple(SHAPES))
            rng.choice(given).append((colour, shape))
        return [partial(_crowd, one, fill, rng, grid, things) for one in given]
    return [partial(_objects, kind, answer, slots, rng, grid, things)]


def _slots(kind: str, rng: random.Random) -> dict[str, str]:
    """What a question of type `kind` names."""
    values = {
        "colour": rng.choice(tuple(COLOURS)),
        "extreme": rng.choice(EXTREMES_OF.get(kind, ("",))),
        "height": rng.choice(tuple(HEIGHTS)),
    }
    return {name: value for name, value in values.items() if f"{{{name}}}" in TEMPLATES[kind][0]}


# ---------------------------------------------------------------- rows


def _of_split(split: str, draw: Callable[[], Scene]) -> Scene:
    """The first that is drawn of the split."""
    return next(scene for scene in iter(draw, None) if split_of(scene) == split)


def _further_turns(kind: str, scenes: list[Scene], slots: dict[str, str], rng: random.Random) -> list[tuple[str, str]]:
    """Questions of the same type about other things of the picture, with their answers."""
    turns: list[tuple[str, str]] = []
    asked = [slots]
    for _ in range(8 * FURTHER_TURNS):
        named = _slots(kind, rng)
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
    slots = _slots(kind, rng)
    most = {"objects": grid * grid // 2, "bars": min(2 * grid - 2, len(LETTERS)), "words": len(COLOURS)}[shows]
    fewest, usual = THINGS[kind]
    while True:
        number = things or (rng.randint(fewest // 3, fewest - 1) if sparse else rng.randint(fewest, usual))
        number = min(most, number)
        shown = [_of_split(split, draw) for draw in _scenes(kind, answer, slots, rng, grid, number, count)]
        if solve(kind, shown, slots) == answer:
            break
    turns = [("<image>\n" * len(shown) + TEMPLATES[kind][wording].format(**slots), answer)]
    if split == "train":
        turns += [] if kind == "find" else _further_turns(kind, shown, slots, rng)
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
