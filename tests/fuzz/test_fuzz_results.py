"""Malformed things that runs leave behind, from a seeded fuzzer: inputs of `report`, kept answers of a killed `validate`, checkpoints.

Each is used, or refused by a message that names the file; kept answers are taken as they are, or asked again. FUZZ_SEED and
FUZZ_TIMES take it further.
"""

from __future__ import annotations

import copy
import io
import json
import pickle
import random
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from fuzz_util import CANARY, ODD_TEXT, SEED, TIMES, bounded, flip, nothing_is_executed, warp  # noqa: F401 a fixture of each test
from lib.reports import write_run, write_sweep

from lit_eemllm.errors import UserError
from lit_eemllm.evaluation.asking import Answers
from lit_eemllm.report import report
from lit_eemllm.training.checkpoint import newest_checkpoint, read_checkpoint
from lit_eemllm.training.fit import fit
from lit_eemllm.training.initial import trained_model, weights_of

NO_JSON = (
    b"",
    b"null",
    b"[]",
    b"7",
    b"[" * 50_000,
    b'{"a":' * 50_000,
    b"\xff\xfe{\0}\0",
    b"\xff",
    b"1" * 6000,
    b'{"a": 1e999}',
)
METRICS = [(1, 3, 0.02, 1, ""), (2, 2, 0.9, 3, ""), (2, "", "", "", 7), (3, 1, 0.01, 2, "")]


def bad_json(draw: random.Random, content: bytes) -> bytes:
    kind = draw.randrange(5)
    if kind == 0:
        return flip(draw, content, 3)
    if kind == 1:
        return draw.choice(NO_JSON)
    return json.dumps(warp(draw, json.loads(content))).encode("utf-8", "surrogatepass")


def bad_lines(draw: random.Random, content: bytes) -> bytes:
    lines = content.splitlines()
    at = draw.randrange(len(lines))
    how = draw.randrange(4)
    lines[at] = bad_json(draw, lines[at]) if how else draw.choice((b"", b" ", lines[at][:-3], lines[at] * 2))
    return b"\n".join(lines) + b"\n" * draw.randrange(2)


def bad_text(draw: random.Random, content: bytes) -> bytes:
    """A table or a configuration: damaged, or with an odd word."""
    if draw.random() < 0.5:
        return flip(draw, content, 3)
    words = content.split(b",")
    words[draw.randrange(len(words))] = draw.choice(ODD_TEXT).encode("utf-8", "surrogatepass")
    return b",".join(words)


def try_all(
    files: list[tuple[Path, int, Callable[[random.Random, bytes], bytes]]], try_it: Callable[[], None]
) -> Counter[str]:
    """Damage one file at a time. Returns what became of it; a message that does not name the file is `unnamed`."""
    draw, outcomes = random.Random(SEED), Counter[str]()
    try_it()
    for file, times, damage in files:
        content = file.read_bytes()
        for _ in range(times * TIMES):
            data = damage(draw, content)
            file.write_bytes(data)
            try:
                with bounded((file.name, data[:2000])):
                    try_it()
                outcomes["used"] += 1
            except UserError as error:
                named = str(file) in str(error) and len(str(error)) < 20_000
                outcomes["refused" if named else f"unnamed: {file.name}: {error}"[:600]] += 1
            except AssertionError as error:
                outcomes[f"unnamed: {str(error)[:600]}"] += 1
        file.write_bytes(content)
    assert outcomes["used"] and outcomes["refused"], outcomes
    unnamed = [outcome for outcome in outcomes if outcome.startswith("unnamed")]
    assert not unnamed, f"{len(unnamed)}:\n" + "\n".join(unnamed)
    return outcomes


@pytest.mark.slow
def test_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows of a sweep, and the runs themselves; some with their picture, which takes longer than the rest."""
    monkeypatch.chdir(tmp_path)
    runs = [
        write_run(
            Path("sweep") / name,
            f"seed={seed}",
            f"optim.lr={lr}",
            metrics=[METRICS],
            answers={"colour": [1, 0, 1], "shape": [0.5]},
        )
        for name, seed, lr in (("a0", 0, 1), ("a1", 1, 1), ("b0", 0, 2), ("b1", 1, 2))
    ]
    write_sweep(
        Path("sweep"), {"a": runs[:2], "b": runs[2:]}, baseline="a", failed=[{"run": "c", "why": "it was killed"}]
    )
    Path("sweep/search.csv").write_text("cell,optim.lr,score,chosen\na,1,0.5,yes\nb,2,0.25,\n")
    (runs[0] / "logs" / "version_0" / "machine.csv").write_text("machine\nours\n")
    (runs[0] / "eval-untrained").mkdir()
    (runs[0] / "eval-untrained" / "results.json").write_bytes((runs[0] / "eval" / "results.json").read_bytes())

    def files(times: int) -> list[tuple[Path, int, Callable[[random.Random, bytes], bytes]]]:
        return [
            (runs[0] / "eval" / "results.json", 3 * times, bad_json),
            (runs[0] / "eval-untrained" / "results.json", times, bad_json),
            (runs[0] / "eval" / "predictions.jsonl", 2 * times, bad_lines),
            (runs[0] / "logs" / "version_0" / "metrics.csv", 2 * times, bad_text),
            (runs[0] / "logs" / "version_0" / "machine.csv", times, bad_text),
            (runs[0] / "config.yaml", times, bad_text),
        ]  # fmt: skip

    of_sweep = [(Path("sweep/sweep.json"), 120, bad_json), (Path("sweep/search.csv"), 60, bad_text)]
    try_all(files(1), lambda: report(runs, Path("report"), str(runs[0])))
    monkeypatch.setattr("lit_eemllm.report.draw", lambda rows: b"")
    try_all(files(60), lambda: report(runs, Path("report"), str(runs[0])))
    try_all(of_sweep, lambda: report([Path("sweep")]))


@pytest.mark.slow
def test_kept_answers(tmp_path: Path) -> None:
    """Whatever is in the file: replies that are taken over are replies, and what is written is read again."""
    identity = {"version": "1", "checkpoint": "c", "questions": {"val": "q"}}
    made = Answers(tmp_path, identity)
    for batch in range(4):
        made.add("val", batch, [("yes", None), ("no", "length")])
    made.file.close()
    file = tmp_path / "answers-0.jsonl"
    content, draw = file.read_bytes(), random.Random(SEED)
    kept = Counter[int]()
    for _ in range(300 * TIMES):
        data = bad_lines(draw, content)
        file.write_bytes(data)
        with bounded(data[:2000]):
            found = Answers(tmp_path, identity)
            replies = dict(found.replies)
            assert all(isinstance(part, str) and isinstance(batch, int) for part, batch in replies)
            for answers in replies.values():
                assert all(isinstance(text, str | None) and isinstance(why, str | None) for text, why in answers)
            found.add("val", 9, [("late", None)])
            found.file.close()
            again = Answers(tmp_path, identity)
            again.file.close()
            assert again.replies == {**replies, ("val", 9): [("late", None)]}
        kept[len(replies)] += 1
    assert len(kept) > 3, kept


def bad_checkpoint(draw: random.Random, content: bytes) -> bytes:
    """Bytes that a disk or a stranger has changed: in the archive, its directory, or one of its members with a right checksum."""
    kind = draw.randrange(4)
    if kind == 0:
        return flip(draw, content, 4)
    if kind == 1:
        at = draw.randrange(len(content))
        return content[:at] + bytes(min(4096, len(content) - at)) + content[at + 4096 :]
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(made, "w") as new:
        names = old.namelist()
        chosen = draw.choice([name for name in names if name.endswith(".pkl")] if kind == 2 else names)
        for name in names:
            data = old.read(name)
            if name == chosen:
                data = draw.choice((flip(draw, data, 3), b"", data * 2, pickle.dumps(Bomb())))
            new.writestr(name, data)
    return made.getvalue()


class Bomb:
    def __reduce__(self) -> tuple:
        return CANARY.touch, ()


def changed(draw: random.Random, value: Any) -> Any:
    """One place of a checkpoint gets another value, goes, or comes twice."""
    if isinstance(value, torch.Tensor):
        odd = (
            value.flatten()[: draw.randrange(3)],
            value.to(torch.int8),
            value[None],
            None,
            7,
            value.double() * torch.nan,
        )
        return draw.choice(odd)
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(list(value))
        how = draw.randrange(8)
        rest = {k: v for k, v in value.items() if k != key}
        return (
            rest if how == 0 else rest | {"odd": value[key]} if how == 1 else value | {key: changed(draw, value[key])}
        )
    if isinstance(value, list | tuple) and value and draw.random() < 0.9:
        at = draw.randrange(len(value))
        return type(value)([*value[:at], changed(draw, value[at]), *value[at + 1 :]])
    return warp(draw, value)


@pytest.mark.slow
def test_checkpoints(tmp_path: Path, parts: Path, shapes: Path) -> None:
    """Bytes and structure. What is loaded is used as `validate`, `init_from` and a resumed `fit` use it."""
    config = tiny.config(parts, shapes, tmp_path / "run", "optim.max_steps=1", "data.val=null", "data.workers=0")
    fit(config)
    file = newest_checkpoint(tmp_path / "run")
    assert file is not None
    content, whole = file.read_bytes(), read_checkpoint(file)
    whole = copy.deepcopy(whole)  # not mapped from the file
    more = replace(config, optim=replace(config.optim, max_steps=2))

    def go_on() -> None:
        for later in file.parent.glob("*.ckpt"):
            if later != file:
                later.unlink()
        fit(more)

    def saved(draw: random.Random, _: bytes) -> bytes:
        made, tree = io.BytesIO(), whole
        for _ in range(draw.randint(1, 2)):
            section = draw.choice([name for name in tree if name != "pytorch-lightning_version"])
            tree = {**tree, section: changed(draw, tree[section])}
        torch.save(tree, made)
        return made.getvalue()

    try_all([(file, 500, bad_checkpoint)], lambda: read_checkpoint(file))
    try_all([(file, 60, saved)], lambda: trained_model(config, file))
    try_all([(file, 60, saved)], lambda: weights_of(file))
    try_all([(file, 25, saved)], go_on)
    assert content == file.read_bytes()
