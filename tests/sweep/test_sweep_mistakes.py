"""Mistakes of sweep files and command lines: told together, before anything runs."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import yaml
from lib.pages import REPOSITORY
from lib.sweeps import SEARCH, STAGES, SWEEP, calls, ran, run, snapshot, wish, write

from lit_eemllm.config import load_config
from lit_eemllm.errors import ConfigError, UserError
from lit_eemllm.sweep.spec import read_sweep


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


def test_runs_of_a_sweep_do_not_end_early(reports):
    with pytest.raises(ConfigError, match=r"all cells: optim\.patience: the runs of a sweep have equally many steps"):
        run(SWEEP, "optim.patience=2")
