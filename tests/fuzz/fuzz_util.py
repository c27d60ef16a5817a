"""What fuzzers share: mutations of bytes and of plain values, a bound on every case, and a canary that nothing may touch."""

from __future__ import annotations

import contextlib
import os
import random
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lit_eemllm.errors import UserError

SEED = int(os.environ.get("FUZZ_SEED", "0"))
TIMES = int(os.environ.get("FUZZ_TIMES", "1"))
SECONDS = 20  # of a case; all of them take milliseconds
CANARY = Path("/tmp") / f"lit-eemllm-canary-{os.getpid()}"
PYTHON = f"__import__('pathlib').Path({str(CANARY)!r}).touch()"
ODD_TEXT = ("", " ", "\0", "\ud800", "﻿", "\u202e", "é" * 50, "😀" * 9, "<image>" * 40, "</s>", "<s>", "nan", "../../etc/passwd",
            "%s%n", "${oc.env:HOME}", "${out}", "{{ 7*7 }}", "{% for x in range(9**9) %}", "a\r\nb", "x" * 5000)  # fmt: skip
ODD_VALUES = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**63,
    10**30,
    1e308,
    -0.0,
    float("nan"),
    float("inf"),
    [],
    {},
    [[]],
    [None],
    {"a": {}},
)


@contextlib.contextmanager
def bounded(what: object) -> Iterator[None]:
    """The case takes no longer than SECONDS, and nothing but a `UserError` (which the caller may swallow) leaves it."""

    def late(*_: object) -> None:
        raise AssertionError(f"hangs: {what!r:.2000}")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    except (UserError, AssertionError):
        raise
    except BaseException as error:
        raise AssertionError(f"{type(error).__name__}: {error} for {what!r:.2000}") from error
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True)
def nothing_is_executed() -> Iterator[None]:
    CANARY.unlink(missing_ok=True)
    yield
    assert not CANARY.exists()
    assert not list(Path("/tmp").glob("escaped-*")), "a member was written outside"


def flip(draw: random.Random, data: bytes, most: int = 8) -> bytes:
    """Bytes changed, cut out, doubled or cut off."""
    changed = bytearray(data)
    for _ in range(draw.randint(1, most)):
        at = draw.randrange(len(changed) or 1)
        how = draw.randrange(5)
        if how == 0 and changed:
            changed[at] = draw.randrange(256)
        elif how == 1:
            del changed[at : at + draw.randint(1, 9)]
        elif how == 2:
            changed[at:at] = changed[at : at + draw.randint(1, 99)]
        elif how == 3:
            del changed[at:]
        else:
            changed[at:at] = draw.randbytes(draw.randint(1, 9))
    return bytes(changed)


def odd(draw: random.Random) -> Any:
    kind = draw.randrange(4)
    if kind == 0:
        return draw.choice(ODD_TEXT)
    if kind == 1:
        return [odd(draw) for _ in range(draw.randrange(3))]
    if kind == 2:
        return {draw.choice(ODD_TEXT): odd(draw) for _ in range(draw.randrange(3))}
    return draw.choice(ODD_VALUES)


def warp(draw: random.Random, value: Any) -> Any:
    """One place of a tree of plain values gets another value, goes, or comes twice."""
    if isinstance(value, dict) and value and draw.random() < 0.8:
        key = draw.choice(list(value))
        changed = {k: v for k, v in value.items() if k != key}
        how = draw.randrange(8)
        if how == 0:
            return changed
        if how == 1:
            return changed | {draw.choice(ODD_TEXT): value[key]}
        return changed | {key: warp(draw, value[key])}
    if isinstance(value, list) and value and draw.random() < 0.8:
        at = draw.randrange(len(value))
        how = draw.randrange(6)
        new = [] if how == 0 else [value[at]] * 3 if how == 1 else [warp(draw, value[at])]
        return value[:at] + new + value[at + 1 :]
    return odd(draw)


def fuzz(
    number: int, make: Callable[[random.Random], bytes], try_it: Callable[[bytes], None], seed: int
) -> Counter[str]:
    draw = random.Random(SEED + seed)
    outcomes: Counter[str] = Counter()
    for _ in range(number * TIMES):
        data = make(draw)
        with bounded(data):
            try:
                try_it(data)
                outcomes["good"] += 1
            except UserError as error:
                told = 0 < len(str(error)) < 20_000  # for people
                outcomes[type(error).__name__ if told else repr(error)] += 1
    return outcomes
