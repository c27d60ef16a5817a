"""Pictures of a comparison: what is drawn, from numbers by hand, and that it can be read."""

import pytest
from lib.reports import RESULTS, TYPES, of_score, write_run
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from lit_eemllm.report import measured, plots
from lit_eemllm.report.runs import compare


def draw(compared, monkeypatch):
    """The figure that is saved."""
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
        marks, caps, bars_of_one = bars[0].lines
        assert [part.get_clip_on() for part in (marks, *caps, *bars_of_one)] == [False, True, True, True]
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


def test_no_two_systems_of_a_bench_look_alike_and_few_times_have_ticks(monkeypatch):
    """More systems than colours; all within a factor of two of the base."""
    rows = [
        {"measure": "prefill", "system": system, "visual": visual, "seconds": [(1 + number / 30) * visual]}
        for number, system in enumerate([measured.BASE, *(f"mechanism {i}" for i in range(24))])
        for visual in (64, 256)
    ]
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.extend(figure.axes))
    measured.draw({"rows": rows})
    looks = [(line.get_color(), line.get_linestyle()) for line in drawn[0].lines]
    assert len(set(looks)) == len(looks) == 25
    assert len(drawn[0].get_yticklabels()) > 2
