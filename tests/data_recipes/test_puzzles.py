"""The puzzles set: deterministic, split by content, balanced, its answers true of the pixels, and lazy answers in bounds."""

import collections
import importlib.util
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SOURCE = Path(__file__).parents[2] / "data_recipes" / "puzzles.py"
spec = importlib.util.spec_from_file_location("puzzles", SOURCE)
puzzles = importlib.util.module_from_spec(spec)
spec.loader.exec_module(puzzles)
ALL = (*puzzles.TYPES, *puzzles.HARDER)
COUNT = 14 * 24 * 3  # rows: every type 72 times


@pytest.fixture(scope="module")
def val():
    return list(puzzles.rows_and_scenes("val", COUNT, types=ALL))


def question(row):
    return row["conversations"][0]["value"].replace("<image>\n", "")


def answer(row):
    return row["conversations"][1]["value"]


def named(kind, text):
    """The wording and what it names, read from a question."""
    for wording, template in enumerate(puzzles.TEMPLATES[kind]):
        pattern = re.sub(r"\\{(\w+)\\}", r"(?P<\1>.+)", re.escape(template))
        if match := re.fullmatch(pattern, text):
            return wording, match.groupdict()
    raise AssertionError(f"{kind}: {text}")


def test_same_bytes_in_another_process(tmp_path):
    command = [sys.executable, SOURCE, "--out", tmp_path, "--train", "42", "--val", "28", "--seed", "3"]
    subprocess.run(command, check=True, env={"PYTHONHASHSEED": "7"}, capture_output=True)
    for split, count in (("train", 42), ("val", 28)):
        expected = list(puzzles.rows(split, count + 10, 3))[:count]
        assert json.loads((tmp_path / f"{split}.json").read_text()) == [row for row, _ in expected]
        for row, files in expected:
            names = [row["image"]] if isinstance(row["image"], str) else row["image"]
            assert [(tmp_path / "images" / name).read_bytes() for name in names] == files
            assert row["conversations"][0]["value"].count("<image>") == len(files)
    path = puzzles.write_search(tmp_path, "val", 14)
    assert json.loads(path.read_text()) == [row for row, _ in puzzles.rows("search", 14)]
    with pytest.raises(ValueError, match="'test'"):
        next(puzzles.rows("test", 1))


def test_splits_share_no_content():
    shown = {
        split: {
            puzzles.content(scene)
            for seed in (0, 1)
            for _, items in puzzles.rows_and_scenes(split, 700, seed, ALL)
            for scene in items
        }
        for split in puzzles.SPLITS
    }
    assert not shown["train"] & (shown["val"] | shown["search"]) and not shown["val"] & shown["search"]
    scene = {"kind": "objects", "background": 0, "items": [(3, "red", "house", 14, 0, 1, 2)]}
    moved = {"kind": "objects", "background": 2, "items": [(3, "red", "house", 15, 1, 0, 0)]}
    assert puzzles.content(scene) == puzzles.content(moved)


@pytest.mark.parametrize("split", ["train", "search", "val"])
def test_answers_are_balanced_for_each_wording(split):
    """The best constant answer of a type, and of a wording, is one in K, give or take the one unfinished block."""
    tables = collections.defaultdict(collections.Counter)
    for row, _ in puzzles.rows_and_scenes(split, COUNT, types=ALL):
        wording, _ = named(row["type"], question(row))
        tables[row["type"], wording][answer(row)] += 1
    assert {kind for kind, _ in tables} == set(ALL) == set(puzzles.ANSWERS)
    for (kind, wording), counts in tables.items():
        assert set(counts) == set(puzzles.ANSWERS[kind]), (kind, wording)
        assert max(counts.values()) - min(counts.values()) <= 1, (kind, wording, counts)


# ---------------------------------------------------------------- reading the pixels


def ink(image, box):
    """The nearest colour and the mask of what is drawn in a box, or None; the background is what is most frequent."""
    background = np.array(max(image.getcolors(), key=lambda entry: entry[0])[1])
    area = np.asarray(image.crop(box)).astype(int)
    mask = (area != background).any(-1)
    if not mask.any():
        return None
    pixel = area[mask][0]
    assert (area[mask] == pixel).all(), "one colour in a box"
    return min(puzzles.COLOURS, key=lambda name: np.abs(pixel - puzzles.COLOURS[name]).sum()), mask


def half(mask):
    """Full, round or pointed: the middle of how wide the rows are, from tip to base."""
    middle = mask.sum(1)[1:-1].mean() / mask.sum(1).max()
    return "full" if middle > 0.97 else "round" if middle > 0.7 else "pointed"


def read_objects(image):
    """Cell (row, column) -> (colour, shape), read from the pixels."""
    shapes = {halves: name for name, halves in puzzles.SHAPES.items()}
    found = {}
    for cell in np.ndindex(4, 4):
        y, x = 16 * cell[0], 16 * cell[1]
        if got := ink(image, (x, y, x + 16, y + 16)):
            rows = got[1][got[1].any(1)]
            middle = len(rows) // 2
            found[cell] = got[0], shapes[half(rows[:middle]), half(rows[middle:][::-1])]
    return found


def read_letter(image, row, column):
    got = ink(image, (8 * column + 1, 8 * row, 8 * column + 6, 8 * row + 7))
    return next((x for x in set("".join(puzzles.WORDS) + "ABCDEFGH") if got and (letter(x) == got[1]).all()), None)


def letter(name):
    return np.asarray(puzzles.easy._word_mask(name, 1)) > 0


def read_bars(image):
    """Letter -> height, read from the pixels."""
    found = {}
    for column in range(8):
        if name := read_letter(image, 7, column):
            found[name] = round(ink(image, (8 * column, 0, 8 * column + 8, 56))[1].any(1).sum() / 8 + 0.4)
    return found


def read_words(image):
    """Compass -> word, read from the pixels."""
    found = {}
    for row, column in np.ndindex(8, 8):
        letters = [read_letter(image, row, column + n) for n in range(min(3, 8 - column))]
        if len(letters) == 3 and all(letters) and (column in (0, 4) or not read_letter(image, row, column - 1)):
            found["north" * (row < 4) + "south" * (row >= 4) + "west" * (column < 4) + "east" * (column >= 4)] = (
                "".join(letters)
            )
    return found


def brute_force(kind, slots, pictures):
    """The answer, from the pixels and the words of the question."""
    if kind in ("tallest", "value", "taller"):
        bars = read_bars(pictures[0])
        assert len(set(bars.values())) == len(bars) >= 4
        if kind == "tallest":
            return (max if slots["extreme"] == "tallest" else min)(bars, key=bars.get)
        return (
            str(bars[slots["letter"]])
            if kind == "value"
            else "yes"
            if bars[slots["letter"]] > bars[slots["other"]]
            else "no"
        )
    if kind in ("word", "where"):
        words = read_words(pictures[0])
        assert len(set(words.values())) == 4
        vertical, horizontal = slots.get("place", "top left").split()
        compass = {"top": "north", "bottom": "south"}[vertical] + {"left": "west", "right": "east"}[horizontal]
        return words[compass] if kind == "word" else {word: place for place, word in words.items()}[slots["word"]]
    scenes = [read_objects(picture) for picture in pictures]
    objects = scenes[0]
    if kind == "find":
        (got,) = [colour for colour, shape in objects.values() if shape == slots["shape"]]
        return got
    if kind in ("shape", "same"):
        by_colour = collections.defaultdict(list)
        for colour, shape in objects.values():
            by_colour[colour].append(shape)
        (got,) = by_colour[slots["colour"]]
        return got if kind == "shape" else "yes" if [got] == by_colour[slots["other"]] else "no"
    if kind == "beside":
        ((row, column),) = [cell for cell, item in objects.items() if item == (slots["colour"], slots["shape"])]
        step = {"to the left of": (0, -1), "to the right of": (0, 1), "above": (-1, 0), "below": (1, 0)}[slots["side"]]
        return objects[row + step[0], column + step[1]][0]
    if kind == "nearest":
        (cell,) = [cell for cell, item in objects.items() if item == (slots["colour"], slots["shape"])]
        far = sorted((np.hypot(*np.subtract(cell, other)), objects[other][0]) for other in objects if other != cell)
        assert len(far) == 1 or far[0][0] < far[1][0]
        return far[0][1]
    if kind == "count_colour":
        return str([colour for colour, _ in objects.values()].count(slots["colour"]))
    if kind == "count_shape":
        return str([shape for _, shape in objects.values()].count(slots["shape"]))
    if kind == "which":
        shown = [(slots["colour"], slots["shape"]) in scene.values() for scene in scenes]
        assert sum(shown) == 1
        return "first" if shown[0] else "second"
    first, second = scenes
    if first == second:
        return "nothing"
    if set(first) != set(second):
        return "place"
    ((before, after),) = [(first[cell], second[cell]) for cell in first if first[cell] != second[cell]]
    return "colour" if before[1] == after[1] else "shape"


def test_answers_are_true_of_the_pixels():
    """Every question is answered again, from its words and the decoded PNGs alone."""
    for row, files in puzzles.rows("val", 14 * 40, types=ALL):
        pictures = [Image.open(io.BytesIO(data)).convert("RGB") for data in files]
        assert all(picture.size == (64, 64) for picture in pictures) and max(map(len, files)) < 800
        slots = named(row["type"], question(row))[1]
        assert brute_force(row["type"], slots, pictures) == answer(row), row


def test_further_turns_are_true_of_the_pixels():
    """Those of training rows, whose scenes may be emptier, and the description that ends each row."""
    turns = 0
    for row, files in puzzles.rows("train", 14 * 20, types=ALL):
        kind, pictures = row["type"], [Image.open(io.BytesIO(data)).convert("RGB") for data in files]
        texts = [turn["value"] for turn in row["conversations"]]
        *asked, (request, description) = zip(texts[::2], texts[1::2], strict=True)
        assert request == puzzles.DESCRIBE
        if kind in ("find", "beside", "nearest", "shape", "count_colour"):
            for text, told in asked[1:]:
                assert brute_force(kind, named(kind, text)[1], pictures) == told
                turns += 1
        if kind in ("tallest", "value", "taller"):
            shown = [" ".join(f"{letter} {height}" for letter, height in read_bars(pictures[0]).items())]
        elif kind in ("word", "where"):
            shown = [" ".join(map(" ".join, [read_words(pictures[0]).values()]))]
        else:
            shown = [" ".join(map(" ".join, read_objects(picture).values())) for picture in pictures]
        assert " and ".join(shown) == description
    assert turns > 50


def test_patches_are_what_is_drawn():
    """A patch that shows something has ink and the colour told, and no other patch has ink."""
    for _, scenes in puzzles.rows_and_scenes("train", 140, types=ALL):
        for scene in scenes:
            image = puzzles.render(scene).convert("RGB")
            for (row, column), _ in np.ndenumerate(np.zeros((8, 8))):
                told = puzzles.patches(scene)[row][column]
                got = ink(image, (8 * column, 8 * row, 8 * column + 8, 8 * row + 8))
                assert bool(got) == bool(told)
                assert not got or got[0] == told.get("colour", "black")


# ---------------------------------------------------------------- lazy answers


def share(right):
    return sum(right) / len(right)


def test_naming_what_is_present_is_not_enough(val):
    """The expected score of naming at random a colour, shape, letter, height or word of the picture."""
    hits = collections.defaultdict(list)
    column = {"find": 1, "beside": 1, "nearest": 1, "shape": 2, "tallest": 1, "value": 2, "word": 2}
    for row, scenes in val:
        if row["type"] in column:
            present = {str(item[column[row["type"]]]) for item in scenes[0]["items"]}
            hits[row["type"]].append((answer(row) in present) / len(present))
    assert set(hits) == set(column)
    for kind, scores in hits.items():
        assert share(scores) < 1 / len(puzzles.ANSWERS[kind]) + 0.2, (kind, share(scores))


@pytest.mark.parametrize("rare", [True, False])
def test_how_often_a_colour_occurs_tells_little(val, rare):
    """Naming one of the rarest, or of the most frequent, colours."""
    for kind in ("find", "beside", "nearest"):
        scores = []
        for row, scenes in val:
            if row["type"] == kind:
                counts = collections.Counter(item[1] for item in scenes[0]["items"])
                extreme = (min if rare else max)(counts.values())
                among = [colour for colour, count in counts.items() if count == extreme]
                scores.append((answer(row) in among) / len(among))
        assert share(scores) < 0.45, (kind, share(scores))


def test_summing_up_halves_does_not_find(val):
    """For each colour, how many patches fit the named shape; what binds nothing is right no more often than 0.6."""
    scores = []
    for row, scenes in val:
        if row["type"] == "find":
            wanted = puzzles.SHAPES[named("find", question(row))[1]["shape"]]
            votes = collections.Counter()
            for _, colour, shape, *_ in scenes[0]["items"]:
                votes[colour] += sum(a == b for a, b in zip(puzzles.SHAPES[shape], wanted, strict=True))
            among = [colour for colour, count in votes.items() if count == max(votes.values())]
            scores.append((answer(row) in among) / len(among))
    assert share(scores) < 0.6, share(scores)


def test_which_picture_is_not_told_by_what_occurs(val):
    """Both pictures show the named colour and the named shape, equally often."""
    for row, scenes in val:
        if row["type"] == "which":
            slots = named("which", question(row))[1]
            for place, name in ((1, "colour"), (2, "shape")):
                first, second = ([item[place] for item in scene["items"]].count(slots[name]) for scene in scenes)
                assert first == second > 0
