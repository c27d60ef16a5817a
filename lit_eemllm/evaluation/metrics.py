"""Scores of generated answers, as torchmetrics: one class a metric, in a registry by name.

A metric scores each answer and the set: `update(answers, truths)`, then `compute()` and `each()`. Sums are exact, so neither
the order of the answers nor their sharing out over ranks changes a digit. Where papers and official code differ, or are
silent, a class says what it follows.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from statistics import fmean  # whose sums are exact
from string import ascii_uppercase

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from ..errors import ConfigError
from .text import caption_words, chosen_letter, edit_distance, normalise, vqa_normalise


@dataclass(frozen=True)
class Truth:
    """What is known of the right answer.

    Attributes:
        answers: the accepted ones; of VQA sets one of each annotator.
        choices: texts of the options, A first; none if there are none.
        type: the question's kind, as its set names it.
        pair: the same for questions that belong together (MME: those about one image).
    """

    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()
    type: str | None = None
    pair: str = ""


METRICS: dict[str, type[AnswerMetric]] = {}


def register_metric(name: str) -> Callable[[type[AnswerMetric]], type[AnswerMetric]]:
    """Class decorator that makes a metric available as ``eval.metric=NAME``. Raises ValueError if taken."""

    def register(cls: type[AnswerMetric]) -> type[AnswerMetric]:
        if name in METRICS:
            raise ValueError(f"metric {name!r} is registered already; registered: {', '.join(METRICS)}")
        METRICS[name] = cls
        return cls

    return register


class AnswerMetric(Metric):
    """The mean of the answers' scores, 0 to 1. A new metric is a subclass with `score`, and what else is not as here."""

    scores: list[Tensor]

    def __init__(self, **options: bool) -> None:
        super().__init__(**options)
        self.add_state("scores", [], dist_reduce_fx="cat")

    def score(self, answer: str, truth: Truth) -> float:
        raise NotImplementedError

    def problem(self, truth: Truth) -> str | None:
        """Why nothing could be scored against this truth, if so."""
        return None

    def forms(self, truth: Truth) -> list[str]:
        """Its answers such that equal ones are equal texts: a common one becomes the constant to compare with."""
        return [normalise(answer) for answer in truth.answers]

    def update(self, answers: Sequence[str], truths: Sequence[Truth]) -> None:
        found = [self.score(answer, truth) for answer, truth in zip(answers, truths, strict=True)]
        self.scores.append(torch.tensor(found, dtype=torch.float64))

    def each(self) -> list[float]:
        """The scores of the single answers, in order."""
        return dim_zero_cat(self.scores).tolist()

    def compute(self) -> Tensor:
        return torch.tensor(fmean(self.each()), dtype=torch.float64)

    def details(self) -> dict[str, float]:
        """Other numbers that are published with the score."""
        return {}


@register_metric("exact_match")
class ExactMatch(AnswerMetric):
    """Equal to an accepted answer after `normalise`."""

    def score(self, answer: str, truth: Truth) -> float:
        return float(normalise(answer) in map(normalise, truth.answers))


@register_metric("multiple_choice")
class MultipleChoice(AnswerMetric):
    """The option that the answer names, see `chosen_letter`, is the right one (ScienceQA, AI2D, SEED).

    The truth is a letter, an option's text, or the option's number from 0 if no option has this number as its text.
    """

    def right(self, truth: Truth) -> str | None:
        given, letters = truth.answers[0].strip(), ascii_uppercase[: len(truth.choices)]
        if given.isdecimal() and given not in truth.choices and int(given) < len(letters):
            return letters[int(given)]
        return chosen_letter(given, truth.choices)

    def score(self, answer: str, truth: Truth) -> float:
        return float(chosen_letter(answer, truth.choices) == self.right(truth))

    def problem(self, truth: Truth) -> str | None:
        if self.right(truth) is None:
            return f"{truth.answers[0]!r} is the letter, text or number of none of its choices {list(truth.choices)}"
        return None

    def forms(self, truth: Truth) -> list[str]:
        return [self.right(truth) or ""]


@register_metric("vqa")
class VQA(AnswerMetric):
    """Soft accuracy of VQA, TextVQA and VizWiz: as many as three of the other annotators said so.

    mean over annotators i of min(1, annotators but i who gave the answer / 3), after `vqa_normalise` (Antol et al. 2015,
    and the official evaluation). Our reading: always normalised, as VLMEvalKit and lmms-eval do; the official code leaves
    the answer as it is where all annotators agree. With fewer than four annotators, by whom the formula never gives 1,
    saying what one of them said is right.
    """

    def score(self, answer: str, truth: Truth) -> float:
        annotators = len(truth.answers)
        same = self.forms(truth).count(vqa_normalise(answer))
        if annotators < 4:
            return float(same > 0)
        return (same * min(1, (same - 1) / 3) + (annotators - same) * min(1, same / 3)) / annotators

    def forms(self, truth: Truth) -> list[str]:
        return [vqa_normalise(answer) for answer in truth.answers]


@register_metric("relaxed_accuracy")
class RelaxedAccuracy(AnswerMetric):
    """ChartQA: a number within 5 % of the truth (Masry et al. 2022), any other answer equal but for case.

    As in pix2struct's code, which the field uses: "12%" is 0.12, "1,000" is no number, and 0 must be met exactly.
    """

    def score(self, answer: str, truth: Truth) -> float:
        return float(any(self.relaxed(answer.strip(), true.strip()) for true in truth.answers))

    @staticmethod
    def relaxed(answer: str, true: str) -> bool:
        said, expected = number(answer), number(true)
        if said is None or not expected:
            return answer.lower() == true.lower()
        return abs(said - expected) / abs(expected) <= 0.05


def number(text: str) -> float | None:
    try:
        value = float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


@register_metric("anls")
class ANLS(AnswerMetric):
    """DocVQA's average normalised Levenshtein similarity: 1 - distance / length of the longer, 0 if that is below 0.5.

    Biten et al. 2019, equation 1, without case and superfluous white space as in the official script. This keeps a
    similarity of exactly 0.5 (the paper does not) and takes lengths before white space is reduced.
    """

    def score(self, answer: str, truth: Truth) -> float:
        best = max(self.similarity(answer, true) for true in truth.answers)
        return best if best >= 0.5 else 0.0

    @staticmethod
    def similarity(answer: str, true: str) -> float:
        longest = max(len(answer), len(true))
        distance = edit_distance(*(" ".join(text.lower().split()) for text in (answer, true)))
        return 1 - distance / longest if longest else 1.0


@register_metric("ocrbench")
class OCRBench(AnswerMetric):
    """The answer contains an accepted one, but for case; handwritten mathematics with case and without white space."""

    MATHS = ("Handwritten Mathematical Expression Recognition", "HME100k")

    def score(self, answer: str, truth: Truth) -> float:
        plain = self.formula if truth.type in self.MATHS else self.line
        return float(any(plain(true) in plain(answer) for true in truth.answers))

    @staticmethod
    def line(text: str) -> str:
        return text.lower().strip().replace("\n", " ")

    @staticmethod
    def formula(text: str) -> str:
        return text.strip().replace("\n", " ").replace(" ", "")

    def forms(self, truth: Truth) -> list[str]:
        return list(truth.answers)


class YesNo(AnswerMetric):
    """Questions to be answered by yes or no."""

    def said(self, answer: str) -> str:
        """yes, no, or neither: other."""
        raise NotImplementedError

    def score(self, answer: str, truth: Truth) -> float:
        return float(self.said(answer) == normalise(truth.answers[0]))

    def problem(self, truth: Truth) -> str | None:
        found = truth.answers[0]
        return None if normalise(found) in ("yes", "no") else f"the answer is {found[:80]!r}, expected yes or no"


@register_metric("mme")
class MME(YesNo):
    """Mean of accuracy and accuracy+, the share of images of which all questions are answered right, over the types.

    MME's own points are 100 (accuracy + accuracy+) a type, summed: 200 times the score, times the number of types. As in the
    official script, an answer says yes or no if its first four characters do.
    """

    types: list[Tensor]
    pairs: list[Tensor]

    def __init__(self, **options: bool) -> None:
        super().__init__(**options)
        self.add_state("types", [], dist_reduce_fx="cat")
        self.add_state("pairs", [], dist_reduce_fx="cat")

    def said(self, answer: str) -> str:
        begins = answer.lower().strip()[:4]
        return "yes" if "yes" in begins else "no" if "no" in begins else "other"

    def update(self, answers: Sequence[str], truths: Sequence[Truth]) -> None:
        super().update(answers, truths)
        self.types.append(torch.tensor([short_hash(truth.type or "") for truth in truths]))
        self.pairs.append(torch.tensor([short_hash(truth.pair) for truth in truths]))

    def accuracies(self) -> tuple[float, float]:
        """Accuracy and accuracy+, each the mean over types."""
        by_type: dict[int, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        rows = zip(dim_zero_cat(self.types).tolist(), dim_zero_cat(self.pairs).tolist(), self.each(), strict=True)
        for kind, pair, score in rows:
            by_type[kind][pair].append(score)
        plain = [fmean([score for scores in pairs.values() for score in scores]) for pairs in by_type.values()]
        return fmean(plain), fmean([fmean([min(scores) for scores in pairs.values()]) for pairs in by_type.values()])

    def compute(self) -> Tensor:
        return torch.tensor(fmean(self.accuracies()), dtype=torch.float64)

    def details(self) -> dict[str, float]:
        accuracy, plus = self.accuracies()
        points = 100 * (accuracy + plus) * len(dim_zero_cat(self.types).unique())
        return {"accuracy": accuracy, "accuracy_plus": plus, "points": points}


def short_hash(text: str) -> int:
    return int.from_bytes(sha256(text.encode()).digest()[:8], "big", signed=True)


@register_metric("pope")
class POPE(YesNo):
    """F1 of saying yes. As in the official script, whose first sentence has no "no" or "not" says yes."""

    yes: list[Tensor]

    def __init__(self, **options: bool) -> None:
        super().__init__(**options)
        self.add_state("yes", [], dist_reduce_fx="cat")

    def said(self, answer: str) -> str:
        words = answer.split(".")[0].replace(",", "").split()
        return "no" if {"No", "no", "not"} & set(words) else "yes"

    def update(self, answers: Sequence[str], truths: Sequence[Truth]) -> None:
        super().update(answers, truths)
        self.yes.append(torch.tensor([self.said(answer) == "yes" for answer in answers]))

    def compute(self) -> Tensor:
        return torch.tensor(self.details()["f1"], dtype=torch.float64)

    def details(self) -> dict[str, float]:
        right, yes = dim_zero_cat(self.scores).bool(), dim_zero_cat(self.yes)
        hits, alarms, misses = (int(x.sum()) for x in (right & yes, ~right & yes, ~right & ~yes))
        return {
            "f1": 2 * hits / max(1, 2 * hits + alarms + misses),
            "accuracy": fmean(self.each()),
            "precision": hits / max(1, hits + alarms),
            "recall": hits / max(1, hits + misses),
            "yes": int(yes.sum()) / len(yes),
        }


@register_metric("cider")
class CIDEr(AnswerMetric):
    """CIDEr-D of captions (Vedantam et al. 2015) by pycocoevalcap, in its unit: 1.0 is what tables print as 100.

    Words are cut by `caption_words`, not by the Java tokeniser of published numbers. How rare a word is, is learnt from all
    references of the set, so an answer has no score by itself, and a set of one question scores 0.
    """

    captions: list[Tensor]  # answers and references, as UTF-8 of JSON lines: text that ranks can exchange

    def __init__(self, **options: bool) -> None:
        super().__init__(**options)
        self.add_state("captions", [], dist_reduce_fx="cat")
        try:
            from pycocoevalcap.cider.cider import Cider
        except ImportError as error:
            found = f"metric cider needs pycocoevalcap ({error})"
            raise ConfigError(f"{found}; install it with: pip install 'lit_eemllm[eval]'") from error
        self.scorer = Cider()

    def update(self, answers: Sequence[str], truths: Sequence[Truth]) -> None:
        rows = [json.dumps([answer, truth.answers]) + "\n" for answer, truth in zip(answers, truths, strict=True)]
        self.captions.append(torch.frombuffer(bytearray("".join(rows).encode()), dtype=torch.uint8))

    def each(self) -> list[float]:
        lines = dim_zero_cat(self.captions).cpu().numpy().tobytes().decode().splitlines()
        rows = dict(enumerate(map(json.loads, lines)))
        answers = {i: [caption_words(answer)] for i, (answer, _) in rows.items()}
        references = {i: [caption_words(text) for text in texts] for i, (_, texts) in rows.items()}
        return self.scorer.compute_score(references, answers)[1].tolist()
