"""The sentences of a report: what its numbers mean, what cannot be compared, what is missing, what was searched."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

from .difference import Difference, difference, t95
from .runs import Comparison, Row
from .tables import asked, types_of

UNNAMED = "a machine that they do not name, as runs of earlier versions do not"


def caption(compared: Comparison) -> list[str]:
    """What the numbers mean that are there."""
    rows = compared.rows
    runs = [run for row in rows for run in row.runs]
    sentences = []
    if types := types_of(rows):
        controlled = any(run.result("types", name, "control") is not None for run in runs for name in types)
        brackets = "; in brackets the same model with images shuffled among the questions of the type"
        sentences.append(f"{metrics(rows)} per question type{brackets if controlled else ''}.")
    if len(types) > 1:
        sentences.append("The average weighs sets alike, and in each its question types.")
    if any(len(row.runs) > 1 for row in rows):
        sentences.append("± is the standard deviation over seeds.")
    sentences += about_differences(rows)
    if any(run.result("prefill_flops") is not None for run in runs):
        sentences.append("FLOPs: decoder layers, prefill of a mean prompt.")
    if any(run.result("prefill_seconds") is not None for run in runs):
        sentences.append("Prefill time and cache are of up to 32 prompts in one batch, vision encoder included.")
    if any(run.curve for run in runs):
        sentences.append("Step time and peak memory are of training, in the last stage of a run.")
    if any(run.curve or run.result("prefill_seconds") is not None for run in runs) and len(rows) > 1:
        sentences.append("Times compare only if they were taken on one machine with nothing else running.")
    return sentences


def machines(rows: list[Row]) -> list[str]:
    """Where runs were trained, in their last stage, and where they were evaluated, with their number."""
    trained, evaluated = Counter[str](), Counter[str]()
    for run in (run for row in rows for run in row.runs):
        trained.update(run.trained_on or {UNNAMED} if run.curve else ())
        evaluated[run.evaluated_on or UNNAMED] += 1
    return [
        f"{what} on {machine[:300]}: {count} run{'s' * (count > 1)}"
        for what, counts in (("trained", trained), ("evaluated", evaluated))
        for machine, count in sorted(counts.items(), key=lambda one: (-one[1], one[0]))
    ]


def metrics(rows: list[Row]) -> str:
    """Names of the scores; of which types, if there are several."""
    types: dict[str, dict[str, None]] = defaultdict(dict)
    for row in rows:
        for run in row.runs:
            for name, kind in run.types.items():
                types[str(kind.get("metric") or "score").replace("_", " ")][name] = None
    if len(types) == 1:
        return next(iter(types)).capitalize()
    return "Scores (" + "; ".join(f"{metric}: {', '.join(names)}" for metric, names in types.items()) + ")"


def about_differences(rows: list[Row]) -> list[str]:
    """How they were paired, and what their intervals cover; nothing if there is no baseline."""
    found: dict[str, list[tuple[Row, Difference]]] = defaultdict(list)
    missing = []
    for row in rows:
        if row.baseline in (None, row):
            continue
        if to := difference(row, row.baseline):
            found[to.over].append((row, to))
        elif row.runs:
            missing.append(row)
    labels = list(dict.fromkeys(row.baseline.label for row in rows if row.baseline is not None))
    base = ", ".join(labels) + " (each for its group)" * (len(labels) > 1)
    sentences = []
    if pairs := found["seeds"]:
        counts = sorted({to.count for _, to in pairs})
        wide = ", ".join(f"{count} seeds: t = {t95(count - 1):.2f}" for count in counts)
        sentences.append(
            f"Difference to {base}: mean over the seeds in common, paired by seed, and in brackets the 95 % "
            f"interval of Student's t. It covers what the seed changes, not the choice of questions; few seeds make it "
            f"wide ({wide})."
        )
    if pairs := found["questions"]:
        who = ", ".join(row.label for row, _ in pairs)
        sentences.append(
            f"Difference of {who} to {base}: one seed in common, paired by question, and in brackets the 95 % "
            f"interval of the normal approximation. It covers the choice of questions, not what another seed would give; "
            f"questions about one image count as independent, so it may be too narrow."
        )
    if unknown := [row.label for pairs in found.values() for row, to in pairs if to.half is None]:
        sentences.append(
            f"No interval for {', '.join(unknown)}: all pairs differ alike, or a seed was run twice, or scores by "
            f"question are not saved or do not have the score as their mean."
        )
    if len(found["seeds"] + found["questions"]) > 1:
        sentences.append("Each interval holds for itself: among many, some miss by chance.")
    if missing:
        who = ", ".join(row.label for row in missing)
        sentences.append(f"No difference for {who}: no seed in common with {base}, or other questions.")
    return sentences


def incomparable(rows: list[Row]) -> str:
    """A sentence if the rows were not evaluated on the same data and questions, else nothing."""
    titles: dict[tuple[str, str], dict[str, None]] = defaultdict(dict)
    data, questions, hashes = set(), set(), set()
    for row in rows:
        for run in row.runs:
            titles[run.data, f"{asked(run) or 0:,.0f} questions"][row.title] = None
            data.add(Path(run.data).resolve())
            questions.add(run.asked)
            hashes.add(run.questions_hash)
    if len(data) < 2 and len(questions - {()}) < 2 and len(hashes - {None}) < 2:
        return ""
    found = "; ".join(f"{', '.join(who)}: {val}, {count}" for (val, count), who in titles.items())
    found += "; the questions themselves differ" * (len(titles) == 1)
    what = "Scores and validation loss" if len(data) > 1 else "Scores"
    return f"{what} of these rows cannot be compared, they come from different data or questions: {found}."


def incomplete(rows: list[Row]) -> str:
    """A sentence if questions could not be asked, or answers were cut off; else nothing."""
    found = []
    for row in rows:
        for name, what in (("skipped", "questions not asked"), ("cut", "answers cut off by max_new_tokens")):
            counts = [(run, run.results.get(name)) for run in row.runs]
            if total := sum(run.result(name, key) or 0 for run, of in counts if isinstance(of, dict) for key in of):
                found.append(f"{row.title}: {total:,.0f} {what}")
    return f"Not all is as it was meant; eval/results.json of the runs says why: {'; '.join(found)}." if found else ""


def search_heading(compared: Comparison) -> str:
    """How it was searched."""
    return f"Searched before the runs{f' ({compared.search})' * bool(compared.search)}; the chosen values are bold:"


def searches(compared: Comparison, escape: Callable[[str], str], bold: str) -> list[str]:
    """A line for each cell of a search: what was tried, the chosen value bold, and whether it ends the range.

    A choice at the end of at least three numbers suggests that a better one lies beyond.

    Args:
        escape: makes text safe for the document.
        bold: marks what stands for ``{}`` in it.
    """
    cells: dict[str, list[dict[str, str]]] = defaultdict(list)
    for line in compared.searched:
        cells[line["cell"]].append(line)
    found = []
    for cell, lines in cells.items():
        keys = [key for key in lines[0] if key not in ("cell", "score", "chosen")]
        chosen = [line["chosen"].strip().lower() not in ("", "0", "no", "false") for line in lines]
        tried = [f"{', '.join(f'{key}={line[key]}' for key in keys)}: {line['score']}" for line in lines]
        ends = any(at_end([line[key] for line in lines], chosen) for key in keys)
        shown = [bold.format(escape(t)) if best else escape(t) for t, best in zip(tried, chosen, strict=True)]
        found.append(f"{escape(cell)}: {'; '.join(shown)}{' (chosen at the end of the range)' * ends}")
    return found


def at_end(values: list[str], chosen: list[bool]) -> bool:
    """The chosen value is the smallest or largest of at least three numbers."""
    try:
        numbers = [float(value) for value in values]
    except ValueError:
        return False
    best = [number for number, choice in zip(numbers, chosen, strict=True) if choice]
    return len(set(numbers)) > 2 and any(number in (min(numbers), max(numbers)) for number in best)
