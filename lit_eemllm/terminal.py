"""What reaches a terminal: names, keys and texts come from strangers, and a terminal obeys what steers it."""

from __future__ import annotations

import logging
import re
import sys
from traceback import format_exception
from types import TracebackType
from typing import TextIO

_STEERING = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: object) -> str:
    """With all that would steer a terminal, turn the order of letters or be no character written out, such as ``\\x1b``."""
    return _STEERING.sub(lambda found: found.group().encode("unicode_escape").decode(), str(text))


def say(text: object, file: TextIO | None = None, end: str = "\n", flush: bool = False) -> None:
    """`print`, of a text that is `visible`."""
    print(visible(text), file=file or sys.stdout, end=end, flush=flush)


def say_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """`sys.excepthook`: what nobody expected, as Python tells it."""
    say("".join(format_exception(kind, error, trace)), file=sys.stderr, end="")


class VisibleFormatter(logging.Formatter):
    """Of log lines."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))
