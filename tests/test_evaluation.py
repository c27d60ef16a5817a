"""Evaluation: scores and controls against a model whose answers are known, and the whole journey on a tiny run."""

import hashlib
import json
from collections import Counter

import pytest
import tiny
import torch
from PIL import Image

from lit_eemllm import cli
from lit_eemllm.chat import Conversation, Turn
from lit_eemllm.errors import CheckpointError, UserError
from lit_eemllm.evaluation import run
from lit_eemllm.evaluation.metrics import ExactMatch
from lit_eemllm.evaluation.questions import Question, read_questions, shuffle_images
from lit_eemllm.evaluation.run import images_per_document, movable
from lit_eemllm.report import read_run
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


def test_exact_match_by_hand():
    metric = ExactMatch()
    metric.update(["Red.", " top  left", "3"], ["red", "top left", "4"])
    metric.update(["blue"], ["Blue"])
    assert metric.compute().item() == pytest.approx(3 / 4)


def test_shuffled_images_come_from_another_question_of_the_type():
    def question(key, kind, images):
        turns = (Turn("human", "<image>" * len(images) + "what?"), Turn("gpt", "x"))
        return Question(Conversation(key, turns, len(images), kind), "x", images)

    questions = [question(f"{kind}{i}", kind, [f"{kind}{i}{j}".encode() for j in range(n)])
                 for kind, n in (("a", 1), ("b", 2), ("text", 0)) for i in range(9)]  # fmt: skip
    questions.append(question("lonely", "c", [b"c"]))
    shuffled = shuffle_images(questions, seed=0)
    own = {q.conversation.key: q.images for q in questions}
    assert sorted(q.conversation.key for q in shuffled) == sorted(f"{k}{i}" for k in "ab" for i in range(9))
    for q in shuffled:
        assert q.images != own[q.conversation.key] and q.images[0].decode()[0] == q.type
    assert Counter(q.images[0] for q in shuffled) == Counter(q.images[0] for q in questions if q.type in "ab")


def test_rolled_images_leave_their_document():
    kept = list(
        movable(tiny.pack(documents) for documents in ([[3, 0, 4], [2, 0, 1, 0, 3], [0, 2]], [[3, 0, 2], [4]], [[5]]))
    )
    assert [len(batch.layout.documents) for batch in kept] == [3]
    assert images_per_document(kept[0]) == 2
    owner = [0, 1, 1, 2]
    rolled = torch.tensor(owner).roll(2).tolist()
    assert all(a != b for a, b in zip(owner, rolled, strict=True))


def test_scores_of_a_model_that_knows_the_answers(trained, monkeypatch, capsys):
    """Answers looked up by picture: every type scores 1, and the control is what the shuffled pictures give."""
    data = run.ShardDataModule(trained.data, trained.seed)
    questions, skipped = read_questions(data.recipe("val"), None)
    assert len(questions) == 70 and not skipped

    def name(pictures, conversation):
        digest = hashlib.sha256(conversation.turns[0].text.split("\n")[-1].encode())
        for picture in pictures:
            digest.update(picture.tobytes())
        return digest.hexdigest()

    def opened(question):
        return [run.open_image(image, "", 10**6) for image in question.images]

    truth = {name(opened(q), q.conversation): q.truth for q in questions}
    asked = []

    def oracle(model, processor, conversations, images, *_):
        asked.extend(conversations)
        return [truth.get(name(p, c), "no idea") for c, p in zip(conversations, images, strict=True)]

    monkeypatch.setattr(run, "answer", oracle)
    run.validate(trained, None)
    results = json.loads((run.Path(trained.out) / "eval" / "results.json").read_text())
    assert set(results["types"]) == {"chart", "colour", "compare", "count", "position", "shape", "word"}
    for kind, row in results["types"].items():
        truths = Counter(q.truth for q in questions if q.type == kind)
        assert row["exact_match"] == 1 and row["questions"] == truths.total()
        assert row["constant"] == max(truths.values()) / truths.total()
        shuffled = [q for q in shuffle_images(questions, trained.seed) if q.type == kind]
        expected = sum(truth.get(name(opened(q), q.conversation)) == q.truth for q in shuffled) / len(shuffled)
        assert row["control"] == pytest.approx(expected)
    assert len(asked) == 140 and results["average"] == 1
    lines = (run.Path(trained.out) / "eval" / "predictions.jsonl").read_text().splitlines()
    assert len(lines) == 70 and json.loads(lines[0])["answer"] == json.loads(lines[0])["truth"]
    assert "best constant" in capsys.readouterr().out


def test_command_line_journey(trained, tmp_path, capsys):
    """validate, validate before training, generate and report, as a user calls them."""
    out = run.Path(trained.out)
    assert cli.main(["validate", str(out), "eval.samples=14"]) == 0
    assert cli.main(["validate", str(out), "--checkpoint", "none", "eval.samples=14"]) == 0
    picture = tmp_path / "a picture.png"
    Image.new("RGB", (40, 20), "red").save(picture)
    assert cli.main(["generate", str(out), "--image", str(picture), "--prompt", "What?"]) == 0
    assert cli.main(["report", str(out), str(out), "--out", str(tmp_path / "report")]) == 0
    text = (tmp_path / "report" / "report.md").read_text()
    assert "ee_mllm (2 seeds)" in text and "average before training" in text and "± 0.000" in text
    assert Image.open(tmp_path / "report" / "report.png").width > 500
    assert Image.open(out / "eval" / "samples.png").width > 500
    trained_loss, untrained_loss = (
        json.loads((out / name / "results.json").read_text())["loss"] for name in ("eval", "eval-untrained")
    )
    assert trained_loss < untrained_loss
    capsys.readouterr()

    assert cli.main(["generate", str(out), "--image", str(tmp_path / "none.png"), "--prompt", "What?"]) == 2
    assert "none.png: no such file" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "not a run directory" in capsys.readouterr().err


def test_what_is_missing_is_named(trained, tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint in it; train first"):
        run.load(tiny.config(run.Path(trained.model.decoder).parent, "x", tmp_path), None)
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(UserError, match="not evaluated yet; run: lit-eemllm validate"):
        read_run(tmp_path)
