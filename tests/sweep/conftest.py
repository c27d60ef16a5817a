"""Where a sweep is called, and its report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from lib.sweeps import BASE


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """The current directory: a base configuration and what it needs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "data").mkdir()
    monkeypatch.setattr("lit_eemllm.sweep.execute.POLL", 0.02)
    return tmp_path


@pytest.fixture
def reports(monkeypatch) -> list:
    """Stands in for the report: what it was called with."""
    made = []

    def report(runs, out):
        index = json.loads((runs[0] / "sweep.json").read_text())
        made.append((runs, out, index))
        out.mkdir(exist_ok=True)
        (out / "report.md").write_text("table")

    monkeypatch.setattr("lit_eemllm.report.report", report)
    return made
