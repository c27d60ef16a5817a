"""The comparison of runs, from run directories written by hand with numbers that can be checked by hand."""

import csv
import json
import shutil

import pytest

from lit_eemllm import report
from lit_eemllm.config import load_config, to_yaml

TYPES = {"colour": {"questions": 10, "exact_match": 0.5, "control": 0.2, "constant": 0.3, "constant_answer": "red"}}
RESULTS = {"parameters": 2_345_678, "loss": 1.25, "loss_shuffled_images": 2.5, "types": TYPES, "average": 0.5, "prefill_flops": 4.56e6}  # fmt: skip


def write_run(path, *overrides, results=RESULTS, metrics=()):
    """A run directory; `metrics` holds one list of rows (step, loss, seconds a step, GiB) per version."""
    config = load_config([], [
        "model.decoder=d", "model.vision.path=e", "data.train=t", "optim.lr=1e-3", "optim.max_steps=4", f"out={path}", *overrides
    ])  # fmt: skip
    (path / "eval").mkdir(parents=True)
    (path / "config.yaml").write_text(to_yaml(config))
    (path / "eval" / "results.json").write_text(json.dumps(results))
    for version, rows in enumerate(metrics):
        folder = path / "logs" / f"version_{version}"
        folder.mkdir(parents=True)
        with (folder / "metrics.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("step", "loss", "step_seconds", "memory_gib", "val_loss"), *rows])
    return path


def cells(paths):
    """Name of a quantity -> its cells."""
    return {line[0]: line[1:] for line in report.table(report.group([report.read_run(path) for path in paths]))}


def labels(*paths):
    return [row.label for row in report.group([report.read_run(path) for path in paths])]


def test_table_by_hand(tmp_path):
    """Two seeds: mean and sample deviation. 0.5 and 0.7: 0.6 ± 0.1414; 0.2 and 0.3: 0.25 ± 0.0707; 20 and 30 ms; 3 and 5 GiB."""
    other = {**TYPES["colour"], "exact_match": 0.7, "control": 0.3}
    runs = [
        write_run(tmp_path / "a", metrics=[[(1, 3, 0.02, 1, ""), (2, 2, 0.9, 3, ""), (3, 1, 0.01, 2, "")]]),
        write_run(
            tmp_path / "b",
            "seed=1",
            results={**RESULTS, "types": {"colour": other}, "average": 0.7, "loss": 1.75},
            metrics=[[(1, 3, 0.03, 5, ""), ("2", "", "", "", 7)]],
        ),
    ]
    untrained = tmp_path / "a" / "eval-untrained"
    untrained.mkdir()
    (untrained / "results.json").write_text(json.dumps({"average": 0.125}))
    assert cells(runs) == {
        "": ["ee_mllm (2 seeds)"],
        "colour, best constant 0.300": ["0.600 ± 0.141 [0.250 ± 0.071]"],
        "average over types": ["0.600 ± 0.141"],
        "average before training": ["0.125"],
        "validation loss": ["1.5000 ± 0.3536"],
        "... images shuffled": ["2.5000 ± 0.0000"],
        "parameters (M)": ["2.346"],
        "prefill MFLOPs a question": ["4.6 ± 0.0"],
        "step time (ms)": ["25 ± 7"],
        "peak memory (GiB)": ["4.00 ± 1.41"],
    }


def test_curve_of_a_continued_run(tmp_path):
    """Version 1 repeats step 20, version 10 comes after version 2: the later one holds."""
    rows = [[(10, 5, 1, 1, ""), (20, 4, 1, 1, "")], [(20, 3.5, 1, 1, ""), (30, 3, 1, 1, "")]]
    run = write_run(tmp_path / "a", metrics=[*rows, [(40, 2, 1, 1, "")]])
    shutil.copytree(run / "logs" / "version_2", run / "logs" / "version_10")
    (run / "logs" / "version_10" / "metrics.csv").write_text("step,loss\n40,1\n")
    curve = report.read_run(run).curve
    assert [(row["step"], row["loss"]) for row in curve] == [(10, 5), (20, 3.5), (30, 3), (40, 1)]


def test_runs_of_the_loss_alone_leave_cells_blank(tmp_path, capsys):
    """One run has only a loss and an empty log, the other everything: nothing unknown is shown as a number."""
    alone = {"parameters": 2_000_000, "loss": 1.0, "loss_shuffled_images": None}
    bare = write_run(tmp_path / "bare", results=alone, metrics=[[]])
    odd = r"cost $\frac$ | more"
    types = {odd: {**TYPES["colour"], "control": None}}
    full = write_run(
        tmp_path / "full", "optim.lr=2e-3", results={**RESULTS, "types": types}, metrics=[[(1, 2, 0.5, 1, "")]]
    )
    table = cells([bare, full])
    assert table[f"{odd}, best constant 0.300"] == ["", "0.500"]
    assert table["prefill MFLOPs a question"] == ["", "4.6"]
    assert table["step time (ms)"] == ["", "500"] and table["peak memory (GiB)"] == ["", "1.00"]
    assert table["parameters (M)"] == ["2.000", "2.346"]
    assert list(cells([bare])) == ["", "validation loss", "parameters (M)"]
    for runs in ([bare], [bare, full]):
        report.report(runs, tmp_path / "report")
        assert (tmp_path / "report" / "report.png").stat().st_size > 1000
    assert r"| cost $\frac$ \| more, best constant 0.300 |" in (tmp_path / "report" / "report.md").read_text()
    assert "bare" in capsys.readouterr().out


def test_a_directory_named_twice_is_one_seed(tmp_path, monkeypatch):
    run = write_run(tmp_path / "a")
    (tmp_path / "link").symlink_to(run)
    monkeypatch.chdir(tmp_path)
    assert cells([run, run, tmp_path / "link", report.Path("a")])["validation loss"] == ["1.2500"]


@pytest.mark.parametrize("kind", ["another first stage", "another path"])
def test_rows_by_what_a_run_starts_from(tmp_path, kind):
    """Second stages of two seeds are one row with their first stages of two seeds; another first stage is another row."""
    if kind == "another first stage":
        first = [write_run(tmp_path / f"1{i}", f"seed={i}") for i in range(2)] + [
            write_run(tmp_path / "12", "optim.lr=5")
        ]
    else:
        first = [tmp_path / "weights", tmp_path / "weights", tmp_path / "others"]
    second = [write_run(tmp_path / f"2{i}", f"seed={i}", f"init_from={first[i]}") for i in range(3)]
    rows = report.group([report.read_run(path) for path in second])
    assert [[run.path for run in row.runs] for row in rows] == [second[:2], second[2:]]
    assert [row.label for row in rows] == [f"ee_mllm init_from={first[i]}" for i in (0, 2)]


def test_runs_that_start_from_each_other_end(tmp_path):
    paths = [tmp_path / name for name in "ab"]
    for path, other in zip(paths, reversed(paths), strict=True):
        write_run(path, f"init_from={other}")
    assert len(labels(*paths)) == 2


def test_equal_labels_get_the_keys_that_differ(tmp_path):
    """lr has three values and comes first; of the keys with two, the first two of the schema; different labels stay."""
    paths = [
        write_run(tmp_path / "a", "seed=1"),
        write_run(tmp_path / "b", "optim.lr=2e-3", "data.train=u", "trainer.precision=bf16-mixed"),
        write_run(tmp_path / "c", "optim.lr=3e-3", "eval.samples=5"),
        write_run(tmp_path / "d", "model.mechanism.preset=llava", "model.mechanism.dense_layers=[0]"),
    ]
    assert labels(*paths) == [
        "ee_mllm optim.lr=0.001 data.train=t eval.samples=None",
        "ee_mllm optim.lr=0.002 data.train=u eval.samples=None",
        "ee_mllm optim.lr=0.003 data.train=t eval.samples=5",
        "llava dense [0]",
    ]
    assert labels(*paths[:1], paths[3]) == ["ee_mllm", "llava dense [0]"]
