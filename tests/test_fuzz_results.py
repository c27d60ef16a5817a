"""Hundreds of malformed inputs of `report`, and kept answers of a killed `validate`, from a seeded fuzzer.

A report is made, or refused by a message that names the file. Kept answers are taken as they are, or asked again. FUZZ_SEED and
FUZZ_TIMES take it further.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from fuzz_util import ODD_TEXT, SEED, TIMES, bounded, flip, nothing_is_executed, warp  # noqa: F401 a fixture of each test
from test_report import write_run, write_sweep

from lit_eemllm.errors import UserError
from lit_eemllm.evaluation.asking import Answers
from lit_eemllm.report import report

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
    (runs[0] / "eval-untrained").mkdir()
    (runs[0] / "eval-untrained" / "results.json").write_bytes((runs[0] / "eval" / "results.json").read_bytes())

    def files(times: int) -> list[tuple[Path, int, Callable[[random.Random, bytes], bytes]]]:
        return [
            (runs[0] / "eval" / "results.json", 3 * times, bad_json),
            (runs[0] / "eval-untrained" / "results.json", times, bad_json),
            (runs[0] / "eval" / "predictions.jsonl", 2 * times, bad_lines),
            (runs[0] / "logs" / "version_0" / "metrics.csv", 2 * times, bad_text),
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
