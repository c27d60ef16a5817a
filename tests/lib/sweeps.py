"""A sweep whose runs are a fake program, and what the runs were called with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from lit_eemllm.sweep import sweep

FAKE = (sys.executable, str(Path(__file__).with_name("fake_program.py")))


BASE = """
model: {decoder: some/decoder, vision: {path: some/encoder}}
data: {train: data, val: data}
optim: {lr: 1e-3, max_steps: 10}
trainer: {accelerator: cpu}
"""
SWEEP = """
base: [base.yaml]
out: out
seeds: [0, 1]
baseline: V+O
shape: aligner
cells:
  V+O: {model.mechanism.aligner.ffn: false}
  all: {optim.weight_decay: 0.1}
"""
STAGES = """
stages:
  - {name: pretrain, shared: true, set: {optim.max_steps: 4, optim.lr: 1e-2}}
  - {name: middle, set: {optim.max_steps: 6}}
  - {name: last}
"""
SEARCH = """
search:
  grid: {optim.lr: [1e-4, 1e-3, 1e-2]}
  set: {optim.max_steps: 5}
  by: loss
"""


def write(text: str, name: str = "sweep.yaml") -> Path:
    Path(name).write_text(text)
    return Path(name)


def run(text: str = SWEEP, *overrides: str, **options) -> int:
    return sweep(write(text), overrides, command=FAKE, **options)


def calls() -> list[dict]:
    file = Path("calls.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def ran() -> list[tuple[str, str]]:
    return [(call["verb"], call["name"]) for call in calls()]


def wish(**wishes) -> None:
    Path("wishes.json").write_text(json.dumps(wishes))


def snapshot(root: Path) -> dict:
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in root.rglob("*") if path.is_file()}


def until(condition, process=None, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline and (process is None or process.poll() is None)
        time.sleep(0.02)


CALL = """
import sys
from pathlib import Path
from types import SimpleNamespace
import lit_eemllm.sweep.plan as plan
from lit_eemllm.sweep import sweep
plan.check_names = plan.check_options = lambda config: []  # know names by importing torch
sys.modules["lit_eemllm.report"] = SimpleNamespace(report=lambda runs, out: None)
sys.exit(sweep(Path("sweep.yaml"), command={!r}, {}))
"""


def start(options: str = "jobs=2") -> subprocess.Popen:
    """A sweep with the fake program in a process of its own."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    code = CALL.format(FAKE, options)
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, **output)


def started() -> list[int]:
    return [int(text) for path in Path("out").rglob("started") if (text := path.read_text())]
