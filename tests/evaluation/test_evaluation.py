"""Evaluation: scores and controls against a model whose answers are known, pictures, and the whole journey."""

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from lib.questions import file_set, of_shards, question, read
from PIL import Image

from lit_eemllm import cli
from lit_eemllm.doctor import origin
from lit_eemllm.errors import CheckpointError, UserError
from lit_eemllm.evaluation import cost, run
from lit_eemllm.evaluation.gallery import extremes, write_gallery
from lit_eemllm.evaluation.loss import losses, with_moved_images
from lit_eemllm.evaluation.metrics import Truth
from lit_eemllm.evaluation.pictures import draw_samples
from lit_eemllm.evaluation.questions import Picture, Question, shuffle_images
from lit_eemllm.evaluation.scoring import Answered, score
from lit_eemllm.evaluation.text import normalise
from lit_eemllm.inputs.conversation import Conversation, Turn
from lit_eemllm.report import read_run
from lit_eemllm.terminal import visible
from lit_eemllm.training.checkpoint import newest_checkpoint


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


@pytest.mark.parametrize(
    ("prompt", "truth", "said"), [("$\\frac{$", "x", "x"), ("x", "$_$", "x"), ("x", "x", "$\\x$\x00")]
)
def test_a_dollar_is_no_formula(prompt, truth, said, tmp_path):
    asked = Question(Conversation("", (Turn("human", prompt), Turn("gpt", truth)), 0), Truth((truth,)))
    draw_samples([Answered("x", asked, said)], 100, tmp_path / "samples.png")
    assert Image.open(tmp_path / "samples.png").width > 100


def test_a_white_picture_has_a_frame_and_the_answer_is_below_its_truth(tmp_path):
    file = io.BytesIO()
    Image.new("RGB", (20, 20), "white").save(file, "PNG")
    draw_samples([Answered("x", question("k", None, [file.getvalue()]), "no")], 1000, tmp_path / "samples.png")
    drawn = np.asarray(Image.open(tmp_path / "samples.png").convert("RGB")).astype(int)
    grey, red, black = (
        (np.abs(drawn - colour).max(2) < 30).sum(1) for colour in ((211, 211, 211), (214, 39, 40), (0, 0, 0))
    )
    frame, answered, asked = np.flatnonzero(grey > 100), np.flatnonzero(red), np.flatnonzero(black)
    assert frame[-1] - frame[0] > 100 and frame[-1] < asked[0]
    assert 0 < answered[0] - asked[-1] < 25


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
    found = read_run(folder.parent)
    assert results["machine"] == found.evaluated_on == origin(cuda=False) and found.trained_on == {found.evaluated_on}
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
    checkpoint = str(newest_checkpoint(Path(trained.out)))
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
        run.validate(replace(trained, out="out"), str(newest_checkpoint(Path(trained.out))))
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
    run.validate(replace(trained, out="bad"), str(newest_checkpoint(Path(trained.out))))
    said = capsys.readouterr().out
    assert f"{Path('bad', 'eval')} holds the results of an earlier evaluation, which this one" in said
    assert "out=FOLDER --checkpoint FILE" in said
    results = json.loads((tmp_path / "bad" / "eval" / "results.json").read_text())
    assert results["skipped"] == {"bad_image": 1} and "types" not in results and results["loss"] > 0
    assert [path.name for path in (tmp_path / "bad" / "eval").iterdir()] == ["results.json"]


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
