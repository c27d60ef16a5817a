"""The questions of an evaluation: made from rows, and shuffled for the control."""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from string import ascii_uppercase
from typing import Any

from ..data.sources import lettered
from ..errors import SampleError
from ..inputs.conversation import IMAGE, SURROGATE, Conversation, Turn, parse_conversation
from ..inputs.rows import show
from .metrics import Truth

QUESTION = "{question}"  # its place in a set's prompt


@dataclass(frozen=True)
class Picture:
    """An image of a question, not decoded; equal if the file is.

    Attributes:
        digest: tells files with other content apart.
        name: member of a shard, or path as the row has it.
        size: width and height by its header.
        source: the file, or what reads it.
    """

    digest: str
    name: str = field(compare=False)
    size: tuple[int, int] = field(compare=False)
    source: bytes | Callable[[], bytes] = field(compare=False, repr=False)

    def read(self) -> bytes:
        """Raises SampleError."""
        return self.source if isinstance(self.source, bytes) else self.source()


@dataclass(frozen=True)
class Question:
    """A conversation whose last turn is to be answered, and the truth.

    Attributes:
        metric: that its row asks for.
        number: its place in its set, the same for the question with other images.
    """

    conversation: Conversation
    truth: Truth
    pictures: tuple[Picture, ...] = ()
    metric: str | None = None
    number: int = 0

    @property
    def images(self) -> list[bytes]:
        """Raises SampleError."""
        return [picture.read() for picture in self.pictures]

    @property
    def type(self) -> str:
        return self.conversation.type or "all"

    @property
    def prompt(self) -> str:
        """What was asked last."""
        turns = self.conversation.turns
        return turns[-2].text if len(turns) > 1 else ""


def make_question(
    row: Mapping[str, Any], pictures: Sequence[Picture], key: str, number: int = 0, prompt: str | None = None
) -> Question:
    """The question that a row asks.

    Args:
        row: ``conversations`` as in training, or ``question`` (LLaVA's files: ``text``); the truth is the last turn, or
            ``answers``, ``answer`` or ``label``. Perhaps ``choices``, ``type`` (or ``category``) and ``metric``.
        pictures: its images.
        key: names it in messages.
        number: its place in its set.
        prompt: what is asked instead, with the row's question in the place of ``{question}``.

    Raises:
        SampleError: ``bad_question``, ``no_answer``, or what `parse_conversation` says.
    """
    choices, answers = texts(row, "choices", key), texts(row, "answers", key)
    if len(choices) > len(ascii_uppercase):
        raise SampleError("bad_question", f"sample {key!r}: {len(choices)} choices, at most 26 have a letter")
    kind, metric = first(row, "type", "category"), row.get("metric")
    kind = str(kind) if type(kind) is int else kind
    if isinstance(kind, str) and not (kind.isprintable() and len(kind) <= 100):
        raise SampleError("bad_question", f"sample {key!r}: 'type' is {kind[:100]!a}, expected a short name")
    if metric is not None and not isinstance(metric, str):
        raise SampleError("bad_question", f"sample {key!r}: 'metric' is {str(metric)[:80]!a}, expected a name")

    turns = row.get("conversations")
    if turns is None:
        turns = [{"from": "human", "value": question_text(row, choices, len(pictures), key)}]
    if isinstance(turns, list) and turns and isinstance(turns[-1], Mapping) and turns[-1].get("from") == "human":
        answers = answers or short_answer(row, choices, key)
        if not answers:
            raise SampleError("no_answer", f"sample {key!r}: it has no answer, so there is no truth to compare with")
        turns = [*turns, {"from": "gpt", "value": answers[0]}]
    conversation = parse_conversation({"conversations": turns, "type": kind}, len(pictures), key)
    if prompt is not None:
        conversation = ask_with(conversation, prompt)
    truth = Truth(
        answers or (conversation.turns[-1].text,), choices, kind, " ".join(picture.digest for picture in pictures)
    )
    return Question(conversation, truth, tuple(pictures), metric, number)


def question_text(row: Mapping[str, Any], choices: Sequence[str], images: int, key: str) -> str:
    """The question of a row without turns: its images first, its choices last, a line each, as LLaVA writes them."""
    text = first(row, "question", "text")
    if not isinstance(text, str) or not text.strip():
        raise SampleError("bad_question", f"sample {key!r}: it has no 'conversations', and no text as 'question'")
    return show("\n".join(filter(None, [text, lettered(choices)])), IMAGE, images)


def short_answer(row: Mapping[str, Any], choices: Sequence[str], key: str) -> tuple[str, ...]:
    """A row's ``answer`` or ``label``; of a choice its letter, if it is a number."""
    number = row.get("answer")
    if choices and type(number) is int:
        return (ascii_uppercase[number],) if 0 <= number < len(choices) else ()
    return texts(row, "answer", key) or texts(row, "label", key)


def first(row: Mapping[str, Any], *names: str) -> Any:
    """The value of the first of these fields that is there."""
    return next((row[name] for name in names if row.get(name) is not None), None)


def texts(row: Mapping[str, Any], name: str, key: str) -> tuple[str, ...]:
    """A field that is a text, a number, or a list of such or of ``{"answer": text}``. Raises SampleError."""
    listed = row.get(name)
    listed = listed if isinstance(listed, list) else [] if listed is None else [listed]
    found = [item.get("answer") if isinstance(item, Mapping) else item for item in listed]
    wrong = [
        x for x in found if isinstance(x, bool) or not isinstance(x, str | int | float) or SURROGATE.search(str(x))
    ]
    if wrong:
        raise SampleError("bad_question", f"sample {key!r}: '{name}' holds {str(wrong[0])[:80]!a}, expected texts")
    return tuple(map(str, found))


def ask_with(conversation: Conversation, prompt: str) -> Conversation:
    """The conversation with its last question put into a prompt; placeholders before the question stay before all."""
    *before, asked, answer = conversation.turns
    marks, question = re.fullmatch(rf"((?:\s*{IMAGE}\s*)*)(.*)", asked.text, re.DOTALL).groups()  # type: ignore[union-attr]
    turn = Turn("human", marks + prompt.replace(QUESTION, question))
    return replace(conversation, turns=(*before, turn, answer))


def shuffle_images(questions: Sequence[Question], seed: int) -> list[Question]:
    """Each question with the images of another of its type that has as many, and other ones; where there is none, it is left out.

    Questions about the same images stand together in a circle. Moving on by the largest such set leaves nobody his own
    images, unless this set is more than half of the circle.
    """
    groups: dict[tuple[str, int], dict[tuple[Picture, ...], list[Question]]] = defaultdict(lambda: defaultdict(list))
    for question in questions:
        if question.pictures:
            groups[question.type, len(question.pictures)][question.pictures].append(question)
    shuffled = []
    for by_pictures in groups.values():
        sets = list(by_pictures.values())
        random.Random(seed).shuffle(sets)
        circle = [question for same in sets for question in same]
        turn = max(map(len, sets))
        for question, other in zip(circle, circle[turn:] + circle[:turn], strict=True):
            if question.pictures != other.pictures:
                shuffled.append(replace(question, pictures=other.pictures))
    return shuffled
