"""Reports of sweeps, and the page that they become: every number leads to its run, and nothing on it is run or loaded."""

import base64
import csv
import hashlib
import json
import re
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from lib.reports import RESULTS, TYPES, of_score, replace_in, write_run, write_sweep

from lit_eemllm.errors import UserError
from lit_eemllm.mechanisms import build_mechanism
from lit_eemllm.report import report
from lit_eemllm.report.runs import compare, read_run
from lit_eemllm.report.tables import tables
from lit_eemllm.sweep import write_tables
from lit_eemllm.sweep.plan import make_plan
from lit_eemllm.sweep.spec import read_sweep


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
        ("m", {**RESULTS, "machine": ["ours"]}, "machine: found ['ours'], expected a text"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            report([write_run(tmp_path / name, results=results)], tmp_path / "report")
    run = write_run(tmp_path / "e", metrics=[[(1, "x", 1, 1, "")]])
    with pytest.raises(UserError, match=r"metrics\.csv: not metrics of a run"):
        read_run(run)


@pytest.mark.parametrize(
    "name",
    [
        "logs/version_0/metrics.csv",
        "logs/version_0/machine.csv",
        "eval/results.json",
        "eval/predictions.jsonl",
        "config.yaml",
        "search.csv",
    ],
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
    write_tables(spec, "lit-eemllm sweep", make_plan(spec), {})
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
