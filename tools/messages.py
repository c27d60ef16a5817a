"""What the program may say: the texts of its errors, warnings and notes, read from the source.

    python tools/messages.py [WORDS]      # all, or those that hold the words; … stands for what is filled in

docs/conf.py lists them by this on the page docs/messages.md, and tests/test_docs_site.py holds that page to have all of them.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SPOKEN = {"append", "error", "fail", "info", "print", "say", "warn", "warning"}
"""What says the texts that it is called with, or collects them for an error; as errors do."""
COMPLAINT = re.compile(
    r"\b(cannot|could|expected|fails|found|must|needs?|needed|no|not|nothing|off|refused|required|set|stops?|this mechanism|unknown|warning|write)\b"
)
"""Has a message that is said elsewhere than where it stands."""
SILENT = {"add", "add_argument", "compile", "filterwarnings"}
"""Functions that write help, and those called with help and patterns."""
SENTENCE = re.compile(r"[^<{#!].*[a-z]{2}.* .*[a-z]{2}")
"""No page and no template."""


def text_of(node: ast.AST) -> str:
    """A string of the source, … in place of what is computed."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else "…"
    if isinstance(node, ast.JoinedStr):
        return "".join(map(text_of, node.values))
    return text_of(node.left) + text_of(node.right) if isinstance(node, ast.BinOp) else "…"


def said_in(node: ast.AST, spoken: bool = False) -> Iterator[tuple[int, str]]:
    """Line and text of the messages in a tree, those that are part of another included."""
    called = vars(node.func).get("id", vars(node.func).get("attr", "")) if isinstance(node, ast.Call) else ""
    docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    if docstring or called in SILENT - {"add"} or (isinstance(node, ast.FunctionDef) and node.name in SILENT):
        return
    spoken = spoken or called in SPOKEN or called.endswith("Error") or isinstance(node, ast.Raise)
    text = re.sub("…+", "…", " ".join(text_of(node).split()))
    if SENTENCE.match(text) and (spoken or COMPLAINT.search(text)):
        yield vars(node)["lineno"], text
    parts: Iterator[ast.AST] = iter([node])
    if text.strip("… "):  # a whole string: others are only in what is computed
        parts = (part for part in ast.walk(node) if isinstance(part, ast.FormattedValue))
    for part in parts:
        for child in ast.iter_child_nodes(part):
            yield from said_in(child, spoken)


@cache
def messages(*within: str) -> dict[str, dict[str, int]]:
    """The texts of each file that has any, and the line of each.

    Args:
        within: only these files and folders, as they are named in lit_eemllm/ or beside it.
    """
    files = sorted(file for folder in ("lit_eemllm", "data_recipes") for file in (ROOT / folder).rglob("*.py"))
    found = {}
    for file in files:
        name = file.relative_to(ROOT).as_posix()
        if not within or name.removeprefix("lit_eemllm/").startswith(within):
            found[name] = {text: line for line, text in said_in(ast.parse(file.read_text(encoding="utf-8")))}
    return {name: texts for name, texts in found.items() if texts}


def quoted(page: str) -> dict[str, str]:
    """The section of each message that a page explains: an item of a list that begins with its fixed words."""
    sections = re.findall(r"^## (.*?)$(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    return {quote: title for title, body in sections for quote in re.findall(r"^- `([^`]+)`\\$", body, re.MULTILINE)}


def matching(quote: str) -> re.Pattern[str]:
    """Texts that have the words of a quote, something in place of its …"""
    return re.compile(".+?".join(map(re.escape, quote.split("…"))), re.DOTALL)


if __name__ == "__main__":
    words = [word.lower() for word in sys.argv[1:]]
    for file, texts in messages().items():
        for text, line in texts.items():
            if all(word in text.lower() for word in words):
                print(f"{file}:{line}: {text}")
