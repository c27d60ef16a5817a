"""Rows in the forms of LLaVA, LLaMA-Factory, ms-swift and TRL: the same conversation, and an error by key for what is not read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from shards_util import encoder, picture, write_tar

from lit_eemllm.data.check import check
from lit_eemllm.data.shards import make, prepare
from lit_eemllm.errors import SampleError, UserError
from lit_eemllm.evaluation.sets import QuestionSet, read_questions
from lit_eemllm.inputs.conversation import IMAGE, parse_conversation
from lit_eemllm.inputs.rows import as_llava, paths_of

SAID = [("human", f"{IMAGE}\nWhat? {IMAGE}"), ("gpt", "red"), ("human", "Sure?"), ("gpt", "yes")]
LLAVA = {"image": ["a.png", "b/c.png"], "conversations": [{"from": who, "value": text} for who, text in SAID]}
MESSAGES = [{"role": {"human": "user", "gpt": "assistant"}[who], "content": text} for who, text in SAID]
PARTS = [{"type": "image"}, {"type": "text", "text": "What? "}, {"type": "image", "text": None}]
FORMS: dict[str, dict[str, Any]] = {
    "LLaVA": LLAVA,
    "LLaMA-Factory": {"images": LLAVA["image"], "conversations": LLAVA["conversations"], "system": "", "tools": ""},
    "LLaMA-Factory, as OpenAI": {"images": LLAVA["image"], "messages": MESSAGES},
    "ms-swift": {"images": [{"path": "a.png", "bytes": None}, {"path": "b/c.png"}], "messages": MESSAGES, "videos": []},
    "TRL": {"images": LLAVA["image"], "messages": [{"role": "user", "content": PARTS}, *MESSAGES[1:]]},
    "paths in parts": {"messages": [{"role": "user", "content": [
        {"type": "image", "image": "a.png"}, PARTS[1], {"type": "image_url", "image_url": {"url": "b/c.png"}}]}, *MESSAGES[1:]]},
    "llava-instruct-mix-vsft": {"images": LLAVA["image"], "messages": [{"role": "user", "content": [
        {"index": 0, "text": None, "type": "image"}, {"index": None, "text": "What? ", "type": "text"},
        {"index": 1, "text": None, "type": "image"}]}, *MESSAGES[1:]]},
    "nothing said": {**LLAVA, "messages": [], "tools": "[]", "videos": "{}", "image_path": "[]", "history": [], "img": "[]"},
    "nothing said in messages": {"images": LLAVA["image"], "conversations": [], "messages": [
        {**message, "tool_calls": [], "name": ""} for message in MESSAGES]},
    "paths from a root": {**LLAVA, "image_path": ["/d/a.png", "/d/b/c.png"]},
    "text in parts": {"images": LLAVA["image"], "messages": [
        MESSAGES[0], {"role": "assistant", "content": [{"type": "text", "text": "red"}]}, *MESSAGES[2:]]},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_conversation(form: str) -> None:
    row = as_llava({"id": 3, **FORMS[form], "source": "web"}, "k")
    assert paths_of(row) == LLAVA["image"] and row["id"] == 3 and row["source"] == "web" and "mended" not in row
    assert [(turn.role, turn.text) for turn in parse_conversation(row, 2, "k").turns] == SAID
    assert as_llava(row, "k") == row


def test_pictures_that_no_placeholder_shows_go_before_the_first_question() -> None:
    bare = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "What?"},
        {"role": "assistant", "content": "red"},
    ]
    for row in (
        {"images": ["a.png", "b.png"], "messages": bare},
        {"images": ["a.png", "b.png"], "system": "s", "conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "red"}]},
    ):  # fmt: skip
        found = as_llava(row, "k")
        assert [turn.text for turn in parse_conversation(found, 2, "k").turns] == [
            "s",
            f"{IMAGE}\n{IMAGE}\nWhat?",
            "red",
        ]
        assert found["mended"] == ["placeholder"]
    of_shard = as_llava({"messages": bare}, "k", members=1)
    assert of_shard["conversations"][1]["value"] == f"{IMAGE}\nWhat?"
    one = as_llava(
        {"image": "a.png", "conversations": LLAVA["conversations"][2:]}, "k"
    )  # LLaVA's own rows are taken at their word
    with pytest.raises(SampleError, match="0 <image> placeholders in the text but 1 images"):
        parse_conversation(one, 1, "k")


TEXT = {"conversations": LLAVA["conversations"][2:]}


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({**TEXT, "imgae": "a.png"}, "imgae"),
        ({**TEXT, "Images": ["a.png"]}, "Images"),
        ({**TEXT, "img_path": "cat"}, "img_path"),
        ({**TEXT, "file": "scans/1.TIFF"}, "file"),
        ({**TEXT, "picture": {"bytes": "…"}}, "picture"),
        ({**TEXT, "video": "a.mp4", "videos": ["b.mp4"]}, "videos"),
        ({**TEXT, "video_path": "a.mp4"}, "video_path"),
        ({**TEXT, "audios": ["a.wav"]}, "audios"),
        ({**TEXT, "rejected_response": "no"}, "rejected_response"),
        ({**TEXT, "tools": "[{}]"}, "tools"),
        ({**LLAVA, "images": ["c.png"]}, "images"),
        ({**TEXT, "messages": MESSAGES[2:]}, "messages"),
        ({**TEXT, "system": 7}, "system"),
        ({"images": ["a.png", {"bytes": "…"}], "messages": MESSAGES}, "bytes"),
        ({"messages": [{"role": "user", "content": [{"type": "audio", "audio": "a.wav"}]}]}, "audio"),
        ({"messages": [{"role": "user", "content": [{"type": "video", "video": "a.mp4", "fps": 2}]}]}, "fps"),
        ({"videos": ["b.mp4"], "messages": [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}]}, "videos"),
        ({"messages": [{**MESSAGES[2], "tool_calls": [{"id": 1}]}, MESSAGES[3]]}, "tool_calls"),
        ({**LLAVA, "image_path": ["/d/b/c.png", "/d/a.png"]}, "image_path"),
        ({**LLAVA, "image_path": ["/d/a.png"]}, "image_path"),
        ({"images": ["a.png", "b.png"], "messages": [{"role": "user", "content": [
            {"type": "image", "index": 1}, {"type": "image", "index": 0}]}]}, "index"),
        ({**TEXT, "image_base64": "iVBORw0KGgo" * 20}, "image_base64"),
        ({**TEXT, "img_link": "http://a.org/3"}, "img_link"),
        ({**TEXT, "Video": "cat"}, "Video"),
        ({"messages": [MESSAGES[2], {**MESSAGES[3], "loss": False}]}, "loss"),
        ({"images": ["z.png"], "messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}]}, "images"),
    ],
)  # fmt: skip
def test_what_is_not_read_is_an_error_by_its_key(row: dict[str, Any], named: str) -> None:
    with pytest.raises(SampleError, match=f"'k'.*'{named}'") as caught:
        as_llava(row, "k")
    assert caught.value.reason == "unread_key"


@pytest.mark.parametrize(
    "row",
    [{"messages": 7}, {"messages": ["x"]}, {"messages": [{"role": "tool", "content": "x"}]}, {"messages": [{"role": "user"}]},
     {"messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}]}, {**TEXT, "image": [3]}],
)  # fmt: skip
def test_what_has_the_wrong_form_is_a_bad_conversation(row: dict[str, Any]) -> None:
    with pytest.raises(SampleError, match="'k'") as caught:
        as_llava(row, "k")
    assert caught.value.reason == "bad_conversation"


def test_other_fields_stay_as_they_are() -> None:
    row = {**TEXT, "id": "a.png", "model": "gpt4", "page": "3", "message": "hello", "image": None, "has_image": False, "image_id": 3,
           "usage": "x", "source": {"name": "web"}, "image_size": [3, 4], "video": "", "url": "http://a.org",
           "is_image": "no", "image_ids": "000", "image_name": "none", "pixels": "12", "photos_of": ["cats"]}  # fmt: skip
    assert as_llava(row, "k") == {name: value for name, value in row.items() if name not in ("image", "video")}
    with_picture = {**LLAVA, "image_url": "http://a.org/a.png", "thumbnail": "t.jpg"}
    assert as_llava(with_picture, "k") == with_picture
    question = {"question": "What?", "answer": "red", "image_path": "a.png"}
    assert as_llava(question, "k") == {"question": "What?", "answer": "red", "image": ["a.png"]}


@pytest.mark.parametrize("said", [{"image": True}, {"images": 2}, {"image": 0, "image_path": 1.0}])
def test_beside_pictures_a_number_is_no_path(said: dict[str, Any]) -> None:
    turns = LLAVA["conversations"]
    assert as_llava({"conversations": turns, **said}, "k", members=2) == {"conversations": turns}
    if all(said.values()):
        with pytest.raises(SampleError, match="expected a path"):
            as_llava({"conversations": turns, **said}, "k")


def test_empty_messages_leave_a_row_as_it_is() -> None:
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "red"}]
    row = {"image": "a.png", "conversations": turns}
    assert as_llava({**row, "messages": []}, "k") == row


def test_every_verb_reads_the_same_rows(tmp_path: Path) -> None:
    (tmp_path / "images" / "b").mkdir(parents=True)
    for number, name in enumerate(LLAVA["image"]):
        (tmp_path / "images" / name).write_bytes(picture(number))
    content = [*FORMS.values(), {**TEXT, "imgae": "a.png"}, {**TEXT, "video_file": "a.mp4"}]
    (tmp_path / "rows.json").write_text(json.dumps(content))
    report = make({"train": tmp_path / "rows.json"}, tmp_path / "images", tmp_path / "made")
    assert report.good == {"train": len(FORMS)} and report.images == 2 * len(FORMS) and report.bad == {"unread_key": 2}
    assert "'imgae'" in str(report) and "'video_file'" in str(report)
    checked = check(tmp_path / "made", encoder())
    assert checked.ok and checked.images == report.images
    asked, told = read_questions(QuestionSet("q", tmp_path / "rows.json", tmp_path / "images", None, 8), None, 10_000)
    assert len(asked) == len(FORMS) and told.bad == {"unread_key": 2} and told.images == report.images
    assert {(q.prompt, q.truth.answers) for q in asked} == {("Sure?", ("yes",))}
    # shards of other tools: the row is read in any form, and a picture that does not come with it is missed
    members = {f"{i}.png": picture(i) for i in range(2)}
    rows = {**FORMS, "forgotten": {**TEXT, "image": "a.png"}, "typo": {**TEXT, "imgae": "a.png"}}
    found = [{"json": json.dumps(row).encode(), **(members if name in FORMS else {})} for name, row in rows.items()]
    write_tar(tmp_path / "foreign" / "a.tar", {f"k{i}": sample for i, sample in enumerate(found)})
    prepare(tmp_path / "foreign")
    foreign = check(tmp_path / "foreign", encoder())
    assert foreign.good.total() == len(FORMS) and foreign.bad == {"missing_image": 1, "unread_key": 1}
    (tmp_path / "only.json").write_text(json.dumps([{**TEXT, "imgae": "a.png"}]))
    with pytest.raises(UserError, match=r"no usable row(?s:.*)'imgae'"):
        make({"train": tmp_path / "only.json"}, tmp_path / "images", tmp_path / "none")
