"""The only doors for code of your own: ``--import FILE`` on the command line, and entry points of installed packages.

A key of a configuration, a recipe, a data set or a checkpoint never names anything to import.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib.metadata import entry_points
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from lit_eemllm.errors import UserError
from lit_eemllm.shipped import find, nowhere

GROUP = "lit_eemllm.plugins"
"""Entry point group; an entry names a module, which registers what it has when it is imported."""


def import_user_code(files: Iterable[Path]) -> None:
    """Run installed plugins, then the user's own files, which register themselves. Their errors keep the traceback."""
    for plugin in entry_points(group=GROUP):
        plugin.load()
    for file in files:
        run_file(file)


def run_file(file: Path) -> ModuleType:
    """Run a Python file as a module. Raises UserError if there is none."""
    found = find(file)
    spec = spec_from_file_location(f"lit_eemllm_user_{file.stem}", found) if found.is_file() else None
    if spec is None or spec.loader is None:
        raise UserError(f"{file}: no such Python file (.py){'' if found.is_file() else nowhere(file)}")
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and loader processes look modules up by name
    spec.loader.exec_module(module)
    return module
