"""Which values a key may have, written at its field: ``lr: Annotated[float, more_than(0)]``. Null is not checked."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

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


NON_NEGATIVE = _expect("0 or more", lambda value: 0 <= value < math.inf)
SHARE = _expect("more than 0, to 1", lambda value: 0 < value <= 1)
BELOW_1 = _expect("0 to below 1", lambda value: 0 <= value < 1)
TWO_BELOW_1 = _expect("two numbers from 0 to below 1", lambda value: len(value) == 2 and all(0 <= v < 1 for v in value))
TEXT = _expect("text that is not empty", lambda value: bool(value.strip()))
LAYERS = _expect("all, none, null or a list of distinct layer numbers such as [0, 1]", _are_layers)
DROP = _expect("pairs of a layer number and a share between 0 and 1, such as [[7, 0.25]]", _is_drop)
