"""A run whose answers are asked for, and questions in files."""

import json

import pytest
import tiny
from PIL import Image

from lit_eemllm.training.fit import fit


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A run of two steps on the embedded set, and its config."""
    folder = tmp_path_factory.mktemp("run")
    tiny.write_parts(folder / "parts")
    data = tiny.write_shards(folder / "shards", train=60, val=70)
    config = tiny.config(folder / "parts", data, folder / "run", "optim.max_steps=2", "optim.val_every=2")
    fit(config)
    return config


@pytest.fixture(scope="session")
def dense_run(tmp_path_factory):
    """Likewise, of a decoder in which visual tokens query in every layer."""
    folder = tmp_path_factory.mktemp("run")
    tiny.write_parts(folder / "parts")
    data = tiny.write_shards(folder / "shards", train=60, val=30)
    options = ("model.mechanism.preset=llava", "optim.max_steps=2", "optim.val_every=2")
    config = tiny.config(folder / "parts", data, folder / "run", *options)
    fit(config)
    return config


@pytest.fixture
def files(tmp_path):
    """Rows of many forms, with images beside them."""
    (tmp_path / "images").mkdir()
    for name, colour in (("a", "red"), ("b", "blue"), ("c", "green")):
        Image.new("RGB", (40, 20 + len(name)), colour).save(tmp_path / "images" / f"{name}.png")
    rows = [
        {"id": 7, "image": "a.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red"}]},
        {"question_id": "p1", "image": "b.png", "text": "Is it blue?", "label": "yes", "category": "adversarial", "metric": "pope"},
        {"id": "sqa", "question": "Which?", "choices": ["red", "blue"], "answer": 1, "type": 3, "metric": "multiple_choice"},
        {"id": "vqa", "image": ["a.png", "c.png"], "question": "Same?", "type": "vqa", "metric": "vqa",
         "answers": [{"answer": "no"}] * 7 + [{"answer": "yes"}] * 3},
        {"image_path": "b.png", "question": "Year?", "answer": 1984, "type": "ocr"},
        {"id": "turns", "image": "a.png", "answers": ["x", "y"], "conversations": [
            {"from": "human", "value": "<image>\nA?"}, {"from": "gpt", "value": "B"}, {"from": "human", "value": "C?"}]},
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path
