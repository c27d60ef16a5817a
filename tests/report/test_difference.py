"""Differences between runs and their intervals: against published quantiles, and by hand."""

import html
import json

import numpy as np
import pytest
from lib.reports import ONE, OTHER, cells, of_score, replace_in, write_run

from lit_eemllm.report import report
from lit_eemllm.report.difference import Difference, difference, t95
from lit_eemllm.report.runs import compare


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
