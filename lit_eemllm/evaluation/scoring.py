"""From answers to numbers: scores by set and question type, each beside its controls, and the lines of ``predictions.jsonl``."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from statistics import fmean
from typing import Any

from rich.table import Table

from ..console import console
from .metrics import AnswerMetric
from .questions import Question
from .sets import make_metric


@dataclass
class Answered:
    """A question with its answer.

    Attributes:
        set: name of its set.
        others: the answers with images of other questions.
        score: of the answer, by the metric of the question; set by `score`.
        cut: whether the answer did not end within the new tokens it was allowed.
    """

    set: str
    question: Question
    answer: str
    others: list[str] = field(default_factory=list)
    score: float = 0.0
    cut: bool = False


Round = Sequence[tuple[Question, str]]
"""Questions with the images of others, and the answers."""


COLUMNS = ("score", "control", "constant")


def score(answered: Sequence[Answered], rounds: dict[str, list[Round]], suite: bool) -> dict[str, Any]:
    """Scores of every set, and of every type in it, beside the shuffled-image control and the best constant answer.

    Args:
        answered: of all sets; their scores and answers to other images are written into them.
        rounds: by set, the control passes.
        suite: whether types are told apart by their sets.
    """
    types: dict[str, dict[str, Any]] = {}
    sets: dict[str, dict[str, Any]] = {}
    groups = []
    for name, mine in by(answered, lambda one: one.set).items():
        of_type = by(mine, lambda one: one.question.type)
        labels = {kind: f"{name}/{kind}" if suite else kind for kind in sorted(of_type)}
        if suite and not any(one.question.conversation.type for one in mine):
            labels = {"all": name}
        for kind, label in labels.items():
            passes = [[pair for pair in each if pair[0].type == kind] for each in rounds[name]]
            types[label] = entry(of_type[kind], passes)
        own = [types[label] for label in labels.values()]
        groups.append(own)
        metrics = {row["metric"] for row in own}
        if len(metrics) == 1:
            sets[name] = values(computed(metrics.pop(), [(one.question, one.answer) for one in mine]), mine)
        by_number = {one.question.number: one for one in mine}
        for question, text in (pair for each in rounds[name] for pair in each):
            by_number[question.number].others.append(text)
    averages = {"average" if key == "score" else f"average_{key}": average(groups, key) for key in COLUMNS}
    return {"types": types, **averages, "sets": sets}


def average(groups: Sequence[Sequence[dict[str, Any]]], key: str) -> float | None:
    """Mean over sets of the mean over types; None if a type has no such value."""
    found = [[row[key] for row in own] for own in groups]
    return None if any(None in own for own in found) else fmean(map(fmean, found))


def by(answered: Sequence[Answered], key: Any) -> dict[str, list[Answered]]:
    groups: dict[str, list[Answered]] = defaultdict(list)
    for one in answered:
        groups[key(one)].append(one)
    return groups


def computed(name: str, pairs: Round) -> AnswerMetric:
    metric = make_metric(name)
    metric.update([text for _, text in pairs], [question.truth for question, _ in pairs])
    return metric


def values(metric: AnswerMetric, answered: Sequence[Answered]) -> dict[str, Any]:
    details = metric.details()
    found = {"questions": len(answered), "metric": answered[0].question.metric, "score": metric.compute().item()}
    return found | ({"details": details} if details else {})


def entry(answered: Sequence[Answered], passes: Sequence[Round]) -> dict[str, Any]:
    """Numbers of questions of one type; the control is the mean over its passes."""
    name = answered[0].question.metric or ""
    metric = computed(name, [(one.question, one.answer) for one in answered])
    for one, own in zip(answered, metric.each(), strict=True):
        one.score = own
    controls = [computed(name, pairs).compute().item() for pairs in passes if pairs]
    common = Counter(form for one in answered for form in metric.forms(one.question.truth)).most_common(2)
    tried = {form: computed(name, [(one.question, form) for one in answered]).compute().item() for form, _ in common}
    constant = max(tried, key=tried.__getitem__)  # F1 counts only yes: the most common truth may score 0
    return values(metric, answered) | {
        "control": fmean(controls) if controls else None,
        "constant": tried[constant],
        "constant_answer": constant,
    }


def pick(answered: Sequence[Answered], most: int = 12) -> list[Answered]:
    """Some questions of every type in turn, right or wrong as they come."""
    groups = by(answered, lambda one: f"{one.set}/{one.question.type}").values()
    rounds = (same[i] for i in range(most) for same in groups if i < len(same))
    return list(islice(rounds, most))


def prediction(one: Answered) -> str:
    """A line of ``predictions.jsonl``."""
    question, answers = one.question, one.question.truth.answers
    row = {
        "set": one.set,
        "key": question.conversation.key,
        "type": question.type,
        "images": [picture.name for picture in question.pictures],
        "prompt": question.prompt,
        "answer": one.answer,
        **({"cut": True} if one.cut else {}),
        **({"truth": answers[0]} if len(answers) == 1 else {"answers": answers}),
        "score": one.score,
    }
    return json.dumps(row) + "\n"


def print_scores(results: dict[str, Any], controls: int) -> None:
    """The table; controls: passes with shuffled images that were asked for."""
    table = Table(title="held-out questions")
    for heading in ("type", "questions", "metric", "score", "images shuffled", "best constant"):
        table.add_column(heading, no_wrap=True)
    for name, row in results["types"].items():
        score, control, constant = ("" if row[key] is None else f"{row[key]:.3f}" for key in COLUMNS)
        constant += f" ({row['constant_answer'][:20]!r})"
        table.add_row(name, f"{row['questions']:,}", row["metric"], score, control, constant)
    found = (results["average"], results["average_control"], results["average_constant"])
    table.add_row("average", "", "", *("" if value is None else f"{value:.3f}" for value in found))
    console.print(table)
    alone = [name for name, row in results["types"].items() if row["control"] is None]
    if alone and controls:
        console.print(
            f"without a score for shuffled images: {', '.join(alone[:5])}{', ...' * (len(alone) > 5)}. It takes questions of the type "
            "about other images, as many of them, to take these from"
        )
