"""The comparison of runs, from run directories written by hand with numbers that can be checked by hand."""

import base64
import csv
import hashlib
import html
import json
import re
import shutil
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from lib.reports import RESULTS, TYPES, write_run, write_sweep
from matplotlib.transforms import Bbox

from lit_eemllm.errors import UserError
from lit_eemllm.mechanisms import build_mechanism
from lit_eemllm.report import plots, report
from lit_eemllm.report.difference import Difference, difference, t95
from lit_eemllm.report.runs import compare, read_run
from lit_eemllm.report.tables import tables
from lit_eemllm.sweep import write_index
from lit_eemllm.sweep.plan import make_plan
from lit_eemllm.sweep.spec import read_sweep


def of_score(value, **more):
    """Results of one question type."""
    return {**RESULTS, "types": {"colour": {**TYPES["colour"], "score": value}}, "average": value, **more}


def cells(paths, baseline=None):
    """Name of a quantity -> its cells."""
    (lines,) = tables(compare(paths, baseline))
    return {line[0]: list(line[1:]) for line in lines}


def labels(*paths):
    return [row.label for row in compare(paths).rows]


@pytest.fixture
def undrawn(monkeypatch):
    """Reports without their picture, which takes longer than all the rest."""
    monkeypatch.setattr("lit_eemllm.report.draw", lambda rows: b"")


# --- one table
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


# --- differences
@pytest.mark.parametrize(
    ("degrees", "published"),
    [
        (1, 12.706),
        (2, 4.303),
        (5, 2.571),
        (10, 2.228),
        (11, 2.201),
        (15, 2.131),
        (20, 2.086),
        (30, 2.042),
        (120, 1.980),
    ],
)
def test_quantiles_of_t_as_printed_in_tables(degrees, published):
    assert t95(degrees) == pytest.approx(published, abs=6e-4)


@pytest.mark.parametrize("degrees", range(2, 14))
def test_quantiles_of_t_enclose_95_percent(degrees):
    """The density (1 + x^2 / n)^-((n + 1) / 2), integrated by x = sqrt(n) tan(u), which makes it cos(u)^(n - 1)."""

    def area(to):
        u = np.linspace(0, to, 20001)
        return np.trapezoid(np.cos(u) ** (degrees - 1), u)

    assert area(np.arctan(t95(degrees) / degrees**0.5)) / area(np.pi / 2) == pytest.approx(0.95, abs=2e-5)


def test_difference_paired_by_seed(tmp_path):
    """0.6 0.7 0.8 against 0.5 0.65 0.6: 0.1, 0.05, 0.2, mean 0.11667, deviation 0.076376, half 4.3027 * 0.076376 / sqrt(3).

    Another baseline seed has no partner. Two runs of one seed count as one, their mean 0.8.
    """
    ours = [write_run(tmp_path / f"a{i}", f"seed={i}", results=of_score(v)) for i, v in enumerate([0.6, 0.7, 0.75])]
    ours.append(write_run(tmp_path / "again", "seed=2", results=of_score(0.85)))
    theirs = [
        write_run(tmp_path / f"b{i}", f"seed={i}", "model.mechanism.preset=llava", results=of_score(v))
        for i, v in enumerate([0.5, 0.65, 0.6, 0.1])
    ]
    table = cells([*ours, *theirs], "llava")
    assert table["difference of the average"] == ["+0.117 (-0.073 to +0.306)", "baseline", ""]
    assert table["average"][0] == "0.700 ± 0.100" and table[""][0] == "ee_mllm (3 seeds)"
    compared = compare([*ours, *theirs], str(theirs[1]))
    found = difference(compared.rows[0], compared.rows[1], "colour")
    assert (found.over, found.count) == ("seeds", 3)
    assert (found.mean, found.half) == (pytest.approx(0.116667, abs=1e-6), pytest.approx(0.189731, abs=1e-5))
    assert difference(compared.rows[1], compared.rows[0], "colour").mean == -found.mean


ONE, OTHER = {"colour": [1, 1, 0, 1], "shape": [1, 0]}, {"colour": [0, 1, 0, 0], "shape": [0, 1]}


def two(tmp_path, one=ONE, other=OTHER, *overrides):
    return [
        write_run(tmp_path / "a", answers=one),
        write_run(tmp_path / "b", "model.mechanism.preset=llava", *overrides, answers=other),
    ]


def test_difference_paired_by_question(tmp_path):
    """colour: 1 0 0 1, mean 0.5, variance of the mean 1/3 / 4; shape: 1 -1, mean 0, variance 2 / 2.

    The average differs by 0.25, with variance (1/12 + 1) / 4: half = 1.96 * 0.520416. Another seed has no part in it.
    """
    alone = write_run(tmp_path / "alone", "seed=7", answers=OTHER)
    compared = compare([alone, *two(tmp_path)], "llava")
    assert difference(*compared.rows) == Difference(0.25, pytest.approx(1.019997, abs=1e-5), "questions", 6)
    assert difference(*compared.rows, "colour") == Difference(0.5, pytest.approx(0.565793, abs=1e-5), "questions", 4)
    assert (
        cells([tmp_path / "a", tmp_path / "b"], "llava")["difference of the average"][0] == "+0.250 (-0.770 to +1.270)"
    )


def test_difference_of_a_suite_weighs_sets_alike(tmp_path):
    """Set s has two types, t one: the average is ((a + b) / 2 + c) / 2, so the variances weigh 1/16, 1/16 and 1/4."""
    answers = {"s/a": [1, 0, 1], "s/b": [1, 1, 0], "t": [0, 1, 0]}
    runs = two(tmp_path, answers, {name: [0, 0, name != "t"] for name in answers})
    for run in runs:
        path = run / "eval" / "results.json"
        results = json.loads(path.read_text())
        score = {name: kind["score"] for name, kind in results["types"].items()}
        for name, constant in {"s/a": 0.2, "s/b": 0.4, "t": 0.8}.items():  # (0.3 + 0.8) / 2
            results["types"][name]["constant"] = constant
        path.write_text(json.dumps({**results, "average": (score["s/a"] + score["s/b"]) / 4 + score["t"] / 2}))
        lines = [json.loads(line) for line in (run / "eval" / "predictions.jsonl").read_text().splitlines()]
        for line in lines:  # a set without types of its own is named by its set alone
            line["set"], _, line["type"] = line["type"].partition("/")
        (run / "eval" / "predictions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    # differences 1 0 0, 1 1 -1, 0 1 0: variances of the mean 1/9, 4/9, 1/9
    half = 1.959964 * ((1 / 9 + 4 / 9) / 16 + 1 / 9 / 4) ** 0.5
    assert difference(*compare(runs).rows) == Difference(pytest.approx(1 / 3), pytest.approx(half), "questions", 9)
    assert cells(runs)["average"] == ["0.500", "0.167", "0.550"]
    text = runs[0] / "eval" / "results.json"
    text.write_text(text.read_text().replace('"average": 0.5', '"average": 0.6'))
    assert cells(runs)["average"][-1] == "", "not known how it weighs"


def test_no_difference_without_common_ground(tmp_path, undrawn):
    """No seed in common, other data, other questions under the same names and counts: nothing is subtracted."""
    base = {"v": "data.val=v"}
    runs = {
        "a": write_run(tmp_path / "a", base["v"], answers=ONE),
        "seed": write_run(tmp_path / "seed", base["v"], "seed=9", "optim.lr=2", answers=ONE),
        "data": write_run(tmp_path / "data", "data.val=w", "optim.lr=3", answers=ONE),
        "asked": write_run(tmp_path / "asked", base["v"], "optim.lr=4", answers=ONE),
        "count": write_run(tmp_path / "count", base["v"], "optim.lr=5", answers={**ONE, "shape": [1, 1, 0]}),
        "metric": write_run(tmp_path / "metric", base["v"], "optim.lr=6", answers=ONE),
        "same": write_run(tmp_path / "same", base["v"], "optim.lr=7", answers=ONE),
    }
    predictions = tmp_path / "asked" / "eval" / "predictions.jsonl"
    predictions.write_text(predictions.read_text().replace('"?"', '"!"'))
    results = tmp_path / "metric" / "eval" / "results.json"
    results.write_text(results.read_text().replace("exact_match", "anls"))
    compared = compare(list(runs.values()))
    rows = dict(zip(runs, compared.rows, strict=True))
    assert [name for name, row in rows.items() if difference(row, rows["a"])] == ["a", "same"]
    report([runs["a"], runs["seed"], runs["same"]], tmp_path / "report", str(runs["a"]))
    text = (tmp_path / "report" / "report.md").read_text()
    assert "no seed in common" in text and "one seed in common, paired by question" in text


def test_no_interval_where_questions_do_not_explain_the_score(tmp_path, undrawn):
    """A score that is no mean of its questions (F1), no saved scores, one question: the difference stands alone."""
    for name, spoil in {
        "f1": lambda run: replace_in(run / "eval" / "results.json", '"score": 0.75', '"score": 0.5'),
        "unsaved": lambda run: (run / "eval" / "predictions.jsonl").unlink(),
        "scoreless": lambda run: replace_in(run / "eval" / "predictions.jsonl", '"score"', '"points"'),
    }.items():
        runs = two(tmp_path / name)
        spoil(runs[0])
        assert difference(*compare(runs).rows, "colour").half is None, name
    runs = two(tmp_path / "twice")
    again = write_run(tmp_path / "twice" / "again", answers=OTHER)
    assert difference(*compare([runs[0], again, runs[1]]).rows) == Difference(0.125, None, "questions", 6)
    runs = two(tmp_path / "one", {"colour": [1]}, {"colour": [0]})
    assert difference(*compare(runs).rows) == Difference(1, None, "questions", 1)
    report(runs, tmp_path / "report", "llava")
    text = (tmp_path / "report" / "report.md").read_text()
    assert "| difference of the average | +1.000 | baseline |" in text and "No interval for ee_mllm" in text


def replace_in(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_what_the_interval_covers_is_said(tmp_path, undrawn):
    many = [
        write_run(tmp_path / f"{p}{i}", f"seed={i}", f"model.mechanism.preset={p}")
        for p in ("vica", "llava")
        for i in (0, 1)
    ]
    single = write_run(tmp_path / "one", "optim.lr=2")
    report([*many, single], tmp_path / "report", "llava")
    text = (tmp_path / "report" / "report.md").read_text()
    assert (
        "covers what the seed changes, not the choice of questions; few seeds make it wide (2 seeds: t = 12.71)" in text
    )
    assert "Difference of ee_mllm to llava: one seed in common" in text and "not what another seed would give" in text


def test_what_was_not_asked_and_what_was_cut_is_told(tmp_path, undrawn):
    runs = [
        write_run(
            tmp_path / "a", "optim.lr=1", results=of_score(0.5, skipped={"bad_image": 3, "no_text": 1}, cut={"x": 0})
        ),
        write_run(tmp_path / "b", "optim.lr=2", results=of_score(0.5, skipped=7, cut={"x": 1200, "y": 34})),
    ]
    report(runs, tmp_path / "report")
    first, second = (row.title for row in compare(runs).rows)
    for name in ("report.md", "report.html"):
        text = html.unescape((tmp_path / "report" / name).read_text()).replace("\\", "")
        assert f"{first}: 4 questions not asked; {second}: 1,234 answers cut off by max_new_tokens." in text, name
    report(
        [write_run(tmp_path / "c", "optim.lr=3", results=of_score(0.5, skipped={}, cut={"x": 0}))], tmp_path / "none"
    )
    assert "not asked" not in (tmp_path / "none" / "report.md").read_text()


# --- what cannot be compared
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


# --- rows
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


# --- sweeps
def aligner(value, output, ffn, dense="none"):
    return {"dense_layers": dense, "gated": None, "aligner": {"value": value, "output": output, "ffn": ffn}}


@pytest.fixture
def sweep(tmp_path):
    """Rows of the aligner with three seeds, one of which failed, and a self-attention baseline; every number differs."""
    folder = tmp_path / "a sweep"
    rows = {
        "llava": aligner(True, True, True, "all"),
        "none": aligner(False, False, False),
        "O+FFN": aligner(False, True, True),
    }
    runs = {
        name: [
            write_run(
                folder / f"{name}-{seed}",
                f"seed={seed}",
                f"optim.lr={i + 1}",
                results=of_score(
                    0.5 + i / 10 + seed * (1 + (i == 1)) / 100, mechanism=mechanism, cache_bytes=2**20 + i + seed / 8
                ),
                metrics=[[(10, 4 - i - seed, 0.1, 1, ""), (20, 2 - i / 2, 0.2, 1, "")]],
            )
            for seed in range(3)
            if (name, seed) != ("none", 2)
        ]
        for i, (name, mechanism) in enumerate(rows.items())
    }
    failed = [{"run": "none-2", "why": "exit status 1\n  loss is nan <at> step 3 | 4"}]
    return write_sweep(folder, runs, baseline="llava", shape="aligner", failed=failed)


def test_report_of_a_sweep(sweep, capsys):
    """Order, names, baseline and shape are the sweep's; missing seeds and failures are seen."""
    report([sweep])
    text = (sweep / "report" / "report.md").read_text()
    lines = text.splitlines()
    assert lines[0] == "# A sweep"
    scores = [line for line in lines if line.startswith("|")][:6]
    # none: 0.1 and 0.11, deviation 0.0070711, half 12.7062 * 0.0070711 / sqrt(2); O+FFN: 0.2 in every seed says no more
    assert scores == [
        "|  | V | O | FFN | colour | average | difference of the average |",
        "|---|---|---|---|---|---|---|",
        "| llava (3 seeds) | – | – | – | 0.510 ± 0.010 [0.200] | 0.510 ± 0.010 | baseline |",
        "| none (2 of 3 seeds) |  |  |  | 0.610 ± 0.014 [0.200] | 0.610 ± 0.014 | +0.105 (+0.041 to +0.169) |",
        "| O+FFN (3 seeds) |  | ✓ | ✓ | 0.710 ± 0.010 [0.200] | 0.710 ± 0.010 | +0.200 |",
        "| best constant answer |  |  |  | 0.300 | 0.300 |  |",
    ]
    assert f"- failed: {sweep / 'none-2'}: exit status 1 loss is nan &lt;at> step 3 | 4" in lines
    assert "- made by: lit-eemllm sweep s.yaml" in lines and "No interval for O+FFN: all pairs differ alike" in text
    assert f"- none (2 of 3 seeds): {sweep / 'none-0'}, {sweep / 'none-1'}" in lines
    assert "2 of 3 seeds" in capsys.readouterr().out
    assert not list((sweep / "report").glob(".*"))


def test_every_number_leads_to_its_run(sweep):
    """`numbers.csv` holds what the results and metrics of the named run say, and `report.csv` what follows from it."""
    report([sweep])
    with (sweep / "report" / "numbers.csv").open() as file:
        numbers = list(csv.DictReader(file))
    checked = 0
    for line in numbers:
        found = json.loads((Path(line["run"]) / "eval" / "results.json").read_text())
        assert int(line["seed"]) == int(line["run"][-1]) and Path(line["run"]).name.startswith(line["row"])
        if line["quantity"] not in ("questions", "step_seconds", "memory_gib"):
            for key in line["quantity"].split("."):
                found = found[key]
            assert float(line["value"]) == found
            checked += 1
    assert checked == 8 * 9
    with (sweep / "report" / "report.csv").open() as file:
        lines = {(line["row"], line["quantity"]): line for line in csv.DictReader(file)}
    for (row, quantity), line in lines.items():
        values = [float(n["value"]) for n in numbers if (n["row"], n["quantity"]) == (row, quantity)]
        assert len(values) == int(line["seeds"]) and float(line["mean"]) == pytest.approx(np.mean(values), rel=1e-5)
        assert float(line["standard deviation"]) == pytest.approx(np.std(values, ddof=1), rel=1e-4, abs=1e-9)
    line = lines["none", "types.colour.score"]
    assert [line[name] for name in ("difference", "low", "high", "paired by", "pairs")] == [
        "0.105",
        "0.041469",
        "0.168531",
        "seeds",
        "2",
    ]
    assert lines["llava", "average"]["difference"] == lines["none", "loss"]["difference"] == ""


def test_a_sweep_is_read_with_care(sweep, tmp_path):
    """A run that cannot be read is a failure with its reason; what leads out of the sweep or has no sense is refused."""
    (sweep / "none-0" / "eval" / "results.json").write_text('{"average": ')
    compared = compare([sweep])
    assert [row.title for row in compared.rows] == ["llava (3 seeds)", "none (1 of 3 seeds)", "O+FFN (3 seeds)"]
    why = compared.failed[str(sweep / "none-0")]
    assert "not valid JSON" in why and why.endswith(f"; make it again: lit-eemllm validate '{sweep / 'none-0'}'")
    untrained = sweep / "llava-0" / "eval-untrained" / "results.json"
    untrained.parent.mkdir()
    untrained.write_text("[]")
    why = compare([sweep]).failed[str(sweep / "llava-0")]
    assert why.endswith(f"; make it again: lit-eemllm validate '{sweep / 'llava-0'}' --checkpoint none")
    untrained.unlink()
    plan = json.loads((sweep / "sweep.json").read_text())
    for change, message in {
        '{"rows": [{"name": "a", "runs": ["../../etc"]}]}': "expected a path inside of",
        '{"rows": [{"name": "a", "runs": ["/etc"]}]}': "expected a path inside of",
        '{"rows": [{"runs": []}]}': 'expected "rows"',
        '{"rows": null}': 'expected "rows"',
        '{"shape": "round"}': "shape: found 'round'",
        '{"rows": []}': "no run to report",
    }.items():
        (sweep / "sweep.json").write_text(json.dumps({**plan, **json.loads(change)}))
        with pytest.raises(UserError, match=message):
            compare([sweep])
    (sweep / "sweep.json").write_text("[]")
    with pytest.raises(UserError, match="found a list, expected an object"):
        compare([sweep])
    (sweep / "sweep.json").write_text(json.dumps({**plan, "baseline": "gone"}))
    assert "no differences" in compare([sweep]).failed["baseline gone"]
    with pytest.raises(UserError, match="baseline gone: found no such row, expected one of llava, none, O"):
        compare([sweep], "gone")
    with pytest.raises(UserError, match="is a sweep: it is reported alone"):
        compare([sweep, tmp_path])


def test_results_that_are_no_numbers_are_refused_by_name(tmp_path):
    for name, results, message in (
        ("a", of_score("0.5"), "types.colour.score: found '0.5', expected a number"),
        ("b", {**RESULTS, "types": ["colour"]}, "types: found"),
        ("c", {**RESULTS, "types": {"colour": 0.5}}, "types.colour: found 0.5"),
        ("d", {**RESULTS, "mechanism": "llava"}, "mechanism: found 'llava'"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            report([write_run(tmp_path / name, results=results)], tmp_path / "report")
    run = write_run(tmp_path / "e", metrics=[[(1, "x", 1, 1, "")]])
    with pytest.raises(UserError, match=r"metrics\.csv: not metrics of a run"):
        read_run(run)


@pytest.mark.parametrize(
    "name", ["logs/version_0/metrics.csv", "eval/results.json", "eval/predictions.jsonl", "config.yaml", "search.csv"]
)
def test_one_byte_that_is_no_utf_8_is_told_with_its_file(tmp_path, sweep, name):
    if name == "search.csv":
        path, runs = sweep / name, [sweep]
        path.write_text("cell,optim.lr,score,chosen\nllava,0.001,0.5,yes\n")
    else:
        runs = [write_run(tmp_path / each, metrics=[[(1, 2, 1, 1, "")]]) for each in "ab"]
        path = runs[0] / name
        if not path.is_file():
            path.write_text('{"score": 1}\n')
    path.write_bytes(path.read_bytes() + b"\n\xff,\xff\n")
    with pytest.raises(UserError, match=re.escape(str(path))):
        report(runs, tmp_path / "report", baseline=None)


def test_what_was_searched_is_shown(sweep, undrawn):
    """0.004 ends the range of three; with two values, or words, an end says nothing."""
    (sweep / "search.csv").write_text(
        "cell,optim.lr,score,chosen\nllava,0.001,0.5,\nllava,0.002,0.7,yes\nllava,0.004,0.6,no\n"
        "none,0.001,0.5,\nnone,0.002,0.7,\nnone,0.004,0.8,true\nO+FFN,0.001,0.5,1\nO+FFN,0.002,0.4,0\n"
    )
    replace_in(sweep / "sweep.json", '"title"', '"search": "5 steps each", "title"')
    report([sweep])
    text = (sweep / "report" / "report.md").read_text()
    assert (
        "Searched before the runs (5 steps each); the chosen values are bold:\n\n- llava: optim.lr=0.001: 0.5; **optim.lr=0.002: 0.7**; optim.lr=0.004: 0.6\n"
        in text
    )
    assert "**optim.lr=0.004: 0.8** (chosen at the end of the range)\n" in text
    assert "- O+FFN: **optim.lr=0.001: 0.5**; optim.lr=0.002: 0.4\n" in text
    assert "<b>optim.lr=0.002: 0.7</b>" in (sweep / "report" / "report.html").read_text()
    (sweep / "search.csv").write_text("cell,chosen\n")
    with pytest.raises(UserError, match=r"search\.csv: found columns cell, chosen; expected"):
        report([sweep])


# --- the page
class Page(HTMLParser):
    """Tags with their attributes, the text of each cell, and what scripts say."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.lines, self.scripts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "tr":
            self.lines.append([])
        elif tag in ("td", "th"):
            self.lines[-1].append("")
        elif tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if not self.tags:
            return
        if self.tags[-1][0] == "script" and self.scripts[-1] == "":
            self.scripts[-1] = data
        elif self.lines and self.lines[-1] and self.tags[-1][0] in ("td", "th", "button", "a"):
            self.lines[-1][-1] += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def test_the_page_is_whole_in_itself(sweep):
    """The one script is the page's own, by its hash; nothing is loaded; links lead to results; the picture is the PNG."""
    report([sweep])
    folder = sweep / "report"
    text = (folder / "report.html").read_text()
    found = Page(text)
    heading, *lines = found.lines
    assert heading[:5] == ["row", "V", "O", "FFN", "colour"] and {len(line) for line in lines} == {len(heading)}
    assert lines[1][:7] == [
        "none (2 of 3 seeds) 0 1",
        "",
        "",
        "",
        "0.610 ± 0.014 [0.200]",
        "0.610 ± 0.014",
        "+0.105 (+0.041 to +0.169)",
    ]
    assert lines[-1][0] == "best constant answer"
    (script,) = found.scripts
    (policy,) = [each["content"] for each in found.all("meta") if each.get("http-equiv") == "Content-Security-Policy"]
    assert f"script-src 'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in policy
    assert policy.startswith("default-src 'none'; img-src data:;") and not re.search(r"https?:|url\(|@import", text)
    assert {tag for tag, has in found.tags if has.keys() & {"src", "href"}} == {"a", "img"}
    (image,) = found.all("img")
    assert base64.b64decode(image["src"].removeprefix("data:image/png;base64,")) == (folder / "report.png").read_bytes()
    links = [(folder / unquote(link["href"])).resolve() for link in found.all("a")]
    assert links == [
        sweep / f"{name}-{i}" / "eval" / "results.json"
        for name, n in (("llava", 3), ("none", 2), ("O+FFN", 3))
        for i in range(n)
    ]
    scores = [cell for cell in found.all("td") if "colour" not in cell and cell.get("data-v") == repr((0.6 + 0.62) / 2)]
    assert scores[0]["title"].splitlines() == [
        f"seed 0: 0.6 [0.2] in {sweep / 'none-0'}",
        f"seed 1: 0.62 [0.2] in {sweep / 'none-1'}",
        "difference to llava: +0.105 (+0.041 to +0.169), by seeds",
    ]


TABLES = {  # of arXiv 2408.11795, as printed, in percent: the marks of V, O and FFN, scores and their average
    "table4_7b": """
    | MMB-VAL | SeedBench | ScienceQA | BLINK | AI2D | OCRBench | TextVQA | ChartQA | Avg.
    336 x 336
    llava   | 67.3 | 65.1 | 67.0 | 40.7 | 56.4 | 24.4 | 46.1 | 17.9 | 48.1
    ee_mllm | 66.8 | 64.1 | 66.7 | 38.4 | 56.2 | 23.6 | 43.3 | 17.3 | 47.1
    672 x 672
    llava   | 70.1 | 68.0 | 69.4 | 40.1 | 58.3 | 39.8 | 61.7 | 27.9 | 54.4
    ee_mllm | 68.2 | 67.3 | 69.1 | 40.3 | 57.5 | 37.0 | 60.1 | 25.1 | 53.1""",
    "table6_7b": """
    | V | O | FFN | SeedB | Hall | TextVQA | ChartQA | DocVQA | Avg.
    336 x 336
    ee_mllm |   |   |   | 65.3 | 24.4 | 44.8 | 14.4 | 18.4 | 33.5
    ee_mllm |   | ✓ | ✓ | 66.3 | 25.9 | 45.5 | 16.7 | 19.2 | 34.7
    ee_mllm | ✓ |   | ✓ | 65.4 | 25.3 | 45.4 | 15.6 | 19.1 | 34.2
    ee_mllm | ✓ | ✓ |   | 65.8 | 25.1 | 43.5 | 14.8 | 17.9 | 33.4
    ee_mllm | ✓ | ✓ | ✓ | 66.1 | 25.7 | 46.1 | 15.8 | 18.6 | 34.5
    672 x 672
    ee_mllm |   |   |   | 66.1 | 25.2 | 56.8 | 19.7 | 28.6 | 39.3
    ee_mllm |   | ✓ | ✓ | 66.6 | 25.5 | 58.2 | 23.0 | 29.8 | 40.6
    ee_mllm | ✓ |   | ✓ | 66.1 | 24.3 | 58.2 | 21.6 | 30.1 | 40.1
    ee_mllm | ✓ | ✓ |   | 66.4 | 24.1 | 56.3 | 18.5 | 26.5 | 38.4
    ee_mllm | ✓ | ✓ | ✓ | 66.9 | 27.6 | 58.8 | 24.0 | 31.8 | 41.8""",
}


@pytest.mark.parametrize("name", TABLES)
def test_the_sweeps_of_tables_4_and_6_have_the_layout_of_the_paper(name, tmp_path, monkeypatch, undrawn):
    """Runs of the sweep's own rows whose scores are the paper's: its columns, its lines below its headings, its averages."""
    monkeypatch.chdir(Path(__file__).parents[2])
    spec = read_sweep(Path(f"configs/sweeps/{name}.yaml"), ["seeds=[0]", f"out={tmp_path}"])
    plan = make_plan(spec)
    printed = [[cell.strip() for cell in line.split("|")] for line in TABLES[name].splitlines()[1:]]
    columns = printed[0]
    first = columns.index("FFN") + 1 if "FFN" in columns else 1  # of the scores
    for line, (run,) in zip((line for line in printed[1:] if len(line) > 1), plan.rows.values(), strict=True):
        settings = asdict(plan.tasks[run].config.model.mechanism)
        assert settings["preset"] == line[0]
        mechanism = build_mechanism(settings.pop("preset"), 32, {**settings, "gated": None})
        scores = dict(zip(columns[first:-1], (float(cell) / 100 for cell in line[first:-1]), strict=True))
        types = {kind: {"questions": 10, "metric": "exact_match", "score": score} for kind, score in scores.items()}
        average = sum(scores.values()) / len(scores)
        write_run(tmp_path / run, results={"types": types, "average": average, "mechanism": mechanism.to_dict()})
    write_index(spec, make_plan(spec), {}, "lit-eemllm sweep")
    report([tmp_path])
    text = (tmp_path / "report" / "report.md").read_text()
    table = text.split("\n\n")[1]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    heading, _, *lines = lines
    assert heading == [*columns[:-1], "average", "difference of the average"]
    names, base = iter(plan.rows), 0.0
    assert len(lines) == len(printed) - 1 and [line[-1] for line in lines].count("baseline") == 2
    for line, expected in zip(lines, printed[1:], strict=True):
        if len(expected) == 1:
            assert line == [f"**{expected[0]}**", *[""] * (len(heading) - 1)]
            base = next(float(row[-2]) for row in lines[lines.index(line) :] if row[-1] == "baseline")
            continue
        row, *cells, average, gap = line
        assert row == f"{next(names)} (1 seed)" and cells[: first - 1] == expected[1:first]
        assert [f"{100 * float(cell):.1f}" for cell in cells[first - 1 :]] == expected[first:-1]
        assert 100 * float(average) == pytest.approx(float(expected[-1]), abs=0.11)  # 47.05 is printed as 47.1
        assert gap == "baseline" or float(gap) == pytest.approx(float(average) - base, abs=0.0011), "of its group"
    page = Page((tmp_path / "report" / "report.html").read_text())
    assert [[cells[0].strip()] for cells in page.lines if len(cells) == 1] == [
        [line[0]] for line in printed if len(line) == 1
    ]
    assert [each.get("colspan") for each in page.all("th") if "scope" in each] == [str(len(page.lines[0]))] * 2


def test_a_baseline_of_each_group(tmp_path, undrawn):
    """A row is compared within its group; where the group's baseline has no run, with nothing; one baseline is for all."""
    runs = {
        name: write_run(tmp_path / name, f"optim.lr={i + 1}", results=of_score(i / 10))
        for i, name in enumerate(("a", "b", "c", "d"))
    }
    groups = {"a": "one", "b": "one", "c": "two", "d": "two"}
    rows = [{"name": name, "runs": [name], "group": groups[name]} for name in runs]
    write_sweep(tmp_path, {})

    def gaps(baseline):
        index = json.loads((tmp_path / "sweep.json").read_text())
        (tmp_path / "sweep.json").write_text(json.dumps({**index, "rows": rows, "baseline": baseline}))
        compared = compare([tmp_path])
        table, _ = tables(compared)
        assert [line[0] for line in table if not any(line[1:])] == ["one", "two"]
        return [line[table[0].index("difference of the average")] for line in table if "seed" in line[0]], compared

    assert gaps(["a", "d"])[0] == ["baseline", "+0.100", "-0.100", "baseline"]
    found, compared = gaps(["a", "gone"])
    assert found == ["baseline", "+0.100", "", ""] and "no differences" in compared.failed["baseline gone"]
    assert gaps("a")[0] == ["baseline", "+0.100", "+0.200", "+0.300"]
    index = json.loads((tmp_path / "sweep.json").read_text())
    (tmp_path / "sweep.json").write_text(json.dumps({**index, "rows": rows[:2]}))
    assert [line[0] for line in tables(compare([tmp_path]))[0] if not any(line[1:])] == ["one"], "a heading, no column"
    gaps(["a", "d"])
    report([tmp_path])
    assert (
        "Difference of b, c to a, d (each for its group): one seed" in (tmp_path / "report" / "report.md").read_text()
    )


def test_names_cannot_become_markup(tmp_path):
    """Names of rows, types, runs, titles, reasons and searched values are text wherever they come."""
    evil = '![i](https://a.b/c.png)"><script>alert(1)</script><b onclick="x'
    types = {evil: {**TYPES["colour"], "metric": evil}}
    folder = tmp_path / "javascript:alert(1)"
    run = write_run(folder / 'a&b" onclick="c\'<i>#%41', results={**RESULTS, "types": types})
    write_sweep(
        folder, {evil: [run]}, title=evil, command=evil, search=evil, failed=[{"run": "x", "why": evil}], baseline=evil
    )
    (folder / "search.csv").write_text(f"cell,{'<i>'},score,chosen\n<b>,<u>,<s>,yes\n")
    report([folder])
    text = (folder / "report" / "report.html").read_text()
    found = Page(text)
    assert len(found.scripts) == 1 and "alert" not in found.scripts[0]
    assert not {"i", "u", "s"} & {tag for tag, _ in found.tags} and not any("onclick" in each for _, each in found.tags)
    (link,) = found.all("a")
    assert ":" not in link["href"] and (folder / "report" / unquote(link["href"])).resolve().is_file()
    text = (folder / "report" / "report.md").read_text()
    assert "<script" not in text and text.count("](") == 1, "our picture"


# --- the picture
def draw(compared, monkeypatch):
    """The figure that is saved."""
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    plots.draw(compared.rows)
    (figure,) = figures
    figure.canvas.draw()
    return figure


def legend_of(figure):
    (legend,) = [legend for part in figure.subfigs for legend in part.legends]
    return legend


def test_score_by_type_by_hand(tmp_path, monkeypatch):
    """A panel a type with a line a row: mean, deviation, control, constant; a row that was not asked is left out."""
    kinds = {"a": ["colour"], "b": ["colour", "count"], "c": ["count"]}
    runs = [
        write_run(
            tmp_path / f"{name}{seed}",
            f"optim.lr={i + 1}",
            f"seed={seed}",
            results={
                **RESULTS,
                "types": {each: {**TYPES["colour"], "score": 0.5 + seed / 10} for each in types},
                "average_control": 0.1 + seed / 5,
            },
        )
        for i, (name, types) in enumerate(kinds.items())
        for seed in (0, 1)
    ]
    figure = draw(compare(runs), monkeypatch)
    legend = legend_of(figure)
    names = [
        "ee_mllm optim.lr=1.0",
        "ee_mllm optim.lr=2.0",
        "ee_mllm optim.lr=3.0",
        "images shuffled",
        "best constant answer",
    ]
    assert [text.get_text() for text in legend.get_texts()] == names
    colours = [line.get_color() for line in legend.get_lines()]
    panels = {axis.get_title(): axis for axis in figure.axes if axis.get_title()}
    assert list(panels) == ["colour", "count", "average"]
    for title, asked in (("colour", [0, 1]), ("count", [1, 2])):
        bars = panels[title].containers
        assert [bar.lines[0].get_color() for bar in bars] == [colours[i] for i in asked]
        assert [(*bar.lines[0].get_xdata(), *bar.lines[0].get_ydata()) for bar in bars] == [(0.55, i) for i in asked]
        (low, high) = (x for x, _ in bars[0].lines[2][0].get_segments()[0])
        assert (high - low) / 2 == pytest.approx(0.070711, abs=1e-6)
        crosses = [line for line in panels[title].lines if line.get_marker() == "x"]
        assert [(*line.get_xdata(), *line.get_ydata()) for line in crosses] == [(0.2, i) for i in asked]
        assert any(list(line.get_xdata()) == [0.3, 0.3] for line in panels[title].lines)
        assert panels[title].get_xlim() == (0, 1)
    crosses = [line for line in panels["average"].lines if line.get_marker() == "x"]
    assert [(*line.get_xdata(), *line.get_ydata()) for line in crosses] == [(0.2, i) for i in range(3)]
    assert [tick.get_text() for tick in panels["colour"].get_yticklabels()] == [
        name.replace(" ", "\n") if len(name) > 26 else name for name in names[:3]
    ]


def test_a_picture_of_any_size_can_be_drawn(tmp_path, monkeypatch):
    """4,000 lines of text, 960 inches: more pixels than Agg has at the usual resolution."""
    from matplotlib.figure import Figure

    sizes = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: sizes.append(max(figure.bbox.size)))
    compared = compare([write_run(tmp_path / "a", results=of_score(0.5, prefill_flops=None))])
    compared.rows[0].label = "many words " * 9000
    plots.draw(compared.rows)
    assert 50_000 < sizes[0] < 65_536


def test_axes_fit_what_there_is(tmp_path, monkeypatch):
    """Without questions one axis; whole steps; a single log line is a dot; a logarithmic axis has ticks to read."""
    alone = {"parameters": 2, "loss": 1.0}
    dot = write_run(tmp_path / "dot", results=alone, metrics=[[(1, 2.5, 1, 1, "")]])
    line = write_run(tmp_path / "line", "optim.lr=1", results=alone, metrics=[[(1, 9, 1, 1, ""), (3, 0.5, 1, 1, "")]])
    for paths, scale in (([dot], "linear"), ([dot, line], "log")):
        (axis,) = draw(compare(paths), monkeypatch).axes
        assert axis.lines[0].get_marker() == "o"
        low, high = axis.get_ylim()
        shown = [tick.get_text() for tick in axis.get_yticklabels() if low <= tick.get_position()[1] <= high]
        assert axis.get_yscale() == scale and len(shown) >= 3 and all(float(text) > 0 for text in shown)
        assert all(float(tick).is_integer() for tick in axis.get_xticks())
    assert {"0.5", "1", "2", "5"} <= set(shown) and axis.lines[1].get_marker() == "None"


def test_curves_are_means_over_seeds_within_their_band(tmp_path, monkeypatch):
    """Losses 4 and 2 at step 10: 3; step 30 has one seed alone and is no mean of both."""
    curves = [[(10, 4, 1, 1, ""), (20, 3, 1, 1, ""), (30, 9, 1, 1, "")], [(10, 2, 1, 1, ""), (20, 2.5, 1, 1, "")]]
    runs = [write_run(tmp_path / str(i), f"seed={i}", results={"loss": 1.0}, metrics=[c]) for i, c in enumerate(curves)]
    (axis,) = draw(compare(runs), monkeypatch).axes
    assert axis.lines[0].get_xydata().tolist() == [[10, 3], [20, 2.75]]
    (band,) = axis.collections
    assert {tuple(point) for point in band.get_paths()[0].vertices.tolist()} == {(10, 4), (10, 2), (20, 3), (20, 2.5)}


def test_scores_that_hardly_differ_do_not_look_as_if(tmp_path, monkeypatch):
    runs = [
        write_run(tmp_path / str(i), f"seed={i}", f"optim.lr={rate}", results=of_score(score, prefill_flops=1e6))
        for i, (rate, score) in enumerate(((1e-3, 0.9969), (1e-4, 0.9970)))
    ]
    (axis,) = [axis for axis in draw(compare(runs), monkeypatch).axes if "FLOPs" in axis.get_xlabel()]
    low, high = axis.get_ylim()
    assert high - low == pytest.approx(0.05) and low < 0.9969 < 0.9970 < high


def test_points_of_cost_are_labelled_without_hiding_each_other(tmp_path, monkeypatch):
    """Eight mechanisms close to the ceiling: every point is at its place with its error, no two labels overlap, and none lies
    on a point or its error bar."""
    presets = ("llava", "ee_mllm", "ee_mllm_f", "naavit", "shortv", "saisa", "vica", "flamingo")
    flops = (14.3, 13.3, 13.8, 12.7, 11.7, 11.0, 8.5, 16.2)
    scores = (0.997, 0.996, 0.995, 0.996, 0.994, 0.999, 0.97, 0.6)
    runs = [
        write_run(
            tmp_path / f"{preset}{seed}",
            f"seed={seed}",
            f"model.mechanism.preset={preset}",
            results=of_score(score + seed / 20, prefill_flops=cost * 1e6),
        )
        for preset, cost, score in zip(presets, flops, scores, strict=True)
        for seed in (0, 1)
    ]
    figure = draw(compare(runs), monkeypatch)
    (axis,) = [axis for axis in figure.axes if "FLOPs" in axis.get_xlabel()]
    points = [bar.lines[0].get_xydata()[0].tolist() for bar in axis.containers]
    assert points == [[pytest.approx(f * 1e6), pytest.approx(s + 0.025)] for f, s in zip(flops, scores, strict=True)]
    labels = [text for text in axis.texts if text.get_text()]
    assert [text.get_text() for text in labels] == list(presets)
    boxes = [text.get_window_extent() for text in labels]
    bars = [Bbox(axis.transData.transform(bar.lines[2][0].get_segments()[0])) for bar in axis.containers]
    assert min(bar.height for bar in bars) > 10
    for i, box in enumerate(boxes):
        assert not box.count_overlaps(boxes[:i] + [bar.padded(1) for bar in bars]), presets[i]
