"""``lmms-eval eval --model lit_eemllm --model_args run=runs/mine``: the model plug-in for lmms-eval.

lmms-eval knows two kinds of models. A *chat* model gets messages, with images where they belong, and can only generate: it
is the default. A *simple* one, with ``--force_simple``, gets a text and a list of images and also weighs given answers, as
tasks of the types ``multiple_choice`` and ``loglikelihood`` need.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms
from PIL import Image

from ...console import progress
from ...errors import UserError
from .answerer import Answerer, Part, Question, refusal

MAX_NEW_TOKENS = 1024  # where a task does not say; so has lmms-eval's LLaVA
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


class Generation(NamedTuple):
    """What a task's ``generation_kwargs`` ask for, as far as it can be done."""

    max_new_tokens: int
    temperature: float
    until: tuple[str, ...]

    @classmethod
    def of(cls, settings: Mapping[str, Any], name: str) -> Generation:
        """Raises UserError if a setting would change the answers that this model would give without it."""
        sampling = settings.get("do_sample", True) and float(settings.get("temperature") or 0) > 0
        neutral = {"num_beams": (None, 1), "repetition_penalty": (None, 1)}
        if sampling:
            neutral |= {"top_p": (None, 1), "top_k": (None, 0)}
        if wrong := [key for key, values in neutral.items() if settings.get(key) not in values]:
            found = ", ".join(f"{key}={settings[key]}" for key in wrong)
            how = ",".join(f"{key}={neutral[key][1]}" for key in wrong)
            raise UserError(f"{name}: {found} cannot be done; answers without it: --gen_kwargs {how}")
        until = settings.get("until") or ()
        return cls(
            max_new_tokens=int(settings.get("max_new_tokens") or MAX_NEW_TOKENS),
            temperature=float(settings["temperature"]) if sampling else 0.0,
            until=(until,) if isinstance(until, str) else tuple(until),
        )


class LitEEMLLM(lmms):
    """A run, or a folder that holds a whole model; the arguments are those of ``--model_args``.

    Args:
        run: the folder.
        checkpoint: a file of the run; default: the newest.
        batch_size: questions computed together, also ``--batch_size``.
        device: ``cpu`` keeps off the GPU.
        imports: Python files of your own that register encoders or attention backends, with ``:`` between them.
        overrides: any other argument is a key of the run's configuration, such as ``model.attention=sdpa``.
    """

    is_simple = True

    def __init__(
        self,
        run: str,
        checkpoint: str | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        imports: str = "",
        **overrides: Any,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise UserError(f"batch_size={batch_size}: expected a number of questions, such as 8")
        self.batch_size = int(batch_size)
        keys = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in overrides.items()]
        if device is not None and torch.device(device).type == "cpu":
            keys.append("trainer.accelerator=cpu")
        files = [Path(file) for file in imports.split(os.pathsep) if file]
        self.answerer = Answerer(Path(str(run)), checkpoint, keys, files)

    @property
    def device(self) -> torch.device:
        """lmms-eval asks for it where several processes share the questions."""
        return self.answerer.model.device

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Documents are opened batch by batch; answers come in the order of the requests."""
        groups: dict[Generation, list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            groups[Generation.of(self._settings(request.args), f"task {request.args[-2]}")].append(i)
        answers = [""] * len(requests)
        with progress("answering", len(requests)) as advance:
            for generation, members in groups.items():
                members.sort(key=lambda i: len(requests[i].args[0]))  # like with like: less padding
                for chunk in _chunks(members, self.batch_size):
                    questions = [self._question(requests[i].args) for i in chunk]
                    for i, text in zip(chunk, self.answerer.answers(questions, *generation), strict=True):
                        answers[i] = text
                    advance(len(chunk))
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """Loss of each answer, the mean over its tokens and end-of-turn, and whether greedy search would give it.

        A loss, not the log-likelihood of the name: lmms-eval chooses the answer with the smallest value
        (`ConfigurableTask.process_results`), and its LLaVA returns this mean. Each pair is wrapped, as 0.7 to 0.7.3 make a
        text of any other tuple (`unwrap_generation_output`) and then fail to read it.
        """
        found: list[Any] = []
        with progress("weighing answers", len(requests)) as advance:
            for chunk in _chunks(requests, self.batch_size):
                questions, answers = [], []
                for context, target, to_visual, number, task, split in (request.args for request in chunk):
                    document = self.task_dict[task][split][number]
                    text = target if isinstance(target, str) else str(target(document))
                    answers.append(text.strip())  # the template puts the space before it
                    questions.append(_simple_question(context, to_visual(document), f"task {task}, document {number}"))
                weighed = self.answerer.likelihoods(questions, answers)
                found += [GenerationResult((-one.log_probability / one.tokens, one.greedy)) for one in weighed]
                advance(len(chunk))
        return found

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise UserError(f"task {requests[0].args[-2]}: asks in several rounds; lit_eemllm answers in one")

    # arguments of a request differ between the two kinds of models

    def _settings(self, arguments: tuple[Any, ...]) -> Mapping[str, Any]:
        return arguments[1]

    def _question(self, arguments: tuple[Any, ...]) -> Question:
        context, _, to_visual, number, task, split = arguments
        visuals = to_visual(self.task_dict[task][split][number])
        return _simple_question(context, visuals, f"task {task}, document {number}")


class ChatLitEEMLLM(LitEEMLLM):
    """The same model as one that gets messages."""

    is_simple = False

    def _settings(self, arguments: tuple[Any, ...]) -> Mapping[str, Any]:
        return arguments[2]

    def _question(self, arguments: tuple[Any, ...]) -> Question:
        _, to_messages, _, number, task, split = arguments
        name = f"task {task}, document {number}"
        turns = []
        for message in to_messages(self.task_dict[task][split][number]):
            content = message["content"]
            parts = [content] if isinstance(content, str) else [_part(one, name) for one in content]
            turns.append((message["role"], parts))
        return Question(name, turns)


def _simple_question(text: str, visuals: Sequence[Any] | None, name: str) -> Question:
    shown: list[Part] = []
    for visual in visuals or []:
        several = visual if isinstance(visual, list | tuple) else [visual]  # a column of several images
        shown += [_image(one, name) for one in several if one is not None]
    return Question(name, [("user", [*shown, text])])


def _part(content: Mapping[str, Any], name: str) -> Part:
    if content["type"] == "text":
        return content["text"]
    if content["type"] == "image":
        return _image(content["url"], name)
    raise refusal(name, content["type"])


def _image(visual: Any, name: str) -> Image.Image | Path:
    if isinstance(visual, Image.Image):
        return visual
    if isinstance(visual, str | Path) and str(visual).lower().endswith(IMAGE_SUFFIXES):
        return Path(visual)
    raise refusal(name, f"video or sound, {str(visual)[:80]!r}")


def _chunks(things: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [things[start : start + size] for start in range(0, len(things), size)]
