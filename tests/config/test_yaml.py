"""The one reader of YAML: what a text stands for, and that configurations, sweeps, recipes and suites refuse the same."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_eemllm.config import load_config, strict_yaml
from lit_eemllm.data.recipe import read_recipe
from lit_eemllm.errors import UserError
from lit_eemllm.evaluation.sets import read_suite
from lit_eemllm.sweep.spec import read_sweep

READERS = {
    "configuration": lambda path: load_config([path]),
    "sweep": read_sweep,
    "recipe": lambda path: read_recipe(path, "train"),
    "suite": lambda path: read_suite(path, None, 32),
}


@pytest.fixture(params=["as installed", "Python's parser"])
def _parser(request, monkeypatch) -> None:
    if request.param == "Python's parser":
        monkeypatch.setattr(strict_yaml, "_Fast", yaml.SafeLoader)


@pytest.mark.usefixtures("_parser")
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1e-3", 0.001), ("1.5", 1.5), (".5", 0.5), ("1_000", 1000), ("-7", -7), (".inf", float("inf")), ("", None), ("~", None),
        ("no", False), ("On", True), ("1:30", "1:30"), ("0123", "0123"), ("0x1f", "0x1f"), ("2020-01-01", "2020-01-01"),
        ("'1'", "1"), ('"\\u00e9"', "é"), ("é😀", "é😀"), ("{a: , b: [1, x]}", {"a": None, "b": [1, "x"]}), ("1: a\nb: {}", {1: "a", "b": {}}),
        ("<<: a", {"<<": "a"}), ("= ", "="), ("? a\n: b", {"a": "b"}), ("a: |\n  b\n  c\n", {"a": "b\nc\n"}),
    ],
)  # fmt: skip
def test_values(text: str, expected: Any) -> None:
    for given in (text, text.encode()):
        found = strict_yaml.parse(given)
        assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ("a: &x 1\nb:\n  - *x\n", 3, "aliases (*name) are not allowed"),
        (
            "a: 1\nb: !!python/object/apply:os.system [touch ran]\n",
            2,
            "the tag tag:yaml.org,2002:python/object/apply:os",
        ),
        ("a: !!str 1\n", 1, "the tag tag:yaml.org,2002:str is not allowed"),
        ("a:\n  " + "[" * 20 + "]" * 20, 2, "more than 20 levels of nesting"),
        ("seed: 1\na: 1\nseed: 1\n", 3, "set twice"),
        ("a: 1\n[b]: 1\n", 2, "expected a word before the colon"),
        ("a: {b\nc: ]", 2, "expected ',' or '}', but got ':'"),
        ("a: 1\n---\nb: 1\n", 2, "but found another document"),
        ("a: \x00", None, "special characters are not allowed"),
    ],
)
def test_all_refuse_the_same_and_say_where(tmp_path, monkeypatch, kind, text, line, problem) -> None:
    monkeypatch.chdir(tmp_path)
    file = Path("x.yaml")
    file.write_text(text)
    with pytest.raises(UserError) as error:
        READERS[kind](file)
    told = [part for part in str(error.value).splitlines() if problem in part]
    assert len(told) == 1 and (f"x.yaml:{line}: " if line else "x.yaml: ") in told[0], error.value
    assert not Path("ran").exists()


def test_what_is_written_is_read_back() -> None:
    """By this reader and by standard YAML; texts that look like other things most of all."""
    draw = random.Random(0)
    texts = [
        "1e3",
        "1.",
        "1:30",
        "0o7",
        "yes",
        "null",
        "~",
        "",
        "=",
        "<<",
        "2020-01-01",
        "- a",
        "a: b",
        "#",
        "${out}",
        "é😀",
        " ",
        "*a",
    ]
    texts += ["".join(draw.choices("0123456789eE+-._:xno ~'\"\n", k=draw.randint(1, 5))) for _ in range(300)]
    values = {
        "texts": texts,
        "keys": {text: number for number, text in enumerate(texts)},
        "numbers": [1e-7, 1e22, -0.5, 3, True, None],
    }
    for style in ({}, {"default_flow_style": True, "width": float("inf")}):
        text = strict_yaml.dump(values, **style)
        assert strict_yaml.parse(text) == yaml.safe_load(text) == values
