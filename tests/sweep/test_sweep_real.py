"""Sweeps of real runs, and those of the documentation and of the repository."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from lib.pages import REPOSITORY
from lib.sweeps import snapshot, until
from torch.utils._pytree import tree_flatten

from lit_eemllm.config import load_config, to_yaml
from lit_eemllm.sweep import sweep
from lit_eemllm.sweep.plan import make_plan
from lit_eemllm.sweep.spec import SLURM as SLURM_KEYS
from lit_eemllm.sweep.spec import read_sweep
from lit_eemllm.training.checkpoint import read_checkpoint
from lit_eemllm.training.fit import fit


def real(parts: Path, data: Path, out: str, *more: str) -> Path:
    """A sweep of two cells, some steps each, a shared stage and a cell that is not trained."""
    Path("real.yaml").write_text(
        to_yaml(tiny.config(parts, data, Path("unused"), "optim.save_every=2", "optim.max_steps=6"))
    )
    content = {
        "base": ["real.yaml"], "out": out, "seeds": [1], "baseline": "ee", "shape": "mechanisms",
        "set": {"eval.samples": 8, "eval.control": 0},
        "cells": {"dense": {"model.mechanism.preset": "llava"}, "ee": {"model.mechanism.preset": "ee_mllm"},
                  "free": {"weights": "dense", "model.mechanism.preset": "ee_mllm_f", "model.mechanism.dense_layers": [0]}},
        "stages": [{"name": "pretrain", "shared": True, "set": {"optim.tuning.llm": "frozen", "optim.max_steps": 3}},
                   {"name": "finetune"}],
    }  # fmt: skip
    file = Path(f"{out}.yaml")
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


def assert_same_tensors(a, b):
    """Two sections of checkpoints, bit by bit."""
    (found, shape), (true, true_shape) = tree_flatten(a), tree_flatten(b)
    assert shape == true_shape and sum(isinstance(x, torch.Tensor) for x in true) >= 4
    for x, y in zip(found, true, strict=True):
        assert x.equal(y) if isinstance(y, torch.Tensor) else x == y


def finished(out: str) -> list[Path]:
    return sorted(Path(out).rglob("results.json"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_real_sweep_killed_in_the_middle_ends_as_runs_that_were_not(parts, shapes, monkeypatch):
    """Two stages, two cells, an untrained cell; SIGKILL of the sweep and of a run; then the bits of plain runs."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    program = [sys.executable, "-m", "lit_eemllm", "sweep", real(parts, shapes, "cut"), "--jobs", "2"]
    process = subprocess.Popen(program, stdout=subprocess.DEVNULL)
    middle = Path("cut/dense/seed1/checkpoints/step-2.ckpt")
    until(middle.is_file, process, 300)
    process.kill()
    process.wait()
    os.kill(int(Path("cut/dense/seed1/.lock").read_text().split()[1]), signal.SIGKILL)
    assert not finished("cut")
    done = subprocess.run(program, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "started  dense/seed1, continues at step" in done.stdout

    for stage, steps in (("pretrain", 3), ("dense", 6), ("ee", 6)):
        name = f"{stage}/seed1"
        config = load_config([f"cut/{name}/config.yaml"])
        assert config.seed == 1
        start = config.init_from and config.init_from.replace("cut", "whole")
        fit(replace(config, out=f"whole/{name}", init_from=start))
        a, b = (read_checkpoint(Path(f"{out}/{name}/checkpoints/step-{steps}.ckpt")) for out in ("cut", "whole"))
        for section in ("state_dict", "optimizer_states"):
            assert_same_tensors(a[section], b[section])
    assert finished("cut") == [Path(f"cut/{cell}/seed1/eval/results.json") for cell in ("dense", "ee", "free")]
    free = json.loads(Path("cut/free/seed1/eval/results.json").read_text())
    assert (free["checkpoint"], free["preset"]) == ("cut/dense/seed1/checkpoints/step-6.ckpt", "ee_mllm_f")
    index = json.loads(Path("cut/sweep.json").read_text())
    assert [row["name"] for row in index["rows"]] == ["dense", "ee", "free"] and not index["failed"]
    assert Path("cut/report/report.md").is_file()
    before = snapshot(Path("cut"))
    assert sweep(Path("cut.yaml")) == 0 and snapshot(Path("cut")) == before


def test_the_example_of_the_documentation(monkeypatch, tmp_path):
    text = (REPOSITORY / "docs" / "sweeps.md").read_text()
    example = text.partition("```yaml\n")[2].partition("```")[0]
    file = tmp_path / "example.yaml"
    file.write_text(example.replace("../demo", str(REPOSITORY / "configs" / "demo")))
    monkeypatch.chdir(REPOSITORY)
    plan = make_plan(read_sweep(file, ["seeds=[0]"]))
    assert list(plan.rows) == ["full", "no FFN", "dense", "without training"]
    assert {name.partition("/")[0] for name in plan.tasks} == {
        "pretrain", "search", "full", "no-ffn", "dense", "without-training"
    }  # fmt: skip
    assert all(f"`{name}`" in text for name in SLURM_KEYS)


MODELS = ["model.decoder=llm", "model.vision.encoder=transformers", "model.vision.path=clip"]
PARTS = {"real.yaml": [*MODELS, "data.train=photos", "data.val=photos"], "real_questions.yaml": MODELS}
"""What a sweep leaves to the command line (and to --import)."""


@pytest.mark.parametrize("name", sorted(path.name for path in (REPOSITORY / "configs" / "sweeps").glob("*.yaml")))
def test_the_sweeps_of_the_repository_make_a_plan(name, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    file = Path("configs/sweeps") / name
    seeds = {"hard_mechanisms.yaml": 8, "hard_aligner.yaml": 5}.get(name, 3)
    assert read_sweep(file).seeds == tuple(range(seeds))
    plan = make_plan(read_sweep(file, ["seeds=[0]", *PARTS.get(name, [])]))
    assert all(len(runs) == 1 for runs in plan.rows.values())
    configs = {row: plan.tasks[runs[0]].config for row, runs in plan.rows.items()}
    mechanisms = {
        row: config.model.mechanism for row, config in configs.items() if config is not None
    }  # searched: None
    parts = {
        row: tuple(vars(m.aligner).values()) for row, m in mechanisms.items() if None not in vars(m.aligner).values()
    }
    spec = read_sweep(file)
    assert bool(parts) == (spec.shape == "aligner"), "the report's columns for the parts go with cells that set them"
    groups = {cell.name: cell.group for cell in spec.cells}
    for group in set(groups.values()) if parts else ():
        found = [parts[row] for row in parts if groups[row] == group]
        assert len(set(found)) == len(found) and (set(found) == PAPERS or set(found) == EVERY), "each once"


PAPERS = {(False, False, False), (False, True, True), (True, False, True), (True, True, False), (True, True, True)}
"""V, O and FFN in the rows of the paper's Table 6."""
EVERY = set(itertools.product((False, True), repeat=3))


def test_table_4_is_trained_by_its_presets(monkeypatch):
    """What a cell would train is the preset, but for its directories and what is evaluated."""
    monkeypatch.chdir(REPOSITORY)
    plan = make_plan(read_sweep(Path("configs/sweeps/table4_7b.yaml"), ["seeds=[0]"]))
    pairs = {
        "llava": "llava_1.5_7b",
        "ee-mllm": "ee_mllm_7b_336",
        "llava-at-672": "llava_7b_672",
        "ee-mllm-at-672": "ee_mllm_7b_672",
    }
    for cell, preset in pairs.items():
        for stage, task in (("pretrain", f"{cell}/pretrain/seed0"), ("finetune", f"{cell}/seed0")):
            asked, config = load_config([f"configs/presets/{preset}_{stage}.yaml"]), plan.tasks[task].config
            start = f"runs/sweeps/table4_7b/{cell}/pretrain/seed0" if stage == "finetune" else None
            assert config.init_from == start and config.eval.suite == "suite.yaml"
            assert replace(config, out="", init_from=None, eval=asked.eval) == replace(asked, out="", init_from=None)
    assert len(plan.tasks) == 8
