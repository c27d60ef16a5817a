"""Sweeps: what is run, in which order, with what; what is left alone; broken, killed and stopped ones; the same at the end."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
import yaml
from rich.console import Console
from torch.utils._pytree import tree_flatten

from lit_eemllm import cli
from lit_eemllm.config import load_config, to_yaml
from lit_eemllm.errors import ConfigError, UserError
from lit_eemllm.locks import try_lock
from lit_eemllm.sweep import sweep
from lit_eemllm.sweep.execute import Job, visible_devices
from lit_eemllm.sweep.plan import make_plan
from lit_eemllm.sweep.spec import SLURM as SLURM_KEYS
from lit_eemllm.sweep.spec import read_sweep
from lit_eemllm.training.checkpoint import read_checkpoint
from lit_eemllm.training.fit import fit

FAKE = (sys.executable, str(Path(__file__).with_name("fake_program.py")))
REPOSITORY = Path(__file__).resolve().parents[2]
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


# --- what is run


def test_cells_times_seeds_then_the_report_and_nothing_the_second_time(reports, folder, capsys):
    assert run() == 0
    names = ["v-o/seed0", "all/seed0", "v-o/seed1", "all/seed1"]
    assert ran() == [(verb, name) for name in names for verb in ("fit", "validate")]
    ((runs, out, index),) = reports
    assert (runs, out) == ([Path("out")], Path("out/report"))
    assert index == {
        "title": "sweep", "command": "lit-eemllm sweep sweep.yaml", "baseline": "V+O", "shape": "aligner",
        "rows": [{"name": "V+O", "runs": ["v-o/seed0", "v-o/seed1"]}, {"name": "all", "runs": ["all/seed0", "all/seed1"]}],
        "failed": [], "search": None,
    }  # fmt: skip
    for name in names:  # frozen, and nothing but what cell and seed say
        true = load_config(
            ["base.yaml"],
            [
                "model.mechanism.aligner.ffn=false" if "v-o" in name else "optim.weight_decay=0.1",
                f"seed={name[-1]}",
                f"out=out/{name}",
            ],
        )
        assert (folder / "out" / name / "config.yaml").read_text() == to_yaml(true, comments=True)
        assert (folder / "out" / name / "log.txt").read_text().splitlines() == [
            f"$ lit-eemllm fit out/{name}",
            f"$ lit-eemllm validate out/{name}",
        ]
    before = snapshot(folder / "out")
    assert run() == 0
    assert snapshot(folder / "out") == before and len(calls()) == 8 and len(reports) == 1
    assert "4 of 4 done; report: out/report/report.md" in capsys.readouterr().out


def test_all_configurations_are_frozen_before_anything_runs(reports):
    wish(fail=["v-o/seed0"])
    run()
    first = min(call["start"] for call in calls())
    seconds = [path.stat().st_mtime for path in Path("out").rglob("config.yaml")]
    assert len(seconds) == 4 and max(seconds) < first + 0.01


def test_stages_start_from_the_one_before_and_a_shared_one_runs_once_a_seed(reports):
    assert run(SWEEP + STAGES, "seeds=[3]") == 0
    fits = [name for verb, name in ran() if verb == "fit"]
    assert fits == [
        "pretrain/seed3", "v-o/middle/seed3", "v-o/seed3", "all/middle/seed3", "all/seed3"
    ]  # fmt: skip
    assert [name for verb, name in ran() if verb == "validate"] == ["v-o/seed3", "all/seed3"]
    configs = {name: load_config([f"out/{name}/config.yaml"]) for name in fits}
    assert [(c.init_from, c.optim.max_steps, c.optim.lr) for c in configs.values()] == [
        (None, 4, 1e-2),
        ("out/pretrain/seed3", 6, 1e-3),
        ("out/v-o/middle/seed3", 10, 1e-3),
        ("out/pretrain/seed3", 6, 1e-3),
        ("out/all/middle/seed3", 10, 1e-3),
    ]
    assert [c.model.mechanism.aligner.ffn for c in configs.values()] == [None, False, False, None, None]
    # what nobody needs any more is not made again; what is needed is
    (Path("out/pretrain/seed3/checkpoints/step-4.ckpt")).unlink()
    assert run(SWEEP + STAGES, "seeds=[3]") == 0 and len(calls()) == 7
    (Path("out/all/seed3/eval/results.json")).unlink()
    (Path("out/all/seed3/checkpoints/step-10.ckpt")).unlink()
    assert run(SWEEP + STAGES, "seeds=[3]") == 0 and ran()[7:] == [("fit", "all/seed3"), ("validate", "all/seed3")]


def test_equal_configurations_are_one_run(reports):
    cells = "cells:\n  a: {optim.weight_decay: 0.1}\n  b: {optim.weight_decay: 1e-1}\n  c: {optim.lr: 2e-3}\n"
    text = SWEEP.partition("baseline")[0] + cells
    assert (
        run(
            text
            + STAGES.replace("shared: true, ", "").replace("optim.lr: 1e-2", "optim.lr: 1e-2, optim.weight_decay: 0")
        )
        == 0
    )
    fits = [name for verb, name in ran() if verb == "fit" and "seed0" in name]
    assert fits == [
        "a/pretrain/seed0", "a/middle/seed0", "a/seed0", "c/pretrain/seed0", "c/middle/seed0", "c/seed0"
    ]  # fmt: skip
    assert [row["runs"] for row in reports[0][2]["rows"]][:2] == [["a/seed0", "a/seed1"]] * 2


def test_grid_gives_names_and_cells_times_grid_the_product():
    grid = "grid:\n  optim.lr: [1e-3, 1e-4]\n  model.mechanism.aligner.ffn: [true, false]\n"
    text = SWEEP.partition("baseline")[0]
    cells = read_sweep(write(text + grid)).cells
    assert [cell.name for cell in cells] == [
        "lr=0.001, ffn=true", "lr=0.001, ffn=false", "lr=0.0001, ffn=true", "lr=0.0001, ffn=false",
    ]  # fmt: skip
    plan = make_plan(read_sweep(write(text + grid)))
    assert [(t.config.optim.lr, t.config.model.mechanism.aligner.ffn) for t in plan.tasks.values()][:4] == [
        (1e-3, True), (1e-3, False), (1e-4, True), (1e-4, False),
    ]  # fmt: skip
    more = "cells:\n  a:\n  b: {weights: a, optim.eps: 1e-7}\ngrid: {optim.lr: [1, 2]}\n"
    cells = read_sweep(write(text + more)).cells
    assert [(cell.name, cell.weights) for cell in cells] == [
        ("a, lr=1", None), ("a, lr=2", None), ("b, lr=1", "a, lr=1"), ("b, lr=2", "a, lr=2")
    ]  # fmt: skip


def test_a_cells_files_may_be_those_of_the_stage_and_groups_go_into_the_index(reports):
    for stage, decay in (("middle", 0.2), ("last", 0.3)):
        write(f"optim: {{weight_decay: {decay}}}", f"{stage}.yaml")
    text = SWEEP.partition("baseline")[0] + "baseline: [a, b]\ncells:\n"
    text += (
        '  a: {group: one, files: ["{stage}.yaml"]}\n  b: {group: two}\n  c: {group: one, optim.weight_decay: 0.5}\n'
        + STAGES
    )
    assert run(text) == 0
    decays = {path: load_config([f"out/{path}/config.yaml"]).optim.weight_decay for path in
              ("pretrain/seed0", "a/middle/seed1", "a/seed1", "b/seed1")}  # fmt: skip
    assert list(decays.values()) == [0.0, 0.2, 0.3, 0.0]
    index = reports[0][2]
    assert index["baseline"] == ["a", "b"] and [row["group"] for row in index["rows"]] == ["one", "one", "two"]


def test_another_cells_weights_are_evaluated_with_its_own_settings_on_top(reports):
    cells = "cells:\n  free: {weights: dense, model.mechanism.preset: ee_mllm_f}\n"
    cells += "  dense: {model.mechanism.preset: llava, optim.weight_decay: 0.3}\n"
    assert run(SWEEP.partition("baseline")[0] + cells + SEARCH) == 0
    mine = [call for call in calls() if call["name"].startswith("free/")]
    assert [(call["verb"], call["name"], call["rest"]) for call in mine] == [
        ("validate", f"free/seed{seed}", ["--checkpoint", f"out/dense/seed{seed}/checkpoints/step-10.ckpt"])
        for seed in (0, 1)
    ]
    config = load_config(["out/free/seed1/config.yaml"])
    assert (config.model.mechanism.preset, config.optim.weight_decay, config.seed) == ("ee_mllm_f", 0.3, 1)
    assert [row["name"] for row in reports[0][2]["rows"]] == ["free", "dense"], "as in the file"


def test_the_search_is_the_same_for_every_cell_and_its_best_is_frozen(reports):
    text = SWEEP.replace("all: {", "all: {data.pack_samples: 8, ")
    assert run(text + SEARCH + STAGES) == 0
    trials = [name for verb, name in ran() if verb == "fit" and "search" in name]
    assert trials == [f"search/{cell}/lr-{lr}" for cell in ("v-o", "all") for lr in ("0.0001", "0.001", "0.01")]
    for name in trials:
        config = load_config([f"out/{name}/config.yaml"])
        assert (config.optim.max_steps, config.seed, config.eval.samples) == (5, 0, 0)
        assert config.init_from == f"out/{name.split('/')[1]}/middle/seed0"
    for cell in ("v-o", "all"):
        for seed in (0, 1):
            assert load_config([f"out/{cell}/seed{seed}/config.yaml"]).optim.lr == 1e-3
            assert load_config([f"out/{cell}/middle/seed{seed}/config.yaml"]).optim.lr == 1e-3  # base, not searched
    table = Path("out/search.csv").read_text().splitlines()
    assert table[:4] == [
        "cell,optim.lr,score,chosen", "V+O,0.0001,1.1000,", "V+O,0.001,0.1000,yes", "V+O,0.01,1.1000,"
    ]  # fmt: skip
    expected = "5 steps of each value, seed 0, lowest validation loss on data"
    assert reports[0][2]["search"] == expected + ", which the runs are scored on too"
    before = snapshot(Path("out"))
    assert run(text + SEARCH + STAGES) == 0 and snapshot(Path("out")) == before


def test_a_search_by_average_and_diverged_trials(reports, capsys):
    wish(diverge=["search/v-o/lr-0.001", *(f"search/all/lr-{lr}" for lr in ("0.0001", "0.001", "0.003"))])
    text = SWEEP + SEARCH.replace("by: loss", "by: average").replace("1e-2", "3e-3")
    text = text.replace("by: average", "by: average\n  seed: 7")
    assert run(text) == 1
    assert load_config(["out/v-o/seed1/config.yaml"]).optim.lr == 3e-3
    assert load_config(["out/search/v-o/lr-0.003/config.yaml"]).seed == 7
    index = reports[0][2]
    assert [row["name"] for row in index["rows"]] == ["V+O"]
    assert [(f["run"], f["why"]) for f in index["failed"]] == [
        (name, "no trial of its search ended with a finite average") for name in ("all/seed0", "all/seed1")
    ]
    assert run(text) == 1 and "no trial of its search" in capsys.readouterr().out, "again, and nothing is repeated"
    assert len(reports) == 2 and ran()[-1] == ("validate", "v-o/seed1")


def test_overrides_of_the_command_line_win_over_everything(reports):
    text = SWEEP.replace("all: {", "all: {optim.lr: 5e-3, ").replace("seeds", "set: {optim.lr: 2e-3}\nseeds")
    plan = make_plan(read_sweep(write(text)))
    assert [task.config.optim.lr for task in plan.tasks.values()] == [2e-3, 5e-3] * 2
    plan = make_plan(read_sweep(write(text), ["optim.lr=7e-3", "out=other", "seeds=[5]", "baseline=all"]))
    assert [(name, t.config.optim.lr, t.config.out) for name, t in plan.tasks.items()] == [
        ("v-o/seed5", 7e-3, "other/v-o/seed5"),
        ("all/seed5", 7e-3, "other/all/seed5"),
    ]


@pytest.mark.parametrize("more", ["grid: {optim.lr: [1, 2]}\n", SEARCH])
@pytest.mark.parametrize("override", ["optim.lr=7e-3", "optim={lr: 7e-3}"])
def test_what_the_sweep_varies_cannot_be_set_for_all(more, override):
    with pytest.raises(ConfigError, match=r"command line: optim(\.lr)?: the sweep varies optim\.lr"):
        read_sweep(write(SWEEP.replace("baseline: V+O", "") + more), [override])
    assert read_sweep(write(SWEEP.replace("baseline: V+O", "") + more), ["optim.eps=1e-7"]).last == ("optim.eps=1e-7",)


def test_dry_run_shows_and_touches_nothing(reports, capsys, folder, monkeypatch):
    wish(fail=["all/seed1"])
    run()
    capsys.readouterr()
    before = snapshot(folder)
    assert run(SWEEP.replace("seeds: [0, 1]", "seeds: [0, 1, 2]"), dry_run=True) == 0
    out = capsys.readouterr().out
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in out.splitlines() if "/seed" in line.split()[0]}
    assert rows == {
        "v-o/seed0": "10 nothing done: out/v-o/seed0/eval/results.json",
        "all/seed0": "10 nothing done: out/all/seed0/eval/results.json",
        "v-o/seed1": "10 nothing done: out/v-o/seed1/eval/results.json",
        "all/seed1": "10 fit and validate was interrupted after step 3",
        "v-o/seed2": "10 fit and validate new",
        "all/seed2": "10 fit and validate new",
    }
    after = snapshot(folder)
    assert {path for path in after if after[path] != before.get(path)} == {folder / "sweep.yaml"}


# --- mistakes


def test_all_mistakes_of_all_cells_together_before_anything_runs(reports):
    text = """
base: [base.yaml]
out: out
seeds: [0, 1]
cells:
  a: {optim.lrr: 1}
  b: {model.mechanism.preset: ee_mlm, trainer.devicez: 3}
  c: {optim.max_steps: none}
set: {data.pack_tokns: 5}
search: {grid: {optim.warmup_ratio: [0.1, 2]}, by: loss}
"""
    with pytest.raises(ConfigError) as caught:
        run(text)
    lines = [line.strip() for line in str(caught.value).splitlines()]
    assert lines[0] == "mistakes in configurations of sweep.yaml:"
    for expected in (
        "all cells: data.pack_tokns: unknown key; did you mean data.pack_tokens?",
        "a: optim.lrr: unknown key; did you mean optim.lr?",
        "c: optim.max_steps: found 'none' (text), expected a whole number or null",
        "all cells: optim.warmup_ratio: found 2.0, expected 0 to 1",
    ):
        assert expected in lines, lines
    assert any(line.startswith("b: model.mechanism.preset: found 'ee_mlm'") for line in lines)
    assert any(line.startswith("b: trainer.devicez: ") and "did you mean devices" in line for line in lines)
    assert not Path("out").exists() and not calls()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("shape: aligner", "shape: aligned"), "shape: found 'aligned', expected aligner, mechanisms or none"),
        (("baseline: V+O", "baseline: V+0"), "baseline: found 'V+0', which is no cell; did you mean V+O?"),
        (("seeds: [0, 1]", "seeds: [0, 0]"), "seeds: found [0, 0], expected a list of distinct whole numbers"),
        (("seeds: [0, 1]", "seed: 0"), "seed: unknown key; did you mean seeds?"),
        (("seeds: [0, 1]", "seed: 0"), "seeds: required"),
        (("base: [base.yaml]", "base: base.yaml"), "base: found 'base.yaml', expected a list"),
        (("  all:", "  v o:"), "cell 'v o': its folder v-o/ is that of the cell 'V+O'; rename one"),
        (("  all:", "  ../..:"), "cell '../..': its name becomes a folder"),
        (("  all:", "  search:"), "cell 'search': its folder search/ is that of the sweep's own search/"),
        (("all: {", "all: {seed: 1, "), "cells.all: seed cannot be set: `seeds` has them"),
        (("all: {", "all: {out: /tmp, "), "cells.all: out cannot be set: each run has its own"),
        (("all: {", "all: {group: a, "), "cells.V+O.group: required, since other cells have one"),
        (("all: {", "all: {group: 3, "), "cells.all.group: found 3, expected text: the heading above its rows"),
        (("baseline: V+O", "baseline: [V+O, all]"), "baseline: found V+O, all: expected one, or one for each group"),
        (("baseline: V+O", "baseline: [[V+O]]"), "baseline: found ['V+O'], which is no cell"),
        (("all: {", "all: {weights: V, "), "cells.all.weights: found 'V', which is no cell that is trained"),
        (("all: {", 'all: {"a b": 1, '), "cells.all: 'a b' is no key of a configuration"),
        (("all: {", "all: {optim.lr: .inf, "), "cells.all.optim.lr: found inf, expected a finite value"),
        (("cells:", "grid: {optim.lr: 1}\ncells:"), "grid.optim.lr: found 1, expected a list of values to try"),
        (("cells:", "stages: [{name: a}, {name: b, shared: true}]\ncells:"), "stages.b: if the last stage is shared"),
        (("cells:", "stages: [{name: V+O}, {name: b}]\ncells:"), "cell 'V+O': its folder v-o/ is that of the stage"),
        (("cells:", "search: {grid: {}, by: score}\ncells:"), "search.by: found 'score', expected loss or average"),
        (("cells:", "slurm: {setup: [curl]}\ncells:"), "slurm.setup: unknown key"),
        (("cells:", 'slurm: {partition: "a\\ntouch x"}\ncells:'), "slurm.partition: found 'a\\ntouch x', expected"),
        (("shape: aligner", "shape: aligner\nshape: none"), "'shape' is set twice"),
        (("out: out", "out: !!python/object/apply:os.system [id]"), "not allowed; write a plain value"),
        (("cells:", "cells: {"), "not valid YAML"),
    ],
)
def test_mistakes_of_the_file(change, expected):
    assert change[0] in SWEEP
    with pytest.raises(ConfigError) as caught:
        run(SWEEP.replace(*change))
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seds=[0]", "did you mean seeds?"),
        ("learning_rate=1", "did you mean optim.lr?"),
        ("quality=1", "the top level has: init_from, model,"),  # not seed, which is refused
        ("sed=1", "did you mean seeds?"),
    ],
)
def test_an_unknown_key_of_the_command_line_is_told_once_and_may_be_of_the_sweep_or_its_runs(override, expected):
    with pytest.raises(ConfigError) as caught:
        read_sweep(write(SWEEP), [override])
    assert str(caught.value).splitlines()[1:] == [line for line in str(caught.value).splitlines() if expected in line]
    assert f"command line: {override.partition('=')[0]}: unknown key; {expected}" in str(caught.value)


@pytest.mark.parametrize("key", ["grid.optim.lr", "search.by", "cells.llava", "slurm.partition"])
def test_a_part_of_a_key_of_the_sweep_is_not_set_on_the_command_line(key):
    with pytest.raises(ConfigError) as caught:
        read_sweep(write(SWEEP), [f"{key}=[1]"])
    (line,) = str(caught.value).splitlines()[1:]
    first = key.partition(".")[0]
    assert line == f"  command line: {key}: `{first}` can only be set as a whole here; change it in the file"


def test_many_unknown_names_in_a_sweep_file_are_told_without_looking_for_each(monkeypatch):
    asked = []
    monkeypatch.setattr("lit_eemllm.sweep.spec.did_you_mean", lambda name, known: asked.append(name) or "")
    cells = "".join(f"  c{i}: {{weights: none{i}}}\n" for i in range(100))
    with pytest.raises(ConfigError) as caught:
        read_sweep(write(SWEEP.partition("baseline")[0] + f"cells:\n{cells}  a: {{}}\n"))
    lines = str(caught.value).splitlines()[1:]
    assert len(lines) == 100 and len(asked) == 20 and lines[-1].endswith("which is no cell that is trained")


def test_any_value_anywhere_is_taken_or_refused_in_words():
    values = [
        None,
        1,
        1.5,
        True,
        "x",
        "",
        [],
        {},
        ["a"],
        {"a": 1},
        [[1]],
        {1: 2},
        "../..",
        "a" * 300,
        float("inf"),
        10**30,
    ]
    text = (REPOSITORY / "docs" / "sweeps.md").read_text().partition("```yaml\n")[2].partition("```")[0]
    example, draw, refused = yaml.safe_load(text), random.Random(0), 0
    for _ in range(300):
        document = json.loads(json.dumps(example))
        section = draw.choice([document, *(part for part in document.values() if isinstance(part, dict))])
        section[draw.choice([*section, "new", "../x"])] = draw.choice(values)
        try:
            read_sweep(write(yaml.safe_dump(document)))
        except ConfigError:
            refused += 1
    assert 100 < refused < 300


def test_too_many_combinations_are_refused_before_they_are_made():
    values = list(range(100))
    with pytest.raises(ConfigError, match="100,000,000 combinations, at most 1,000"):
        run(
            SWEEP + f"grid: {{optim.lr: {values}, optim.eps: {values}, data.workers: {values}, optim.keep: {values}}}\n"
        )


def test_data_that_are_not_there_and_devices(reports, monkeypatch):
    with pytest.raises(UserError, match="missing:\n  elsewhere: no such data"):
        run(SWEEP, "data.val=elsewhere")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(UserError, match=r"trainer.devices=3, but only 2 are visible"):
        run(SWEEP, "trainer.accelerator=gpu", "trainer.devices=3")
    with pytest.raises(ConfigError, match=r"all cells: trainer.devices: found \[1\], expected a number"):
        run(SWEEP, "trainer.accelerator=gpu", "trainer.devices=[1]")
    with pytest.raises(
        ConfigError, match=r"all cells: data.val: required \(or eval.data, eval.suite\), since the runs"
    ):
        run(SWEEP, "data.val=null")
    with pytest.raises(ConfigError, match=r"all cells: data.val: required, since the search is judged"):
        run(SWEEP + SEARCH, "data.val=null", "eval.data=data")
    with pytest.raises(UserError, match="--jobs 0: expected 1 or more"):
        run(jobs=0)
    assert not calls()


def test_a_changed_file_adds_what_is_new_and_refuses_what_differs(reports):
    assert run() == 0
    more = SWEEP.replace("[0, 1]", "[0, 1, 2]") + "  new: {optim.lr: 3e-3}\n"
    assert run(more) == 0
    assert [name for verb, name in ran()[8:] if verb == "fit"] == [
        "new/seed0", "new/seed1", "v-o/seed2", "all/seed2", "new/seed2"
    ]  # fmt: skip
    before = snapshot(Path("out"))
    with pytest.raises(ConfigError) as caught:
        run(more.replace("optim.weight_decay: 0.1", "optim.weight_decay: 0.2, data.workers: 1"))
    lines = str(caught.value).splitlines()
    expected = "data.workers was 2 and is 1; optim.weight_decay was 0.1 and is 0.2. Set it back; or remove the folder"
    assert len(lines) == 4 and all(expected in line and f"out/all/seed{i}" in line for i, line in enumerate(lines[1:]))
    assert snapshot(Path("out")) == before


def test_a_sweep_may_be_moved(reports):
    wish(fail=["all/seed1"])
    assert run(SWEEP + STAGES) == 1
    Path("elsewhere").mkdir()
    Path("out").rename("elsewhere/out")
    wish()
    count = len(calls())
    assert run(SWEEP + STAGES, "out=elsewhere/out") == 0
    assert ran()[count:] == [("fit", "all/seed1"), ("validate", "all/seed1")]
    assert load_config(["elsewhere/out/all/seed1/config.yaml"]).init_from == "elsewhere/out/all/middle/seed1"


# --- broken, killed, stopped


def test_the_others_go_on_when_one_fails_and_the_next_call_tries_again(reports, capsys):
    wish(fail=["pretrain/seed0", "all/seed1"])
    assert run(SWEEP + STAGES) == 1
    index = json.loads(Path("out/sweep.json").read_text())
    assert index["rows"] == [{"name": "V+O", "runs": ["v-o/seed1"]}] and len(reports) == 1
    why = {one["run"]: one["why"] for one in index["failed"]}
    assert list(why) == [
        "pretrain/seed0", "v-o/middle/seed0", "v-o/seed0", "all/middle/seed0", "all/seed0", "all/seed1"
    ]  # fmt: skip
    assert why["v-o/middle/seed0"] == "it needs pretrain/seed0, which failed"
    assert why["all/seed1"].startswith("exit status 2; out/all/seed1/log.txt ends:\n    line 29\n")
    assert why["all/seed1"].endswith("error: the disk is full")
    assert "error: the disk is full" in capsys.readouterr().out
    wish()
    count = len(calls())
    assert run(SWEEP + STAGES) == 0
    assert [name for verb, name in ran()[count:] if verb == "fit"] == [
        "pretrain/seed0", "v-o/middle/seed0", "v-o/seed0", "all/middle/seed0", "all/seed0", "all/seed1"
    ]  # fmt: skip
    assert json.loads(Path("out/sweep.json").read_text())["failed"] == []


def test_a_run_that_ends_well_but_leaves_nothing_has_failed(reports):
    assert sweep(write(SWEEP), command=("true",)) == 1
    why = json.loads(Path("out/sweep.json").read_text())["failed"][0]["why"]
    assert (
        why
        == "exit status 0; out/v-o/seed0/log.txt ends:\n    $ lit-eemllm fit out/v-o/seed0\n    $ lit-eemllm validate out/v-o/seed0"
    )
    assert sweep(write(SWEEP), command=("/no/such/program",)) == 1
    why = json.loads(Path("out/sweep.json").read_text())["failed"][0]["why"]
    assert why.startswith("FileNotFoundError: [Errno 2] No such file or directory: '/no/such/program'")
    assert not reports


def test_a_report_without_its_baseline(reports):
    wish(fail=["v-o/seed0", "v-o/seed1"])
    assert run() == 1
    assert reports[0][2]["baseline"] is None and [row["name"] for row in reports[0][2]["rows"]] == ["all"]


CALL = """
import sys
from pathlib import Path
from types import SimpleNamespace
import lit_eemllm.sweep.plan as plan
from lit_eemllm.sweep import sweep
plan.check_names = lambda config: []  # knows names by importing torch
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


def test_two_sweeps_on_one_directory_and_signals(folder, reports):
    wish(seconds=30)
    write(SWEEP)
    process = start()
    until(lambda: len(started()) == 2, process)
    with pytest.raises(UserError, match=rf"out: another sweep is running here \(process {process.pid} on "):
        run()
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM, out
    assert "SIGTERM: 2 running save and end; once more ends them at once" in out
    assert "0 of 4 done; the same command continues" in out
    assert sorted(path.parent.parent.name for path in Path("out").rglob("saved")) == ["all", "v-o"]
    assert json.loads(Path("out/sweep.json").read_text())["failed"] == []
    wish()
    assert run() == 0


def test_what_a_killed_sweep_left_running_is_asked_to_save_and_then_continued(reports):
    wish(seconds=30)
    write(SWEEP)
    process = start()
    until(lambda: len(started()) == 2, process)
    process.kill()
    process.communicate()
    orphans = started()
    wish()
    assert run(jobs=2) == 0
    assert [call["end"] for call in calls()[:2]] == ["stopped"] * 2 and {c["pid"] for c in calls()[:2]} == set(orphans)
    log = Path("out/v-o/seed0/log.txt").read_text()
    assert "which an earlier call has left, to save and end" in log and log.count("$ lit-eemllm fit") == 2


def test_a_process_of_another_machine_is_waited_for_but_not_signalled():
    """Its number may be that of any process here."""
    process = subprocess.Popen(["sleep", "60"])
    with Path(".lock").open("w") as lock:
        assert try_lock(lock)
        print("elsewhere", process.pid, file=lock, flush=True)
        job = Job(SimpleNamespace(commands=list, folder=Path()), FAKE, [], {})
        thread = threading.Thread(target=job)
        thread.start()
        log = Path("log.txt")
        until(lambda: log.is_file() and f"waiting for process {process.pid} on elsewhere" in log.read_text())
        time.sleep(0.1)
        waits, status = thread.is_alive(), process.poll()
    thread.join(20)
    process.kill()
    process.wait()
    assert waits and status is None and not thread.is_alive()


@pytest.mark.parametrize(
    ("named", "expected"),
    [("4,GPU-7", ["4", "GPU-7"]), ("-1", []), ("", []), ("1,-1,2", ["1"]), ("NoDevFiles", []), ("3,,2", ["3"])],
)
def test_devices_end_at_the_first_that_is_none(named, expected, monkeypatch):
    """As CUDA reads the list."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert visible_devices() == expected


def test_jobs_at_once_each_with_its_devices_or_threads(reports, monkeypatch):
    wish(seconds=0.5)
    monkeypatch.setattr("lit_eemllm.sweep.execute.cores", lambda: 8)
    assert run(SWEEP, "seeds=[0, 1, 2]", jobs=3) == 0
    fits = [call for call in calls() if call["verb"] == "fit"]
    assert {call["OMP_NUM_THREADS"] for call in calls()} == {"2"} and {c["CUDA_VISIBLE_DEVICES"] for c in fits} == {
        None
    }
    most = max(sum(a["start"] <= b["start"] < a["start"] + 0.5 for a in fits) for b in fits)
    assert most == 3

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,GPU-7")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert run(SWEEP, "trainer.accelerator=auto", "trainer.devices=2", "out=out/two", jobs=3) == 0
    assert run(SWEEP, "trainer.accelerator=gpu", "out=out/one", jobs=3) == 0
    two, one = ([c for c in calls() if c["name"].startswith(name)] for name in ("two", "one"))
    assert {c["CUDA_VISIBLE_DEVICES"] for c in two} <= {"4,5", "5,GPU-7", "4,GPU-7", "GPU-7,4"} and two
    starts = sorted(c["start"] for c in two if c["verb"] == "fit")
    assert all(b - a >= 0.5 for a, b in zip(starts, starts[1:], strict=False)), "devices for one at a time"
    assert {c["CUDA_VISIBLE_DEVICES"] for c in one} == {"4", "5", "GPU-7"}
    assert {c["OMP_NUM_THREADS"] for c in two + one} == {"1"}


def test_user_code_is_handed_on(reports):
    assert run(imports=[Path("mine.py")]) == 0
    assert {tuple(call["rest"]) for call in calls()} == {("--import", "mine.py")}
    assert reports[0][2]["command"] == "lit-eemllm sweep sweep.yaml --import mine.py"


def test_the_verb(monkeypatch, capsys):
    made = []
    monkeypatch.setattr("lit_eemllm.sweep.sweep", lambda *args: made.append(args) or 1)
    Path("mine.py").write_text("")
    line = ["sweep", "seeds=[0]", "a.yaml", "--jobs", "3", "--import", "mine.py", "--dry-run", "optim.lr=1"]
    assert cli.main(line) == 1 and cli.main(["sweep", "a.yaml", "--slurm"]) == 1
    assert made == [
        (Path("a.yaml"), ["seeds=[0]", "optim.lr=1"], 3, True, False, [Path("mine.py")]),
        (Path("a.yaml"), [], None, False, True, []),
    ]
    assert cli.main(["sweep", "a.yaml", "b.yaml"]) == 2
    assert "expected one sweep file, found a.yaml b.yaml" in capsys.readouterr().err


def test_the_table_on_a_terminal(reports, monkeypatch):
    console = Console(force_terminal=True, width=100, file=open(os.devnull, "w"), record=True)  # noqa: SIM115
    monkeypatch.setattr("lit_eemllm.sweep.status.console", console)
    wish(seconds=1.5, fail=["v-o/seed0"])
    assert run(SWEEP + SEARCH.replace("1e-4, 1e-3, 1e-2", "1e-3"), jobs=2) == 1
    shown = console.export_text()
    assert "step 3/5, " in shown and "step 3/10, 2 s" in shown and "0.990" in shown and "failed" in shown
    assert "min left" in shown or "s left" in shown


def test_torn_results_are_named_with_what_to_do(reports, monkeypatch):
    """A trial's score is needed. A run's is only shown, by the table on a terminal too, which must not end the sweep."""
    assert run(SWEEP + SEARCH) == 0
    shown, trial = Path("out/v-o/seed0/eval/results.json"), Path("out/search/v-o/lr-0.001/eval/results.json")
    shown.write_text('{"average": ')
    Path("out/all/seed0/eval/results.json").unlink()
    console = Console(force_terminal=True, width=100, file=open(os.devnull, "w"), record=True)  # noqa: SIM115
    monkeypatch.setattr("lit_eemllm.sweep.status.console", console)
    assert run(SWEEP + SEARCH) == 0 and "unreadable" in console.export_text()

    trial.write_text("[]")
    with pytest.raises(UserError, match=f"{trial}: found a list, .*; remove it; the sweep evaluates that run again"):
        run(SWEEP + SEARCH)
    trial.unlink()
    assert run(SWEEP + SEARCH) == 0 and json.loads(trial.read_text())["loss"]


# --- Slurm


@pytest.fixture
def local_cluster(monkeypatch):
    pytest.importorskip("submitit")
    from lit_eemllm.sweep import slurm

    monkeypatch.setattr(slurm, "LOOK", 0.2)
    monkeypatch.setattr(slurm, "LAG", 0.5)
    return {"slurm": True, "cluster": "local"}


@pytest.mark.slow
def test_slurm_jobs_by_submitit_on_this_machine(reports, local_cluster):
    wish(fail=["all/seed0"])
    text = SWEEP + STAGES + "slurm: {timeout_min: 7, partition: gpu, gpus_per_node: 0}\n"
    assert run(text, "data.train=only/there", **local_cluster) == 1
    assert sorted(ran()) == sorted(
        [("fit", f"pretrain/seed{s}") for s in (0, 1)]
        + [("fit", f"{c}/middle/seed{s}") for s in (0, 1) for c in ("v-o", "all")]
        + [("fit", f"{c}/seed{s}") for s in (0, 1) for c in ("v-o", "all")]
        + [("validate", name) for name in ("v-o/seed0", "v-o/seed1", "all/seed1")]
    )
    ends = {call["name"]: call for call in calls() if call["verb"] == "fit"}
    assert ends["pretrain/seed0"]["start"] < ends["v-o/middle/seed0"]["start"] < ends["v-o/seed0"]["start"]
    assert {call["SLURM_JOB_NAME"] for call in calls()} == {"interactive"}
    ((name, why),) = ((one["run"], one["why"]) for one in reports[0][2]["failed"])
    assert name == "all/seed0" and why.startswith("job ") and why.endswith("error: the disk is full")
    assert json.loads(Path("out/slurm/jobs.json").read_text()) == {}
    wish()
    assert run(text, "data.train=only/there", **local_cluster) == 0
    assert ran()[-2:] == [("fit", "all/seed0"), ("validate", "all/seed0")]


def test_jobs_of_an_earlier_call_go_on(monkeypatch):
    """Also those that become ready while others run, and those of calls before that one."""
    slurm = pytest.importorskip("lit_eemllm.sweep.slurm")
    monkeypatch.setattr(pytest.importorskip("submitit"), "LocalJob", lambda folder, number: SimpleNamespace(
        job_id=number, done=lambda force_check: False
    ))  # fmt: skip
    spec = read_sweep(write(SWEEP))
    file, tasks = Path("out/slurm/jobs.json"), list(make_plan(spec).tasks.values())
    slurm.Cluster(spec, None, ("false",), [], "local").start([])
    known = {"v-o/seed0": "11", "all/seed0": "12_3"}
    file.write_text(json.dumps(known))
    place = slurm.Cluster(spec, None, ("false",), [], "local")
    for ready in ([], tasks[:1], tasks[1:2]):
        assert place.start(ready) == ready and json.loads(file.read_text()) == known
    assert place.start([]) == []


def test_a_torn_list_of_jobs_is_named_with_what_to_do():
    slurm = pytest.importorskip("lit_eemllm.sweep.slurm")
    pytest.importorskip("submitit")
    file = Path("out/slurm/jobs.json")
    file.parent.mkdir(parents=True)
    file.write_text('{"v-o')
    with pytest.raises(UserError, match=r"jobs\.json: not valid JSON: .*; end its jobs \(scancel\), then remove it"):
        slurm.Cluster(read_sweep(write(SWEEP)), None, ("false",), [], "local")


@pytest.mark.slow
def test_a_job_whose_time_is_up_saves_and_goes_on(reports, local_cluster, monkeypatch):
    """As Slurm does it: SIGUSR2 to all processes of the job. The child must not die of it, but save."""
    wish(seconds=30)
    write("base: [base.yaml]\nout: out\nseeds: [0]\ncells: {a: {}}\n")
    process = start("slurm=True, cluster='local'")
    until(started, process)
    (child,) = started()
    job = int(Path(f"/proc/{child}/stat").read_text().split()[3])
    wish()
    os.kill(child, signal.SIGUSR2)
    os.kill(job, signal.SIGUSR2)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, out
    assert Path("out/a/seed0/saved").is_file()
    assert [(call["verb"], call["end"]) for call in calls()] == [
        ("fit", "stopped"), ("fit", "done"), ("validate", "done")
    ]  # fmt: skip


SLURM = {
    "sbatch": """#!/bin/sh
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\)%.*/\\1/p' "$1")
cp "$1" "$PWD/$$.sh"
for i in $(seq 0 ${last:-0}); do
  [ -n "$last" ] && export SLURM_ARRAY_JOB_ID=$$ SLURM_ARRAY_TASK_ID=$i
  SLURM_JOB_ID=$(($$ + i)) sh "$PWD/$$.sh" > /dev/null 2>&1 &
done
echo "Submitted batch job $$"
""",
    "srun": """#!/bin/sh
while true; do
  case "$1" in --output | --error) shift 2 ;; --*) shift ;; *) break ;; esac
done
exec "$@"
""",
    "sacct": "#!/bin/sh\necho 'JobID|State|NodeList'\n",
}


@pytest.mark.slow
def test_slurm_gets_arrays_of_what_is_ready(reports, monkeypatch, folder):
    """Submitit's Slurm part, with programs that stand in for Slurm's and start the jobs here."""
    pytest.importorskip("submitit")
    monkeypatch.setattr("lit_eemllm.sweep.slurm.LOOK", 0.2)
    for name, text in SLURM.items():
        program = folder / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(text)
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
    text = SWEEP + "stages: [{name: first, shared: true}, {name: last}]\n"
    text += "slurm: {timeout_min: 7, partition: gpu, account: me}\n"
    assert run(text, "trainer.accelerator=gpu", "trainer.devices=3", slurm=True) == 0
    assert sorted(ran()[:2]) == [("fit", "first/seed0"), ("fit", "first/seed1")]
    assert sorted(ran()[2:]) == [
        (v, f"{c}/seed{s}") for v in ("fit", "validate") for c in ("all", "v-o") for s in (0, 1)
    ]
    scripts = sorted(Path().glob("[0-9]*.sh"), key=lambda path: path.stat().st_mtime)
    assert len(scripts) >= 2
    lines = scripts[0].read_text().splitlines()
    for line in ("array=0-1%2", "partition=gpu", "account=me", "time=7", "gpus-per-node=3", "signal=USR2@180",
                 "ntasks-per-node=1", "job-name=sweep-sweep"):  # fmt: skip
        assert f"#SBATCH --{line}" in lines, lines


def test_slurm_without_slurm(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="no sbatch and srun here"):
        run(slurm=True)


# --- real runs


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


PARTS = {
    "real.yaml": [
        "model.decoder=llm",
        "model.vision.encoder=transformers",
        "model.vision.path=clip",
        "data.train=photos",
        "data.val=photos",
    ]
}
"""What a sweep leaves to the command line (and to --import)."""


@pytest.mark.parametrize("name", sorted(path.name for path in (REPOSITORY / "configs" / "sweeps").glob("*.yaml")))
def test_the_sweeps_of_the_repository_make_a_plan(name, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    file = Path("configs/sweeps") / name
    assert read_sweep(file).seeds == (0, 1, 2)
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
