"""Of the tests themselves."""

import ast
from pathlib import Path

from lib.order import LONGEST

FILES = sorted(Path(__file__).parent.rglob("test_*.py"))


def imported(text: str) -> set[str]:
    """First words of the modules that a file imports."""
    nodes = list(ast.walk(ast.parse(text)))
    plain = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return {name.partition(".")[0] for name in plain + [n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)]}


def test_no_test_module_imports_another():
    assert imported("import a.b, c as d\ndef f():\n    from test_e import g") == {"a", "c", "test_e"}
    found = {file.name: imported(file.read_text(encoding="utf-8")) for file in FILES}
    assert {name: others for name, modules in found.items() if (others := modules & {f.stem for f in FILES})} == {}


def test_modules_that_begin_first_are_there():
    assert set(LONGEST) <= {file.name for file in FILES}
