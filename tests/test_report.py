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
        "questions": ["10"],
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


def draw(paths, monkeypatch, tmp_path):
    """The figure that `report.draw` saves."""
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    report.draw(report.group([report.read_run(path) for path in paths]), tmp_path / "x.png")
    (figure,) = figures
    figure.canvas.draw()
    return figure


def test_every_row_is_in_the_legend_and_bars_stand_side_by_side(tmp_path, monkeypatch):
    """Three rows with question types of their own: one legend for both axes, and no gap where a row was not asked."""
    kinds = {"a": ["colour"], "b": ["colour", "count"], "c": ["count"]}
    runs = [
        write_run(
            tmp_path / name, f"optim.lr={i + 1}", results={**RESULTS, "types": dict.fromkeys(types, TYPES["colour"])}
        )
        for i, (name, types) in enumerate(kinds.items())
    ]
    figure = draw(runs, monkeypatch, tmp_path)
    (legend,) = figure.legends
    names = ["ee_mllm optim.lr=1.0", "ee_mllm optim.lr=2.0", "ee_mllm optim.lr=3.0", "images shuffled"]
    assert [text.get_text() for text in legend.get_texts()] == names
    bars = [(bar.get_x() + bar.get_width() / 2, bar.get_facecolor()) for bar in figure.axes[1].patches]
    colours = [patch.get_facecolor() for patch in legend.get_patches()]
    width = 0.8 / 3
    expected = [
        (-width / 2, colours[0]),
        (width / 2, colours[1]),
        (1 - width / 2, colours[1]),
        (1 + width / 2, colours[2]),
    ]
    assert [(pytest.approx(x), colour) for x, colour in expected] == bars


def test_axes_fit_what_there_is(tmp_path, monkeypatch):
    """Without questions one axis; whole steps; a single log line is a dot; a logarithmic axis has ticks to read."""
    alone = {"parameters": 2, "loss": 1.0}
    dot = write_run(tmp_path / "dot", results=alone, metrics=[[(1, 2.5, 1, 1, "")]])
    line = write_run(tmp_path / "line", "optim.lr=1", results=alone, metrics=[[(1, 9, 1, 1, ""), (3, 0.5, 1, 1, "")]])
    for paths, scale in (([dot], "linear"), ([dot, line], "log")):
        (axis,) = draw(paths, monkeypatch, tmp_path).axes
        assert axis.lines[0].get_marker() == "o"
        low, high = axis.get_ylim()
        shown = [tick.get_text() for tick in axis.get_yticklabels() if low <= tick.get_position()[1] <= high]
        assert axis.get_yscale() == scale and len(shown) >= 3 and all(float(text) > 0 for text in shown)
        assert all(float(tick).is_integer() for tick in axis.get_xticks())
    assert {"0.5", "1", "2", "5"} <= set(shown) and axis.lines[1].get_marker() == "None"


def test_what_cannot_be_compared_is_said(tmp_path, capsys):
    half = {**RESULTS, "types": {"colour": {**TYPES["colour"], "questions": 5, "control": None}}}
    runs = {
        "a": write_run(tmp_path / "a", "data.val=v"),
        "same": write_run(tmp_path / "same", "data.val=v", "seed=1"),
        "half": write_run(tmp_path / "half", "data.val=v", "model.mechanism.preset=llava", results=half),
        "loss": write_run(tmp_path / "loss", "data.val=v", "optim.lr=2", results={"loss": 1.0}),
        "other": write_run(tmp_path / "other", "data.val=w", "model.mechanism.preset=vica"),
    }

    def said(*names):
        report.report([runs[name] for name in names], tmp_path / "report")
        text = (tmp_path / "report" / "report.md").read_text()
        found = [line for line in text.splitlines() if "cannot be compared" in line]
        assert all(line in capsys.readouterr().out for line in found)
        return text, *found

    assert len(said("a", "same")) == len(said("a", "loss")) == 1
    _, sentence = said("a", "same", "half")
    assert sentence.startswith("Exact match of these") and sentence.endswith(
        "questions: ee_mllm (2 seeds): v, 10 questions; llava (1 seed): v, 5 questions."
    )
    _, sentence = said("a", "other")
    assert sentence.startswith("Exact match and validation loss of") and "vica (1 seed): w, 10" in sentence
    text = said("half")[0]
    assert "in brackets" not in text and "±" not in text and "Step time" not in text and "| questions | 5 |" in text
    text = said("a", "same")[0]
    assert "in brackets" in text and "± is the standard" in text
    assert said("loss")[0].count("Exact match") == 0


def test_a_wide_table_is_printed_in_parts(tmp_path, capsys):
    """Eight columns do not fit: no cell is cut, and the quantities stand in every part."""
    presets = ("llava", "ee_mllm", "ee_mllm_f", "naavit", "shortv", "saisa", "vica", "flamingo")
    runs = [write_run(tmp_path / name, f"model.mechanism.preset={name}") for name in presets]
    report.report(runs, tmp_path / "report")
    out = capsys.readouterr().out.partition(str(tmp_path))[0]
    assert out.count("0.500 [0.200]") == 8 and "…" not in out and all(f"{name} (1 seed)" in out for name in presets)
    assert out.count("colour, best constant 0.300") == out.count("comparison") == 2
    assert max(map(len, out.splitlines())) <= 120


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
