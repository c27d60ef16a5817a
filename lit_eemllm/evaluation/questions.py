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

    @property
    def prompt(self) -> str:
        """What was asked last."""
        turns = self.conversation.turns
        return turns[-2].text if len(turns) > 1 else ""


def read_questions(recipe: Recipe, most: int | None) -> tuple[list[Question], Counter[str]]:
    """Questions in the order of the shards, and how many samples were unusable, by reason.

    Args:
        recipe: of the samples.
        most: samples to take, spread evenly over the set; None takes all. Only these are checked and kept in memory.
    """
    total = recipe.num_samples
    wanted = range(total) if most is None or most >= total else {i * total // most for i in range(most)}
    questions: list[Question] = []
    skipped = Counter[str]()
    if not wanted:
        return questions, skipped
    shards = (source.folder / name for source in recipe.sources for name, _ in source.shards)
    for i, (key, members) in enumerate(sample for shard in shards for sample in read_shard(shard)):
        if i not in wanted:
            continue
        try:
            conversation, images = read_members(key, members)
            if conversation.turns[-1].role != "gpt":
                raise conversation.refusal("no_answer", "it ends with a question, so there is no truth to compare with")
        except SampleError as error:
            skipped[error.reason] += 1
        else:
            questions.append(Question(conversation, conversation.turns[-1].text, images))
    return questions, skipped


def shuffle_images(questions: Sequence[Question], seed: int) -> list[Question]:
    """Each question with the images of another of its type that has as many, and other ones; where there is none, it is left out.

    Questions about the same images stand together in a circle. Moving on by the largest such set leaves nobody his own
    images, unless this set is more than half of the circle.
    """
    groups: dict[tuple[str, int], dict[tuple[bytes, ...], list[Question]]] = defaultdict(lambda: defaultdict(list))
    for question in questions:
        if question.images:
            groups[question.type, len(question.images)][tuple(question.images)].append(question)
    shuffled = []
    for by_images in groups.values():
        sets = list(by_images.values())
        random.Random(seed).shuffle(sets)
        circle = [question for same in sets for question in same]
        turn = max(map(len, sets))
        for question, other in zip(circle, circle[turn:] + circle[:turn], strict=True):
            if question.images != other.images:
                shuffled.append(replace(question, images=other.images))
    return shuffled


def pick(answered: Sequence[tuple[Question, str]], most: int = 12) -> list[tuple[Question, str]]:
    """Some questions of every type in turn, right or wrong as they come, with their answers."""
    by_type: dict[str, list[tuple[Question, str]]] = defaultdict(list)
    for pair in answered:
        by_type[pair[0].type].append(pair)
    rounds = (pairs[i] for i in range(most) for pairs in by_type.values() if i < len(pairs))
    return list(islice(rounds, most))
