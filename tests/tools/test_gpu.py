"""`make gpu-dry`: every part runs on the fake device; what was done is not done again; what is missing, fails or hangs is said."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import gpu

ROOT = Path(__file__).parents[2]


def dry(out: Path, *words: str) -> str:
    command = [sys.executable, ROOT / "tools" / "gpu.py", "--dry", "--out", out, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    return f"{done.returncode}\n{done.stdout}{done.stderr}"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_part_runs_on_the_fake_device_and_is_not_done_twice(tmp_path: Path) -> None:
    said = dry(tmp_path)
    assert said.startswith("0\n"), said
    assert all(f"{name}: done (" in said for name in gpu.PARTS), said
    rows = json.loads((tmp_path / "steps.json").read_text())["rows"]
    assert {row["mechanism"] for row in rows} == {"llava", "ee_mllm", "flamingo"} and len(rows) > 20
    assert all(row["waits"] == {} and row["loss"][0] == pytest.approx(row["loss"][1], rel=0.02) for row in rows)
    assert json.loads((tmp_path / "resumed.json").read_text())["equal"] is True
    assert json.loads((tmp_path / "exactness.json").read_text())["failed"] == []
    for name in ("peers", "training", "attention"):
        assert (tmp_path / name / "report.md").is_file()
    summary = (tmp_path / "summary.md").read_text()
    assert "dry: a fake device" in summary and summary.count("| done |") == len(gpu.PARTS)
    again = dry(tmp_path)
    assert all(f"{name}: done before" in again for name in gpu.PARTS)


def test_a_part_that_fails_or_hangs_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """And is tried again by the next command."""
    calls = []

    def run(words: list[str], *, stdout, timeout: float, **options):
        name = words[words.index("--part") + 1]
        calls.append(name)
        if name == "steps":
            stdout.write("Traceback\nValueError: of two kinds\n")
            stdout.flush()
            return subprocess.CompletedProcess(words, 1)
        if name == "prefill":
            raise subprocess.TimeoutExpired(words, timeout)
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(gpu.subprocess, "run", run)
    monkeypatch.setattr(gpu, "commit", lambda: "abc")
    parts = ["steps", "prefill", "training"]
    assert gpu.run_all(tmp_path, True, parts) == 2
    said = capsys.readouterr().out
    assert "steps: failed: ValueError: of two kinds (" in said and "prefill: not ended within 600 s" in said
    assert gpu.run_all(tmp_path, True, parts) == 2 and calls == [*parts, "steps", "prefill"]
    monkeypatch.setattr(gpu, "commit", lambda: "def")  # other code: all again
    gpu.run_all(tmp_path, True, parts)
    assert calls[-3:] == parts


def test_what_is_missing_is_named_before_anything_runs(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(gpu, "NEEDED", {"torch": "", "not_there": "the resumed run"})
    gpu.missing()
    assert "missing: not_there, so without the resumed run" in capsys.readouterr().out
    monkeypatch.setattr(gpu, "NEEDED", {"not_there": ""})
    with pytest.raises(SystemExit, match=r"make gpu needs not_there; .* --wheels FOLDER"):
        gpu.missing()


def test_twelve_minutes_in_all() -> None:
    assert sum(seconds for _, seconds in gpu.PARTS.values()) <= 12 * 60


def test_wheels_are_of_what_a_bare_machine_lacks() -> None:
    """What this project's loader needs, at the locked versions; not what an image made for training has."""
    found = gpu.wanted()
    assert {"megatron-energon", "webdataset", "omegaconf", "multi-storage-client", "rapidyaml"} <= found.keys()
    assert not found.keys() & {"torch", "transformers", "numpy", "lightning", "pytest", "ruff", "mypy"}
    locked = (ROOT / "constraints.txt").read_text()
    assert all(f"{name}=={version}" in locked for name, version in found.items())
