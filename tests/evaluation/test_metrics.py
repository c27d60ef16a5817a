"""Scores of answers against published examples, others' code, numbers worked out by hand, and slow readings of the formulas."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from functools import cache, partial
from itertools import product
from pathlib import Path

import pytest
import torch

from lit_eemllm.errors import ConfigError
from lit_eemllm.evaluation.metrics import METRICS, AnswerMetric, Truth, register_metric
from lit_eemllm.evaluation.text import caption_words, chosen_letter, edit_distance, vqa_normalise


def truth(*answers, **more):
    return Truth(answers, **more)


def scored(name, answers, truths):
    """The set's score and that of each answer, given in two parts."""
    metric = METRICS[name]()
    metric.update(answers[:1], truths[:1])
    metric.update(answers[1:], truths[1:])
    return metric.compute().item(), metric.each()


# Rows of pix2struct's metrics_test.py: answer, truth, and what ANLS and relaxed accuracy give. Its totals are 47.5 % and 62.5 %.
PIX2STRUCT = [
    ("abc", "abc", 1, 1), ("abc", "Abc", 1, 1), ("Abc", "abc", 1, 1), ("100%", "96%", 0, 1), ("100%", "94%", 0, 0),
    ("100%", "0.96", 0, 1), ("100%", "0.94", 0, 0), ("Don't", "Won't", 0.8, 0),
]  # fmt: skip


@pytest.mark.parametrize(("name", "column", "total"), [("anls", 2, 0.475), ("relaxed_accuracy", 3, 0.625)])
def test_published_examples(name, column, total):
    found, each = scored(name, [row[0] for row in PIX2STRUCT], [truth(row[1]) for row in PIX2STRUCT])
    assert each == [row[column] for row in PIX2STRUCT]
    assert found == pytest.approx(total)


def test_exact_match():
    answers, truths = (
        ["Red.", " top  left", "3", "blue"],
        [truth("red"), truth("top left"), truth("4"), truth("x", "Blue")],
    )
    assert scored("exact_match", answers, truths) == (0.75, [1, 1, 0, 1])


# --- multiple choice

CHOICES = ("a red cat", "blue", "New York", "dark blue", "Vitamin C")
FORMS = {  # of naming an option in an answer; {l} and {t} are its letter and text
    "{l}", "{l}.", "({l})", "{l})", "**{l}**", "[{l}]", "{l}. {t}", "{l}: {t}", "({l}) {t}", "({l}) because", "{l}, since it is",
    "The answer is {l}.", "The correct answer is **{l}**. Look:", "Answer: {l}", "answer is ({l})", "Option {l} is correct",
    "I think it is {l}.", "A cat? No: {l}", "It must be {l}", "{t}", "{t}.", "It is {t}, I think.", "The answer is {t}",
}  # fmt: skip


@pytest.mark.parametrize("form", sorted(FORMS))
def test_ways_to_name_an_option(form):
    for letter, text in zip("ABCDE", CHOICES, strict=True):
        assert chosen_letter(form.format(l=letter, t=text), CHOICES) == letter
        if "{t}" not in form:
            assert chosen_letter(form.format(l=letter), ()) == letter
    assert chosen_letter(form.format(l="F", t="green"), CHOICES) is None


@pytest.mark.parametrize(
    "answer",
    ["", "Sorry, I cannot help with that.", "I do not know.", "A or B", "Neither A nor B", "blue or New York", "None of these",
     "A dog is there", "A blue and New York one", "I see it", "Bob's", "F", "the answer is a dog", "FAILED"],
)  # fmt: skip
def test_answers_that_name_no_single_option(answer):
    assert chosen_letter(answer, CHOICES) is None


def test_letters_and_texts_that_look_alike():
    assert chosen_letter("A", ["B", "A"]) == "A"  # a letter, as the prompt asks for one
    assert chosen_letter("C. elegans", ["a fly", "C. elegans", "a worm"]) == "B"
    assert chosen_letter("It shows Vitamin C", CHOICES) == "E"
    assert chosen_letter("a dark blue one", CHOICES) == "D"
    assert chosen_letter("bluebell", CHOICES) is None
    assert chosen_letter("It must be B, as this is not New York", CHOICES) == "B"
    assert chosen_letter("Of A and C: the answer is B", CHOICES) == "B"
    assert chosen_letter("D.C.", CHOICES) is None
    assert chosen_letter("b", CHOICES) == chosen_letter("(b) blue", CHOICES) == "B"
    assert chosen_letter("yes", ["yes", "yes"]) is None


def test_multiple_choice_knows_the_truth_in_every_form():
    metric = METRICS["multiple_choice"]()
    for given in ("B", "b", "(B)", "blue", "1", "The answer is B."):
        assert metric.score("B. blue", truth(given, choices=CHOICES)) == 1
        assert metric.score("A", truth(given, choices=CHOICES)) == 0
        assert metric.problem(truth(given, choices=CHOICES)) is None
    assert metric.score("A", truth("1", choices=("1", "0"))) == 1  # an option's text before a number
    assert metric.score("D", truth("D")) == 1
    for none in ("green", str(len(CHOICES)), "-1"):
        assert "none of its choices" in metric.problem(truth(none, choices=CHOICES))
    assert metric.forms(truth("blue", choices=CHOICES)) == ["B"]


# --- VQA


def leave_one_out(answer, annotators):
    """Antol et al. 2015: the mean over annotators of min(1, how many of the others said so / 3). No normalisation."""
    accuracies = []
    for i in range(len(annotators)):
        others = annotators[:i] + annotators[i + 1 :]
        accuracies.append(min(1, sum(other == answer for other in others) / 3))
    return sum(accuracies) / len(accuracies)


def test_vqa_accuracy_is_the_leave_one_out_mean():
    """The published values are 0, 0.3, 0.6, 0.9 and 1 for none, one, two, three and more of ten."""
    metric = METRICS["vqa"]()
    values = [metric.score("yes", truth(*["yes"] * n, *["no"] * (10 - n))) for n in range(11)]
    assert values == pytest.approx([0, 0.3, 0.6, 0.9] + [1] * 7)
    rng = random.Random(0)
    for _ in range(300):
        annotators = [rng.choice("abcd") * 2 for _ in range(rng.randint(4, 12))]
        answer = rng.choice("abcde") * 2
        assert metric.score(answer, truth(*annotators)) == pytest.approx(leave_one_out(answer, annotators))
    assert metric.score("Two.", truth("2")) == 1 and metric.score("3", truth("2", "x")) == 0  # too few for the formula


@pytest.mark.parametrize(
    ("said", "bare"),
    [("The Two dogs.", "2 dogs"), ("a dont", "don't"), ("Isnt it?", "isn't it"), ("1,000", "1000"), ("3.5", "3.5"),
     ("U.S. Army", "us army"), ("black/white", "black white"), ("black / white", "black white"), ("well-known", "well known"),
     ("none", "0"), ("TEN\nmen", "10 men"), ("an apple, a pear", "apple pear"), ("apple,pear", "apple pear"), ("theyd've", "they'd've"),
     ("red-1,000", "red1000"), ("somebody'd", "somebodyd"), ("  the  ", ""), ("12:30 p.m.", "12:30 pm"), ("ow's'at", "'ow's'at")],
)  # fmt: skip
def test_vqa_normalisation_by_hand(said, bare):
    assert vqa_normalise(said) == bare


# --- ChartQA, DocVQA, OCRBench


@pytest.mark.parametrize(
    ("answer", "true", "right"),
    [("95", "100", 1), ("94.9", "100", 0), ("105", "100", 1), ("105.1", "100", 0), ("-98", "-100", 1), ("98", "-100", 0),
     ("0", "0", 1), ("0.0", "0", 0), ("0.01", "0", 0), ("12%", "0.12", 1), ("12", "12%", 0), ("1,000", "1000", 0), ("Yes ", "yes", 1),
     ("yes, it is", "yes", 0), ("nan", "5", 0), ("inf", "inf", 1), ("1e2", "100", 1)],
)  # fmt: skip
def test_relaxed_accuracy_by_hand(answer, true, right):
    metric = METRICS["relaxed_accuracy"]()
    assert metric.score(answer, truth(true)) == right
    assert metric.score(answer, truth("other", true)) == right


@cache
def levenshtein(a, b):
    """The definition, recursively."""
    if not a or not b:
        return len(a) + len(b)
    return min(levenshtein(a[1:], b) + 1, levenshtein(a, b[1:]) + 1, levenshtein(a[1:], b[1:]) + (a[0] != b[0]))


def test_edit_distance_is_levenshteins():
    rng = random.Random(0)
    for _ in range(200):
        a, b = ("".join(rng.choice("abc") for _ in range(rng.randint(0, 7))) for _ in range(2))
        assert edit_distance(a, b) == levenshtein(a, b)
    long = "".join(rng.choice("abc") for _ in range(300))
    assert edit_distance(long, long[150:] + "xyz") == 153  # torchmetrics' beam loses its way here
    assert edit_distance("kitten", "sitting") == 3


def test_anls_by_hand():
    """1 - distance / length, the best truth, nothing below a half, which itself counts."""
    answers = ["ITC  limited", "abcd", "abcd", "abcd", "", "abcdefgh", "abcdef"]
    truths = [truth("x", "itc limited"), truth("abxx"), truth("axxx"), truth("axxx", "abcx"), truth("abc"), truth("abcdefgx"),
              truth("abc")]  # fmt: skip
    _, each = scored("anls", answers, truths)
    assert each == pytest.approx([1, 0.5, 0, 0.75, 0, 7 / 8, 0.5])


def test_ocrbench_contains_an_answer():
    maths = {"type": "Handwritten Mathematical Expression Recognition"}
    rows = [("It says CENTRE.", truth("centre"), 1), ("centr", truth("centre"), 0), ("a\nb", truth("x", "A b"), 1),
            ("the value is 5", truth("12", "5"), 1), ("so x ^ 2\n+ 1 = 0", truth("x^2+1", **maths), 1),
            ("X^2", truth("x^2", **maths), 0), ("x ^ 2", truth("x^2"), 0), ("x^2", truth(" x ^ 2 ", **maths), 1)]  # fmt: skip
    found, each = scored("ocrbench", [row[0] for row in rows], [row[1] for row in rows])
    assert each == [row[2] for row in rows] and found == 5 / 8


# --- yes and no


def test_mme_by_hand():
    """Two types. Type a: image 1 both right, image 2 one right: accuracy 3/4, accuracy+ 1/2. Type b: one image, none right."""
    rows = [("a", "1", "Yes", "Yes, it is"), ("a", "1", "No", "no"), ("a", "2", "Yes", "yes."), ("a", "2", "No", "The answer is no"),
            ("b", "1", "No", "Yes"), ("b", "1", "Yes", "  NO")]  # fmt: skip
    answers, truths = [row[3] for row in rows], [truth(row[2], type=row[0], pair=row[1]) for row in rows]
    found, each = scored("mme", answers, truths)
    assert each == [1, 1, 1, 0, 0, 0]
    assert found == pytest.approx(((3 / 4 + 1 / 2) / 2 + 0) / 2)
    metric = METRICS["mme"]()
    metric.update(answers, truths)
    assert metric.details() == pytest.approx(
        {"accuracy": 3 / 8, "accuracy_plus": 1 / 4, "points": 100 * (3 / 4 + 1 / 2)}
    )
    assert "expected yes or no" in metric.problem(truth("maybe")) and metric.problem(truth("Yes.")) is None


def test_pope_by_hand():
    """Truths 3 yes, 3 no. Said yes: two of the former, one of the latter; what denies nothing says yes."""
    answers = ["Yes, there is.", "A dog. No cat.", "No", "no", "There is not", "There is a cat"]
    truths = [truth(word) for word in ("yes", "yes", "yes", "no", "No.", "no")]
    found, each = scored("pope", answers, truths)
    assert each == [1, 1, 0, 1, 1, 0]
    metric = METRICS["pope"]()
    metric.update(answers, truths)
    assert found == pytest.approx(2 / 3)
    assert metric.details() == pytest.approx(
        {"f1": 2 / 3, "accuracy": 4 / 6, "precision": 2 / 3, "recall": 2 / 3, "yes": 3 / 6}
    )
    lone = METRICS["pope"]()
    lone.update(["no"], [truth("no")])
    assert lone.compute().item() == 0


def test_f1_is_that_of_torchmetrics():
    from torchmetrics.functional.classification import binary_f1_score, binary_precision, binary_recall

    rng = random.Random(0)
    said, true = ([rng.random() < 0.4 for _ in range(200)] for _ in range(2))
    metric = METRICS["pope"]()
    metric.update(["yes" if x else "no" for x in said], [truth("yes" if x else "no") for x in true])
    pair = torch.tensor(said).int(), torch.tensor(true).int()
    for name, other in (("f1", binary_f1_score), ("precision", binary_precision), ("recall", binary_recall)):
        assert metric.details()[name] == pytest.approx(other(*pair).item())


# --- others' code, whose scores tools/metrics_reference.py has written down

REFERENCE = json.loads((Path(__file__).parents[1] / "fixtures" / "metrics_reference.json").read_text(encoding="utf-8"))


# On purpose otherwise: {section: {function: {why: answers}}}
TASKS, KIT = "lmms_eval.tasks", "vlmeval.dataset.utils"


def references(section):
    return [name for name in REFERENCE["sections"][section]["columns"] if "." in name]


def differing(section, reference, ours, differ=lambda theirs, own: own != pytest.approx(theirs, abs=1e-9)):
    """Answers of which `ours`, of a row's inputs, says other than a reference."""
    columns, rows = REFERENCE["sections"][section].values()
    return {row[0] for row in rows if differ(row[columns.index(reference)], ours(*row))}


def on_purpose(section, reference):
    return {answer for same in REFERENCE["on_purpose"].get(section, {}).get(reference, {}).values() for answer in same}


def scores(name, answer, answers, kind=None, *_):
    answers = [answers] if isinstance(answers, str) else answers
    return METRICS[name]().score(answer, truth(*answers, type=kind if name == "ocrbench" else None))


SCORED = ("vqa", "ocrbench", "relaxed_accuracy", "anls")


@pytest.mark.parametrize(("section", "reference"), [(name, other) for name in SCORED for other in references(name)])
def test_others_score_alike(section, reference):
    assert differing(section, reference, partial(scores, section)) == on_purpose(section, reference)


@pytest.mark.parametrize("reference", references("vqa_normalise"))
def test_others_normalise_alike(reference):
    found = differing("vqa_normalise", reference, lambda answer, *_: vqa_normalise(answer))
    assert found == on_purpose("vqa_normalise", reference)


@pytest.mark.parametrize(
    ("metric", "reference"), [("mme", f"{TASKS}.mme.utils.parse_pred_ans"), ("pope", "llava.eval.eval_pope")]
)
def test_others_read_yes_and_no_alike(metric, reference):
    found = differing("yes_or_no", reference, lambda answer, *_: METRICS[metric]().said(answer))
    assert found == on_purpose("yes_or_no", reference)


@pytest.mark.parametrize("reference", references("multiple_choice"))
def test_the_letter_that_others_read_is_ours(reference):
    """Where a reference names none, ours may: each reads some forms only."""
    found = differing("multiple_choice", reference, lambda answer, choices, *_: chosen_letter(answer, choices),
                      lambda theirs, own: theirs not in ("", own))  # fmt: skip
    assert found == on_purpose("multiple_choice", reference)


def test_no_letter_is_ours_alone():
    rows = REFERENCE["sections"]["multiple_choice"]["rows"]
    alone = {row[0] for row in rows if (chosen_letter(*row[:2]) or "") not in [*row[2:], ""]}
    assert alone == on_purpose("multiple_choice", "any")


def test_mme_of_others():
    """Two answers in turn are about one image, images in turn of two types; each as lmms-eval reads it."""
    rows = REFERENCE["sections"]["yes_or_no"]["rows"]
    metric = METRICS["mme"]()
    metric.update([row[2] for row in rows], [truth(row[1], type="ab"[i // 2 % 2], pair=str(i // 2)) for i, row in enumerate(rows)])  # fmt: skip
    for name in (f"{TASKS}.mme.utils.mme_aggregate_results", f"{KIT}.yorn.MME_rating"):
        assert metric.details()["points"] == pytest.approx(REFERENCE["sets"][name])
    assert 0 < metric.details()["accuracy_plus"] < metric.details()["accuracy"]


@pytest.mark.parametrize(("reader", "name"), [(4, "llava.eval.eval_pope"), (3, f"{KIT}.yorn.POPE_rating")])
def test_pope_of_others(reader, name):
    """Of the answers that the reference itself reads as yes or no."""
    known = [row for row in REFERENCE["sections"]["yes_or_no"]["rows"] if row[reader] != "unknown"]
    metric = METRICS["pope"]()
    metric.update([row[reader] for row in known], [truth(row[1]) for row in known])
    theirs = REFERENCE["sets"][name]
    assert {key: metric.details()[key] for key in theirs} == pytest.approx(theirs)


# --- captions


def test_words_of_a_caption():
    assert (
        caption_words("A giraffe's head isn't in this clear, colorful photo.")
        == "a giraffe 's head is n't in this clear colorful photo"
    )
    assert (
        caption_words('100% of 1,000 red-and-white "U.S." flags; 12:45!')
        == "100 % of 1,000 red-and-white u.s flags 12:45"
    )
    assert caption_words("Don't! They'll say it's O'Clock...") == "do n't they 'll say it 's o'clock"


def cider_d(answers, references):
    """Vedantam et al. 2015, equations 1 to 3 with the clipping, length penalty (sigma 6) and factor 10 of CIDEr-D."""

    def vector(sentence, n):
        words = sentence.split()
        grams = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
        seen = {g: sum(any(g in zip(*[r.split()[i:] for i in range(n)], strict=False) for r in refs) for refs in references)
                for g in grams}  # fmt: skip
        return {g: count * math.log(len(references) / max(1, seen[g])) for g, count in grams.items()}

    def norm(v):
        return math.sqrt(sum(x * x for x in v.values()))

    scores = []
    for answer, refs in zip(answers, references, strict=True):
        total = 0.0
        for n, ref in product((1, 2, 3, 4), refs):
            c, s = vector(answer, n), vector(ref, n)
            dot = sum(min(x, s.get(g, 0)) * s.get(g, 0) for g, x in c.items())
            lengths = len(answer.split()) - len(ref.split())
            total += math.exp(-(lengths**2) / 72) * dot / ((norm(c) * norm(s)) or 1)
        scores.append(10 * total / 4 / len(refs))
    return scores


def test_cider_is_the_papers_formula():
    pytest.importorskip("pycocoevalcap")
    rng = random.Random(0)
    words = ["a", "the", "dog", "cat", "red", "runs", "sits", "on", "grass", "mat"]
    sentences = [[" ".join(rng.choices(words, k=rng.randint(3, 9))) for _ in range(4)] for _ in range(12)]
    answers = [rng.choice(own)[: rng.randint(8, 60)].strip() for own in sentences]
    found, each = scored("cider", answers, [truth(*own) for own in sentences])
    assert each == pytest.approx(cider_d(answers, sentences))
    assert found == pytest.approx(sum(each) / 12) and found > 1


def test_published_cider():
    """pix2struct's test gives 128.6 for the eight rows above, with the Java tokeniser: theirs and ours cut them alike."""
    pytest.importorskip("pycocoevalcap")
    found, _ = scored("cider", [row[0] for row in PIX2STRUCT], [truth(row[1]) for row in PIX2STRUCT])
    assert 100 * found == pytest.approx(128.6, abs=0.05)


def test_cider_without_its_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pycocoevalcap.cider.cider", None)
    with pytest.raises(ConfigError, match=r"pip install 'lit_eemllm\[eval\]'"):
        METRICS["cider"]()


# --- all of them


@pytest.mark.parametrize("name", METRICS)
def test_order_and_parts_change_no_digit(name):
    """As when answers are shared out over ranks: parts of a set in any order, and states of two metrics joined."""
    if name == "cider":
        pytest.importorskip("pycocoevalcap")
    rng = random.Random(0)
    rows = [(rng.choice(("yes", "no", "abc 12", "A")), truth(rng.choice(("yes", "no")), *["yes"] * 9, type=rng.choice("ab"), pair=f"{i % 7}",
                                                              choices=("yes", "no"))) for i in range(41)]  # fmt: skip
    whole, parts = METRICS[name](), [METRICS[name](), METRICS[name]()]
    whole.update(*zip(*rows, strict=True))
    shuffled = rng.sample(rows, len(rows))
    for part, own in zip(parts, (shuffled[:13], shuffled[13:]), strict=True):
        part.update(*zip(*own, strict=True))
    joined = METRICS[name]()
    for state, reduce in joined._reductions.items():
        assert reduce.__name__ == "dim_zero_cat"
        setattr(joined, state, [tensor for part in parts for tensor in getattr(part, state)])
    joined._update_count = 2
    assert joined.compute().item() == pytest.approx(whole.compute().item(), rel=1e-12 if name == "cider" else 0)
    assert joined.details() == whole.details()
    assert sorted(joined.each()) == pytest.approx(sorted(whole.each()), rel=1e-12)


def test_a_new_metric_is_one_class(monkeypatch):
    monkeypatch.delitem(METRICS, "length", raising=False)

    @register_metric("length")
    class Length(AnswerMetric):
        def score(self, answer, truth):
            return float(len(answer) == len(truth.answers[0]))

    assert scored("length", ["ab", "abc"], [truth("xy"), truth("z")]) == (0.5, [1, 0])
    with pytest.raises(ValueError, match="'length' is registered already"):
        register_metric("length")(Length)
    del METRICS["length"]
