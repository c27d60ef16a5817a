"""The questions of an evaluation: read from shards, shuffled for the control, picked for the picture."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice

from ..chat import Conversation
from ..data.recipe import Recipe
from ..data.samples import read_members
from ..data.shards import read_shard
from ..errors import SampleError


@dataclass(frozen=True)
class Question:
    """A conversation whose last turn is to be answered, and the answer."""

    conversation: Conversation
    truth: str
    images: list[bytes]

    @property
    def type(self) -> str:
        return self.conversation.type or "all"


def read_questions(recipe: Recipe, most: int | None) -> tuple[list[Question], Counter[str]]:
    """Questions in the order of the shards (every n-th if only some are wanted), and how many samples were unusable."""
    questions, skipped = [], Counter[str]()
    for source in recipe.sources:
        for shard, _ in source.shards:
            for key, members in read_shard(source.folder / shard):
                try:
                    conversation, images = read_members(key, members)
                except SampleError as error:
                    skipped[error.reason] += 1
                    continue
                questions.append(Question(conversation, conversation.turns[-1].text, images))
    if most is not None and most < len(questions):
        questions = [questions[i * len(questions) // most] for i in range(most)]
    return questions, skipped


def shuffle_images(questions: Sequence[Question], seed: int) -> list[Question]:
    """Each question with the images of another of its type that has as many; questions without such stay out."""
    groups: dict[tuple[str, int], list[int]] = defaultdict(list)
    for i, question in enumerate(questions):
        if question.images:
            groups[question.type, len(question.images)].append(i)
    shuffled = []
    for members in groups.values():
        if len(members) > 1:
            random.Random(seed).shuffle(members)
            others = members[1:] + members[:1]  # a cycle: nobody keeps his own
            shuffled += [
                replace(questions[i], images=questions[j].images) for i, j in zip(members, others, strict=True)
            ]
    return shuffled


def pick(questions: Sequence[Question], answers: Sequence[str], most: int = 12) -> list[tuple[Question, str]]:
    """Some questions of every type in turn, right or wrong as they come."""
    by_type: dict[str, list[tuple[Question, str]]] = defaultdict(list)
    for pair in zip(questions, answers, strict=True):
        by_type[pair[0].type].append(pair)
    rounds = (pairs[i] for i in range(most) for pairs in by_type.values() if i < len(pairs))
    return list(islice(rounds, most))
