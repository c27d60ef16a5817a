"""Where questions come from: shards, rows of files, suites; what is unusable is named by its reason."""

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from lib.questions import file_set, of_shards, picture, read

from lit_eemllm.config import load_config
from lit_eemllm.data import shards
from lit_eemllm.errors import ConfigError, SampleError, UserError
from lit_eemllm.evaluation import sets
from lit_eemllm.evaluation.questions import make_question
from lit_eemllm.evaluation.sets import QuestionSet, question_sets


def test_some_questions_are_spread_over_the_set(trained, monkeypatch):
    """Ten of seventy: every seventh. Two of them are unusable; the others are neither parsed nor kept."""
    source = of_shards(trained)
    keys = [q.conversation.key for q in read(source)[0]]
    parsed = []

    def read_row(key, members, real=sets.read_row):
        parsed.append(key)
        row, images = real(key, members)
        if key == keys[14]:
            raise SampleError("bad_image", "broken")
        return (row | {"conversations": row["conversations"][:1]} if key == keys[21] else row), images

    monkeypatch.setattr(sets, "read_row", read_row)
    questions, report = read(source, 10)
    assert parsed == keys[::7]
    assert [q.conversation.key for q in questions] == [key for key in keys[::7] if key not in (keys[14], keys[21])]
    assert report.bad == {"bad_image": 1, "no_answer": 1}
    assert len(read(source, 1000)[0]) == 68
    monkeypatch.setattr(sets, "read_shard", None)
    assert read(source, 0)[0] == []


def test_shards_name_images_and_keep_equal_ones_once(files):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red"}]
    rows = [{"image": f"{name}.png", "conversations": turns, "answers": ["red", "rot"]} for name in "aba"]
    (files / "val.json").write_text(json.dumps(rows))
    shards.make({"val": files / "val.json"}, files / "images", files / "shards")
    questions, _ = read(QuestionSet("x", files / "shards", None, None, 8))
    assert [q.pictures[0].name for q in questions] == [f"val-0000000{i}.0.png" for i in range(3)]
    assert [(q.number, q.metric, q.truth.answers) for q in questions] == [
        (i, "exact_match", ("red", "rot")) for i in range(3)
    ]
    assert questions[0].pictures[0].source is questions[2].pictures[0].source != questions[1].pictures[0].source


def test_rows_of_every_form(files):
    questions, report = read(file_set(files))
    assert not report.bad and report.images == 6
    seven, pope, sqa, vqa, ocr, turns = questions
    assert (seven.conversation.key, seven.prompt, seven.truth.answers, seven.type) == (
        "7",
        "<image>\nWhat?",
        ("red",),
        "all",
    )
    assert (pope.prompt, pope.truth.answers, pope.type, pope.metric) == (
        "<image>\nIs it blue?",
        ("yes",),
        "adversarial",
        "pope",
    )
    assert (sqa.prompt, sqa.truth.answers, sqa.truth.choices) == ("Which?\nA. red\nB. blue", ("B",), ("red", "blue"))
    assert (sqa.type, sqa.pictures) == ("3", ())
    assert (vqa.prompt, vqa.truth.answers) == ("<image>\n<image>\nSame?", ("no",) * 7 + ("yes",) * 3)
    assert [p.name for p in vqa.pictures] == ["a.png", "c.png"] and vqa.pictures[0] is seven.pictures[0]
    assert (ocr.conversation.key, ocr.truth.answers, ocr.metric) == ("row 4", ("1984",), "exact_match")
    assert vqa.images == [(files / "images" / name).read_bytes() for name in ("a.png", "c.png")]
    assert turns.prompt == "C?" and turns.truth.answers == ("x", "y") and len(turns.conversation.turns) == 4
    assert seven.pictures[0].size == (40, 21) and vqa.truth.pair != pope.truth.pair == ocr.truth.pair

    asked = read(file_set(files, prompt="Look. {question}\nShortly."))[0]
    assert asked[0].prompt == "<image>\nLook. What?\nShortly." and asked[5].prompt == "Look. C?\nShortly."
    assert asked[2].prompt == "Look. Which?\nA. red\nB. blue\nShortly."
    assert [q.conversation.key for q in read(file_set(files), 3)[0]] == ["7", "sqa", "row 4"]


def test_a_suite_chooses_the_split(files, trained):
    """As published scores are on `test` here and on `val` there."""
    for split in ("val", "test"):
        turns = [{"from": "human", "value": f"{split}?"}, {"from": "gpt", "value": split}]
        (files / f"{split}.json").write_text(json.dumps([{"conversations": turns}]))
    shards.make({split: files / f"{split}.json" for split in ("val", "test")}, files / "images", files / "shards")
    (files / "suite.yaml").write_text(
        "sets:\n  default: {data: shards}\n  test: {data: shards, split: test}\n  none: {data: shards, split: gone}\n"
        "  rows: {data: rows.jsonl, split: test}\n"
    )
    config = replace(trained, eval=replace(trained.eval, suite=str(files / "suite.yaml")))
    with pytest.raises(ConfigError) as caught:
        question_sets(config)
    assert re.search(r"sets.none.data: .*no split 'gone' .*'test': 1", str(caught.value))
    assert "sets.rows.split: " in str(caught.value) and "2 mistakes" in str(caught.value)
    (files / "suite.yaml").write_text("sets:\n  default: {data: shards}\n  test: {data: shards, split: test}\n")
    assert [read(one)[0][0].prompt for one in question_sets(config)] == ["val?", "test?"]


def test_the_suite_and_the_row_of_the_documentation():
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    (suite, _) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert not [text for body in yaml.safe_load(suite)["sets"].values() for text in sets.wrong_values(body)]
    (row,) = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    asked = make_question(json.loads(row), [picture(b"x")], "1")
    assert (asked.metric, asked.type, asked.truth.answers) == ("mme", "existence", ("Yes",))
    assert sets.make_metric("mme").problem(asked.truth) is None
    assert set(re.findall(r"`(\w+)`", page.partition("| field | |")[2].partition("\n\n")[0])) == {
        "conversations", "question", "text", "image", "image_path", "answers", "answer", "label", "choices", "type", "category",
        "metric", "id", "question_id", "images",
    }  # fmt: skip


def test_unusable_rows_are_named_by_reason(files, tmp_path):
    (files / "images" / "broken.png").write_bytes(b"no image")
    (files / "images" / "out.png").symlink_to(files / "rows.jsonl")
    good = {"question": "What?", "answer": "x"}
    bad = {
        "path_escape": [{**good, "image": "../rows.jsonl"}, {**good, "image": "/etc/passwd"}, {**good, "image": "out.png"}],
        "missing_image": [{**good, "image": "d.png"}],
        "bad_image": [{**good, "image": "broken.png"}],
        "bad_json": ["text", 3],
        "bad_question": [{"answer": "x"}, {"question": " ", "answer": "x"}, {**good, "answer": [True]},
                         {**good, "answers": ["\ud800"]}, {**good, "type": "\x1b[31m"}, {**good, "metric": 3},
                         {**good, "choices": ["x"] * 27}],
        "no_answer": [{"question": "What?"}, {"question": "What?", "choices": ["a", "b"], "answer": 2}],
        "unknown_metric": [{**good, "metric": "bleu"}],
        "bad_truth": [{**good, "metric": "pope"}, {**good, "metric": "multiple_choice", "choices": ["a", "b"]}],
        "bad_conversation": [{"conversations": "x"}, {"conversations": []}, {**good, "type": ["x"]}, {**good, "image": [3]}],
        "missing_video": [{**good, "video": "a.mp4"}],
        "unread_key": [{**good, "audio": "a.wav"}, {**good, "imgae": "a.png"}],
        "placeholder_mismatch": [{**good, "question": "<image> What?"}],
    }  # fmt: skip
    lines = [json.dumps(row) for rows in bad.values() for row in rows]
    (files / "bad.jsonl").write_text("\n".join([*lines, json.dumps(good)]))
    questions, report = read(file_set(files, "bad.jsonl"))
    assert len(questions) == 1
    assert report.bad == {reason: len(rows) for reason, rows in bad.items()}
    (files / "bad.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"none of its questions can be asked(.|\n)*unknown_metric"):
        read(file_set(files, "bad.jsonl"))
    (files / "bad.jsonl").write_text("")
    with pytest.raises(UserError, match="none of its questions"):
        read(file_set(files, "bad.jsonl"))


def test_which_metric(files, trained):
    """The suite's, before eval.metric, before the row's own, before exact match; and one for all questions of a type."""
    (files / "suite.yaml").write_text(
        "sets:\n  own: {data: rows.jsonl, images: images}\n  said: {data: rows.jsonl, images: images, metric: anls}\n"
    )
    config = replace(trained, eval=replace(trained.eval, suite=str(files / "suite.yaml")))
    own, said = question_sets(config)
    assert Counter(q.metric for q in read(own)[0]) == {"exact_match": 3, "pope": 1, "multiple_choice": 1, "vqa": 1}
    assert {q.metric for q in read(said)[0]} == {"anls"}
    own, said = question_sets(replace(config, eval=replace(config.eval, metric="ocrbench")))
    assert {q.metric for q in read(own)[0]} == {"ocrbench"} and {q.metric for q in read(said)[0]} == {"anls"}
    rows = [{"question": "What?", "answer": "x", "metric": name} for name in ("vqa", "anls")]
    (files / "mixed.json").write_text(json.dumps(rows))
    with pytest.raises(UserError, match="questions of type 'all' ask for several metrics: anls, vqa; set"):
        read(file_set(files, "mixed.json"))


def test_a_suite_names_all_its_mistakes(files, trained):
    (files / "suite.yaml").write_text("""
sets:
  gone: {data: none.json, metric: bleu}
  shards: {data: images}
  escapes: {data: ../x.json, images: ../y}
  typo: {data: rows.jsonl, imges: images, max_new_tokens: 0, prompt: [x]}
  prompts: {data: rows.jsonl, prompt: "Say {q}"}
  a/b: {data: rows.jsonl}
  nothing:
""")
    with pytest.raises(ConfigError) as caught:
        question_sets(replace(trained, eval=replace(trained.eval, suite=str(files / "suite.yaml"))))
    said = str(caught.value)
    for part in (
        "none.json is not there", "sets.gone.metric: found 'bleu', expected exact_match or multiple_choice", "images: no shards (.tar) in it",
        "sets.escapes.data: '../x.json' leaves the suite's folder", "sets.escapes.images: '../y' leaves", "sets.typo.imges: unknown key",
        "sets.typo.max_new_tokens: found 0, expected 1 or more", "sets.typo.prompt: found ['x'], expected a text",
        "sets.prompts.prompt: 'Say {q}': expected a text with {question}", "'sets.a/b': expected a name", "sets.nothing: found None",
    ):  # fmt: skip
        assert part in said, part
    for text, part in (
        ("x: 1", "expected one key, sets"),
        ("sets: !!python/object/apply:os.getcwd []", "nothing was executed"),
    ):
        (files / "suite.yaml").write_text(text)
        with pytest.raises(UserError, match=part):
            question_sets(replace(trained, eval=replace(trained.eval, suite=str(files / "suite.yaml"))))


def test_keys_of_the_configuration_that_contradict_each_other(trained):
    base = ["model.decoder=x", "model.vision.path=x", "data.train=x", "optim.lr=1", "optim.max_steps=1"]
    with pytest.raises(ConfigError, match=r"eval.suite: a suite names its own data"):
        load_config([], [*base, "eval.suite=a.yaml", "eval.data=b.json"])
    with pytest.raises(ConfigError, match=r"eval.images: belongs to the rows of eval.data"):
        load_config([], [*base, "eval.images=b"])
    with pytest.raises(ConfigError, match=r"eval.metric: found 'bleu', expected anls or cider"):
        load_config([], [*base, "eval.metric=bleu"], checks=[cli_checks()])
    with pytest.raises(ConfigError, match=r"set eval.data, eval.suite or data.val"):
        question_sets(load_config([], base))


def cli_checks():
    from lit_eemllm.names import check_names

    return check_names
