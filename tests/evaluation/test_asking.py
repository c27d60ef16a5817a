"""Asking: batches, kills, ranks, and answers that were kept change nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lib.processes import Started, run_command
from lib.questions import of_shards, question, read

from lit_eemllm.errors import ConfigError
from lit_eemllm.evaluation import run
from lit_eemllm.evaluation.asking import Answers, in_batches, start_ranks
from lit_eemllm.evaluation.questions import Picture
from lit_eemllm.inputs.conversation import Conversation, Turn
from lit_eemllm.training.checkpoint import newest_checkpoint
from lit_eemllm.training.fit import fit


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
    checkpoint = newest_checkpoint(Path(talkative.out))
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
