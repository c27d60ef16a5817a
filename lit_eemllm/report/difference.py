"""How much better a row is than the baseline, and how sure that is.

With two or more seeds in common the runs are paired by seed, and the 95 % interval is Student's t over the paired
differences: it covers what changes with the seed. With one seed in common the two runs are paired by question, and the
interval is the normal approximation: it covers the choice of questions, and says nothing of another seed.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, nan, sqrt
from pathlib import Path
from statistics import mean, stdev

from .runs import Row, Run

Z95 = 1.959964
TOLERANCE = 1e-4  # of scores that are the same; they are computed in float32
NO_WIDTH = 1e-9  # an interval of pairs that all differ alike: it would claim to be sure
_T95 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)  # of 1 to 10 degrees


def deviation(values: Sequence[float]) -> float:
    """Sample standard deviation; of what is not finite it is not a number."""
    return stdev(values) if all(map(isfinite, values)) else nan


@dataclass(frozen=True)
class Difference:
    """A mean difference and the half width of its 95 % interval, None if that is unknown.

    Attributes:
        over: what the interval covers, ``seeds`` or ``questions``.
        count: how many of them.
    """

    mean: float
    half: float | None
    over: str
    count: int

    def text(self, form: str = "{:+.3f}") -> str:
        if self.half is None:
            return form.format(self.mean)
        low, high = (form.format(self.mean + sign * self.half) for sign in (-1, 1))
        return f"{form.format(self.mean)} ({low} to {high})"


def t95(degrees: int) -> float:
    """Quantile 0.975 of Student's t. Beyond the table the expansion of Abramowitz and Stegun, 26.7.5, with its numbers put in."""
    if degrees <= len(_T95):
        return _T95[degrees - 1]
    return Z95 + 2.37227 / degrees + 2.82250 / degrees**2 + 2.55585 / degrees**3


def half_over_seeds(gaps: Sequence[float]) -> float:
    """Half width of the 95 % interval of the mean of two or more differences, one of each seed."""
    return t95(len(gaps) - 1) * deviation(gaps) / sqrt(len(gaps))


def difference(row: Row, baseline: Row, name: str | None = None) -> Difference | None:
    """Of the average, or of one question type. None without a common seed, without scores, or on other questions."""
    keys = ("average",) if name is None else ("types", name, "score")
    pairs = [(a, b) for a in row.runs for b in baseline.runs if a.config.seed == b.config.seed]
    if not all(comparable(a, b) for a, b in pairs):
        return None
    own, other = (each.by_seed(lambda run: run.result(*keys)) for each in (row, baseline))
    seeds = [seed for seed in own if seed in other]
    if not seeds:
        return None
    gaps = [own[seed] - other[seed] for seed in seeds]
    if len(gaps) > 1:
        half = half_over_seeds(gaps)
        return Difference(mean(gaps), half if half > NO_WIDTH else None, "seeds", len(gaps))
    (a, b), *more = (pair for pair in pairs if pair[0].config.seed == seeds[0])
    weights = weights_of_average((a, b)) if name is None else {name: 1.0}
    questions = sum(a.result("types", each, "questions") or 0 for each in weights)
    interval = None if more else over_questions(a, b, weights)
    return Difference(gaps[0], interval, "questions", int(questions))


def comparable(a: Run, b: Run) -> bool:
    """Both were asked the same questions of the same data, as far as they say."""
    hashes = {a.questions_hash, b.questions_hash} - {None}
    return a.asked == b.asked and Path(a.data).resolve() == Path(b.data).resolve() and len(hashes) < 2


def weights_of_average(runs: Sequence[Run]) -> dict[str, float]:
    """Question type -> its weight in the runs' averages: equal, or first equal within each set ``set/type``; else empty."""
    types = runs[0].types
    sets = Counter(name.partition("/")[0] for name in types)
    for weights in (
        {name: 1 / len(types) for name in types},
        {name: 1 / len(sets) / sets[name.partition("/")[0]] for name in types},
    ):
        sums = [sum(weights[name] * (run.result("types", name, "score") or 0) for name in types) for run in runs]
        if all(abs(total - (run.result("average") or 0)) < TOLERANCE for total, run in zip(sums, runs, strict=True)):
            return weights
    return {}


def over_questions(a: Run, b: Run, weights: dict[str, float]) -> float | None:
    """Half width of the interval of a weighted mean over question types, paired by question.

    The types' means are independent, so variances of the paired differences add: sum of w_k^2 s_k^2 / n_k. None where a
    type's score is no mean over its questions (F1, say), or is unknown by question, or where all pairs differ alike.
    """
    scores: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for question, (set_, type_, score) in a.predictions.items():
        name = next((name for name in (f"{set_}/{type_}", type_, set_) if name in weights), None)
        if name is not None and question in b.predictions:
            scores[name].append((score, b.predictions[question][-1]))
    total = 0.0
    for name, weight in weights.items():
        if len(pairs := scores[name]) < 2:
            return None
        for run, found in zip((a, b), zip(*pairs, strict=True), strict=True):
            if abs(mean(found) - (run.result("types", name, "score") or 0.0)) > TOLERANCE:
                return None
        total += weight**2 * deviation([x - y for x, y in pairs]) ** 2 / len(pairs)
    half = Z95 * sqrt(total)
    return half if half > NO_WIDTH else None
