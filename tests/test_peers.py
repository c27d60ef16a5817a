"""`bench`: the same computation as transformers' LLaVA on the same weights, what it writes, its time, and what it refuses."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_eemllm import bench as bench_module
from lit_eemllm.bench import BASE, Pair, Setting, bench, setting
from lit_eemllm.cli import main
from lit_eemllm.errors import UserError
from lit_eemllm.report.measured import exponent, report


def small(**given: Any) -> Setting:
    return setting(**{"layers": 2, "text": 40, "tokens": 2, "rounds": 1, "documents": 3, **given})


def test_a_run_writes_its_files(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    systems = ["hf eager", "llava", "ee_mllm", "saisa", "flamingo"]
    words = [
        "--layers",
        "2",
        "--text",
        "40",
        "--tokens",
        "2",
        "--rounds",
        "1",
        "--documents",
        "3",
        "--visual",
        "36",
        "4",
        "16",
    ]
    assert main(["bench", *words, "--systems", *systems, "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert max(result["differences"].values()) <= 1e-4 and set(result["differences"]) == {"logits", "loss"}
    cells = [(row["visual"], row["measure"], row["system"]) for row in result["rows"]]
    assert len(cells) == len(set(cells)) == 3 * 4 * 6, "and hf sdpa, which all are compared with"
    assert all(len(row["seconds"]) == 1 and row["seconds"][0] > 0 for row in result["rows"])
    said = (tmp_path / "report.md").read_text()
    assert said.count("| V | 4 | 16 | 36 | exponent |") == 4 and said.count("(1.00)") >= 12
    assert "T/2, T, T x 2 tokens" in said and "commit" in said
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "36 visual tokens: ms" in capfd.readouterr().out


def test_both_sides_have_one_set_of_weights() -> None:
    pair = Pair(small(), 16)
    assert max(pair.compare().values()) <= 1e-4
    names = dict(pair.model("saisa").named_parameters())
    theirs = dict(pair.hf.named_parameters())
    own = [name for name, x in names.items() if x.data_ptr() not in {y.data_ptr() for y in theirs.values()}]
    assert own and all(name.startswith("projector.") for name in own), "SAISA's projectors"
    with torch.no_grad():
        theirs["lm_head.weight"].mul_(2)  # of both
        pair.compare()
        theirs["lm_head.weight"].data = theirs["lm_head.weight"] * 2
    with pytest.raises(UserError, match="llava is not transformers' LLaVA"):
        pair.compare()


def test_the_exponent_is_that_of_a_power() -> None:
    assert exponent([(v, 3.0 * v**1.5) for v in (4, 64, 900)]) == pytest.approx(1.5)
    assert exponent([(4, 1.0), (8, 2.0)]) is None


def test_a_table_says_how_many_times_as_fast() -> None:
    rows = [("hf sdpa", [0.4, 0.1, 0.2]), ("vica", [0.05]), ("llava", [])]
    made: list[dict[str, Any]] = [
        {"measure": "prefill", "system": name, "visual": 64, "seconds": seconds} for name, seconds in rows
    ]
    made[2]["failed"] = "out of memory"
    about = {"shape": "small", "layers": 8, "dtype": "float32", "threads": 1, "text": 64, "documents": 2, "load": 0.0}
    said = report({**about, "rows": made, "differences": {}, "provenance": "here"})
    assert (
        "| hf sdpa | 200 (1.00) |  |" in said
        and "| vica | 50 (4.00) |  |" in said
        and "| llava | out of memory |  |" in said
    )


def test_running_out_of_memory_is_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: object, model: object) -> float:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Pair, "training", full)
    bench(small(systems=["vica"], measures=["training"], visual=[4]), tmp_path)
    said = (tmp_path / "report.md").read_text()
    assert "| hf sdpa | out of memory |  |" in said and "| vica | out of memory |  |" in said


def test_rounds_end_with_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 300 minutes 16 tokens get a third and 64 the rest; each has one round at least, and the first counts where no other is made."""
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def slow(self: Pair, model: object) -> float:
        clock[0] += 60 * (10 if self.visual == 16 else 250)
        return clock[0]

    monkeypatch.setattr(Pair, "prefill", slow)
    bench(small(systems=[BASE], measures=["prefill"], visual=[16, 64], rounds=100, minutes=300.0), tmp_path)
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert [(row["visual"], len(row["seconds"])) for row in rows] == [(16, 10), (64, 1)]
    assert rows[0]["seconds"][0] == 60 * 20, "the first round, which warms up, is not among them"


def test_what_cannot_be_measured_is_said_together() -> None:
    with pytest.raises(UserError) as told:
        setting(visual=[5, 64], systems=["lava"], text=10, shape="7b", attention="sdp", minutes=float("nan"))
    lines = str(told.value).splitlines()
    assert [re.match(r"--\w+ \S+: expected", line) is not None for line in lines] == [True] * 5, lines
    assert (
        "--visual 5: expected a square" in lines[2]
        and "did you mean llava?" in lines[0]
        and "--minutes nan" in lines[4]
    )
    assert bench_module.setting(systems=["vica"]).systems == [BASE, "vica"]
