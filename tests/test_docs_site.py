"""docs/ as a site: its pages are in the index, and what troubleshooting.md quotes is what the program says. The site itself: `make docs`."""

from __future__ import annotations

import ast
import re
import sys
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from messages import matching, messages, quoted, text_of

REPOSITORY = Path(__file__).parents[1]
DOCS = REPOSITORY / "docs"
PAGE = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")


@cache
def sources() -> list[ast.Module]:
    folders = [REPOSITORY / "lit_eemllm", REPOSITORY / "data_recipes"]
    return [ast.parse(file.read_text(encoding="utf-8")) for folder in folders for file in folder.rglob("*.py")]


@cache
def said() -> set[str]:
    """All texts of the program but docstrings."""
    nodes = [node for tree in sources() for node in ast.walk(tree)]
    docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    return {text_of(node) for node in nodes if isinstance(node, ast.expr) and id(node) not in docstrings}


def reasons() -> set[str]:
    """Under which samples are counted: the first argument of `SampleError` and of what makes one."""
    calls = [node for tree in sources() for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args]
    names = {"SampleError", "refusal", "_error"}
    return {text_of(call.args[0]) for call in calls if vars(call.func).get("id", vars(call.func).get("attr")) in names}


def test_every_page_is_in_the_index() -> None:
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    trees = "\n".join(re.findall(r"```\{toctree\}\n(.*?)```", index, re.DOTALL))
    listed = {entry.strip("<>") for entry in trees.split()}
    pages = {path.stem for path in DOCS.iterdir() if path.suffix in (".md", ".ipynb")} - {"index"}
    assert pages <= listed, "add it to docs/index.md"


def test_quoted_messages_are_the_programs() -> None:
    """And among those of docs/messages.md: the quotes were gathered by hand, the page by rules."""
    assert len(quoted(PAGE)) > 80
    listed = {text for texts in messages().values() for text in texts}
    assert not [quote for quote in quoted(PAGE) if not any(map(matching(quote).search, listed))]


def test_every_message_is_in_one_group() -> None:
    groups = re.findall(
        r"^```\{messages\}\n(.*?)^```", (DOCS / "messages.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    names = [name for group in groups for name in group.split()]
    assert not [name for name in names if not messages(name)], "nothing is said there any more: remove it"
    found = [file for name in names for file in messages(name)]
    assert sorted(found) == list(messages()), (
        "name the file in a group of docs/messages.md whose cause and cure fit, once"
    )


def test_every_reason_of_a_skipped_sample_is_explained() -> None:
    (table,) = re.findall(r"^\| reason .*?\n\n", PAGE, re.DOTALL | re.MULTILINE)
    explained = set(re.findall(r"`(\w+)`", " ".join(re.findall(r"^\|(.*?)\|", table, re.MULTILINE))))
    found = reasons() - {"…"}  # computed: from others
    assert len(found) > 20
    assert not [reason for reason in found if not any(map(matching(reason).fullmatch, explained))]
    assert explained <= said()
