"""What the package uses of other libraries beyond their documentation (`lit_eemllm/compat`), each use alone.

A failure names the library, its version and what it used to be, so nothing that may be broken is imported before a contract is
checked. Every contract is also tried on a library that breaks it.
"""

from __future__ import annotations

import ast
import inspect
import os
import re
import subprocess
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest
from contracts import CONTRACTS, LIBRARIES, compat

for library in (*LIBRARIES, "hooks"):
    pytest.register_assert_rewrite(name := f"contracts.{library}")
    import_module(name)

PACKAGE = Path(__file__).parents[2] / "lit_eemllm"


@pytest.mark.parametrize("name", CONTRACTS)
def test_the_library_is_as_it_was(name, request):
    CONTRACTS[name].hold(request)


@pytest.mark.parametrize("name", CONTRACTS)
def test_a_library_that_broke_is_named(name, request, monkeypatch):
    for fixture in inspect.signature(CONTRACTS[name].check).parameters:
        request.getfixturevalue(fixture)  # of the sound library
    broken = CONTRACTS[name]
    broken.broken(monkeypatch)
    distribution = LIBRARIES[broken.library]
    with pytest.raises(pytest.fail.Exception) as failure:
        broken.hold(request)
    assert str(failure.value).startswith(f"{distribution} {version(distribution)}: {broken.was}. Mend")


def defined(tree: ast.AST) -> set[str]:
    """Names that a file gives to functions, classes, variables and attributes."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.attr if isinstance(node, ast.Attribute) else node.id)
    return names


def private_uses(files: dict[str, str]) -> list[str]:
    """Where files use a private name that none of them defines, or import from a private module: those of others."""
    trees = {name: ast.parse(text) for name, text in files.items()}
    ours = {"_exit", *(name for tree in trees.values() for name in defined(tree))}
    found = []
    for file, tree in trees.items():
        for node in ast.walk(tree):
            names: list[str] = []
            if isinstance(node, ast.Attribute):
                names = [node.attr] if node.attr not in ours else []
            elif (
                isinstance(node, ast.ImportFrom)
                and node.level == 0
                and not (node.module or "").startswith("lit_eemllm")
            ):
                names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            elif isinstance(node, ast.Import):
                names = [part for alias in node.names for part in alias.name.split(".")]
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in (
                "getattr",
                "hasattr",
                "setattr",
                "delattr",
            ):
                names = [
                    word.value for word in node.args[1:2] if isinstance(word, ast.Constant) and word.value not in ours
                ]
            found += [f"{file}:{node.lineno}: {name}" for name in names if re.match(r"_[^_]", name)]
    return found


def package_files() -> dict[str, str]:
    files = [path for path in PACKAGE.rglob("*.py") if "compat" not in path.relative_to(PACKAGE).parts]
    tools = [*(PACKAGE.parent / "tools").glob("*.py"), *(PACKAGE.parent / "data_recipes").glob("*.py")]
    return {str(path.relative_to(PACKAGE.parent)): path.read_text(encoding="utf-8") for path in (*files, *tools)}


def test_private_names_of_others_are_used_in_compat_alone():
    assert private_uses(package_files()) == []
    bad = "import torch._dynamo\nfrom peft.x import _y\nloader._iterator\nself._mine = 1\nself._mine\nhasattr(p, '_z')"
    assert private_uses({"a.py": bad}) == [
        f"a.py:{n}: {name}" for n, name in ((1, "_dynamo"), (2, "_y"), (3, "_iterator"), (6, "_z"))
    ]


DOCUMENTED = {
    "torch": r"torch(\.(nn|utils|distributed|optim|profiler)(\..*)?)?",
    "transformers": r"transformers(\.(modeling_outputs|utils))?",
    "lightning": r"lightning(\.pytorch|\.fabric)?(\.(callbacks|loggers|profilers|strategies|utilities\..*|plugins\.io|core\.optimizer))?",
    "megatron": r"megatron\.energon",
    "peft": r"peft",
    "bitsandbytes": r"bitsandbytes",
}
"""Modules whose names their documentation uses."""


def test_modules_that_may_move_are_imported_in_compat_alone():
    found = []
    for file, text in package_files().items():
        for node in ast.walk(ast.parse(text)):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                modules = [node.module]
            for module in modules:
                pattern = DOCUMENTED.get(module.partition(".")[0])
                if pattern and not re.fullmatch(pattern, module):
                    found.append(f"{file}:{node.lineno}: {module}")
    assert found == []


def test_the_list_names_every_use():
    listed = set(re.findall(r"`(\w+)`", (PACKAGE / "compat" / "README.md").read_text(encoding="utf-8")))
    contracts = "".join(file.read_text(encoding="utf-8") for file in (Path(__file__).parent / "contracts").glob("*.py"))
    for library in LIBRARIES:
        module = compat(library)
        ours = {n for n, x in vars(module).items() if getattr(x, "__module__", "") == module.__name__}
        uses = ours | set(getattr(module, "__all__", ()))
        assert uses <= listed, f"compat/README.md does not say why {sorted(uses - listed)} of {library}"
        tested = set(re.findall(r"\.(\w+)", contracts))
        assert uses <= tested, f"no contract uses {sorted(uses - tested)} of {library}"


@pytest.mark.slow
def test_a_name_that_is_gone_from_the_start_is_named_too(tmp_path):
    """Most breaks are imports that fail, before any test has begun."""
    (tmp_path / "newer.py").write_text("import megatron.energon.state\ndel megatron.energon.state.FlexState\n")
    line = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "newer",
        "-k",
        "as_it_was and (loader_counts or in_place or naflex)",
    ]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([*line, __file__], env=environment, capture_output=True, text=True, timeout=200)
    was = CONTRACTS["a_loader_counts_and_saves"].was
    assert f"Failed: megatron-energon {version('megatron-energon')}: {was}. Mend" in done.stdout
    assert "cannot import name 'FlexState'" in done.stdout and "1 failed, 2 passed" in done.stdout, done.stdout
