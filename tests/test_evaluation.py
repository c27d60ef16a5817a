"""Evaluation: scores and controls against a model whose answers are known, and the whole journey on a tiny run."""

import hashlib
import json
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny
import torch
from PIL import Image

from lit_eemllm import cli
from lit_eemllm.chat import Conversation, Turn
from lit_eemllm.errors import CheckpointError, SampleError, UserError
from lit_eemllm.evaluation import questions as questions_module
from lit_eemllm.evaluation import run
from lit_eemllm.evaluation.metrics import ExactMatch, normalise
from lit_eemllm.evaluation.pictures import draw_samples
from lit_eemllm.evaluation.questions import Question, read_questions, shuffle_images
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


def question(key, kind, images, truth="x"):
    turns = (Turn("human", "<image>" * len(images) + "what?"), Turn("gpt", truth))
    return Question(Conversation(key, turns, len(images), kind), truth, images)


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
    found = run.losses(model, SimpleNamespace(val_dataloader=lambda: packs), 2)
    assert seen == [[1, 2, 3], [3, 1, 2], [1, 1, 2, 2], [2, 2, 1, 1]]
    expected = {"loss": (14 + 17) / 10, "loss_shuffled_images": (11 + 13) / 10, "loss_tokens": 10}
    assert found == pytest.approx(expected)
    nothing = run.losses(model, SimpleNamespace(val_dataloader=lambda: packs[:1]), 2)
    assert nothing == {"loss": None, "loss_shuffled_images": None, "loss_tokens": 0}


def test_moved_images_leave_their_document():
    packs = [tiny.pack(documents) for documents in ([[3, 0, 4], [2, 0, 1, 0, 3], [0, 2]], [[3, 0, 2], [4]], [[5]])]
    ((batch, moved),) = run.with_moved_images(packs)
    owner = [0, 1, 1, 2]
    origin = [next(i for i, own in enumerate(batch.pixel_values) if own.equal(image)) for image in moved.pixel_values]
    assert sorted(origin) == [0, 1, 2, 3]
    assert all(owner[i] != document for i, document in zip(origin, owner, strict=True))


def test_some_questions_are_spread_over_the_set(trained, monkeypatch):
    """Ten of seventy: every seventh. Two of them are unusable; the others are neither parsed nor kept."""
    recipe = run.ShardDataModule(trained.data, trained.seed).recipe("val")
    keys = [q.conversation.key for q in read_questions(recipe, None)[0]]
    parsed = []

    def read_members(key, members, real=questions_module.read_members):
        parsed.append(key)
        conversation, images = real(key, members)
        if key == keys[14]:
            raise SampleError("bad_image", "broken")
        return (replace(conversation, turns=conversation.turns[:1]) if key == keys[21] else conversation), images

    monkeypatch.setattr(questions_module, "read_members", read_members)
    questions, skipped = read_questions(recipe, 10)
    assert parsed == keys[::7]
    assert [q.conversation.key for q in questions] == [key for key in keys[::7] if key not in (keys[14], keys[21])]
    assert skipped == {"bad_image": 1, "no_answer": 1}
    assert len(read_questions(recipe, 1000)[0]) == 68
    monkeypatch.setattr(questions_module, "read_shard", None)
    assert read_questions(recipe, 0) == ([], {})


@pytest.mark.parametrize(("prompt", "truth", "said"), [("$\\frac{$", "x", "x"), ("x", "$_$", "x"), ("x", "x", "$\\x$")])
def test_a_dollar_is_no_formula(prompt, truth, said, tmp_path):
    asked = Question(Conversation("", (Turn("human", prompt), Turn("gpt", truth)), 0), truth, [])
    draw_samples([(asked, said)], 100, tmp_path / "samples.png")
    assert Image.open(tmp_path / "samples.png").width > 100


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
        truths = Counter(normalise(q.truth) for q in questions if q.type == kind)
        assert row["exact_match"] == 1 and row["questions"] == truths.total()
        assert row["constant"] == max(truths.values()) / truths.total()
        shuffled = [q for q in shuffle_images(questions, trained.seed) if q.type == kind]
        expected = sum(truth.get(name(opened(q), q.conversation)) == q.truth for q in shuffled) / len(shuffled)
        assert row["control"] == pytest.approx(expected)
    assert len(asked) == 140 and results["average"] == 1
    lines = (run.Path(trained.out) / "eval" / "predictions.jsonl").read_text().splitlines()
    assert len(lines) == 70 and json.loads(lines[0])["answer"] == json.loads(lines[0])["truth"]
    assert "best constant" in capsys.readouterr().out


def test_what_cannot_be_asked_is_counted_and_results_come_first(trained, monkeypatch, tmp_path):
    """A broken image and a control token among good questions; constant answers are counted as scores are, normalised."""
    good = [question(str(i), "a", [], truth) for i, truth in enumerate(["Red.", "red", "blue"])]
    broken = question("broken", "b", [b"no image"])
    control = replace(good[0], conversation=Conversation("control", (Turn("human", "</s>"), Turn("gpt", "x")), 0, "a"))
    monkeypatch.setattr(run, "read_questions", lambda *_: ([broken, control, *good], Counter(bad_json=2)))
    monkeypatch.setattr(run, "answer", lambda model, processor, conversations, *_: ["red"] * len(conversations))
    monkeypatch.setattr(run, "draw_samples", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TypeError, match="not callable"):
        run.validate(replace(trained, out="out"), str(run.newest_checkpoint(run.Path(trained.out))))
    results = json.loads((tmp_path / "out" / "eval" / "results.json").read_text())
    assert results["skipped"] == {"bad_json": 2, "bad_image": 1, "control_token": 1}
    assert list(results["types"]) == ["a"] and results["types"]["a"] == {
        "questions": 3, "exact_match": pytest.approx(2 / 3), "control": None, "constant": 2 / 3, "constant_answer": "red"
    }  # fmt: skip
    lines = (tmp_path / "out" / "eval" / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == ["0", "1", "2"]

    monkeypatch.setattr(run, "read_questions", lambda *_: ([broken], Counter()))
    run.validate(replace(trained, out="bad"), str(run.newest_checkpoint(run.Path(trained.out))))
    results = json.loads((tmp_path / "bad" / "eval" / "results.json").read_text())
    assert results["skipped"] == {"bad_image": 1} and "types" not in results and results["loss"] > 0


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
