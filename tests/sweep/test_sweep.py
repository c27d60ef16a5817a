"""Sweeps: what is run, in which order, with what; what is left alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from lib.sweeps import SEARCH, STAGES, SWEEP, calls, ran, run, snapshot, wish, write

from lit_eemllm.config import load_config, to_yaml
from lit_eemllm.errors import ConfigError
from lit_eemllm.sweep.plan import make_plan
from lit_eemllm.sweep.spec import read_sweep


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
