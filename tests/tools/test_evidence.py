"""tools/evidence.py: power by hand and by drawing seeds, answers that are kept and can be scored again, curves of difficulty."""

import csv
import gzip
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from lib.reports import of_score, write_run, write_sweep

from lit_eemllm.evaluation.sets import read_suite
from lit_eemllm.report.difference import t95
from lit_eemllm.report.runs import compare, read_run

SOURCE = Path(__file__).parents[2] / "tools" / "evidence.py"
spec = importlib.util.spec_from_file_location("evidence", SOURCE)
evidence = importlib.util.module_from_spec(spec)
sys.modules["evidence"] = evidence
spec.loader.exec_module(evidence)


def rows(folder, **seeds):
    """A row under each preset, whose run of each seed scored questions like this: {type: scores}."""
    written = [
        write_run(folder / f"{preset}{seed}", f"seed={seed}", f"model.mechanism.preset={preset}", answers=types)
        for preset, runs in seeds.items()
        for seed, types in enumerate(runs)
    ]
    return compare(written).rows


def test_variances_by_hand(tmp_path):
    """Differences of averages 0.5 and 0; of type b the pairs differ by 1, 0, 1, 0: 1/3 / 4, and a fourth of that for two types."""
    again = {"a": [0, 1, 0, 1], "b": [1, 1, 1, 1]}
    ours, base = rows(
        tmp_path,
        ee_mllm=[{"a": [1, 1, 1, 1], "b": [1, 0, 1, 0]}, again],
        llava=[{"a": [0.5] * 4, "b": [0, 0, 0, 0]}, again],
    )
    of_seeds, of_questions = evidence.variances(ours, base)
    assert of_seeds == pytest.approx(0.5**2 / 2) and of_questions == pytest.approx(1 / 3 / 4 / 4 / 2)
    (one,) = rows(tmp_path / "one", ee_mllm=[{"a": [1, 1, 1, 1], "b": [1, 0, 1, 0]}])
    assert evidence.variances(one, base) is None


def test_half_width_is_what_is_found_when_seeds_are_drawn():
    """Seeds of deviation 0.02 and fresh questions: the interval's mean square is what is foretold."""
    rng = np.random.default_rng(0)
    for seeds, times in ((3, 1), (5, 2), (8, 4)):
        drawn = rng.normal(0, np.sqrt(0.02**2 + 0.015**2 / times), (20000, seeds))
        squares = t95(seeds - 1) ** 2 * drawn.var(1, ddof=1) / seeds
        told = evidence.half_width(0.02**2 + 0.015**2, 0.015**2, seeds, times)
        assert told == pytest.approx(np.sqrt(squares.mean()), rel=0.02)
    assert evidence.half_width(0.001, 0.002, 4, 1) == pytest.approx(t95(3) * np.sqrt(0.002 / 4))


def test_power_names_each_row(tmp_path):
    ours, base = rows(tmp_path, ee_mllm=[{"a": [1, 0]}, {"a": [1, 1]}], llava=[{"a": [0, 0]}, {"a": [1, 0]}])
    head, _, line = evidence.power([base, ours]).splitlines()
    assert "3 seeds, 1 x" in head and line.startswith("| ee_mllm (2 seeds)") and line.count("|") == head.count("|")


def test_rows_that_a_sweep_has_not_are_named(monkeypatch, capsys):
    monkeypatch.setattr(evidence, "read_sweep", lambda path: [SimpleNamespace(rows=[scored("a", 1, 0.5)])])
    assert evidence.main(["power", "sweep", "--rows", "b", "a", "c"]) == 2
    assert capsys.readouterr().err == "error: --rows: found b, c, expected of a\n"


def test_a_folder_that_is_no_sweep_is_named(tmp_path, capsys):
    assert evidence.main(["power", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: [Errno 2] No such file or directory: '{tmp_path / 'sweep.json'}'\n"


def scored(label, flops, *averages):
    """A row of runs with these averages."""
    results = [{"average": average, "prefill_flops": flops} for average in averages]
    runs = [SimpleNamespace(config=SimpleNamespace(seed=seed), result=one.get) for seed, one in enumerate(results)]
    return SimpleNamespace(label=label, runs=runs, by_seed=lambda of: dict(enumerate(map(of, runs))))


def test_claims_by_hand(tmp_path):
    """0.5, 0.6, 0.4 beside half of 0.8, 0.8, 0.8: differences 0.1, 0.2, 0.0, so 0.1 +- 4.3027 * 0.1 / sqrt(3)."""
    rows = [scored("a, b", 30, 0.5, 0.6, 0.4), scored("base", 40, 0.8, 0.8, 0.8)]
    (found,) = evidence.claimed("a, b >= 0.5 base", rows)
    half = 4.3027 * 0.1 / 3**0.5
    assert [found[name] for name in ("difference", "low", "high", "FLOPs")] == pytest.approx(
        [0.1, 0.1 - half, 0.1 + half, 0.75], abs=1e-5
    )
    assert found["outcome"] == "not decided"
    assert evidence.claimed("a, b >= 0.1 base", rows)[0]["outcome"] == "holds"
    assert evidence.claimed("a, b >= 1.1 base", rows)[0]["outcome"] == "fails"
    evidence.claims(["a, b >= 0.5 base"], rows, tmp_path)
    (line,) = csv.DictReader((tmp_path / "claims.csv").read_text().splitlines())
    assert (line["claim"], line["low"], line["outcome"]) == ("a, b >= 0.5 base", f"{0.1 - half:.4f}", "not decided")
    for claim in ("a, b > base", "c >= 1 base", "c looks", "base"):
        with pytest.raises(evidence.UserError, match="are of a, b, base"):
            evidence.claimed(claim, rows)
    with pytest.raises(evidence.UserError, match="1 seeds in common"):
        evidence.claimed("one >= 1 base", [scored("one", 1, 0.5), rows[1]])


def test_what_a_claim_hangs_on_by_hand(tmp_path, capsys):
    """Without shape, and without seed 2, the differences are 0.5 and 0.25; with it one is -1."""
    cells = {
        "a": [{"colour": [1, 1], "shape": [0]}, {"colour": [1, 1, 1, 0], "shape": [0]}, {"colour": [0], "shape": [1]}],
        "b": [{"colour": [1, 0], "shape": [1]}, {"colour": [1, 1, 0, 0], "shape": [1]}, {"colour": [1], "shape": [0]}],
    }
    named = {
        name: [write_run(tmp_path / name / f"{s}", f"seed={s}", answers=one) for s, one in enumerate(runs)]
        for name, runs in cells.items()
    }
    command = ["claims", str(write_sweep(tmp_path, named)), "--out", str(tmp_path / "out"), "--claims", "a >= 1 b"]
    assert evidence.main([*command, "--seeds", "0", "1", "--without", "shape"]) == 0
    (line,) = csv.DictReader((tmp_path / "out" / "claims.csv").read_text().splitlines())
    told = [line[name] for name in ("claim", "seeds", "average", "difference", "outcome")]
    assert told == ["a >= 1 b, without shape", "2", "0.8750", "0.3750", "not decided"]
    assert evidence.main([*command, "--without", "shape"]) == 0
    (line,) = csv.DictReader((tmp_path / "out" / "claims.csv").read_text().splitlines())
    assert (line["seeds"], line["difference"]) == ("3", "-0.0833")
    capsys.readouterr()
    for more, message in (
        (["--seeds", "7"], "--seeds: a, b: no run of these"),
        (["--without", "word"], "--without: found word"),
        (["--without", "colour", "shape"], "--without: nothing is left of the average"),
    ):
        assert evidence.main([*command, *more]) == 2 and message in capsys.readouterr().err


def test_a_type_left_out_leaves_the_others_their_weights(tmp_path):
    """Two sets weigh a half each: (1/4 * 0.5 + 1/2 * 0.2) / (3/4) without x/a."""
    types = {name: {"questions": 4, "score": score} for name, score in (("x/a", 1.0), ("x/b", 0.5), ("y/c", 0.2))}
    results = {"loss": 1.0, "types": types, "average": (0.75 + 0.2) / 2}
    run = read_run(write_run(tmp_path / "run", results=results))
    assert evidence.average(run, []) == 0.475 and evidence.average(run, ["x/a"]) == pytest.approx(0.3)


def test_whether_a_row_looks_by_hand(tmp_path):
    """Scores 0.5, 0.6, 0.4 beside 0.2, of a second type 0.2 beside 0.2, and losses 1.25 beside 2.5: the answer is of each."""
    shape = {"questions": 10, "metric": "exact_match", "score": 0.2, "control": 0.2}
    written = []
    for seed, score in enumerate((0.5, 0.6, 0.4)):
        one = of_score(score)
        written.append(
            write_run(tmp_path / str(seed), f"seed={seed}", results={**one, "types": {**one["types"], "shape": shape}})
        )
    rows = compare(written).rows
    evidence.claims([f"{rows[0].label} looks"], rows, tmp_path)
    colour, of_shape, loss = csv.DictReader((tmp_path / "claims.csv").read_text().splitlines())
    half = 4.3027 * 0.1 / 3**0.5
    assert [colour[name] for name in ("average", "of the other", "low", "outcome")] == [
        "0.5000", "0.2000", f"{0.3 - half:.4f}", "holds"
    ]  # fmt: skip
    assert [loss[name] for name in ("claim", "difference", "low", "outcome")] == [
        f"{rows[0].label} looks: minus the loss", "1.2500", "1.2500", "holds"
    ]  # fmt: skip
    assert of_shape["claim"].endswith(": shape") and of_shape["outcome"] == "not decided"


def test_kept_answers_are_those_of_the_runs(tmp_path):
    """Scores from the file alone are those of the predictions, whatever order the runs had."""
    rows = []
    for number, given in enumerate((["red", "blue"], ["blue", "blue"])):
        at = tmp_path / f"run{number}"
        (at / "eval").mkdir(parents=True)
        asked = [
            {"set": "data", "key": f"q{i}", "type": "colour", "truth": "blue", "answer": answer, "prompt": "é\n,"}
            for i, answer in enumerate(given)
        ]
        (at / "eval" / "predictions.jsonl").write_text(
            "".join(json.dumps(one) + "\n" for one in asked[:: 1 - 2 * number])
        )
        rows.append(
            SimpleNamespace(label=f"m{number}", runs=[SimpleNamespace(config=SimpleNamespace(seed=7), path=at)])
        )
    (tmp_path / "sweep" / "report").mkdir(parents=True)
    (tmp_path / "sweep" / "report" / "report.md").write_text("# Title\n")
    for again in range(2):
        evidence.keep(tmp_path / "sweep", rows, tmp_path / f"kept{again}")
    data = (tmp_path / "kept0" / "predictions.csv.gz").read_bytes()
    assert data == (tmp_path / "kept1" / "predictions.csv.gz").read_bytes()
    lines = list(csv.DictReader(gzip.decompress(data).decode().splitlines()))
    right = {name: [line[name] == line["truth"] for line in lines] for name in ("m0/7", "m1/7")}
    assert right == {"m0/7": [False, True], "m1/7": [True, True]}
    assert (tmp_path / "kept0" / "report.md").read_text() == "# Title\n"


def test_questions_are_as_difficult_as_their_set_says(tmp_path):
    suite = evidence.questions(tmp_path, 1)
    read, wrong = read_suite(suite, None, 2)
    sets = json.loads(suite.read_text())["sets"]
    assert wrong == [] and len(read) == len(sets)
    assert [*sets] == [f"{name}-{n}" for name, curve in evidence.CURVES.items() for n in curve.values]
    assert sorted(kind for curve in evidence.CURVES.values() for kind in curve.types) == sorted(evidence.puzzles.TYPES)
    for name, one in sets.items():
        parameter, value = name.split("-")
        asked = json.loads((tmp_path / one["data"]).read_text())
        assert [question["type"] for question in asked] == [*evidence.CURVES[parameter].types]
        names = asked[0]["image"] if isinstance(asked[0]["image"], list) else [asked[0]["image"]]
        assert all((tmp_path / one["images"] / image).is_file() for image in names)
        assert len(names) == (int(value) if parameter == "pictures" else 1)


def test_a_difficulty_of_which_nothing_was_answered_is_named(tmp_path, monkeypatch):
    names = [
        f"{name}-{n}/{kind}" for name, curve in evidence.CURVES.items() for n in curve.values for kind in curve.types
    ]
    (tmp_path / "eval").mkdir()
    monkeypatch.setattr(evidence.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=0))
    run = SimpleNamespace(path=tmp_path, results={"checkpoint": "none"})
    for left_out in (0, 2):
        types = {name: {"questions": 1, "score": 0.5} for name in names[left_out:]}
        (tmp_path / "eval" / "results.json").write_text(json.dumps({"types": types}))
        if not left_out:
            assert evidence.ask(run, tmp_path / "suite.yaml", tmp_path) == types
    with pytest.raises(evidence.UserError, match="no question of objects-2/outermost, objects-2/shape was answered"):
        evidence.ask(run, tmp_path / "suite.yaml", tmp_path)


def test_curves_are_written_by_row_and_seed(tmp_path, monkeypatch):
    """Two rows, two seeds: each run is asked once."""
    rows = [
        SimpleNamespace(label=label, runs=[SimpleNamespace(config=SimpleNamespace(seed=seed)) for seed in (0, 2)])
        for label in ("a", "b")
    ]
    scores = {
        f"{name}-{n}/{kind}": {"questions": 1, "score": (kind == "shape") / n}
        for name, curve in evidence.CURVES.items()
        for n in curve.values
        for kind in curve.types
    }
    asked = []
    monkeypatch.setattr(evidence, "ask", lambda run, suite, folder: asked.append(run) or scores)
    evidence.curves(rows, 1, tmp_path)
    lines = list(csv.DictReader((tmp_path / "curves.csv").read_text().splitlines()))
    assert len(asked) == 4 and len(lines) == 4 * len(scores)
    assert {(line["row"], line["seed"]) for line in lines} == {("a", "0"), ("a", "2"), ("b", "0"), ("b", "2")}
    assert {(line["value"], line["score"]) for line in lines if line["type"] == "shape"} >= {("4", "0.250000")}
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    table = (tmp_path / "curves.md").read_text()
    assert "| objects | | 2 | 4 | 8 | 16 | 24 |\n" in table and "| shape | a | 0.500 | 0.250 | 0.125 |" in table
    assert "| mean | b | 0.125 | 0.062 | 0.031 |" in table and "| word | a | 0.000 |" in table
