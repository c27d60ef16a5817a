"""Converters of published data sets: each on a miniature in the release's exact form, bad records included."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lib.releases import RELEASES, chartqa, dvqa, pictures, said, scienceqa, turns, write

from lit_eemllm import cli
from lit_eemllm.data import json_rows, sources
from lit_eemllm.data.check import check
from lit_eemllm.data.json_rows import read_json
from lit_eemllm.data.shards import make, read_shard
from lit_eemllm.data.sources import SHORT, SOURCES, Question, conversations, convert, held_out, mended
from lit_eemllm.errors import SampleError, UserError
from lit_eemllm.evaluation.metrics import METRICS
from lit_eemllm.inputs.conversation import parse_conversation


def read(row: dict[str, Any]) -> list[str]:
    """What training reads of a row."""
    images = row.get("image") or []
    return [turn.text for turn in parse_conversation(row, 1 if isinstance(images, str) else len(images), "x").turns]


# --- releases in LLaVA's form


# --- captions


# --- questions


# --- text alone


# --- the tests


def rows_of(folder: Path, split: str) -> list[dict[str, Any]]:
    shards = sorted(folder.glob(f"{split}-*.tar"))
    return [json.loads(members["json"]) for shard in shards for _, members in read_shard(shard)]


def test_one_registry() -> None:
    files = {path.stem for path in sources.RECIPES.glob("*.py")}
    procedural = {spec.partition(".")[0] for spec in sources.PROCEDURAL.values()}
    assert set(SOURCES) == files - procedural and list(SOURCES) == sorted(SOURCES)
    assert set(SOURCES) == set(RELEASES), "every source has a miniature"
    for name in SOURCES:
        text = (sources.RECIPES / f"{name}.py").read_text()
        for part in ("\nFrom: ", "\nLicence", "\nBelow --root" if "Licence and layout" not in text else "layout"):
            assert part in text, (name, part)


@pytest.mark.parametrize("name", SOURCES)
def test_a_release_becomes_shards(name: str, tmp_path: Path) -> None:
    root = tmp_path / "release"
    root.mkdir()
    expected = RELEASES[name](root)
    report = convert(name, root, tmp_path / "out", shard_size=2)
    assert report.bad == expected["bad"] and report.good == expected["good"], report
    assert report.mended == expected.get("mended", {}), report
    assert check(tmp_path / "out").ok, "what was written can be trained on"
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["source"] == name and {s: p["samples"] for s, p in manifest["splits"].items()} == expected["good"]
    for split, told in expected["said"].items():
        made = rows_of(tmp_path / "out", split)
        assert [read(row) for row in made][: len(told)] == told
    for split, names in expected.get("images", {}).items():
        assert [row["image"] for row in rows_of(tmp_path / "out", split)] == names
    if "row" in expected:
        last = list(expected["said"])[1]
        first = rows_of(tmp_path / "out", last)[0]
        assert {key: first.get(key) for key in expected["row"]} == expected["row"]
        assert first.get("metric", "exact_match") in METRICS


def test_processes_write_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    chartqa(tmp_path / "root")
    for workers in (1, 2):
        convert("chartqa", tmp_path / "root", tmp_path / str(workers), shard_size=1, workers=workers)
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / n).glob("[!.]*")} for n in ("1", "2"))
    assert one == two and len(one) == 2 * 11 + 3  # shards and indices; manifest.json, report.json, dropped.jsonl


def test_options(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    dvqa(tmp_path / "root")
    report = convert("dvqa", tmp_path / "root", tmp_path / "bare", turns=1, format_prompts=False, splits=["train"])
    assert report.good == {"train": 12}
    assert said(rows_of(tmp_path / "bare", "train")[3])[0].endswith("in each group?")
    for wrong, message in (
        ({"name": "dqva"}, "found 'dqva', expected alpaca or .*; did you mean dvqa"),
        ({"splits": ["test"]}, "no split 'test'; the release has train, val"),
        ({"root": tmp_path / "gone"}, "no such folder"),
        ({"turns": 0}, "turns is 0"),
        ({"holdout": 0.1}, "holdout is 0.1"),
        ({"root": tmp_path}, r"train_qa.json is not there(?s:.*)Below --root(?s:.*)bar_train_00200000.png"),
    ):
        arguments: dict[str, Any] = {"name": "dvqa", "root": tmp_path / "root", "out": tmp_path / "x", **wrong}
        with pytest.raises(UserError, match=message):
            convert(**arguments)
    (tmp_path / "sqa").mkdir()
    scienceqa(tmp_path / "sqa")
    for pids in ({}, {"train": 3, "val": [], "test": []}, []):
        write(tmp_path / "sqa" / "pid_splits.json", pids)
        with pytest.raises(UserError, match=r"not as expected: .*(?s:.*)Below --root|found a list, expected an object"):
            convert("scienceqa", tmp_path / "sqa", tmp_path / "x")
    assert not (tmp_path / "x").exists() and not list(tmp_path.glob(".x*"))


def test_a_file_of_the_current_folder_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data may come with a data_recipes/ of their own; the converter is the shipped one all the same."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data_recipes").mkdir()
    for name in ("chartqa", "shapes"):
        (tmp_path / "data_recipes" / f"{name}.py").write_text("raise SystemExit('executed')")
    chartqa(tmp_path)
    for wanted in (["chartqa", "--root", "."], ["shapes", "--train", "1", "--val", "0"]):
        assert cli.main(["shards", "make", "--out", f"shards/{wanted[0]}", "--source", *wanted]) == 0


def test_holdout_parts_by_image(tmp_path: Path) -> None:
    names = [f"images/{i:05d}/{i}.jpg" for i in range(40)]
    pictures(tmp_path / "root", *names)
    asked = turns("<image>\nWhat?", "That.")
    rows = [
        {"id": str(n), "image": name.removeprefix("images/"), "conversations": asked}
        for n, name in enumerate(names * 2)
    ]
    write(tmp_path / "root" / "blip_laion_cc_sbu_558k.json", [*rows, {"id": "bad"}])
    report = convert("blip_laion_cc_sbu_558k", tmp_path / "root", tmp_path / "out", holdout=0.25)
    train, val = ([row["image"] for row in rows_of(tmp_path / "out", split)] for split in ("train", "val"))
    assert len(train) + len(val) == 80 and not set(train) & set(val) and 8 <= len(val) <= 32
    assert report.good.total() == 80 and report.bad == {"bad_record": 1}
    share = sum(held_out({"id": str(i)}, 0.25) for i in range(4000)) / 4000
    assert abs(share - 0.25) < 0.03


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "root").mkdir()
    chartqa(tmp_path / "root")
    make = ["shards", "make", "--source", "chartqa", "--out", str(tmp_path / "out")]
    assert cli.main(make) == 2 and "needs --root" in capsys.readouterr().err
    assert cli.main([*make, "--root", str(tmp_path / "root"), "--splits", "val,test", "--bare"]) == 0
    out = capsys.readouterr().out
    assert "8 good samples (val 4, test 4), 8 images" in out and "bad_record              4" in out
    assert "test: record 3: answer is '', expected a text: " in out
    assert "--root is the folder" not in out
    line = ["shards", "make", "--source", "shapes", "--root", str(tmp_path), "--out", str(tmp_path / "x")]
    assert (
        cli.main(line) == 2 and "--root is the folder of a published --source, one of alpaca" in capsys.readouterr().err
    )


def test_conversations_are_shared_by_neighbours_only() -> None:
    def asked(number: int, image: str = "a", form: str = SHORT, type: str | None = "t") -> Question:
        return Question(str(number), f"Q{number}", f"A{number}", (image,) if image else (), form, type=type)

    items = [asked(0), asked(1), SampleError("bad_record", "x"), asked(2, type="u"), asked(3, "b"), asked(4), asked(5, form=""),
             asked(6, ""), asked(7, "")]  # fmt: skip
    made = list(conversations(items, 10, True))
    assert made[0] is items[2], "what is refused does not wait"
    assert [row["id"] for row in made[1:]] == ["0", "3", "4", "5", "6", "7"]
    assert said(made[1]) == [f"<image>\nQ0\n{SHORT}", "A0", "Q1", "A1", "Q2", "A2"]
    assert "type" not in made[1] and "answers" not in made[1] and made[1]["image"] == "a"
    assert (made[2]["type"], made[2]["answers"]) == ("t", ["A3"]) and said(made[4]) == ["<image>\nQ5", "A5"]
    assert said(made[5]) == [f"Q6\n{SHORT}", "A6"] and "image" not in made[5]
    assert [len(row["conversations"]) // 2 for row in conversations([*items[:2], items[3]], 2, True)] == [2, 1]


@pytest.mark.parametrize(
    ("values", "expected", "changes"),
    [
        # what llava/train/train.py of LLaVA makes of the same turns
        (["What?\n<image>", "A"], ["<image>\nWhat?", "A"], []),
        (["<image>\nWhat?", "A"], ["<image>\nWhat?", "A"], []),
        (["<image>", "A"], ["<image>", "A"], []),
        (["Look: <image> what?", "A"], ["<image>\nLook:  what?", "A"], []),
        (["Hi", "A", "And <image>", "B"], ["Hi", "A", "<image>\nAnd", "B"], []),
        # two images keep their places; an escape next to the placeholder goes, others are not ours to judge
        (["<image> and <image>?", "A"], ["<image> and <image>?", "A"], []),
        (["<image>\\nWhat?", "A"], ["<image>\nWhat?", "A"], ["escaped_newline"]),
        (["What?\\n<image>", "A\\nB"], ["<image>\nWhat?", "A\\nB"], ["escaped_newline"]),
        (["\\nabla <image>", "A"], ["<image>\n\\nabla", "A"], []),
    ],
)
def test_placeholders_go_where_llava_puts_them(values: list[str], expected: list[str], changes: list[str]) -> None:
    row = mended({"id": "1", "image": "x.jpg", "conversations": turns(*values)})
    assert said(row) == expected and row.get("mended", []) == changes and row["image"] == "x.jpg"


def test_a_placeholder_in_an_answer_to_nothing_does_not_count() -> None:
    """Such a turn is dropped when the row is read."""
    answer = {"from": "gpt", "value": "an <image> here"}
    row = mended({"id": "1", "image": "x.jpg", "conversations": [answer, *turns("what is this?<image>", "a")]})
    assert row["conversations"] == [answer, *turns("<image>\nwhat is this?", "a")]
    unlike = {**row, "conversations": [answer, *turns("what?", "a")]}
    assert mended(unlike) == unlike


@pytest.mark.parametrize("way", ["rows", "source"])
def test_an_answer_to_nothing_is_not_read_whichever_way_a_row_came(way: str, tmp_path: Path) -> None:
    """LLaVA's and FastChat's training code skips a first turn that is not the human's."""
    answer = {"from": "gpt", "value": "As I said"}
    rows = [
        {"id": "1", "conversations": [answer, *turns("Go on", "Well")]},
        {"id": "2", "conversations": turns("Hi", "Hello")},
        {"id": "3", "conversations": [answer]},
        {"id": "4", "conversations": [answer, answer, *turns("Go on", "Well")]},
    ]
    write(tmp_path / "root" / "lvis_instruct4v_220k.json", rows)
    if way == "source":
        report = convert("lvis_instruct4v", tmp_path / "root", tmp_path / "out")
    else:
        report = make({"train": tmp_path / "root" / "lvis_instruct4v_220k.json"}, None, tmp_path / "out")
    assert report.good == {"train": 2} and report.bad == {"bad_conversation": 2}
    assert report.mended == {"leading_answer": 1} and "leading_answer" in str(report)
    assert [read(row) for row in rows_of(tmp_path / "out", "train")] == [["Go on", "Well"], ["Hi", "Hello"]]
    assert check(tmp_path / "out").good == {"out/train": 2}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


@given(
    values=st.lists(json_values, max_size=6),
    size=st.integers(1, 30),
    indent=st.sampled_from([None, 1]),
    under=st.booleans(),
)
def test_a_list_is_read_piece_by_piece(
    tmp_path_factory: pytest.TempPathFactory, values: list[Any], size: int, indent: int | None, under: bool
) -> None:
    """Wherever the pieces are cut, the elements are those of the standard library's parser."""
    path = tmp_path_factory.mktemp("json") / "x.json"
    document = {"info": [{"x": 1}], "rows": values, "after": 1} if under else values
    path.write_text(json.dumps(document, indent=indent, ensure_ascii=False), encoding="utf-8", errors="surrogatepass")
    whole = json.loads(path.read_text())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_rows, "_BUFFER", 60 + size if under else size)  # the key must be in the first piece
        assert list(read_json(path, "rows" if under else None)) == (whole["rows"] if under else whole)


def test_files_that_are_no_lists(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for text, message in (
        ('[{"a": 1}, {"b": ', "at element 1: "),
        ('[{"a": 1}', "at element 0: no comma and no end of the list follows it"),
        ("[{]", "not valid JSON at element 0"),
        ("[1 2]", "at element 0: no comma"),
        ("[" * 100_000, "not valid JSON at element 0"),
        ('{"data": {"a": 1}}', "expected a list, or a list 'rows' near the beginning"),
        (b"[\"\xff\"]", "not UTF-8"),
        ('[{"a": 1}]\n[{"a": 2}]', r"found '\[{\"a\": 2}\]' after its list"),
        ("[1, 2]" + " " * 2**20 + "]", r"found '\]' after its list"),
    ):  # fmt: skip
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(UserError, match=message):
            list(read_json(path, "rows"))
    path.write_text("﻿[1, 2]\n \n", encoding="utf-8")
    assert list(read_json(path)) == [1, 2]
    path.write_text('{"a": 1}\n\n{broken\n{"a": 2}', encoding="utf-8")
    assert list(read_json(path)) == [{"a": 1}, "{broken\n", {"a": 2}]


# --- really run

REAL = {  # by source and folder: rows by split, and images
    ("openstax", "openstax"): ({"train": 5454, "val": 344}, 5798),
    ("nlvr", "nlvr"): ({"train": 3956, "val": 990}, 4946),
    ("nlvr", "nlvr_boxes"): ({"train": 600, "val": 200}, 2400),
    ("grocery", "grocery"): ({"train": 1456, "val": 324}, 1780),
    ("grocery", "grocery_text"): ({"train": 81}, 0),
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "folder"), REAL)
def test_real_sets(name: str, folder: str, shared: Path, tmp_path: Path) -> None:
    splits, images = REAL[name, folder]
    report = convert(name, shared / "data" / folder, tmp_path / "out", splits=list(splits))
    assert report.good == splits and report.images == images and report.ok and not report.mended
    assert check(tmp_path / "out").ok
    given = json.loads((shared / "data" / folder / "train.json").read_text())
    assert [row["conversations"] for row in rows_of(tmp_path / "out", "train")] == [
        row["conversations"] for row in given
    ]


@pytest.mark.slow
def test_easy_vqa_of_the_package_index(tmp_path: Path) -> None:
    try:  # by its name in the index: `easy_vqa` may also be the recipe
        root = Path(str(importlib.metadata.distribution("easy-vqa").locate_file("easy_vqa/data")))
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs the package easy-vqa: pip install easy-vqa")
    report = convert("easy_vqa", root, tmp_path / "out")
    assert report.good == {"train": 5491, "val": 9673} and report.ok
    train = rows_of(tmp_path / "out", "train")
    pairs = [(row["image"], *pair) for row in train for pair in zip(said(row)[::2], said(row)[1::2], strict=True)]
    clean = [
        (image, text.removeprefix("<image>\n").removesuffix(f"\n{SHORT}"), answer) for image, text, answer in pairs
    ]
    given = json.loads((root / "train" / "questions.json").read_text())
    assert (
        clean == [(f"train/images/{image}.png", text, answer) for text, answer, image in given] and len(clean) == 38575
    )
    answers = {answer for row in rows_of(tmp_path / "out", "val") for answer in row["answers"]}
    assert len(answers) == 13
