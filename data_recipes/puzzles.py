"""Puzzles: a procedural set of questions that need more than one visual token, in the style of shapes.py but harder.

Pictures are 64 x 64 pixels, meant for patches of 8 (64 visual tokens), and of three kinds: objects of two by two patches
on a 4 x 4 grid, bars with a letter below, and words with a letter per patch. Two types of question show two pictures.

An object has an upper and a lower half, each full, round or pointed; its shape is the pair (a house is pointed above and
full below), so no patch tells a shape, and telling which object has it means to *bind* patches to each other. Where a
named shape is looked for, one half of it is also found in other objects (`twin`), and where its colour is asked, a second
colour has the same halves in two objects: whoever only sums up what patches show finds both colours equally often.

As in shapes.py: within a type every answer is equally frequent, for each wording, and independent of what the question
names, so the best constant answer scores 1/K (``ANSWERS``); answers are one word and one token; training scenes may be
emptier (half of them are), and training rows may have further turns of the same type about other things of the picture (these may hint at
each other) and end with a description of it (without, models of this size hardly learn to bind); rows of the other
splits have one question. Scenes belong to splits by the SHA-256 of their *content*
(without sizes, small shifts, shades, backgrounds and the colours of bars and words): its first byte modulo ten is 0 in
``val``, 1 in ``search`` (for choosing learning rates and the like, so that nothing is chosen by what is reported) and
more in ``train``.

Lazy strategies, on validation rows (bounded by tests/data_recipes/test_puzzles.py): a colour, shape, letter or word that is merely
present scores at most 1/K + 0.2; ``find`` by summing up halves 0.6. ``same``, ``taller`` and ``which`` are yes or no,
or one of two: 0.5 is chance.

Use it from Python (``rows``), or write LLaVA-style JSON files and a folder of images::

    python data_recipes/puzzles.py --out DIR --train 32000 --val 2800
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parent))
import shapes as easy
from shapes import BACKGROUNDS, CELL, COLOURS, GRID, QUADRANTS, SHADES, SIZE, Scene

PATCH = 8  # pixels, both ways
SIDE = SIZE // PATCH  # patches, both ways
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
LETTERS = tuple("ABCDEFGH")
HEIGHTS = range(1, 7)  # of bars, in patches
# Of each first letter, every pair of a vowel and a last letter: no two letters tell the word
WORDS = ("CAT", "CUT", "CAP", "CUP", "BAT", "BUT", "BAG", "BUG", "HAT", "HUT", "HAM", "HUM")
SIDES = {"to the left of": (0, -1), "to the right of": (0, 1), "above": (-1, 0), "below": (1, 0)}  # rows, columns
PLACES = dict(zip(("top left", "top right", "bottom left", "bottom right"), QUADRANTS, strict=True))
CHANGES = ("colour", "shape", "place", "nothing")

TEMPLATES: dict[str, tuple[str, ...]] = {
    "find": ("What colour is the {shape}?", "Which colour does the {shape} have?"),
    "shape": ("What shape is the {colour} object?", "Which shape does the {colour} thing have?"),
    "beside": (
        "What colour is the object {side} the {colour} {shape}?",
        "Which colour does the thing {side} the {colour} {shape} have?",
    ),
    "nearest": (
        "What colour is the object nearest to the {colour} {shape}?",
        "Which colour does the thing closest to the {colour} {shape} have?",
    ),
    "same": (
        "Are the {colour} and the {other} object of the same shape?",
        "Do the {colour} and the {other} thing have the same shape?",
    ),
    "count_colour": ("How many {colour} objects are there?", "What is the number of {colour} things?"),
    "count_shape": ("How many objects are a {shape}?", "What is the number of things that are a {shape}?"),
    "tallest": ("Which letter has the {extreme} bar?", "Below the {extreme} bar, what letter is there?"),
    "value": ("How tall is bar {letter}?", "What is the value of {letter}?"),
    "taller": ("Is bar {letter} taller than bar {other}?", "Is the value of {letter} larger than that of {other}?"),
    "word": ("Which word is at the {place}?", "Read the word at the {place}."),
    "where": ("Where, as on a map, is the word {word}?", "Towards which corner, as on a map, is the word {word}?"),
    "changed": ("What changed between the pictures?", "What is different in the second picture?"),
    "which": (
        "Which picture shows a {colour} {shape}, the first or the second?",
        "Is there a {colour} {shape} in the first or in the second picture?",
    ),
}
ANSWERS: dict[str, tuple[str, ...]] = {
    "find": tuple(COLOURS),
    "shape": tuple(SHAPES),
    "beside": tuple(COLOURS),
    "nearest": tuple(COLOURS),
    "same": ("yes", "no"),
    "count_colour": ("0", "1", "2", "3", "4"),
    "count_shape": ("0", "1", "2", "3", "4"),
    "tallest": LETTERS,
    "value": tuple(map(str, HEIGHTS)),
    "taller": ("yes", "no"),
    "word": WORDS,
    "where": QUADRANTS,
    "changed": CHANGES,
    "which": ("first", "second"),
}
HARDER = (
    "nearest",
    "same",
    "taller",
    "where",
    "changed",
)  # in minutes, the tiny models learnt little or nothing of these
TYPES = tuple(kind for kind in TEMPLATES if kind not in HARDER)
DESCRIBE = "Describe what is shown."
# Training rows of these types have up to three further turns; of the others, such turns would favour an answer ("no")
FURTHER = ("find", "shape", "beside", "nearest", "count_colour", "tallest", "value", "taller", "word", "where")
FURTHER_TURNS = 3
SPLITS = {"val": (0,), "search": (1,), "train": tuple(range(2, 10))}  # the first byte of the content's hash modulo ten

# A scene is plain data: {"kind": "objects" | "bars" | "words", "background": index, "items": [...]}. Items are
#   objects: (cell, colour, shape, size, dx, dy, shade), sorted by cell = 4 * row + column; pixels from the cell's corner
#   bars:    (column of patches, letter, height in patches, colour, width, dx, shade), left to right
#   words:   (row, column of patches, word, colour, shade), at most one in each quadrant
SHOWN = {"objects": 3, "bars": 3, "words": 3}  # how many entries of an item are content


def content(scene: Scene) -> str:
    """What the scene shows, as canonical text, without what questions are never about."""
    shown = [item[: SHOWN[scene["kind"]]] for item in scene["items"]]
    return json.dumps([scene["kind"], shown], separators=(",", ":"))


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
    """The picture of a scene: 64 x 64, palette mode (a few colours, so the PNG is a few hundred bytes)."""
    image = Image.new("P", (SIZE, SIZE), 0)
    draw = ImageDraw.Draw(image)
    letters = len(scene["items"]) + 1  # the ink of the letters below bars
    palette = list(BACKGROUNDS[scene["background"]])
    for ink, item in enumerate(scene["items"], start=1):
        if scene["kind"] == "objects":
            cell, colour, shape, size, dx, dy, shade = item
            row, column = divmod(cell, GRID)
            _draw_shape(draw, shape, column * CELL + dx, row * CELL + dy, size, ink)
        elif scene["kind"] == "bars":
            column, letter, height, colour, width, dx, shade = item
            left, foot = column * PATCH + dx, SIZE - PATCH - 1
            draw.rectangle((left, foot - PATCH * height + 4, left + width - 1, foot), fill=ink)
            image.paste(letters, (column * PATCH + 1, foot + 1), easy._word_mask(letter, 1))
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
    shown: list[list[dict[str, str]]] = [[{} for _ in range(SIDE)] for _ in range(SIDE)]
    for item in scene["items"]:
        if scene["kind"] == "objects":
            cell, colour, shape = item[:3]
            row, column = divmod(cell, GRID)
            for corner, name in enumerate(QUADRANTS):
                half = SHAPES[shape][corner // 2]
                part = half if half == "full" else half + name
                shown[2 * row + corner // 2][2 * column + corner % 2] = {"colour": colour, "part": part}
        elif scene["kind"] == "bars":
            column, letter, height, colour = item[:4]
            shown[SIDE - 1][column] = {"letter": letter}
            for row in range(SIDE - 1 - height, SIDE - 1):
                part = "top" if row == SIDE - 1 - height else "bar"
                shown[row][column] = {"colour": colour, "part": part}
        else:
            row, column, word, colour = item[:4]
            for place, letter in enumerate(word):
                shown[row][column + place] = {"colour": colour, "letter": letter}
    return shown


# ---------------------------------------------------------------- answers


def twin(shape: str, half: int, rng: random.Random) -> str:
    """Another shape with the same upper (0) or lower (1) half."""
    return rng.choice(
        [name for name, halves in SHAPES.items() if halves[half] == SHAPES[shape][half] and name != shape]
    )


def solve(kind: str, scenes: Sequence[Scene], slots: dict[str, str]) -> str | None:
    """The answer to a question of type `kind` that names `slots`; None if the scene has none or several."""
    items = scenes[0]["items"]
    found: list[str] = []  # candidates: exactly one is an answer
    if kind == "find":
        found = [item[1] for item in items if item[2] == slots["shape"]]
    elif kind == "shape":
        found = [item[2] for item in items if item[1] == slots["colour"]]
    elif kind in ("beside", "nearest"):
        named = [divmod(item[0], GRID) for item in items if item[1:3] == (slots["colour"], slots["shape"])]
        if len(named) != 1:
            return None
        (row, column) = named[0]
        if kind == "beside":
            down, right = SIDES[slots["side"]]
            found = [item[1] for item in items if divmod(item[0], GRID) == (row + down, column + right)]
        else:
            distances = [(item[0] // GRID - row) ** 2 + (item[0] % GRID - column) ** 2 for item in items]
            least = min((distance for distance in distances if distance), default=0)
            found = [item[1] for item, distance in zip(items, distances, strict=True) if distance == least]
    elif kind == "same":
        both = [[item[2] for item in items if item[1] == slots[name]] for name in ("colour", "other")]
        if all(len(shapes) == 1 for shapes in both):
            found = ["yes" if both[0] == both[1] else "no"]
    elif kind in ("count_colour", "count_shape"):
        found = [
            str(
                sum(
                    item[1] == slots["colour"] if kind == "count_colour" else item[2] == slots["shape"]
                    for item in items
                )
            )
        ]
    elif kind == "tallest":
        extreme = (max if slots["extreme"] == "tallest" else min)(item[2] for item in items)
        found = [item[1] for item in items if item[2] == extreme]
    elif kind in ("value", "taller"):
        heights = {item[1]: item[2] for item in items}
        if kind == "value" and slots["letter"] in heights:
            found = [str(heights[slots["letter"]])]
        elif kind == "taller" and {slots["letter"], slots["other"]} <= set(heights):
            found = ["yes" if heights[slots["letter"]] > heights[slots["other"]] else "no"]
    elif kind in ("word", "where"):
        words = {QUADRANTS[2 * (item[0] // GRID) + item[1] // GRID]: item[2] for item in items}
        if kind == "word":
            found = [words[PLACES[slots["place"]]]] if PLACES[slots["place"]] in words else []
        else:
            found = [place for place, word in words.items() if word == slots["word"]]
    elif kind == "changed":
        before, after = ({item[:3] for item in scene["items"]} for scene in scenes)
        if before == after:
            return "nothing"
        ((cell, colour, shape),), ((other_cell, other_colour, other_shape),) = before - after, after - before
        differ = {"place": cell != other_cell, "colour": colour != other_colour, "shape": shape != other_shape}
        found = [name for name, different in differ.items() if different]
    else:  # which
        shown = [any(item[1:3] == (slots["colour"], slots["shape"]) for item in scene["items"]) for scene in scenes]
        found = [name for name, there in zip(ANSWERS["which"], shown, strict=True) if there]
    return found[0] if len(found) == 1 and found[0] in ANSWERS[kind] else None


# ---------------------------------------------------------------- scenes


def _place(rng: random.Random, placed: Sequence[tuple[int, str, str]], background: int | None = None) -> Scene:
    """A scene of (cell, colour, shape) with random sizes, shifts and shades."""
    items = []
    for cell, colour, shape in sorted(placed):
        size = rng.randint(CELL - 2, CELL)
        dx, dy = rng.randint(0, CELL - size), rng.randint(0, CELL - size)
        items.append((cell, colour, shape, size, dx, dy, rng.randrange(len(SHADES))))
    return {"kind": "objects", "background": rng.randrange(len(BACKGROUNDS)), "items": items}


def _other(rng: random.Random, values: Sequence[str], *but: str) -> str:
    return rng.choice([value for value in values if value not in but])


def _objects(kind: str, answer: str, slots: dict[str, str], rng: random.Random, sparse: bool) -> list[Scene]:
    """One or two scenes of objects that may have the answer wanted; `solve` decides whether they have."""
    colour, shape = slots.get("colour", ""), slots.get("shape", "")
    further = 0 if sparse else rng.randint(2, 3)  # objects of any colour and shape
    cells = rng.sample(range(GRID * GRID), GRID * GRID)
    some = [(rng.choice(tuple(COLOURS)), rng.choice(tuple(SHAPES))) for _ in range(further)]
    if kind == "find":
        second = _other(rng, tuple(COLOURS), answer)
        twins = [(second, twin(shape, half, rng)) for half in (0, 1)]
        given = [(answer, shape), *([] if sparse else twins)]
    elif kind == "shape":
        given = [(colour, answer)]
        if not sparse:
            given += [(_other(rng, tuple(COLOURS), colour), twin(answer, half, rng)) for half in (0, 1)]
    elif kind in ("beside", "nearest"):
        given = [(colour, shape), (answer, rng.choice(tuple(SHAPES)))]
        if not sparse:
            some += [(rng.choice(tuple(COLOURS)), rng.choice(tuple(SHAPES)))]
        row, column = divmod(cells[0], GRID)
        steps = rng.sample(list(SIDES.values()), len(SIDES))
        if kind == "beside":  # the next to the named object, in the direction asked for and in others
            steps = [SIDES[slots["side"]], *(step for step in steps if step != SIDES[slots["side"]])]
            around = [(row + down, column + right) for down, right in steps]
            inside = [GRID * r + c for r, c in around if 0 <= r < GRID and 0 <= c < GRID]
            cells = [cells[0], *inside, *(cell for cell in cells[1:] if cell not in inside)]
        else:  # the rest are further away
            far = {cell: (cell // GRID - row) ** 2 + (cell % GRID - column) ** 2 for cell in cells}
            cells = [*cells[:2], *(cell for cell in cells[2:] if far[cell] > far[cells[1]])]
    elif kind == "same":
        mine = rng.choice(tuple(SHAPES))
        given = [(colour, mine), (slots["other"], mine if answer == "yes" else twin(mine, rng.randrange(2), rng))]
    elif kind in ("count_colour", "count_shape"):
        number, total = int(answer), rng.randint(5, 6)
        total = rng.randint(max(number, 1), number + 1) if sparse else total
        if kind == "count_colour":
            given = [(colour, rng.choice(tuple(SHAPES))) for _ in range(number)]
            some = [(_other(rng, tuple(COLOURS), colour), rng.choice(tuple(SHAPES))) for _ in range(total - number)]
        else:
            given = [(rng.choice(tuple(COLOURS)), shape) for _ in range(number)]
            some = [(rng.choice(tuple(COLOURS)), twin(shape, n % 2, rng)) for n in range(total - number)]
    elif kind == "which":  # the same colours and halves in both, paired otherwise
        second, other = _other(rng, tuple(COLOURS), colour), twin(shape, rng.randrange(2), rng)
        pair = [[(colour, shape), (second, other)], [(colour, other), (second, shape)]]
        if answer == "second":
            pair.reverse()
        some = [item for item in some if item != (colour, shape)]
        return [
            _place(
                rng, [(cell, *item) for cell, item in zip(rng.sample(cells, len(cells)), [*two, *some], strict=False)]
            )
            for two in pair
        ]
    else:  # changed
        given = [(rng.choice(tuple(COLOURS)), rng.choice(tuple(SHAPES))) for _ in range(1 if sparse else 2)]
    placed = [(cell, *item) for cell, item in zip(cells, [*given, *some], strict=False)]
    if kind != "changed":
        return [_place(rng, placed)]
    cell, colour, shape = placed[0]
    after = {
        "colour": (cell, _other(rng, tuple(COLOURS), colour), shape),
        "shape": (cell, colour, twin(shape, rng.randrange(2), rng)),
        "place": (cells[-1], colour, shape),
        "nothing": placed[0],
    }[answer]
    return [_place(rng, placed), _place(rng, [after, *placed[1:]])]


def _bars(kind: str, answer: str, slots: dict[str, str], rng: random.Random, sparse: bool) -> Scene:
    """Bars of distinct heights with distinct letters."""
    number = rng.randint(2, 3) if sparse else rng.randint(4, 5)
    heights = rng.sample(HEIGHTS, number)
    first = {"tallest": answer, "value": slots.get("letter"), "taller": slots.get("letter")}[kind]
    second = [slots["other"]] if "other" in slots else []
    letters = [first, *second, *rng.sample([x for x in LETTERS if x not in (first, *second)], number - 1 - len(second))]
    if kind == "value":
        heights = [int(answer), *rng.sample([h for h in HEIGHTS if h != int(answer)], number - 1)]
    elif kind == "tallest":
        heights.sort(reverse=slots["extreme"] == "tallest")
    bars = list(zip(letters, heights, strict=True))
    rng.shuffle(bars)
    items = []
    for column, bar in zip(sorted(rng.sample(range(SIDE), number)), bars, strict=True):
        width = rng.randint(5, 7)
        look = rng.choice(tuple(COLOURS)), width, rng.randint(0, PATCH - width), rng.randrange(len(SHADES))
        items.append((column, *bar, *look))
    return {"kind": "bars", "background": rng.randrange(len(BACKGROUNDS)), "items": items}


def _words(kind: str, answer: str, slots: dict[str, str], rng: random.Random, sparse: bool) -> Scene:
    """Distinct words, one in each quadrant (sparse: in some)."""
    word, place = (answer, PLACES[slots["place"]]) if kind == "word" else (slots["word"], answer)
    others = rng.sample([quadrant for quadrant in QUADRANTS if quadrant != place], rng.randint(0, 1) if sparse else 3)
    words = rng.sample([w for w in WORDS if w != word], len(others))
    items = []
    for quadrant, text in zip([place, *others], [word, *words], strict=True):
        down, right = divmod(QUADRANTS.index(quadrant), 2)
        look = rng.choice(tuple(COLOURS)), rng.randrange(len(SHADES))
        items.append((GRID * down + rng.randrange(GRID), GRID * right + rng.randrange(2), text, *look))
    return {"kind": "words", "background": rng.randrange(len(BACKGROUNDS)), "items": sorted(items)}


def _slots(kind: str, rng: random.Random) -> dict[str, str]:
    """What a question of type `kind` names."""
    letters, colours = rng.sample(LETTERS, 2), rng.sample(tuple(COLOURS), 2)
    values = {
        "colour": colours[0],
        "shape": rng.choice(tuple(SHAPES)),
        "side": rng.choice(tuple(SIDES)),
        "extreme": rng.choice(("tallest", "shortest")),
        "letter": letters[0],
        "other": letters[1] if kind == "taller" else colours[1],
        "place": rng.choice(tuple(PLACES)),
        "word": rng.choice(WORDS),
    }
    return {name: value for name, value in values.items() if f"{{{name}}}" in TEMPLATES[kind][0]}


# ---------------------------------------------------------------- rows


def _further_turns(kind: str, scene: Scene, slots: dict[str, str], rng: random.Random) -> list[tuple[str, str]]:
    """Questions of the same type about other things of the scene, with their answers."""
    turns: list[tuple[str, str]] = []
    asked = [slots]
    for _ in range(8 * FURTHER_TURNS):
        named = _slots(kind, rng)
        answer = None if named in asked else solve(kind, [scene], named)
        if answer is not None and len(turns) < FURTHER_TURNS:
            turns.append((rng.choice(TEMPLATES[kind]).format(**named), answer))
            asked.append(named)
    return turns


def describe(scene: Scene) -> str:
    """Objects with colour and shape, bars with letter and height, or words, in reading order."""
    if scene["kind"] == "words":
        return " ".join(item[2] for item in scene["items"])
    return " ".join(f"{item[1]} {item[2]}" for item in scene["items"])


def _row(kind: str, index: int, nth: int, split: str, seed: int) -> tuple[dict[str, Any], list[Scene]]:
    """The `nth` question of its type: a LLaVA-style row and its scenes."""
    wording, answer = easy.nth_pair(kind, len(TEMPLATES[kind]), ANSWERS[kind], f"{seed}:{split}", nth)
    rng = random.Random(f"{seed}:{split}:{index}")
    slots, sparse = _slots(kind, rng), split == "train" and rng.random() < 0.5
    while True:
        if kind in ("tallest", "value", "taller"):
            shown = [_bars(kind, answer, slots, rng, sparse)]
        elif kind in ("word", "where"):
            shown = [_words(kind, answer, slots, rng, sparse)]
        else:
            shown = _objects(kind, answer, slots, rng, sparse)
        if solve(kind, shown, slots) == answer and all(split_of(scene) == split for scene in shown):
            break
    turns = [("<image>\n" * len(shown) + TEMPLATES[kind][wording].format(**slots), answer)]
    if split == "train" and kind in FURTHER:
        turns += _further_turns(kind, shown[0], slots, rng)
    if split == "train":
        turns.append((DESCRIBE, " and ".join(map(describe, shown))))
    return easy.llava_row(f"{split}-{index:06d}", kind, len(shown), turns), shown


def rows_and_scenes(
    split: str, count: int, seed: int = 0, types: Sequence[str] = TYPES
) -> Iterator[tuple[dict[str, Any], list[Scene]]]:
    """The first `count` rows of a split, each with its scenes not yet drawn. See `rows`."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, expected one of {', '.join(map(repr, SPLITS))}")
    nth = dict.fromkeys(TEMPLATES, 0)
    for index in range(count):
        kind = types[index % len(types)]
        yield _row(kind, index, nth[kind], split, seed)
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
