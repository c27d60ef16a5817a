"""A conversation about images, checked: LLaVA row --parse_conversation--> Conversation."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lit_eemllm import limits
from lit_eemllm.errors import SampleError

IMAGE = "<image>"  # placeholder of one image in the text of a human turn
SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, which JSON can hold and no tokenizer takes


@dataclass(frozen=True)
class Turn:
    """What one says: the role is ``system``, ``human`` or ``gpt``."""

    role: str
    text: str


@dataclass(frozen=True)
class Conversation:
    """Turns human, gpt, ... (system may come first), one placeholder per image in human turns; else SampleError."""

    key: str
    turns: tuple[Turn, ...]
    num_images: int
    type: str | None = None

    def __post_init__(self) -> None:
        speakers = self.roles[1:] if self.roles[:1] == ["system"] else self.roles
        if not speakers or speakers != [("human", "gpt")[i % 2] for i in range(len(speakers))]:
            found = f"turns must alternate human, gpt, ... (system may come first), not {self.roles}"
            raise self.refusal("bad_conversation", found)
        if any(turn.role != "human" and IMAGE in turn.text for turn in self.turns):
            raise self.refusal("bad_conversation", f"{IMAGE} in a gpt or system turn; only human turns show images")
        placeholders = sum(turn.text.count(IMAGE) for turn in self.turns)
        if placeholders != self.num_images:
            found = f"{placeholders} {IMAGE} placeholders in the text but {self.num_images} images"
            raise self.refusal("placeholder_mismatch", f"{found}; each image needs one in a human turn")

    @property
    def roles(self) -> list[str]:
        return [turn.role for turn in self.turns]

    def refusal(self, reason: str, message: str) -> SampleError:
        return SampleError(reason, f"sample {self.key!r}: {message}")


def leading_answer(turns: Sequence[Any]) -> bool:
    """Whether a row's turns begin with an answer, to nothing, and go on. `parse_conversation` drops it, as LLaVA's code does."""
    return len(turns) > 1 and isinstance(turns[0], Mapping) and turns[0].get("from") == "gpt"


def parse_conversation(row: Mapping[str, Any], num_images: int, key: str) -> Conversation:
    """Check a row in LLaVA's JSON form and return its conversation, without a `leading_answer`.

    Args:
        row: ``{"conversations": [{"from": "human"|"gpt"|"system", "value": str}, ...], "type": str (optional)}``.
        num_images: images that come with the row; human turns must hold as many placeholders.
        key: names the sample in messages.

    Raises:
        SampleError: ``bad_conversation``, ``placeholder_mismatch``, ``missing_image``, ``missing_video``, ``too_many_images`` or ``no_target`` (all
            answers are white space).
    """
    if num_images > limits.ROW_IMAGES:
        raise SampleError(
            "too_many_images", f"sample {key!r}: {num_images:,} images, at most {limits.ROW_IMAGES:,} are read"
        )
    expected = f"sample {key!r}: expected a list 'conversations' of mappings with strings 'from' and 'value'"
    entries = row.get("conversations") if isinstance(row, Mapping) else None
    if not isinstance(entries, list):
        raise SampleError("bad_conversation", f"{expected}, found {str(row)[:80]!r}")
    turns = []
    for entry in entries:
        role, value = (entry.get("from"), entry.get("value")) if isinstance(entry, Mapping) else (None, None)
        if not isinstance(role, str) or not isinstance(value, str) or SURROGATE.search(value):
            raise SampleError("bad_conversation", f"{expected}, one turn is {str(entry)[:80]!a}")
        turns.append(Turn(role, value))
    turns = turns[leading_answer(entries) :]
    kind = row.get("type")
    if kind is not None and not isinstance(kind, str):
        raise SampleError("bad_conversation", f"sample {key!r}: 'type' must be a string, found {str(kind)[:80]!r}")
    conversation = Conversation(key, tuple(turns), num_images, kind)
    if not num_images and row.get("image"):
        raise conversation.refusal(
            "missing_image", f"its row names {str(row['image'])[:80]!a}, but no image comes with it"
        )
    if row.get("video"):
        raise conversation.refusal(
            "missing_video",
            f"its row names {str(row['video'])[:80]!a}, but no frames come with it; `shards make` makes them",
        )
    if not any(turn.role == "gpt" and turn.text.strip() for turn in turns):
        raise conversation.refusal("no_target", "no gpt turn holds an answer, so there is nothing to train on")
    return conversation
