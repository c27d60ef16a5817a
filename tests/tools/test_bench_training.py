"""The training benchmark runs on a CPU at tiny sizes, and says what could not run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_tiny_cases_are_measured_and_reported(tmp_path):
    words = [
        "--out",
        tmp_path,
        "--text",
        "16",
        "--documents",
        "1",
        "--cases",
        "projector",
        "qlora",
        "--mechanisms",
        "llava",
        "ee_mllm",
    ]
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "bench_training.py", *words], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert len(result["rows"]) == 8 and result["shape"] == "tiny"
    measured = [row for row in result["rows"] if row["case"] == "projector"]
    assert all(row["step_seconds"] > 0 and row["trained"] == 32 * 64 + 64 + 64 * 64 + 64 for row in measured)
    losses = {row["mechanism"]: row["loss"] for row in measured if not row["activation_checkpointing"]}
    again = {row["mechanism"]: row["loss"] for row in measured if row["activation_checkpointing"]}
    assert losses == again and losses["llava"] != losses["ee_mllm"]
    report = (tmp_path / "report.md").read_text()
    assert report.count("| projector | llava |") == 2 and "| 1.00 |" in report
