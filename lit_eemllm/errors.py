"""Errors written for people: the command line prints their message without a traceback and exits with their status."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from difflib import SequenceMatcher
from operator import itemgetter
from typing import Any

MOST_HINTS = 20  # mistakes of a file that are told with what may have been meant: to look for it takes milliseconds
_COMPARED = 100  # characters of a name


class UserError(Exception):
    """Something the user can mend. The message says what was found, what was expected and how to fix it.

    Attributes:
        status: exit status of the command.
    """

    status = 2


class WriteError(UserError):
    """A file that cannot be written, for which the disk is to blame. The message has the path and the cause."""

    status = 1


class ConfigError(UserError):
    """A configuration that cannot be used; all its mistakes are listed at once."""


class CheckpointError(UserError):
    """A checkpoint or model folder that is unknown, broken or does not fit."""


class SampleError(UserError):
    """A data sample that cannot be used.

    Args:
        reason: short slug under which the sample is counted, such as ``"no_target"``.
        message: names the sample, what was found and what was expected.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message

    def __reduce__(self) -> tuple:  # crosses process borders of loader workers
        return type(self), (self.reason, self.message)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question that names the known name most like `name`; empty if none is like it.

    What stands after the last dot counts most. It is like the end of a dotted name (``lora_rank``, ``optim.lora.r``), a name
    that has its words (``steps``, ``optim.max_steps``), its initials or the name that they stand for (``learning_rate``,
    ``optim.lr``). Of names that are like it, one of the section that `name` names is rather meant; none of a section far away.
    """
    name, known = name[:_COMPARED], list(known)
    *sections, last = name.lower().split(".")
    exists = any(valid.lower().split(".")[:-1] == sections for valid in known)

    def likeness(valid: str) -> tuple[float, float, float]:
        """How like it is, less for every section between them; how like they are as a whole; how like it is."""
        parts = valid[:_COMPARED].lower().split(".")
        whole = SequenceMatcher(None, name, valid[:_COMPARED]).ratio()
        words, its_words = (re.findall("[^_-]+", text) for text in (last, parts[-1]))
        contained = set(words) <= set(its_words) and any(len(word) > 2 for word in words)
        initials = _stands_for(last, its_words) or _stands_for(parts[-1], words)
        found = [(whole - 0.2, 0)]
        for i in range(len(parts)):
            end, far = "_".join(parts[i:]), len(set(sections) ^ set(parts[:i]))
            alike = SequenceMatcher(None, last, end).ratio() - abs(len(last) - len(end)) / 500
            if i == len(parts) - 1:
                alike = max(alike, 0.8 * contained, 0.75 * initials)
            if far < 3 or not (sections and exists):
                found.append((alike, -far))
        alike, near = max(found)
        return alike + 0.12 * near, whole, alike

    best, (_, _, alike) = max(((valid, likeness(valid)) for valid in known), key=itemgetter(1), default=("", (0, 0, 0)))
    return f"did you mean {best}?" if alike > 0.665 else ""  # two of three letters are enough


def not_one_of(found: Any, known: Collection[str]) -> str:
    """What is said of a value that is none of those that are known."""
    hint = did_you_mean(str(found), known)
    return f"found {found!r}, expected {' or '.join(known)}" + (f"; {hint}" if hint else "")


def is_panic(error: BaseException) -> bool:
    """Whether a library written in Rust, such as tokenizers, has given up: no Exception, but no less an error."""
    return type(error).__name__ == "PanicException"


def describe(error: BaseException) -> str:
    """An exception of another library in a line: its type and what it says."""
    return f"{type(error).__name__}: {error}".strip()


def _stands_for(short: str, words: Sequence[str]) -> bool:
    return len(words) > 1 and short == "".join(word[0] for word in words)
