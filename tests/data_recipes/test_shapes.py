"""The shapes set: deterministic, split by content, balanced, and its answers true of the pixels; the tiny parts made for it."""

import collections
import dataclasses
import importlib.util
import io
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast, SiglipVisionModel

SOURCE = Path(__file__).parents[2] / "data_recipes" / "shapes.py"
spec = importlib.util.spec_from_file_location("shapes", SOURCE)
shapes = importlib.util.module_from_spec(spec)
spec.loader.exec_module(shapes)


@pytest.fixture(scope="module")
def val():
    return list(shapes.rows_and_scenes("val", 2 * 7 * 72))


def answer(row):
    return row["conversations"][1]["value"]


def test_same_bytes_in_another_process(tmp_path):
    """Hash randomisation and the number of rows asked for change nothing; the files hold what `rows` yields."""
    command = [sys.executable, SOURCE, "--out", tmp_path, "--train", "60", "--val", "30", "--seed", "3"]
    subprocess.run(command, check=True, env={"PYTHONHASHSEED": "7"}, capture_output=True)
    for split, count in (("train", 60), ("val", 30)):
        expected = list(shapes.rows(split, count + 10, 3))[:count]
        assert json.loads((tmp_path / f"{split}.json").read_text()) == [row for row, _ in expected]
        for row, files in expected:
            names = row.get("image", [])
            names = [names] if isinstance(names, str) else names
            assert [(tmp_path / "images" / name).read_bytes() for name in names] == files
            assert row["conversations"][0]["value"].count("<image>") == len(files)
    assert [row for row, _ in shapes.rows("train", 60, 4)] != [row for row, _ in shapes.rows("train", 60, 3)]


def test_splits_share_no_content():
    shown = {
        split: {
            shapes.content(scene)
            for seed in (0, 1)
            for _, items in shapes.rows_and_scenes(split, 1500, seed)
            for scene in items
        }
        for split in ("train", "val")
    }
    assert not shown["train"] & shown["val"]
    scene = {"kind": "objects", "background": 0, "items": [(3, "red", "ring", 12, 0, 1, 2)]}
    moved = {"kind": "objects", "background": 2, "items": [(3, "red", "ring", 14, 2, 0, 0)]}
    assert shapes.content(scene) == shapes.content(moved)
    with pytest.raises(ValueError, match="'test'"):
        next(shapes.rows("test", 1))


@pytest.mark.parametrize("split", ["train", "val"])
def test_answers_are_balanced_for_each_wording(split):
    """The best constant answer of a type, and of a wording, is one in K, give or take the one unfinished block."""
    blocks = 2
    count = blocks * 7 * 72
    tables = collections.defaultdict(collections.Counter)
    for row, _ in shapes.rows_and_scenes(split, count):
        kind = row["type"]
        question = row["conversations"][0]["value"].replace("<image>\n", "")
        patterns = [re.sub(r"\\{\w+\\}", r"\\w+", re.escape(text)) for text in shapes.TEMPLATES[kind]]
        (wording,) = [index for index, pattern in enumerate(patterns) if re.fullmatch(pattern, question)]
        tables[kind, wording][answer(row)] += 1
    assert {kind for kind, _ in tables} == {*shapes.TYPES, *(["text"] if split == "train" else [])}
    for (kind, wording), counts in tables.items():
        assert len(shapes.TEMPLATES[kind]) >= 4
        assert set(counts) == set(shapes.ANSWERS[kind]), (kind, wording)
        assert max(counts.values()) - min(counts.values()) <= 1, (kind, wording, counts)


def nearest_colour(pixel):
    return min(
        shapes.COLOURS, key=lambda name: sum((a - b) ** 2 for a, b in zip(pixel, shapes.COLOURS[name], strict=True))
    )


def cells(image):
    """Cell -> colour of what is in it, read from the pixels of an object scene whose most frequent colour is the background."""
    background = max(image.getcolors(), key=lambda entry: entry[0])[1]
    found = {}
    for cell in range(16):
        x, y = cell % 4 * 16, cell // 4 * 16
        colours = [(n, c) for n, c in image.crop((x, y, x + 16, y + 16)).getcolors() if c != background]
        if colours:
            assert len(colours) == 1, "an object left its cell"
            found[cell] = nearest_colour(colours[0][1])
    return found


def test_answers_are_true_of_the_pixels():
    """Count, compare and chart are answered again from the decoded PNG, the other types from the scene."""
    seen = collections.Counter()
    for (row, files), (_, scenes) in zip(shapes.rows("val", 700), shapes.rows_and_scenes("val", 700), strict=True):
        kind, question = row["type"], row["conversations"][0]["value"].lower()
        pictures = [Image.open(io.BytesIO(data)).convert("RGB") for data in files]
        assert all(picture.size == (64, 64) for picture in pictures)
        if kind == "count":
            got = str(len(cells(pictures[0])))
        elif kind == "compare":
            first, second = (len(cells(picture)) for picture in pictures)
            got = "first" if first > second else "second"
        elif kind == "chart":
            heights = {}
            for left in range(0, 64, 16):
                column = pictures[0].crop((left, 0, left + 16, 62))
                background = pictures[0].getpixel((0, 0))
                bar = max((n, c) for n, c in column.getcolors() if c != background)[1]
                top = next(y for y in range(62) if any(column.getpixel((x, y)) == bar for x in range(16)))
                heights[nearest_colour(bar)] = 62 - top
            assert len(set(heights.values())) == 4
            extreme = max if any(word in question for word in ("tallest", "highest", "largest")) else min
            got = extreme(heights, key=heights.get)
        elif kind == "word":
            got = scenes[0]["items"][0][0]
        else:
            items = scenes[0]["items"]
            asked = [item for item in items if item[1] in question or kind == "colour"]
            asked = [item for item in asked if item[2] in question or kind == "shape"]
            assert len(asked) == 1, "the question fits one object"
            cell, colour, shape = asked[0][:3]
            where = ("south" if cell // 4 >= 2 else "north") + ("east" if cell % 4 >= 2 else "west")
            assert cells(pictures[0])[cell] == colour
            got = {"colour": colour, "shape": shape, "position": where}[kind]
        assert got == answer(row), row
        seen[kind] += 1
    assert set(seen.values()) == {100}


def test_naming_what_is_present_is_not_enough(val):
    """The lazy strategies stay below the best constant answer plus 15 points, as the module's docstring says."""
    rng = random.Random(0)
    hits = collections.defaultdict(list)
    for row, scenes in val:
        item = rng.choice(scenes[0]["items"])
        kind = row["type"]
        if kind in ("colour", "shape", "chart"):
            hits[kind].append(item[{"colour": 1, "shape": 2, "chart": 0}[kind]] == answer(row))
        elif kind == "position":
            hits[kind].append(shapes.QUADRANTS[2 * (item[0] // 8) + item[0] % 4 // 2] == answer(row))
    for kind, right in hits.items():
        assert sum(right) / len(right) < 1 / len(shapes.ANSWERS[kind]) + 0.15, kind


def test_words_are_legible():
    """Every letter of every word has a shape of its own."""
    letters = sorted({letter for word in shapes.WORDS for letter in word})
    masks = {shapes._word_mask(letter, 1).tobytes() for letter in letters}
    assert len(masks) == len(letters)


@pytest.fixture(scope="module")
def tool():
    path = SOURCE.parents[1] / "tools" / "make_tiny_parts.py"
    spec = importlib.util.spec_from_file_location("make_tiny_parts", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["shapes", "puzzles"])
def test_parts_were_trained_on_training_scenes_only(tool, monkeypatch, name):
    """Neither the labelled pictures nor the told scenes that the parts learn from hold a scene of another split."""
    drawn, subject = [], tool.SUBJECTS[name]
    watched = dataclasses.replace(subject, patches=lambda scene: drawn.append(scene) or subject.patches(scene))
    next(tool.labelled_batches(watched, 300))
    assert len(drawn) == 300
    assert all("<image>" not in question for _, question, *_ in tool.told_rows(watched, "train", 300, subject.told))
    assert len(drawn) > 550
    if name == "shapes":
        assert not any(shapes.is_val(scene) for scene in drawn)
    else:
        assert {subject.source.split_of(scene) for scene in drawn} == {"train"}


@pytest.mark.parametrize(
    ("name", "labels"), [("shapes", ("colour", "shape")), ("puzzles", ("colour", "part", "letter"))]
)
def test_committed_encoder_reads_unseen_pictures(tool, name, labels):
    """A linear classifier of the frozen features, fitted to half of some validation pictures, reads the other half."""
    torch.set_num_threads(1)
    subject = tool.SUBJECTS[name]
    model = SiglipVisionModel.from_pretrained(SOURCE.parent / subject.folder / "encoder")
    pixels, classes = next(tool.labelled_batches(subject, 900, 1, "val"))
    with torch.no_grad():
        states = model(pixels, output_hidden_states=True).hidden_states[-1]
    states = torch.cat([states, torch.ones_like(states[..., :1])], -1)
    for label in labels:
        column = list(subject.labels).index(label)
        something = classes[..., column] > 0
        fit, unseen = (something & (torch.arange(len(pixels))[:, None] % 2 == part) for part in (0, 1))
        targets = torch.nn.functional.one_hot(classes[..., column]).float()
        inputs = states[fit]
        weights = torch.linalg.solve(inputs.T @ inputs + 1e-2 * torch.eye(inputs.shape[1]), inputs.T @ targets[fit])
        right = (states[unseen] @ weights).argmax(-1) == classes[..., column][unseen]
        assert right.float().mean() > 0.95, label


def test_a_token_of_the_hard_encoder_knows_its_patch_alone(tool):
    """Bit-equal whatever the other patches show."""
    model = SiglipVisionModel.from_pretrained(SOURCE.parent / "parts_hard" / "encoder")
    pixels, other = next(tool.labelled_batches(tool.SUBJECTS["puzzles"], 2, 1, "val"))[0]
    mixed = other.clone()
    pixels[:, 16:24, 24:32] = mixed[:, 16:24, 24:32] = torch.linspace(-1, 1, 8)
    with torch.no_grad():
        states = model(torch.stack([pixels, other, mixed]), output_hidden_states=True).hidden_states[-1]
    same, others = 2 * 16 + 3, [n for n in range(256) if n != 2 * 16 + 3]
    assert (states[0, same] - states[1, same]).abs().max() > 0.1
    torch.testing.assert_close(states[2, same], states[0, same], rtol=0, atol=1e-6)
    torch.testing.assert_close(states[2, others], states[1, others], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["shapes", "puzzles"])
def test_committed_tokenizer_knows_the_set(tool, name):
    """Answers are one token, no text is lost, and the chat template only ever adds to what it has rendered."""
    parts = SOURCE.parent / tool.SUBJECTS[name].folder
    tokenizer = PreTrainedTokenizerFast.from_pretrained(parts / "decoder")
    config = json.loads((parts / "decoder" / "config.json").read_text())
    assert config["vocab_size"] == len(tokenizer) and config["eos_token_id"] == tokenizer.eos_token_id
    assert all(
        len(tokenizer.tokenize(text)) == 1 for texts in tool.SUBJECTS[name].source.ANSWERS.values() for text in texts
    )
    text = "Größe? 漢字 <image>\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    turns = [{"role": role, "content": role} for role in ("system", "user", "assistant", "user", "assistant")]
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    for end in range(1, len(turns)):
        assert whole.startswith(tokenizer.apply_chat_template(turns[:end], tokenize=False))
    assert whole.startswith(tokenizer.apply_chat_template(turns[:2], tokenize=False, add_generation_prompt=True))
    files = [path for path in parts.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 5_000_000
