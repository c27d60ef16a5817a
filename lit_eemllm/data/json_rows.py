"""Rows from JSON files of any size: a list, a list inside an object, or JSON lines."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from lit_eemllm.errors import UserError

_BUFFER = 2**20  # characters read at once
_LONGEST = 2**26  # characters of one element of a list
_BETWEEN = re.compile(r"[ \t\r\n,]*")
_AFTER = re.compile(r"[ \t\r\n]*[,\]]")


def read_json(path: Path, key: str | None = None) -> Iterator[Any]:
    """Elements of a JSON list, one at a time since some files have gigabytes; of JSON lines, a bad one as text.

    Args:
        path: of the file.
        key: the list is the value of this key, if the file is not a list itself.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it is not such a file.
    """
    with path.open(encoding="utf-8-sig") as file:
        try:
            head = file.read(_BUFFER)
            match = re.match(r"\s*\[", head)
            whole = match is not None
            if match is None and key is not None:
                match = re.search(rf'"{re.escape(key)}"\s*:\s*\[', head)
                if match is None:
                    raise UserError(
                        f"{path}: found {head[:80]!a}, expected a list, or a list {key!r} near the beginning"
                    )
            if match is None:
                file.seek(0)
                for line in iter(lambda: file.readline(_LONGEST), ""):
                    if len(line) == _LONGEST:
                        raise UserError(
                            f"{path}: a line of more than {_LONGEST:,} characters; expected a list, or JSON lines"
                        )
                    if line.strip():
                        yield _json_or_text(line)
            else:
                yield from _elements(path, head[match.end() :], lambda: file.read(_BUFFER), whole)
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8: {error}") from None


def _elements(path: Path, text: str, read: Callable[[], str], whole: bool) -> Iterator[Any]:
    """Of a list that begins in `text`; `read` gives what follows, in the end nothing. It may be the `whole` file."""
    decode, at, number = json.JSONDecoder().raw_decode, 0, 0
    while True:
        at = _BETWEEN.match(text, at).end()  # type: ignore[union-attr]
        if text.startswith("]", at):
            after = filter(None, map(str.strip, chain([text[at + 1 :]], iter(read, ""))))
            if whole and (more := next(after, "")):
                raise UserError(f"{path}: found {more[:80]!a} after its list; expected one list, or JSON lines")
            return
        problem: Exception | str = "no comma and no end of the list follows it"
        try:
            value, end = decode(text, at)
        except (ValueError, RecursionError) as error:
            problem, end = error, len(text)
        if _AFTER.match(text, end):
            yield value
            at, number = end, number + 1
            continue
        # it may be cut, even where what is there can be read: 0 of 0.5
        more = read() if len(text) - at < _LONGEST else ""
        if not more:
            raise UserError(f"{path}: not valid JSON at element {number}: {problem}")
        text, at = text[at:] + more, 0


def _json_or_text(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return line
