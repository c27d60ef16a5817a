"""A trained model as one of VLMEvalKit's; `vlmeval` puts it among them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmeval.vlm.base import BaseModel
from vlmeval.vlm.llava import LLaVA

from ...errors import UserError
from .answerer import Answerer, Part, Question, refusal

MAX_NEW_TOKENS = 2048  # so has VLMEvalKit's LLaVA
PROMPTS = ("dataset", "llava")


class LitEEMLLM(BaseModel):
    """A run, or a folder that holds a whole model. Answers one question at a time, as VLMEvalKit asks.

    Args:
        run: the folder.
        checkpoint: a file of the run; default: the newest.
        overrides: ``key=value`` for the run's configuration.
        imports: Python files of your own that register encoders or attention backends.
        max_new_tokens: of an answer.
        temperature: 0 is greedy.
        prompts: ``dataset``: as VLMEvalKit's data sets ask any model; ``llava``: multiple choice as it asks its LLaVA, in
            the words of LLaVA's training data.
    """

    INTERLEAVE = True

    def __init__(
        self,
        run: str,
        checkpoint: str | None = None,
        overrides: Sequence[str] = (),
        imports: Iterable[str] = (),
        max_new_tokens: int = MAX_NEW_TOKENS,
        temperature: float = 0.0,
        prompts: str = "dataset",
    ) -> None:
        super().__init__()
        if prompts not in PROMPTS:
            raise UserError(f"prompts={prompts}: expected {' or '.join(PROMPTS)}")
        self.answerer = Answerer(Path(run), checkpoint, overrides, map(Path, imports))
        self.max_new_tokens, self.temperature, self.prompts = max_new_tokens, temperature, prompts

    def use_custom_prompt(self, dataset: str) -> bool:
        return self.prompts == "llava" and LLaVA.use_custom_prompt(self, dataset)

    def build_prompt(self, line: Any, dataset: str | None = None) -> list[dict[str, str]]:
        return LLaVA.build_prompt(self, line, dataset)

    def generate_inner(self, message: Sequence[Mapping[str, str]], dataset: str | None = None) -> str:
        return self.chat_inner([{"role": "user", "content": message}], dataset)

    def chat_inner(self, message: Sequence[Mapping[str, Any]], dataset: str | None = None) -> str:
        name = f"data set {dataset}"
        turns = [(turn["role"], [_part(one, name) for one in turn["content"]]) for turn in message]
        return self.answerer.answers([Question(name, turns)], self.max_new_tokens, self.temperature)[0]


def _part(content: Mapping[str, str], name: str) -> Part:
    if content["type"] == "text":
        return content["value"]
    if content["type"] == "image":
        return Path(content["value"])
    raise refusal(name, content["type"])
