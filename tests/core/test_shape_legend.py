"""Every shape suffix in the package is made of letters that a legend explains, that of layout.py or one at the top of the file."""

import ast
import re
from pathlib import Path

import lit_eemllm
from lit_eemllm import layout

PACKAGE = Path(lit_eemllm.__file__).parent
UNEXPLAINED = {"attention/base.py": {"M"}}  # query rows of all heads that share a key head


def legend(docstring: str | None) -> set[str]:
    """Its letters: each begins an indented line or follows four spaces, before what it means."""
    _, _, lines = (docstring or "").partition("Legend of shape")
    return {letter for line in re.findall(r"\n {4}.*", lines) for letter in re.findall(r" {4}(\w) ", line)}


def shapes(code: str) -> dict[str, str]:
    """Variables and arguments -> the part after the last underscore, if only that has capital letters."""
    nodes = list(ast.walk(ast.parse(code)))
    names = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    names |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    parts = {name: re.fullmatch(r"_?[a-z][a-z0-9_]*_(\w*[A-Z]\w*)", name) for name in names}
    return {name: part[1] for name, part in parts.items() if part and not name.startswith("visit_")}  # of ast visitors


def test_every_letter_is_in_a_legend():
    assert legend("Legend of shapes:\n    A an x    b more, of c d\nD no") == {"A", "b"}
    assert shapes("x_RNH = a_list = 1\ndef f(_y_1K, NAME_X): z_Th: int").keys() == {"x_RNH", "_y_1K", "z_Th"}
    shared, found = legend(layout.__doc__) | set("0123456789"), {}
    for file in PACKAGE.rglob("*.py"):
        code, path = file.read_text(encoding="utf-8"), file.relative_to(PACKAGE).as_posix()
        known = shared | legend(ast.get_docstring(ast.parse(code))) | UNEXPLAINED.get(path, set())
        if unknown := {name for name, part in shapes(code).items() if not set(part) <= known}:
            found[path] = unknown
    assert found == {}
