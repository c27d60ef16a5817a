"""The benchmark beside transformers' LLaVA: the same computation on both sides, its files, and what it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import bench_peers

SMALL = ["--shape", "tiny", "--layers", "2", "--text", "40", "--tokens", "2", "--rounds", "1"]


def test_a_run_writes_its_files(tmp_path: Path) -> None:
    systems = ["hf eager", "hf sdpa", "llava", "ee_mllm", "saisa", "flamingo"]
    bench_peers.main([*SMALL, "--visual", "4", "16", "36", "--systems", *systems, "--out", str(tmp_path)])
    result = json.loads((tmp_path / "result.json").read_text())
    assert max(result["differences"].values()) <= 1e-4 and set(result["differences"]) == {"logits", "loss"}
    cells = [(row["visual"], row["measure"], row["system"]) for row in result["rows"]]
    assert len(cells) == len(set(cells)) == 3 * 4 * len(systems)
    assert all(len(row["seconds"]) == 1 and row["seconds"][0] > 0 for row in result["rows"])
    report = (tmp_path / "report.md").read_text()
    assert report.count("| V | hf eager | hf sdpa | llava |") == 4 and report.count("(1.00)") >= 12
    assert report.count("| exponent | ") == 4 and "commit" in report
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_both_sides_have_one_set_of_weights() -> None:
    pair = bench_peers.Pair(bench_peers.parse([*SMALL, "--visual", "16"]), 16)
    assert max(pair.compare().values()) <= 1e-4
    names = dict(pair.model("saisa").named_parameters())
    theirs = dict(pair.hf.named_parameters())
    own = [name for name, x in names.items() if x.data_ptr() not in {y.data_ptr() for y in theirs.values()}]
    assert own and all(name.startswith("projector.") for name in own), "SAISA's projectors"
    with torch.no_grad():
        theirs["lm_head.weight"].mul_(2)  # of both
        pair.compare()
        theirs["lm_head.weight"].data = theirs["lm_head.weight"] * 2
    with pytest.raises(SystemExit, match="llava is not transformers' LLaVA"):
        pair.compare()


def test_the_exponent_is_that_of_a_power() -> None:
    assert bench_peers.exponent([(v, 3.0 * v**1.5) for v in (4, 64, 900)]) == pytest.approx(1.5)
    assert bench_peers.exponent([(4, 1.0), (8, 2.0)]) is None


def test_running_out_of_memory_is_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: object, model: object) -> float:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(bench_peers.Pair, "training", full)
    systems = ["--systems", "hf sdpa", "vica", "--measures", "training"]
    bench_peers.main([*SMALL, "--visual", "4", *systems, "--out", str(tmp_path)])
    assert "| 4 | out of memory | out of memory |" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--visual", "5"], "expected squares"),
        (["--systems", "llama"], "--systems llama: expected of"),
        (["--text", "10"], "--text is 37 or more"),
    ],
)
def test_what_cannot_be_measured_is_said(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_peers.parse(words)
    assert told in capsys.readouterr().err
