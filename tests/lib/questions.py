"""Questions about pictures that are not there."""

import hashlib
from dataclasses import replace

from lit_eemllm.evaluation.metrics import Truth
from lit_eemllm.evaluation.questions import Picture, Question
from lit_eemllm.evaluation.sets import QuestionSet, question_sets, read_questions
from lit_eemllm.inputs.conversation import Conversation, Turn


def picture(data):
    return Picture(hashlib.sha256(data).hexdigest(), "a.png", (16, 16), data)


def question(key, kind, images, truth="x", metric="exact_match", number=0, **more):
    turns = (Turn("human", "<image>" * len(images) + "what?"), Turn("gpt", truth))
    conversation = Conversation(key, turns, len(images), kind)
    return Question(conversation, Truth((truth,), type=kind, **more), tuple(map(picture, images)), metric, number)


def of_shards(config, **more):
    (found,) = question_sets(config)
    return replace(found, **more)


def read(source, most=None):
    return read_questions(source, most, 10**6)


def file_set(files, name="rows.jsonl", **more):
    return QuestionSet("rows", files / name, files / "images", None, 8, **more)
