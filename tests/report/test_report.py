"""The comparison of runs, from run directories written by hand with numbers that can be checked by hand."""

import json
import shutil
from pathlib import Path

import pytest
from lib.reports import ONE, RESULTS, TYPES, cells, labels, replace_in, write_run

from lit_eemllm.report import report
from lit_eemllm.report.runs import compare, read_run
from lit_eemllm.report.tables import tables


def test_table_by_hand(tmp_path):
    """Two seeds: mean and sample deviation. 0.5 and 0.7: 0.6 ± 0.1414; controls 0.2 and 0.3: 0.25; 20 and 30 ms; 3 and 5 GiB."""
    other = {**TYPES["colour"], "score": 0.7, "control": 0.3}
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
        "": ["ee_mllm (2 seeds)", "best constant answer"],
        "colour": ["0.600 ± 0.141 [0.250]", "0.300"],
        "average": ["0.600 ± 0.141", "0.300"],
        "questions": ["10", ""],
        "average before training": ["0.125", ""],
        "validation loss": ["1.5000 ± 0.3536", ""],
        "... images shuffled": ["2.5000 ± 0.0000", ""],
        "parameters (M)": ["2.346", ""],
        "prefill MFLOPs a question": ["4.6", ""],
        "step time (ms)": ["25 ± 7", ""],
        "peak memory (GiB)": ["4.00 ± 1.41", ""],
    }


def test_units_follow_the_smallest_number(tmp_path):
    """All rows share a unit in which none is below one: 7e9 and 13e9 parameters are billions, 900 MiB keep 2 GiB in MiB."""
    sizes = [(7e9, 8e12, 900 * 2**20), (13e9, 15e12, 2**31)]
    runs = [
        write_run(
            tmp_path / str(i),
            f"optim.lr={i + 1}",
            results={"parameters": parameters, "prefill_flops": flops, "cache_bytes": cache},
        )
        for i, (parameters, flops, cache) in enumerate(sizes)
    ]
    table = cells(runs)
    assert table["parameters (B)"] == ["7.000", "13.000"] and table["prefill TFLOPs a question"] == ["8.0", "15.0"]
    assert table["key/value cache (MiB)"] == ["900.0", "2048.0"]


def test_curve_of_a_continued_run(tmp_path):
    """Version 1 repeats step 20, version 10 comes after version 2: the later one holds."""
    rows = [[(10, 5, 1, 1, ""), (20, 4, 1, 1, "")], [(20, 3.5, 1, 1, ""), (30, 3, 1, 1, "")]]
    run = write_run(tmp_path / "a", metrics=[*rows, [(40, 2, 1, 1, "")]])
    shutil.copytree(run / "logs" / "version_2", run / "logs" / "version_10")
    (run / "logs" / "version_10" / "metrics.csv").write_text("step,loss\n40,1\n")
    shutil.copytree(run / "logs" / "version_2", run / "logs" / "version_old")  # somebody's copy is none
    curve = read_run(run).curve
    assert [(row["step"], row["loss"]) for row in curve] == [(10, 5), (20, 3.5), (30, 3), (40, 1)]


def test_machines_of_runs_are_named(tmp_path, undrawn):
    """One run was continued, and asked, on another machine than it was begun on; one does not say; one was never trained."""
    rows = [[(10, 3, 1, 1, "")], [(20, 2, 1, 1, "")]]
    runs = [
        write_run(tmp_path / "a", "seed=0", results={"loss": 1.0, "machine": "ours, <b>"}, metrics=rows),
        write_run(tmp_path / "b", "seed=1", results={"loss": 1.0, "machine": "theirs"}, metrics=rows[:1]),
        write_run(tmp_path / "c", "seed=2", results={"loss": 1.0}, metrics=rows[:1]),
        write_run(tmp_path / "d", "seed=3", results={"loss": 1.0, "machine": "theirs"}),
    ]
    for run, version, machine in ((0, 0, "theirs"), (0, 1, "ours, <b>"), (1, 0, "theirs")):
        (runs[run] / "logs" / f"version_{version}" / "machine.csv").write_text(f'machine\n"{machine}"\nmore\n')
    report(runs, tmp_path / "out")
    assert (tmp_path / "out" / "report.md").read_text().splitlines()[-7:-1] == [
        "- trained on theirs: 2 runs",
        "- trained on a machine that they do not name, as runs of earlier versions do not: 1 run",
        "- trained on ours, &lt;b>: 1 run",
        "- evaluated on theirs: 2 runs",
        "- evaluated on a machine that they do not name, as runs of earlier versions do not: 1 run",
        "- evaluated on ours, &lt;b>: 1 run",
    ]
    last = (tmp_path / "out" / "report.md").read_text().splitlines()[-1]
    assert last.startswith("- this report: ") and ", commit " in last


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
    assert table[odd] == ["", "0.500", "0.300"]
    assert table["prefill MFLOPs a question"] == ["", "4.6", ""]
    assert table["step time (ms)"] == ["", "500", ""] and table["peak memory (GiB)"] == ["", "1.00", ""]
    assert table["parameters (M)"] == ["2.000", "2.346", ""]
    assert list(cells([bare])) == ["", "validation loss", "parameters (M)"]
    for runs in ([bare], [bare, full]):
        report(runs, tmp_path / "report")
        assert (tmp_path / "report" / "report.png").stat().st_size > 1000
    assert r"| cost $\frac$ \| more |" in (tmp_path / "report" / "report.md").read_text()
    assert "bare" in capsys.readouterr().out


def test_what_is_not_a_number_is_shown_as_such(tmp_path):
    """A run that diverged: its loss is seen, the others' scores stay, the picture is drawn."""
    runs = [
        write_run(
            tmp_path / str(i),
            f"seed={i}",
            results={**RESULTS, "loss": loss},
            metrics=[[(1, loss, 1, 1, ""), (2, 1, 1, 1, "")]],
        )
        for i, loss in enumerate((1.0, float("inf"), float("nan")))
    ]
    assert cells(runs)["validation loss"][0] == "nan ± nan" and cells(runs[:2])["validation loss"][0] == "inf ± nan"
    report(runs, tmp_path / "report")
    assert "| average | 0.500 ± 0.000 | 0.300 |" in (tmp_path / "report" / "report.md").read_text()


def test_a_few_rows_are_columns_and_many_are_lines(tmp_path, capsys, monkeypatch, undrawn):
    """Eight mechanisms: scores and costs are two tables of a line a row, in parts that fit; no cell is cut."""
    presets = ("llava", "ee_mllm", "ee_mllm_f", "naavit", "shortv", "saisa", "vica", "flamingo")
    runs = [write_run(tmp_path / name, f"model.mechanism.preset={name}") for name in presets]
    assert [len(tables(compare(runs[:n]))) for n in (1, 4, 5)] == [1, 1, 2]
    scores, costs = tables(compare(runs))
    assert scores[0] == ["", "colour", "average"] and scores[1] == [
        "llava (1 seed)",
        "0.500 [0.200]",
        "0.500",
    ]
    assert len(scores) == 1 + 8 + 1 and scores[-1] == ["best constant answer", "0.300", "0.300"]
    assert costs[0][:3] == ["", "questions", "validation loss"] and costs[8][:3] == [
        "flamingo (1 seed)",
        "10",
        "1.2500",
    ]
    for width in (120, 60):  # parts below each other are one table under one title
        monkeypatch.setattr("lit_eemllm.console.console.width", width)
        report(runs, tmp_path / "report")
        out = capsys.readouterr().out.partition(str(tmp_path))[0].partition("ee_mllm (1 seed): ")[0]
        assert out.count("0.500 [0.200]") == 8 and "…" not in out and all(f"{name} (1 seed)" in out for name in presets)
        assert out.count("Comparison") == 1 and out.count("┏") == 1 and out.count("validation loss") == 1
        lengths = {len(line) for line in out.splitlines() if line[:1] in "┏┃┡│├└"}
        assert len(lengths) == 1 and max(lengths) <= width
    text = (tmp_path / "report" / "report.md").read_text()
    assert "| vica (1 seed) | 0.500 [0.200] | 0.500 |\n" in text and len(text) < 5000


def test_what_cannot_be_compared_is_said(tmp_path, capsys, undrawn):
    half = {**RESULTS, "types": {"colour": {**TYPES["colour"], "questions": 5, "control": None}}}
    runs = {
        "a": write_run(tmp_path / "a", "data.val=v"),
        "same": write_run(tmp_path / "same", "data.val=v", "seed=1"),
        "half": write_run(tmp_path / "half", "data.val=v", "model.mechanism.preset=llava", results=half),
        "loss": write_run(tmp_path / "loss", "data.val=v", "optim.lr=2", results={"loss": 1.0}),
        "other": write_run(tmp_path / "other", "data.val=w", "model.mechanism.preset=vica"),
        "one": write_run(tmp_path / "one", "data.val=v", "optim.lr=3", answers=ONE),
        "two": write_run(tmp_path / "two", "data.val=v", "optim.lr=3", "seed=1", answers=ONE),
    }
    replace_in(runs["two"] / "eval" / "predictions.jsonl", '"truth": "y"', '"truth": "z"')

    def said(*names):
        report([runs[name] for name in names], tmp_path / "report")
        text = (tmp_path / "report" / "report.md").read_text()
        found = [line for line in text.splitlines() if "cannot be compared" in line]
        assert all(line in capsys.readouterr().out for line in found)
        assert all(line in (tmp_path / "report" / "report.html").read_text() for line in found)
        return text, *found

    assert len(said("a", "same")) == len(said("a", "loss")) == 1
    _, sentence = said("a", "same", "half")
    assert sentence.startswith("Scores of these") and sentence.endswith(
        "questions: ee_mllm (2 seeds): v, 10 questions; llava (1 seed): v, 5 questions."
    )
    _, sentence = said("a", "other")
    assert sentence.startswith("Scores and validation loss of") and "vica (1 seed): w, 10" in sentence
    assert said("one", "two")[1].endswith("v, 6 questions; the questions themselves differ.")
    text = said("half")[0]
    assert "in brackets" not in text and "±" not in text and "Step time" not in text and "| questions | 5 |" in text
    text = said("a", "same")[0]
    assert "in brackets" in text and "± is the standard" in text
    assert said("loss")[0].count("Exact match") == 0


def test_a_directory_named_twice_is_one_seed(tmp_path, monkeypatch):
    run = write_run(tmp_path / "a")
    (tmp_path / "link").symlink_to(run)
    monkeypatch.chdir(tmp_path)
    assert cells([run, run, tmp_path / "link", Path("a")])["validation loss"][0] == "1.2500"


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
    rows = compare(second).rows
    assert [[run.path for run in row.runs] for row in rows] == [second[:2], second[2:]]
    assert [row.label for row in rows] == [f"ee_mllm init_from={first[i]}" for i in (0, 2)]


def test_rows_are_the_same_from_any_directory(tmp_path, monkeypatch):
    """What runs start from stands in their configurations as it was named where they were made."""
    monkeypatch.chdir(tmp_path)
    for i in range(2):
        write_run(Path(f"first/{i}"), f"seed={i}")
        write_run(Path(f"second/{i}"), f"seed={i}", f"init_from=first/{i}")
    assert labels(Path("second/0"), Path("second/1")) == ["ee_mllm"]
    monkeypatch.chdir(tmp_path / "second")
    assert labels(Path("0"), Path("1")) == labels(tmp_path / "second" / "0", Path("1")) == ["ee_mllm"]


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
