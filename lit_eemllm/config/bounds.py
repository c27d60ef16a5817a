"""Which values a key may have, written at its field: ``lr: Annotated[float, more_than(0)]``. Null is not checked."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from typing import Any

from lit_eemllm import limits
from lit_eemllm.errors import not_one_of

Bound = Callable[[Any], str]
"""From a value to what is wrong with it; empty if nothing is."""


def _expect(expected: str, holds: Callable[[Any], bool]) -> Bound:
    return lambda value: "" if holds(value) else f"found {value!r}, expected {expected}"


# Comparisons are written so that NaN fails them.
def at_least(least: int) -> Bound:
    return _expect(f"{least} or more", lambda value: value >= least)


def more_than(least: int) -> Bound:
    return _expect(f"more than {least}", lambda value: least < value < math.inf)


def within(least: int, most: int) -> Bound:
    return _expect(f"{least} to {most}", lambda value: least <= value <= most)


def one_of(*words: str) -> Bound:
    return lambda value: "" if value in words else not_one_of(value, words)


def each(bound: Bound) -> Bound:
    """The bound, for every item of a list."""
    return lambda values: next(filter(None, map(bound, values)), "")


def _are_layers(value: Any) -> bool:
    if not isinstance(value, list):
        return value in ("all", "none")
    return all(type(layer) is int and layer >= 0 for layer in value) and len(set(value)) == len(value)


def _is_drop(pair: Any) -> bool:
    if not isinstance(pair, list) or len(pair) != 2 or type(pair[0]) is not int or not isinstance(pair[1], int | float):
        return False
    return pair[0] >= 0 and 0 < pair[1] < 1


def step_range(text: str | int) -> range | None:
    """The optimiser steps that ``7``, ``1-1000`` or ``1001-`` names, counted from 1 as in the log; None if it names none."""
    match = re.fullmatch(r"([1-9]\d{0,14})(?:(-)([1-9]\d{0,14})?)?", str(text))
    if match is None:
        return None
    first, dash, last = match.groups()
    return range(int(first), int(last) + 1 if last else sys.maxsize if dash else int(first) + 1) or None


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < 1e9


NON_NEGATIVE = _expect("0 or more", lambda value: 0 <= value < math.inf)
SHARE = _expect("more than 0, to 1", lambda value: 0 < value <= 1)
BELOW_1 = _expect("0 to below 1", lambda value: 0 <= value < 1)
TWO_BELOW_1 = _expect("two numbers from 0 to below 1", lambda value: len(value) == 2 and all(0 <= v < 1 for v in value))
TEXT = _expect("text that is not empty", lambda value: bool(value.strip()))
LAYERS = _expect("all, none, null or a list of distinct layer numbers such as [0, 1]", _are_layers)
DROP = _expect("pairs of a layer number and a share between 0 and 1, such as [[7, 0.25]]", _is_drop)

_LOGGERS = ("csv", "tensorboard", "wandb", "mlflow")


def LOGGERS(names: list[str]) -> str:
    wrong = each(one_of(*_LOGGERS))(names)
    if not wrong and ("csv" not in names or len(set(names)) < len(names)):
        wrong = f"found {names!r}, expected csv, which `report` and `sweep` read, and others once each: {', '.join(_LOGGERS[1:])}"
    return wrong


_POSITIVE = _expect("a number, more than 0 and less than 1e9", _is_positive)
_SECTION = _expect("keys of model.mechanism, such as {preset: llava}", lambda value: isinstance(value, dict))
_ENTRY: dict[str, Bound] = {
    "steps": _expect("optimiser steps from 1, such as 7, 1-1000 or 1001-", lambda value: step_range(value) is not None),
    "weight": _POSITIVE,
    "mechanism": _SECTION,
    "teacher": _SECTION,
    "kl": _POSITIVE,
    "temperature": _POSITIVE,
}


def SCHEDULE(entries: list[Any]) -> str:
    """The entries of a schedule of mechanisms; what they override is read by `mechanisms.schedule`."""
    if not 0 < len(entries) <= limits.SCHEDULE:
        return f"found {len(entries)} entries, expected 1 to {limits.SCHEDULE}; null for no schedule"
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict):
            return f"entry {number}: found {entry!r}, expected a section such as {{weight: 9, mechanism: {{preset: llava}}}}"
        for name, value in entry.items():
            if name not in _ENTRY:
                return f"entry {number}: {not_one_of(name, _ENTRY)}"
            if value is not None and (wrong := _ENTRY[name](value)):
                return f"entry {number}: {name}: {wrong}"
        for name in ("kl", "temperature"):
            if entry.get(name) is not None and entry.get("teacher") is None:
                return f"entry {number}: {name}: has no effect without a teacher"
    return ""
