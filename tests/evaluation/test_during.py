"""A model that is asked while it trains is trained as if nobody asked; and says what it would say if it were asked afterwards."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import tiny
from lib.processes import run_ranks
from lib.runs import Killed, assert_same, fit_until
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_eemllm.config import load_config, to_yaml
from lit_eemllm.console import metrics_files
from lit_eemllm.errors import UserError
from lit_eemllm.evaluation import during
from lit_eemllm.evaluation.during import Asking, read_past
from lit_eemllm.evaluation.gallery import CHANGES, Past, write_history
from lit_eemllm.evaluation.metrics import METRICS, AnswerMetric
from lit_eemllm.evaluation.run import validate
from lit_eemllm.evaluation.scoring import Answered
from lit_eemllm.training.checkpoint import read_checkpoint
from lit_eemllm.training.fit import fit

SECTIONS = ("state_dict", "optimizer_states", "rng", "lr_schedulers", "ShardDataModule", "loops")
ASKED = ("eval.during_training=8", "optim.samples_every=2", "eval.metric=length")


class Length(AnswerMetric):
    """What a model that has learnt nothing gets points by."""

    def score(self, answer, truth):
        return len(answer) % 5 / 4


@pytest.fixture(scope="module", autouse=True)
def by_length():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METRICS, "length", Length)
        patch.setattr(
            "lit_eemllm.data.loader.SNAPSHOT_SECONDS", 1e9
        )  # else a slow machine writes the same place otherwise
        yield


def config(parts, shapes, out, *more):
    """Adapters with dropout, which draws random numbers."""
    options = [
        "optim.max_steps=6",
        "optim.val_every=2",
        "optim.val_batches=1",
        "optim.save_every=4",
        "optim.tuning.llm=lora",
    ]
    return tiny.config(parts, shapes, out, *options, "optim.lora.dropout=0.3", "optim.lora.r=4", *more)


@pytest.fixture(scope="module")
def asked(tmp_path_factory, parts, shapes):
    """Its configuration; not to be changed."""
    made = config(parts, shapes, tmp_path_factory.mktemp("asked"), *ASKED, "optim.keep=9")
    fit(made, Asking(made))
    return made


def end(out):
    return read_checkpoint(out / "checkpoints" / "step-6.ckpt")


def scores(out):
    rows = [line.split(",") for file in metrics_files(out) for line in file.read_text().splitlines()]
    places = {name: i for i, name in enumerate(rows[0])}
    return {
        int(row[places["step"]]): float(row[places["val_score"]])
        for row in rows
        if re.match(r"[\d.]", row[places["val_score"]])
    }


def folder(made):
    return tiny.Path(made.out)


def test_nothing_of_it_reaches_the_training(asked, tmp_path, parts, shapes):
    fit(config(parts, shapes, tmp_path))
    for section in SECTIONS:
        assert_same(end(folder(asked))[section], end(tmp_path)[section], section)


def test_who_asks_is_needed_and_somebody_must_be_asked(tmp_path, parts, shapes, monkeypatch):
    made = config(parts, shapes, tmp_path, *ASKED, "optim.max_steps=2")
    with pytest.raises(UserError, match=r"fit\(config, lit_eemllm\.evaluation\.during\.Asking\(config\)\)"):
        fit(made)
    monkeypatch.setattr(during, "ask", lambda *args: [(None, "bad_image") for _ in args[-1]])
    with pytest.raises(
        UserError, match=r"none of the questions of .* can be asked: bad_image; set eval\.during_training=null"
    ):
        fit(made, Asking(made))


def test_the_score_is_that_of_validate(asked, tmp_path):
    """Of the checkpoint of the same step: asked by another function, with a backend chosen for inference."""
    found = scores(folder(asked))
    assert sorted(found) == [2, 4, 6] and any(found.values())
    after = replace(asked, out=str(tmp_path), eval=replace(asked.eval, samples=8, control=0))
    best = folder(asked) / "checkpoints" / "best.ckpt"
    validate(after, str(best))
    results = json.loads((tmp_path / "eval" / "results.json").read_text())
    step = int(re.fullmatch(r"step-(\d).ckpt", best.resolve().name)[1])
    assert results["average"] == pytest.approx(found[step]) and found[step] == max(found.values())


def test_samples_are_shown(asked):
    out = folder(asked)
    rows = read_past(out / "samples.jsonl")
    assert [row.step for row in rows] == [2] * 8 + [4] * 8 + [6] * 8 and len({row.key for row in rows}) == 8
    page = (out / "samples.html").read_text()
    assert page.count("<article>") == 8 and page.count("data:image/png") == 8 and "step 6</h1>" in page
    (log,) = out.glob("logs/version_0/events.*")
    events = EventAccumulator(str(log), {"images": 0, "tensors": 0}).Reload()
    assert [one.step for one in events.Images("samples")] == [2, 4, 6]
    with Image.open(out / "samples.png") as last:
        assert (last.width, last.height) == (events.Images("samples")[-1].width, events.Images("samples")[-1].height)
        assert np.asarray(last.convert("L")).std() > 1


def test_a_run_goes_on(asked, tmp_path, parts, shapes):
    """Killed in step 6: samples and scores are those of the unbroken run, each once."""
    made = config(parts, shapes, tmp_path, *ASKED, "optim.keep=9")
    with pytest.raises(Killed):
        fit_until(5, made, Asking(made))
    with (tmp_path / "samples.jsonl").open("a") as file:  # of a process that came further, and did not save
        file.write(json.dumps({"step": 6, "key": "k", "answer": "x", "score": 0}) + "\n")
    fit(made, Asking(made))
    assert (tmp_path / "samples.jsonl").read_bytes() == (folder(asked) / "samples.jsonl").read_bytes()
    for section in (*SECTIONS[:-1], "callbacks"):
        assert_same(end(tmp_path)[section], end(folder(asked))[section], section)


def test_a_page_is_bounded_and_escaped(asked, tmp_path):
    """Equal answers after each other are one line; what is no line of answers is left out."""
    (tmp_path / "past").write_text('{"step": 1}\nx\n[]\n{"step": 1, "key": "k", "answer": "a", "score": NaN}\n')
    assert read_past(tmp_path / "past") == [] == read_past(tmp_path / "none")
    question = Asking(replace(asked, eval=replace(asked.eval, during_training=None))).shown[0][1][0]
    key = question.conversation.key
    past = [Past(step, key, f"<b>{step // 2}", 0.0) for step in range(2000, 2000 + 4 * CHANGES)]
    write_history([Answered("set", question, "")], past, "t", 10**6, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert (
        page.count("&lt;b&gt;") == CHANGES
        and "<b>1" not in page
        and "steps 2,118 – 2,119" in page.replace("&#8211;", "–")
    )


def fit_asked(*files):
    METRICS["length"] = Length  # in a process of its own
    for file in files:
        made = load_config([file], [])
        fit(made, Asking(made))


@pytest.mark.slow
def test_ranks_ask_as_one_does(tmp_path, parts, shapes):
    """Each a share of the batches, or under FSDP2 all of them; the training is what it is without."""
    common = ["optim.max_steps=4", "optim.val_every=2", "optim.val_batches=1", "eval.batch_size=3", "optim.lr=1e-2"]
    more = {
        "one": ["trainer.accumulate_grad_batches=2", "data.workers=2"],
        "two": ["trainer.devices=2", "trainer.strategy=ddp", "data.workers=1"],
        "shares": ["trainer.devices=2", "trainer.strategy=fsdp2", "data.workers=1"],
    }
    files = {}
    for name, options in more.items():
        made = tiny.config(parts, shapes, tmp_path / name, *common, *ASKED, *options)
        files[name] = tmp_path / f"{name}.yaml"
        files[name].write_text(to_yaml(made))
    fit_asked(files["one"])
    run_ranks(fit_asked, files["two"], files["shares"])
    for name in ("two", "shares"):
        assert scores(tmp_path / name) == pytest.approx(scores(tmp_path / "one")), name
        assert (tmp_path / name / "checkpoints" / "best.ckpt").is_file()
        found, true = (read_past(tmp_path / one / "samples.jsonl") for one in (name, "one"))
        assert [(row.step, row.key, row.answer) for row in found] == [(row.step, row.key, row.answer) for row in true]
