"""A metric, a data source and an encoder in a user's own file: docs/my_metric.py, docs/my_source.py, as their pages tell it."""

import json
from pathlib import Path

import pytest
import tiny
from shards_util import write_quiz

from lit_eemllm import cli
from lit_eemllm.config import to_yaml
from lit_eemllm.data.check import check
from lit_eemllm.data.shards import read_shard
from lit_eemllm.data.sources import SHORT, names, register_source
from lit_eemllm.evaluation.metrics import METRICS, Truth

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(autouse=True)
def forget():
    """Whatever a test registers and imports is gone after it."""
    with tiny.forgotten_imports():
        yield


@pytest.fixture
def quiz(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A release as docs/my_source.py wants it, in the current folder."""
    monkeypatch.chdir(tmp_path)
    write_quiz(tmp_path / "quiz")
    return tmp_path / "quiz"


MAKE = ["shards", "make", "--source", "quiz", "--root", "quiz", "--out", "shards"]
IMPORT = ["--import", str(DOCS / "my_source.py")]


def test_a_source(quiz: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*MAKE, *IMPORT]) == 0
    out = capsys.readouterr().out
    assert "2 good samples (train 1, val 1)" in out and check(Path("shards")).ok
    assert "train: record 2: answer is '', expected a text" in out and "missing_image" in out
    (train,) = [json.loads(members["json"]) for _, members in read_shard(Path("shards/train-000000.tar"))]
    assert [turn["value"] for turn in train["conversations"]] == [
        f"<image>\nWhat is it?\n{SHORT}", "a cat", "And where?", "at home",
    ]  # fmt: skip
    (val,) = [json.loads(members["json"]) for _, members in read_shard(Path("shards/val-000000.tar"))]
    assert val["answers"] == ["red"] and val["conversations"][0]["value"].startswith("<image>\nRed, or blue?")
    assert json.loads(Path("shards/manifest.json").read_text())["source"] == "quiz"


def test_mistakes_with_a_source(quiz: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(MAKE)
    assert "argument --source: found 'quiz', expected alpaca or" in (err := capsys.readouterr().err)
    assert err.endswith("; one of your own needs --import FILE\n")
    assert cli.main([*MAKE[:4], *MAKE[6:], *IMPORT]) == 2
    assert capsys.readouterr().err == "error: shards make: --source quiz needs --root, the folder of the release\n"
    for name in ("quiz", "chartqa", "shapes"):
        with pytest.raises(
            ValueError, match=f"data source '{name}' is registered already; registered: alpaca, .*quiz, "
        ):
            register_source(name)(list)
    assert cli.main([*MAKE, "--splits", "test"]) == 2
    assert "quiz: no split 'test'; the release has train, val." in capsys.readouterr().err
    (quiz / "val.csv").unlink()
    assert cli.main(MAKE) == 2
    assert (
        "quiz/val.csv is not there.\n\nBelow --root::\n\ntrain.csv    picture,question,answer"
        in capsys.readouterr().err
    )


def test_a_source_is_known_only_where_it_is_imported() -> None:
    assert "quiz" not in names() and "chartqa" in names() and "shapes" in names()


def test_a_metric(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("model: {decoder: d, vision: {path: e}}\ndata: {train: t}\noptim: {lr: 1, max_steps: 1}\n")
    line = ["config", "show", str(file), "eval.metric=begins"]
    assert cli.main(line) == 2
    assert "eval.metric: found 'begins', expected anls or" in (err := capsys.readouterr().err)
    assert err.endswith("one of your own needs --import FILE\n")
    assert cli.main([*line, "--import", str(DOCS / "my_metric.py")]) == 0
    metric = METRICS["begins"]()
    metric.update(["Red, I think", "a red one", "blue"], [Truth(("red",)), Truth(("red",)), Truth(("x", "Blue"))])
    assert metric.compute().item() == pytest.approx(2 / 3)


def test_an_encoder(parts: Path, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A step of training, then an answer of what it has saved."""
    file = tmp_path / "mine.py"
    file.write_text(
        "import tiny\nfrom lit_eemllm.model import register_vision_encoder\n"
        "register_vision_encoder('mine')(type('Mine', (tiny.Patches,), {}))\n"
    )
    given = tiny.config(parts, shapes, tmp_path / "run", "optim.max_steps=1", "data.val=null")
    (tmp_path / "c.yaml").write_text(to_yaml(given))
    line = ["fit", str(tmp_path / "c.yaml"), "model.vision.encoder=mine"]
    assert cli.main(line) == 2
    assert (
        "model.vision.encoder: unknown encoder 'mine'; registered: ['qwen_vl', 'transformers']"
        in capsys.readouterr().err
    )
    with tiny.forgotten_imports():
        assert cli.main([*line, "--import", str(file)]) == 0
    ask = ["generate", str(tmp_path / "run"), "--prompt", "What?"]
    assert cli.main(ask) == 2 and f"was made with --import {file}" in capsys.readouterr().err
    assert cli.main([*ask, "--import", str(file)]) == 0
