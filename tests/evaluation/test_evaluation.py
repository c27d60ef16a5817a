"""Evaluation: sources, scores and controls against a model whose answers are known, kills, ranks, and the whole journey."""

import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
import yaml
from lib.processes import Started, run_command
from PIL import Image

from lit_eemllm import cli
from lit_eemllm.config import load_config
from lit_eemllm.data import shards
from lit_eemllm.errors import CheckpointError, ConfigError, SampleError, UserError
from lit_eemllm.evaluation import cost, run, sets
from lit_eemllm.evaluation.asking import Answers, in_batches, start_ranks
from lit_eemllm.evaluation.gallery import extremes, write_gallery
from lit_eemllm.evaluation.loss import losses, with_moved_images
from lit_eemllm.evaluation.metrics import Truth
from lit_eemllm.evaluation.pictures import draw_samples
from lit_eemllm.evaluation.questions import Picture, Question, make_question, shuffle_images
from lit_eemllm.evaluation.scoring import Answered, score
from lit_eemllm.evaluation.sets import QuestionSet, question_sets, read_questions
from lit_eemllm.evaluation.text import normalise
from lit_eemllm.inputs.chat import Conversation, Turn
from lit_eemllm.report import read_run
from lit_eemllm.terminal import visible
from lit_eemllm.training.fit import fit


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two steps on the embedded set, and its config."""
    folder = tmp_path_factory.mktemp("run")
    tiny.write_parts(folder / "parts")
    data = tiny.write_shards(folder / "shards", train=60, val=70)
    config = tiny.config(folder / "parts", data, folder / "run", "optim.max_steps=2", "optim.val_every=2")
    fit(config)
    return config


def picture(data):
    return Picture(hashlib.sha256(data).hexdigest(), "a.png", (16, 16), data)


def question(key, kind, images, truth="x", metric="exact_match", number=0, **more):
    turns = (Turn("human", "<image>" * len(images) + "what?"), Turn("gpt", truth))
    conversation = Conversation(key, turns, len(images), kind)
    return Question(conversation, Truth((truth,), type=kind, **more), tuple(map(picture, images)), metric, number)


def test_shuffled_images_come_from_another_question_of_the_type():
    questions = [question(f"{kind}{i}", kind, [f"{kind}{i}{j}".encode() for j in range(n)])
                 for kind, n in (("a", 1), ("b", 2), ("text", 0)) for i in range(9)]  # fmt: skip
    questions.append(question("lonely", "c", [b"c"]))
    shuffled = shuffle_images(questions, seed=0)
    own = {q.conversation.key: q.images for q in questions}
    assert sorted(q.conversation.key for q in shuffled) == sorted(f"{k}{i}" for k in "ab" for i in range(9))
    for q in shuffled:
        assert q.images != own[q.conversation.key] and q.images[0].decode()[0] == q.type
    assert Counter(q.images[0] for q in shuffled) == Counter(q.images[0] for q in questions if q.type in "ab")


@pytest.mark.parametrize(
    ("pictures", "moved"), [("AABB", 4), ("AAABBCD", 7), ("ABABACACB", 9), ("AAAB", 2), ("AAA", 0)]
)
@pytest.mark.parametrize("seed", range(5))
def test_no_question_keeps_a_picture_that_others_share(pictures, moved, seed):
    """Four of "AAAB" cannot all move: one of the A gets B, B gets A, two stay out."""
    questions = [question(str(i), "a", [picture.encode()]) for i, picture in enumerate(pictures)]
    shuffled = shuffle_images(questions, seed)
    assert len({q.conversation.key for q in shuffled}) == len(shuffled) == moved
    assert all(q.images != questions[int(q.conversation.key)].images for q in shuffled)


def test_each_control_pass_shuffles_anew():
    questions = [question(str(i), "a", [bytes([i])]) for i in range(20)]
    passes = [{q.conversation.key: q.images for q in shuffle_images(questions, seed)} for seed in (1, 2, 1)]
    assert passes[0] == passes[2] != passes[1]


def test_losses_by_hand():
    """The spy's loss of a pack: image i counts i + 1 times its grey value. Tokens: text tokens that follow text.

    Pack 1, a document an image, greys 1 2 3: 14 with the right images; moved by one, 3 1 2: 11; 2 + 1 + 3 tokens.
    Pack 2, two documents of two images, 1 2 1 3: a move by two puts 1 3 1 2, where a 1 meets a 1, so it is left out.
    Pack 3, greys 1 1 2 2: a move by one leaves a 1 at a 1, by two gives 2 2 1 1: 17 and 13; 1 token each.
    """

    def pack(documents, greys):
        batch = tiny.pack(documents)
        values = torch.tensor(greys)[:, None, None, None] * torch.ones(1, 3, 2, 2)
        return replace(batch, pixel_values=values if greys else None)

    packs = [
        pack([[5]], []),
        pack([[3, 0], [2, 0], [4, 0]], [1.0, 2.0, 3.0]),
        pack([[2, 0], [2, 0], [2, 0]], [4.0, 4.0, 4.0]),
        pack([[2, 0, 0], [2, 0, 0]], [1.0, 2.0, 1.0, 3.0]),
        pack([[2, 0, 2, 0, 2], [2]], [1.0, 2.0]),
        pack([[2, 0]] * 4, [1.0, 1.0, 2.0, 2.0]),
        pack([[2, 0]] * 2, [8.0, 9.0]),
    ]
    seen = []

    def packed_loss(batch):
        seen.append(batch.pixel_values[:, 0, 0, 0].tolist())
        return sum((i + 1) * pixels[0, 0, 0] for i, pixels in enumerate(batch.pixel_values))

    model = SimpleNamespace(device="cpu", packed_loss=packed_loss)
    found = losses(model, packs, 2)
    assert seen == [[1, 2, 3], [3, 1, 2], [1, 1, 2, 2], [2, 2, 1, 1]]
    expected = {"loss": (14 + 17) / 10, "loss_shuffled_images": (11 + 13) / 10, "loss_tokens": 10}
    assert found == pytest.approx(expected)
    nothing = losses(model, packs[:1], 2)
    assert nothing == {"loss": None, "loss_shuffled_images": None, "loss_tokens": 0}


def test_moved_images_leave_their_document():
    packs = [tiny.pack(documents) for documents in ([[3, 0, 4], [2, 0, 1, 0, 3], [0, 2]], [[3, 0, 2], [4]], [[5]])]
    ((batch, moved),) = with_moved_images(packs)
    owner = [0, 1, 1, 2]
    origin = [next(i for i, own in enumerate(batch.pixel_values) if own.equal(image)) for image in moved.pixel_values]
    assert sorted(origin) == [0, 1, 2, 3]
    assert all(owner[i] != document for i, document in zip(origin, owner, strict=True))


# --- where questions come from


def of_shards(config, **more):
    (found,) = question_sets(config)
    return replace(found, **more)


def read(source, most=None):
    return read_questions(source, most, 10**6)


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


def file_set(files, name="rows.jsonl", **more):
    return QuestionSet("rows", files / name, files / "images", None, 8, **more)


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
        "unread_key": [{**good, "video": "a.mp4"}, {**good, "imgae": "a.png"}],
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
    from lit_eemllm.config.keys import check_names

    return check_names


# --- pictures


@pytest.mark.parametrize(
    ("prompt", "truth", "said"), [("$\\frac{$", "x", "x"), ("x", "$_$", "x"), ("x", "x", "$\\x$\x00")]
)
def test_a_dollar_is_no_formula(prompt, truth, said, tmp_path):
    asked = Question(Conversation("", (Turn("human", prompt), Turn("gpt", truth)), 0), Truth((truth,)))
    draw_samples([Answered("x", asked, said)], 100, tmp_path / "samples.png")
    assert Image.open(tmp_path / "samples.png").width > 100


def test_gallery_escapes_and_bounds_what_it_shows(files, tmp_path):
    big = files / "images" / "big.png"
    Image.effect_noise((900, 1100), 90).convert("RGB").save(big)
    evil = "<script>alert(1)</script>&\ud800" + "x" * 5000
    row = {"id": "<b>", "image": "big.png", "question": evil.replace("\ud800", ""), "answer": "<i>", "type": "<u>"}
    (files / "rows.json").write_text(json.dumps([row]))
    asked = read(file_set(files, "rows.json"))[0][0]
    write_gallery([Answered("s", asked, evil, ["</article>other"], 0.0)], "<h1>", 10**8, tmp_path / "gallery.html")
    page = (tmp_path / "gallery.html").read_text(encoding="ascii")
    assert (
        "<script" not in page
        and "&lt;script&gt;alert(1)&lt;/script&gt;&amp;" in page
        and "<u>" not in page
        and "<b>" not in page.replace("<b>0.00</b>", "")
    )
    assert "&lt;/article&gt;other" in page and 'src="data:image/jpeg;base64,' in page and 'class="wrong"' in page
    assert len(page) < 60_000 and not re.search(r"https?:|url\(|<link|<iframe", page)


def test_small_files_are_utf_8_in_any_locale(tmp_path):
    code = "import pathlib, sys; from lit_eemllm import console; console.write_atomically(pathlib.Path(sys.argv[1]), '\\xe9')"
    ascii_only = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "x")], env=ascii_only, check=True)
    assert (tmp_path / "x").read_bytes() == "é".encode() and len(list(tmp_path.iterdir())) == 1


def test_gallery_shows_the_worst_and_the_best_once():
    scores = [1, 0, 0.5, 1, 0, 0.25, 1, 0]
    some = [Answered("s", question(str(i), None, []), "x", [], score) for i, score in enumerate(scores)]
    keys = [[one.question.conversation.key for one in part] for part in extremes(some, 3)]
    assert keys == [["1", "4", "7"], ["0", "3", "6"]]
    keys = [[one.question.conversation.key for one in part] for part in extremes(some, 6)]
    assert keys == [["1", "4", "7", "5", "2"], ["0", "3", "6"]]
    assert extremes([], 3) == ([], [])


# --- scores


def test_scores_of_a_model_that_knows_the_answers(trained, monkeypatch, capsys):
    """Answers looked up by picture: every type scores 1, and the control is what two passes of shuffled pictures give."""
    questions, report = read(of_shards(trained))
    assert len(questions) == 70 and not report.bad

    def name(pictures, conversation):
        digest = hashlib.sha256(conversation.turns[0].text.split("\n")[-1].encode())
        for picture in pictures:
            digest.update(picture.tobytes())
        return digest.hexdigest()

    def opened(question):
        return [run.open_image(image, "", 10**6) for image in question.images]

    truth = {name(opened(q), q.conversation): q.truth.answers[0] for q in questions}
    asked = []

    def oracle(model, processor, conversations, images, *_):
        asked.extend(conversations)
        return [(truth.get(name(p, c), "no idea"), True) for c, p in zip(conversations, images, strict=True)]

    monkeypatch.setattr(run, "generated", oracle)
    run.validate(replace(trained, eval=replace(trained.eval, control=2)), None)
    folder = run.Path(trained.out) / "eval"
    results = json.loads((folder / "results.json").read_text())
    assert set(results["types"]) == {"chart", "colour", "compare", "count", "position", "shape", "word"}
    passes = [shuffle_images(questions, trained.seed + i) for i in range(2)]
    assert passes[0] != passes[1]
    for kind, row in results["types"].items():
        truths = Counter(normalise(q.truth.answers[0]) for q in questions if q.type == kind)
        assert row["score"] == 1 and row["questions"] == truths.total() and row["metric"] == "exact_match"
        assert row["constant"] == max(truths.values()) / truths.total()
        right = [
            truth.get(name(opened(q), q.conversation)) == q.truth.answers[0]
            for p in passes
            for q in p
            if q.type == kind
        ]
        assert row["control"] == pytest.approx(sum(right) / len(right))
    assert len(asked) == 210 and results["average"] == 1
    assert results["sets"] == {"shards": {"questions": 70, "metric": "exact_match", "score": 1.0}}
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 70 and lines[0]["answer"] == lines[0]["truth"] and lines[0]["score"] == 1
    assert lines[0].keys() == {"set", "key", "type", "images", "prompt", "answer", "truth", "score"}
    assert lines[0]["images"] == [f"{lines[0]['key']}.0.png"] and lines[0]["set"] == "shards"
    page = (folder / "gallery.html").read_text()
    assert page.count("with other images") == 2 * page.count("<article>") == 2 * 7 * 6 and "worst" not in page
    assert "best constant" in capsys.readouterr().out and not list(folder.glob("answers*"))


def test_a_suite_is_scored_by_set_and_type(files, trained, monkeypatch, capsys):
    """Two sets: `said` is of one type, `own` has several and a metric each. Every answer is "yes, B", cut off in `own`."""
    (files / "suite.yaml").write_text(
        "sets:\n  own: {data: rows.jsonl, images: images, max_new_tokens: 3}\n"
        "  said: {data: said.json, images: images, metric: vqa}\n"
    )
    rows = [{"image": f"{name}.png", "question": "What?", "answers": ["yes b", "no"]} for name in "abc"]
    (files / "said.json").write_text(json.dumps(rows))
    tokens = []

    def answer(model, processor, conversations, images, most):
        tokens.append(most)
        return [("yes, B", most > 3)] * len(conversations)

    monkeypatch.setattr(run, "generated", answer)
    config = replace(
        trained, out=str(files / "out"), eval=replace(trained.eval, suite=str(files / "suite.yaml"), control=2)
    )
    checkpoint = str(run.newest_checkpoint(run.Path(trained.out)))
    run.validate(config, checkpoint)
    results = json.loads((files / "out" / "eval" / "results.json").read_text())
    assert results["data"] == config.eval.suite and (files / "out" / "config.yaml").exists()
    scores = {name: row["score"] for name, row in results["types"].items()}
    assert scores == {"own/3": 1, "own/adversarial": 1, "own/all": 0, "own/ocr": 0, "own/vqa": 0, "said": 1}
    assert results["types"]["own/adversarial"]["details"]["precision"] == 1
    assert results["types"]["said"] | {"constant_answer": ""} == {
        "questions": 3, "metric": "vqa", "score": 1, "control": 1, "constant": 1, "constant_answer": ""
    }  # fmt: skip
    assert results["types"]["own/3"]["control"] is None  # a question without images
    assert results["average"] == pytest.approx((2 / 5 + 1) / 2)
    assert results["sets"] == {"said": {"questions": 3, "metric": "vqa", "score": 1}}
    lines = [json.loads(line) for line in (files / "out" / "eval" / "predictions.jsonl").read_text().splitlines()]
    assert [line["set"] for line in lines] == ["own"] * 6 + ["said"] * 3
    assert results["cut"] == {"own": 6} and ["cut" in line for line in lines] == [True] * 6 + [False] * 3
    shown = " ".join(capsys.readouterr().out.split())
    assert "own: 6 of 6 answers did not end within max_new_tokens=3" in shown and "said: 3" not in shown
    assert (
        lines[3]["answers"] == ["no"] * 7 + ["yes"] * 3
        and "truth" not in lines[3]
        and lines[3]["images"] == ["a.png", "c.png"]
    )
    assert set(tokens) == {3, trained.eval.max_new_tokens}


def test_control_is_the_mean_of_its_passes_and_pairs_stay_apart():
    """MME: two questions about one image, right with it; of two control passes one is right. Pooled, no pair would be."""
    asked = [question(str(i), "a", [b"x"], "yes", "mme", i, pair="x") for i in range(2)]
    answered = [Answered("s", one, "yes") for one in asked]
    rounds = {"s": [[(one, "yes") for one in asked], [(one, "no") for one in asked], []]}
    row = score(answered, rounds, suite=False)["types"]["a"]
    assert (row["score"], row["control"], row["constant"], row["constant_answer"]) == (1, 0.5, 1, "yes")
    assert [one.score for one in answered] == [1, 1] and answered[0].others == ["yes", "no"]


def test_the_best_constant_is_not_always_the_most_common():
    """POPE counts only yes: of two truths that are as common, and of a rare yes, F1 by hand."""
    for truths, best in ((["no", "yes"], 2 / 3), (["no", "no", "yes"], 1 / 2)):
        asked = [question(str(i), "a", [], truth, "pope", i) for i, truth in enumerate(truths)]
        row = score([Answered("s", one, "no") for one in asked], {"s": []}, suite=False)["types"]["a"]
        assert (row["score"], row["constant"], row["constant_answer"]) == (0, pytest.approx(best), "yes")


def test_costs_open_only_the_images_that_are_measured(trained, monkeypatch):
    questions = read(of_shards(trained))[0]
    model, processor, _ = run.load(trained, None)
    tokens = [model.vision.transform.num_tokens(*Image.open(io.BytesIO(x)).size) for q in questions for x in q.images]
    opened, real = [], Picture.read
    monkeypatch.setattr(Picture, "read", lambda picture: opened.append(picture) or real(picture))
    found = run.costs(model, processor, questions, trained)
    assert found["prompt_visual_tokens"] == pytest.approx(sum(tokens) / len(questions))
    assert len(opened) == sum(len(q.pictures) for q in questions[: cost.PROMPTS]) < len(tokens)


def test_the_python_example_of_the_documentation_answers_as_generate_does(trained, tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(trained.out)
    Image.effect_noise((40, 30), 90).convert("RGB").save("cat.jpg")
    exec(page.partition("```python\n")[2].partition("```")[0], {})  # noqa: S102 - of this repository
    shown = capsys.readouterr().out
    run.generate(trained, None, [Path("cat.jpg")], "What is it?", 32, 0.0)
    assert capsys.readouterr() == (visible(shown), "") and shown.strip()  # the untrained model says anything
    monkeypatch.setattr(run, "answer", lambda *_: [""])
    run.generate(trained, None, [], "What is it?", 32, 0.0)
    assert capsys.readouterr() == ("\n", "the answer is empty: the model ended it at once\n")


def test_what_cannot_be_asked_is_counted_and_results_come_first(trained, monkeypatch, tmp_path, capsys):
    """A broken image and a control token among good questions; constant answers are counted as scores are, normalised."""
    good = [question(str(i), "a", [], truth, number=i) for i, truth in enumerate(["Red.", "red", "blue"])]
    broken = question("broken", "b", [b"no image"], number=3)
    control = replace(
        good[0], conversation=Conversation("control", (Turn("human", "</s>"), Turn("gpt", "x")), 0, "a"), number=4
    )
    report = SimpleNamespace(bad=Counter(bad_json=2))
    monkeypatch.setattr(run, "read_questions", lambda *_: ([broken, control, *good], report))
    monkeypatch.setattr(
        run, "generated", lambda model, processor, conversations, *_: [("red", True)] * len(conversations)
    )
    monkeypatch.setattr(run, "draw_samples", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TypeError, match="not callable"):
        run.validate(replace(trained, out="out"), str(run.newest_checkpoint(run.Path(trained.out))))
    results = json.loads((tmp_path / "out" / "eval" / "results.json").read_text())
    assert results["skipped"] == {"bad_json": 2, "bad_image": 1, "control_token": 1}
    assert list(results["types"]) == ["a"] and results["types"]["a"] == {
        "questions": 3, "metric": "exact_match", "score": pytest.approx(2 / 3), "control": None,
        "constant": pytest.approx(2 / 3), "constant_answer": "red",
    }  # fmt: skip
    assert results["average_constant"] == pytest.approx(2 / 3) and results["average_control"] is None
    assert (
        "without a score for shuffled images: a. It takes questions of the type about other images"
        in capsys.readouterr().out
    )
    lines = (tmp_path / "out" / "eval" / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == ["0", "1", "2"]

    monkeypatch.setattr(run, "read_questions", lambda *_: ([broken], SimpleNamespace(bad=Counter())))
    shutil.copytree(tmp_path / "out" / "eval", tmp_path / "bad" / "eval")  # of an earlier validation
    (tmp_path / "bad" / "eval" / "gallery.html").touch()
    assert "earlier evaluation" not in capsys.readouterr().out
    run.validate(replace(trained, out="bad"), str(run.newest_checkpoint(run.Path(trained.out))))
    said = capsys.readouterr().out
    assert f"{Path('bad', 'eval')} holds the results of an earlier evaluation, which this one" in said
    assert "out=FOLDER --checkpoint FILE" in said
    results = json.loads((tmp_path / "bad" / "eval" / "results.json").read_text())
    assert results["skipped"] == {"bad_image": 1} and "types" not in results and results["loss"] > 0
    assert [path.name for path in (tmp_path / "bad" / "eval").iterdir()] == ["results.json"]


# --- batches, kills, ranks


def test_batches_hold_questions_of_like_length():
    """By visual tokens, whatever the images' sizes, then by turns."""
    sizes = [(2, 2), (9, 9), (2, 2), (3, 3), (9, 9)]
    asked = [
        replace(question(str(i), None, [b"x"]), pictures=(Picture(str(i), "", size, b""),))
        for i, size in enumerate(sizes)
    ]
    assert in_batches(asked, lambda width, height: width * height, 2) == [[0, 2], [3, 1], [4]]


def outcome(out):
    """What an evaluation found, without what it measured."""
    results = json.loads((run.Path(out) / "eval" / "results.json").read_text())
    measured = {"prefill_seconds", "image_cache", "checkpoint"}
    return {k: v for k, v in results.items() if k not in measured}, (
        run.Path(out) / "eval" / "predictions.jsonl"
    ).read_text()


def test_answers_do_not_depend_on_the_batch(talkative):
    """One question at a time, seven, all: the same texts; with and without the cache of images."""
    model, processor, _ = run.load(talkative, None)
    questions, _ = read(of_shards(talkative))
    found = []
    for size, cached in ((1, True), (7, True), (70, True), (7, False)):
        model.image_cache = run.ImageCache(2**20) if cached else None
        batches = in_batches(questions, processor.transform.num_tokens, size)
        replies = {j: reply for batch in batches
                   for j, reply in zip(batch, run.ask(model, processor, 4, 10**6, [questions[j] for j in batch]), strict=True)}  # fmt: skip
        found.append([replies[j] for j in range(70)])
    assert found[0] == found[1] == found[2] == found[3]
    assert len({text for text, _ in found[0]}) > 5


@pytest.fixture(scope="module")
def talkative(trained, tmp_path_factory):
    """A run whose answers differ from each other."""
    config = replace(
        trained,
        out=str(tmp_path_factory.mktemp("talkative") / "run"),
        optim=replace(trained.optim, max_steps=40, val_every=100),
    )
    fit(config)
    return replace(config, eval=replace(config.eval, batch_size=4, samples=28))


def test_an_evaluation_goes_on_where_it_ended(talkative, monkeypatch, capsys):
    """Stopped after 5 of 7 + 7 batches, with a line that was cut off; then only what is left is asked, and all is equal."""
    run.validate(talkative, None)
    whole = outcome(talkative.out)
    sizes, real = [], run.generated

    def answer(model, processor, conversations, *rest):
        if len(sizes) == 5:
            raise KeyboardInterrupt
        sizes.append(len(conversations))
        return real(model, processor, conversations, *rest)

    monkeypatch.setattr(run, "generated", answer)
    with pytest.raises(KeyboardInterrupt):
        run.validate(talkative, None)
    kept = run.Path(talkative.out) / "eval" / "answers-0.jsonl"
    lines = kept.read_bytes().splitlines(keepends=True)
    assert len(lines) == 1 + 5
    kept.write_bytes(b"".join(lines[:-1]) + lines[-1][:20])  # the fifth is asked again
    sizes.clear()
    capsys.readouterr()
    monkeypatch.setattr(run, "generated", lambda *all: sizes.append(len(all[2])) or real(*all))
    run.validate(talkative, None)
    assert "16 answers were there before" in capsys.readouterr().out
    assert len(sizes) == 3 + 7 and outcome(talkative.out) == whole and not kept.exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("weights", "checkpoint"),
        ("eval.samples", "questions"),
        ("eval.max_new_tokens", "eval.max_new_tokens"),
        ("seed", "seed"),
        ("template", "model.template"),
    ],
)
def test_answers_of_another_evaluation_are_not_used(talkative, monkeypatch, capsys, tmp_path, change, said):
    config = replace(talkative, out=str(tmp_path / "out"))
    checkpoint = run.newest_checkpoint(run.Path(talkative.out))
    count, real = [], run.generated
    if change == "template":  # the tokenizer's own, whose text is edited
        tokenizer = shutil.copytree(config.model.decoder, tmp_path / "tokenizer")
        own = tokenizer / "chat_template.jinja"
        own.write_text("{% for m in messages %}{{ m.role + ':\n' + m.content + (eos_token if m.role == 'assistant' else '') }}"
                       "{% endfor %}{% if add_generation_prompt %}assistant:\n{% endif %}")  # fmt: skip
        config = replace(config, model=replace(config.model, template="jinja", tokenizer=str(tokenizer)))

    def answer(*all):
        if len(count) == 3:
            raise KeyboardInterrupt
        count.append(1)
        return real(*all)

    monkeypatch.setattr(run, "generated", answer)
    with pytest.raises(KeyboardInterrupt):
        run.validate(config, str(checkpoint))
    if change == "weights":
        checkpoint = run.Path(talkative.out) / "checkpoints" / "step-30.ckpt"
    elif change == "seed":
        config = replace(config, seed=5)
    elif change == "template":
        own.write_text(own.read_text().replace(":", ";"))
    else:
        config = replace(config, eval=replace(config.eval, **{change.removeprefix("eval."): 14}))
    count.clear()
    monkeypatch.setattr(run, "generated", lambda *all: count.append(1) or [("x", True)] * len(all[2]))
    run.validate(config, str(checkpoint))
    assert f"holds answers of another evaluation ({said}): all questions are asked anew" in capsys.readouterr().out
    assert len(count) == (8 if change == "eval.samples" else 14)


def test_files_of_more_ranks_are_read_or_removed(tmp_path):
    for rank in range(3):
        Answers(tmp_path, {"a": 1}, rank).add("s", rank, [(f"{rank}", None)])
    assert Answers(tmp_path, {"a": 1}).replies == {("s", rank): [(f"{rank}", None)] for rank in range(3)}
    (tmp_path / "answers-1.jsonl").write_text('{"a": 1}\n{"part": "s", "batch": 9, "replies": [["x", null]]}\n\0\0\n')
    with (tmp_path / "answers-0.jsonl").open("a") as file:
        file.write('{"part": "s", "bat')  # as a kill leaves it
    Answers(tmp_path, {"a": 1}).add("s", 5, [(None, "bad_image")])
    again = Answers(tmp_path, {"a": 1}).replies
    assert set(again) == {("s", i) for i in (0, 2, 5, 9)} and again["s", 5] == [(None, "bad_image")]
    other = Answers(tmp_path, {"a": 2})
    assert not other.replies and [path.name for path in other.files()] == ["answers-0.jsonl"]
    other.remove()
    assert not list(tmp_path.iterdir())


def test_no_rank_removes_a_file_that_another_may_still_read(tmp_path, monkeypatch):
    Answers(tmp_path, {"a": 1}, 2).add("s", 0, [("x", None)])
    there = []
    monkeypatch.setattr(Answers, "share", lambda self: there.append((tmp_path / "answers-2.jsonl").exists()))
    Answers(tmp_path, {"a": 2}, 0, 2)
    assert there == [True] and not (tmp_path / "answers-2.jsonl").exists()


def test_ranks_are_those_that_are_there(monkeypatch, capsys):
    for name in ("MASTER_ADDR", "SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    fabric = start_ranks(SimpleNamespace(trainer={"accelerator": "cpu", "num_nodes": 4}))
    assert fabric.world_size == 1 and "one machine, not trainer.num_nodes=4" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"trainer.devices, trainer.num_nodes: .*should be an int > 0"):
        start_ranks(SimpleNamespace(trainer={"accelerator": "cpu", "devices": -3}))


def start(*arguments):
    command = [sys.executable, "-m", "lit_eemllm", "validate", *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def forked(*arguments):
    """Likewise one process, with the imports made."""
    return Started(run_command, "validate", *arguments, session=True)


@pytest.mark.slow
@pytest.mark.timeout(2000)
def test_sigkill_and_two_ranks_change_nothing(talkative, tmp_path):
    """One process; two, started by Fabric and by torchrun; one that is killed, then two killed: equal to the last byte."""
    run.validate(talkative, None)
    whole = outcome(talkative.out)
    kept = run.Path(talkative.out) / "eval"

    def ended(process):
        said = process.communicate(timeout=400)
        assert process.returncode == 0, said
        assert not list(kept.glob("answers*"))
        return outcome(talkative.out)

    (kept / "results.json").unlink()
    overrides = [talkative.out, "eval.batch_size=4", "eval.samples=28"]
    assert ended(start(*overrides, "trainer.devices=2")) == whole
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--standalone",
        "-m",
        "lit_eemllm",
        "validate",
    ]
    assert (
        ended(subprocess.Popen([*torchrun, *overrides], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        == whole
    )

    for begin, devices in ((forked, 1), (start, 2)):
        process = begin(*overrides, f"trainer.devices={devices}")
        deadline = time.monotonic() + 400
        while (
            sum(len(path.read_bytes().splitlines()) for path in kept.glob("answers-*")) < 4 and process.poll() is None
        ):
            assert time.monotonic() < deadline
            time.sleep(0.002)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=60)
        assert list(kept.glob("answers*")), "it had ended before it was killed"
    assert ended(forked(*overrides)) == whole


def test_answers_end_with_the_turn(trained):
    """The decoder says a script of tokens: generation stops when both rows have ended, and nothing behind is in the answer."""
    model, processor, _ = run.load(trained, run.UNTRAINED)
    tokenizer = processor.tokenizer
    stop = tokenizer.eos_token_id
    assert model.generation_config.eos_token_id == processor.template.stop_ids == [stop]
    red, blue = (tokenizer.encode(text)[0] for text in "rb")
    script = [(red, blue), (stop, red), (blue, stop), (blue, blue), (red, red)]
    said = []

    class Says(torch.nn.Module):
        def forward(self, states):
            ids = torch.tensor(script[len(said)])
            said.append(ids)
            return torch.nn.functional.one_hot(ids, len(tokenizer) - 1)[:, None].float()

    model.language_model.lm_head = Says()
    conversations = [Conversation(str(i), (Turn("human", "What?" * i),), 0) for i in (1, 2)]
    assert run.answer(model, processor, conversations, [[], []], 5) == ["r", "br"]
    assert len(said) == 3
    said.clear()
    assert run.generated(model, processor, conversations, [[], []], 2) == [("r", True), ("br", False)]
    assert processor.answers(torch.tensor([[red, blue, stop, red]]), 1) == ["b"]


def test_command_line_journey(trained, tmp_path, capsys):
    """validate, validate before training, generate and report, as a user calls them."""
    out = run.Path(trained.out)
    assert cli.main(["validate", str(out), "eval.samples=14"]) == 0
    assert cli.main(["validate", str(out), "--checkpoint", "none", "eval.samples=14"]) == 0
    picture = tmp_path / "a picture.png"
    Image.new("RGB", (40, 20), "red").save(picture)
    assert "held-out questions" in capsys.readouterr().out
    assert cli.main(["generate", str(out), "--image", str(picture), "--prompt", "What?"]) == 0
    model, processor, _ = run.load(trained, None)
    asked = Conversation("", (Turn("human", "<image>\nWhat?"),), 1)
    said = run.answer(model, processor, [asked], [[Image.open(picture)]], trained.eval.max_new_tokens)[0]
    assert capsys.readouterr() == (f"{said}\n", "")
    assert cli.main(["report", str(out), "--out", str(tmp_path / "report")]) == 0
    text = (tmp_path / "report" / "report.md").read_text()
    assert "ee_mllm (1 seed)" in text and "average before training" in text
    assert Image.open(tmp_path / "report" / "report.png").width > 500
    assert Image.open(out / "eval" / "samples.png").width > 500
    trained_loss, untrained_loss = (
        json.loads((out / name / "results.json").read_text())["loss"] for name in ("eval", "eval-untrained")
    )
    assert trained_loss < untrained_loss
    capsys.readouterr()

    assert cli.main(["generate", str(out), "--image", str(tmp_path / "none.png"), "--prompt", "What?"]) == 2
    assert "none.png: no such file" in capsys.readouterr().err
    for option, value in (("--max-new-tokens", "0"), ("--temperature", "-1"), ("--temperature", "nan")):
        assert cli.main(["generate", str(out), "--image", str(picture), "--prompt", "What?", f"{option}={value}"]) == 2
        assert f"{option} {value}: expected" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "not a run directory" in capsys.readouterr().err

    assert cli.main(["validate", str(out), "eval.samples=0"]) == 0  # the loss alone
    assert "held-out questions" not in capsys.readouterr().out
    results = json.loads((out / "eval" / "results.json").read_text())
    assert results["loss"] == trained_loss and "types" not in results
    assert cli.main(["report", str(out), "--out", str(tmp_path / "report")]) == 0


def test_what_is_missing_is_named(trained, tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint in it; train first"):
        run.load(tiny.config(run.Path(trained.model.decoder).parent, "x", tmp_path), None)
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(UserError, match="not evaluated yet; run: lit-eemllm validate"):
        read_run(tmp_path)
