"""What a sweep needs beside its report to be evidence: its power beforehand, curves of difficulty, and its answers kept.

    python tools/evidence.py power SWEEP                  # of a pilot: the differences that more seeds and questions would show
    python tools/evidence.py claims SWEEP --out FOLDER --claims "ee_mllm >= 0.98 llava" ...     # what was stated, and its outcome
    python tools/evidence.py curves SWEEP --out FOLDER    # the hard set's questions with more objects, bars or words, or more pictures
    python tools/evidence.py keep SWEEP --out FOLDER      # its report, and each answer of each run, compressed

**Power.** The difference of two rows varies with the seed and with the choice of questions. Of a pilot, s^2 is the variance
of the paired differences over seeds and q^2 what of it the questions make (the variance of the paired differences of one
question's scores, type by type, divided by their number). With n seeds and m times as many questions the 95 % interval is
to either side::

    t(n - 1) * sqrt((s^2 - q^2 + q^2 / m) / n)        (s^2 - q^2 is taken to be no less than 0)

if all seeds are asked the same questions it says nothing of other questions, as the report's does not.

**Claims.** Of "A >= w B", the interval of average(A) - w average(B), paired by seed: a claim holds if it lies above zero, fails if it
lies below, and is not decided otherwise. "A looks" is one for each type of question, of its score with the right pictures beside
that with exchanged ones, and one of the loss. Writes claims.csv, with the share of B's prefill FLOPs that A takes. What a difference
of the averages hangs on is seen without a type (`--without`) or a seed (`--seeds`); a line says which types are left out, and how
many seeds there are.

**Curves.** Each run is asked questions of data_recipes/puzzles.py with a fixed number of objects, of bars, of words, and of pictures
in one of which is what is asked for (`CURVES`; where more are counted than that, as many are shown). Writes curves.csv, .md (means
over seeds) and .png.

**Keep.** Copies report.md, .csv and .png, numbers.csv and search.csv, and writes predictions.csv.gz: a line for each question,
with its type, the right answer, and what each run (a column) answered.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from math import nan, sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from lit_eemllm.console import COMMAND, console, progress, write_atomically
from lit_eemllm.errors import UserError
from lit_eemllm.report import markdown_table
from lit_eemllm.report.difference import Z95, half_over_seeds, over_questions, t95, weights_of_average
from lit_eemllm.report.runs import Row, Run, read_sweep
from lit_eemllm.report.tables import csv_text

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data_recipes"))
import puzzles

SEEDS = (3, 5, 8, 12)
TIMES = (1, 2, 4)  # as many questions


class Curve(NamedTuple):
    """What is varied: argument and values of `puzzles.rows_and_scenes`, the types that are asked, the axis and what a step on it is."""

    argument: str
    values: tuple[int, ...]
    types: tuple[str, ...]
    axis: str
    unit: int = 1


TOKENS = (2 * puzzles.GRID) ** 2  # visual tokens of a picture
CURVES = {  # every type of the set; training has 2 to 16 objects, 2 to 12 bars, 1 to 6 words, 2 to 4 pictures of 5 to 28
    "objects": Curve("things", (2, 4, 8, 16, 24), ("outermost", "shape", "most", "count_colour"), "objects"),
    "bars": Curve("things", (2, 4, 8, 12), ("tallest", "count_bars"), "bars"),
    "words": Curve("things", (1, 2, 4, 6), ("word",), "words"),
    "pictures": Curve("pictures", (1, 2, 3, 4, 6), ("find",), f"visual tokens, {TOKENS} a picture", TOKENS),
}
KEPT = ("report.md", "report.csv", "report.png", "numbers.csv")


# ---------------------------------------------------------------- power


def variances(row: Row, baseline: Row) -> tuple[float, float] | None:
    """Of the difference of the averages of two rows: over seeds, and what of it the questions make. None below two common seeds."""
    pairs = [(a, b) for a in row.runs for b in baseline.runs if a.config.seed == b.config.seed]
    differences = [a.results["average"] - b.results["average"] for a, b in pairs]
    of_questions = [((over_questions(a, b, weights_of_average((a, b))) or 0.0) / Z95) ** 2 for a, b in pairs]
    return (stdev(differences) ** 2, mean(of_questions)) if len(differences) > 1 else None


def half_width(seed_variance: float, question_variance: float, seeds: int, times: float) -> float:
    """Of the 95 % interval of a difference, see above."""
    rest = max(0.0, seed_variance - question_variance)
    return t95(seeds - 1) * sqrt((rest + question_variance / times) / seeds)


def power(rows: Sequence[Row]) -> str:
    """The table, in Markdown."""
    baseline, *others = rows
    heading = f"against {baseline.label}, half of the 95 % interval"
    lines = [[heading, *(f"{n} seeds, {m} x" for n in SEEDS for m in TIMES)]]
    for row in others:
        if found := variances(row, baseline):
            cells = (f"{half_width(*found, n, m):.3f}" for n in SEEDS for m in TIMES)
            lines.append([f"{row.label} ({len(row.runs)} seeds)", *cells])
    return markdown_table(lines) + "\n"


# ---------------------------------------------------------------- claims


def compared(claim: str, own: dict[int, float], theirs: dict[int, float], share: float, flops: float) -> dict[str, Any]:
    """Whether what a row has is more than `share` of what the other has, both by seed, and how many of its FLOPs it takes."""
    gaps = [own[seed] - share * theirs[seed] for seed in own if seed in theirs]
    if len(gaps) < 2:
        raise UserError(f"--claims {claim!r}: {len(gaps)} seeds in common, expected 2 or more")
    middle, half = mean(gaps), half_over_seeds(gaps)
    outcome = "holds" if middle > half else "fails" if middle < -half else "not decided"
    scores = {"average": mean(own.values()), "of the other": mean(theirs.values())}
    interval = {"difference": middle, "low": middle - half, "high": middle + half}
    return {"claim": claim, "seeds": len(gaps), **scores, **interval, "FLOPs": flops, "outcome": outcome}


def average(run: Run, without: Sequence[str]) -> float | None:
    """Of a run's types but those, each with its weight in the whole. Raises UserError if it has no such type, or no other."""
    if not without:
        return run.result("average")
    if unknown := [kind for kind in without if kind not in run.types]:
        raise UserError(f"--without: found {', '.join(unknown)}, expected types of {run.path}: {', '.join(run.types)}")
    kept = {kind: weight for kind, weight in weights_of_average((run,)).items() if kind not in without}
    if not kept:
        raise UserError(f"--without: nothing is left of the average of {run.path}")
    return sum(weight * run.results["types"][kind]["score"] for kind, weight in kept.items()) / sum(kept.values())


def claimed(claim: str, rows: Sequence[Row], without: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The outcome of a claim such as "ee_mllm >= 0.98 llava", or the outcomes of "llava looks".

    Args:
        without: types that the average leaves out.

    Raises:
        UserError: it is written otherwise, names a row or type that is not there, or rows with fewer than two seeds in common.
    """
    named = {row.label: row for row in rows}
    if claim.endswith(" looks") and (row := named.get(claim.removesuffix(" looks"))):
        return looks(claim, row)
    found = re.fullmatch(r"(.+) >= ([0-9.]+) (.+)", claim)
    if not found or not {found[1], found[3]} <= set(named):
        expected = f"expected A >= 0.98 B, or A looks, where A and B are of {', '.join(named)}"
        raise UserError(f"--claims {claim!r}: {expected}")
    pair = named[found[1]], named[found[3]]
    own, theirs = (each.by_seed(lambda run: average(run, without)) for each in pair)
    flops = [mean(run.result("prefill_flops") or nan for run in each.runs) for each in pair]
    told = claim + f", without {' and '.join(without)}" * bool(without)
    return [compared(told, own, theirs, float(found[2]), flops[0] / flops[1])]


def looks(claim: str, row: Row) -> list[dict[str, Any]]:
    """Whether a row's scores with the right pictures are above those with exchanged ones, by type; and so with its loss, negated."""

    def of(*keys: str, sign: int = 1) -> dict[int, float]:
        return {seed: sign * value for seed, value in row.by_seed(lambda run: run.result(*keys)).items()}

    kinds = sorted({kind for run in row.runs for kind in run.results["types"]})
    pairs = {kind: (of("types", kind, "score"), of("types", kind, "control")) for kind in kinds}
    pairs["minus the loss"] = of("loss", sign=-1), of("loss_shuffled_images", sign=-1)
    return [compared(f"{claim}: {name}", *pair, 1.0, 1.0) for name, pair in pairs.items()]


def claims(written: Sequence[str], rows: Sequence[Row], out: Path, without: Sequence[str] = ()) -> None:
    """Write claims.csv."""
    found = [one for claim in written for one in claimed(claim, rows, without)]
    values = (one.values() for one in found)
    text = csv_text([[*found[0]], *([f"{x:.4f}" if isinstance(x, float) else x for x in one] for one in values)])
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "claims.csv", text)
    console.print(text)


# ---------------------------------------------------------------- curves


def questions(folder: Path, each: int) -> Path:
    """Write the questions of all difficulties, `each` of a type, and the suite that names them; returns the suite's path."""
    sets = {}
    for parameter, (argument, values, types, *_) in CURVES.items():
        for value in values:
            asked = partial(puzzles.rows_and_scenes, types=types, **{argument: value})

            def rows(split: str, count: int, seed: int, asked: Any = asked) -> Iterable[Any]:
                for row, shown in asked(split, count, seed):
                    yield row, [puzzles.easy.png(puzzles.render(scene)) for scene in shown]

            at = folder / f"{parameter}-{value}"
            puzzles.easy.write(at, "val", each * len(types), seed=1, rows=rows)
            sets[at.name] = {"data": f"{at.name}/val.json", "images": f"{at.name}/images"}
    suite = folder / "suite.yaml"
    suite.write_text(json.dumps({"sets": sets}))
    return suite


def ask(run: Run, suite: Path, folder: Path) -> dict[str, Any]:
    """Scores of a run's checkpoint: set/type -> results."""
    command = [*COMMAND, "validate", str(run.path / "config.yaml"), "--checkpoint", str(run.results["checkpoint"])]
    command += [f"out={folder}", f"eval.suite={suite}", "eval.control=0"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{run.path}: {done.stderr.strip() or done.stdout.strip()[-500:]}")
    types: dict[str, Any] = json.loads((folder / "eval" / "results.json").read_text())["types"]
    asked = [f"{name}-{n}/{kind}" for name, curve in CURVES.items() for n in curve.values for kind in curve.types]
    if missing := [name for name in asked if name not in types]:
        raise UserError(f"{run.path}: no question of {', '.join(missing)} was answered")
    return types


def curves(rows: Sequence[Row], each: int, out: Path) -> None:
    """Ask and write curves.csv and curves.png."""
    written = []
    runs = [(row, run) for row in rows for run in row.runs]
    with tempfile.TemporaryDirectory() as folder, progress("runs", len(runs)) as advance:
        suite = questions(Path(folder), each)
        for number, (row, run) in enumerate(runs):
            for name, found in ask(run, suite, Path(folder) / str(number)).items():
                group, kind = name.split("/")
                parameter, value = group.split("-")
                about = parameter, int(value), kind
                written.append((row.label, run.config.seed, *about, found["questions"], found["score"]))
            advance(1)
    heading = "row", "seed", "parameter", "value", "type", "questions", "score"
    lines = [heading, *((*head, f"{score:.6f}") for *head, score in written)]
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "curves.csv", csv_text(lines))
    write_atomically(out / "curves.md", table_of(written))
    write_atomically(out / "curves.png", draw(written))


def table_of(written: Sequence[tuple[Any, ...]]) -> str:
    """Means over seeds of each type, and over types, in Markdown."""
    scores: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for row, _, parameter, value, kind, _, score in written:
        scores[row, parameter, value, kind].append(score)
    rows = [*dict.fromkeys(line[0] for line in written)]
    lines = ["# Scores over difficulty"]
    for parameter, curve in CURVES.items():
        lines += [
            "",
            f"| {parameter} | | {' | '.join(map(str, curve.values))} |",
            "|---|---|" + "---|" * len(curve.values),
        ]
        groups = {kind: (kind,) for kind in curve.types} | ({"mean": curve.types} if len(curve.types) > 1 else {})
        for name, kinds in groups.items():
            for row in rows:
                means = (mean(mean(scores[row, parameter, value, kind]) for kind in kinds) for value in curve.values)
                lines.append(f"| {name} | {row} | {' | '.join(f'{one:.3f}' for one in means)} |")
    return "\n".join(lines) + "\n"


def draw(written: Sequence[tuple[Any, ...]]) -> bytes:
    """Mean score over the types, for each row: mean over seeds, and from the lowest to the highest seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, grid = plt.subplots(2, 2, figsize=(12, 8.4), sharey=True, layout="constrained")
    for axis, (parameter, curve) in zip(grid.flat, CURVES.items(), strict=True):
        x = [curve.unit * value for value in curve.values]
        for number, row in enumerate(dict.fromkeys(line[0] for line in written)):
            scores: dict[int, dict[int, list[float]]] = {value: defaultdict(list) for value in curve.values}
            for name, seed, about, value, _, _, score in written:
                if (name, about) == (row, parameter):
                    scores[value][seed].append(score)
            means = [[mean(of_types) for of_types in by_seed.values()] for by_seed in scores.values()]
            axis.plot(x, [*map(mean, means)], marker="osD^vP*X<>"[number % 10], color=f"C{number}", label=row)
            axis.fill_between(x, [*map(min, means)], [*map(max, means)], color=f"C{number}", alpha=0.12, linewidth=0)
        chance = mean(1 / len(puzzles.ANSWERS[kind]) for kind in curve.types)
        axis.axhline(chance, color="0.4", linestyle=":", label="guessing")
        axis.set(xlabel=curve.axis, xscale="log", ylim=(0, 1.03), title=", ".join(curve.types))
        axis.set_xticks(x, [f"{value:,}" for value in x])
        axis.minorticks_off()
        axis.spines[["top", "right"]].set_visible(False)
    for axis in grid[:, 0]:
        axis.set_ylabel("score")
    grid[0, 1].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    image = io.BytesIO()
    figure.savefig(image, dpi=110)
    plt.close(figure)
    return image.getvalue()


# ---------------------------------------------------------------- keep


def keep(sweep: Path, rows: Sequence[Row], out: Path) -> None:
    """Copy the report and write the answers."""
    out.mkdir(parents=True, exist_ok=True)
    for file in [*(sweep / "report" / name for name in KEPT), sweep / "search.csv"]:
        if file.is_file():
            shutil.copyfile(file, out / file.name)
    about: dict[tuple[str, str], tuple[str, ...]] = {}
    answers: dict[str, dict[tuple[str, str], str]] = {}
    for row in rows:
        for run in row.runs:
            given = answers[f"{row.label}/{run.config.seed}"] = {}
            for line in (run.path / "eval" / "predictions.jsonl").read_text(encoding="utf-8").splitlines():
                one = json.loads(line)
                key = one["set"], one["key"]
                about[key] = one["type"], one["truth"]
                given[key] = one["answer"]
    lines = [("set", "question", "type", "truth", *answers)]
    lines += [(*key, *about[key], *(given.get(key, "") for given in answers.values())) for key in about]
    write_atomically(out / "predictions.csv.gz", gzip.compress(csv_text(lines).encode(), mtime=0))


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=("power", "claims", "curves", "keep"))
    parser.add_argument("sweep", type=Path, help="its directory")
    parser.add_argument("--out", type=Path, help="folder for what is written")
    parser.add_argument("--rows", nargs="+", help="only these, for curves; the first is the baseline of power")
    parser.add_argument("--seeds", type=int, nargs="+", help="only these")
    parser.add_argument("--without", nargs="+", default=[], help="types that the average leaves out, for claims")
    parser.add_argument("--questions", type=int, default=60, help="of each type and difficulty, for curves")
    parser.add_argument("--claims", nargs="+", default=[], help="such as 'ee_mllm >= 0.98 llava', 'llava looks'")
    args = parser.parse_args(argv)
    if args.out is None and args.do != "power":
        parser.error("--out is needed")
    try:
        rows = [row for row in read_sweep(args.sweep)[0].rows if row.runs]
        if args.rows:
            named = {row.label: row for row in rows}
            if unknown := [label for label in args.rows if label not in named]:
                raise UserError(f"--rows: found {', '.join(unknown)}, expected of {', '.join(named)}")
            rows = [named[label] for label in args.rows]
        if args.seeds:
            rows = [replace(row, runs=[run for run in row.runs if run.config.seed in args.seeds]) for row in rows]
            if not all(row.runs for row in rows):
                raise UserError(f"--seeds: {', '.join(row.label for row in rows if not row.runs)}: no run of these")
        if args.do == "power":
            console.print(table := power(rows))
            if args.out is not None:
                args.out.mkdir(parents=True, exist_ok=True)
                write_atomically(args.out / "power.md", f"# What more seeds would show\n\n{table}")
        elif args.do == "claims":
            claims(args.claims, rows, args.out, args.without)
        elif args.do == "curves":
            curves(rows, args.questions, args.out)
        else:
            keep(args.sweep, rows, args.out)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
