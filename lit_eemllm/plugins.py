"""The only doors for code of your own: ``--import FILE`` on the command line, and entry points of installed packages.

A key of a configuration, a recipe, a data set or a checkpoint never names anything to import. A run records which files it was
given, to say so when one is missing or has changed; nothing is ever run because a run names it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Iterable
from importlib.metadata import entry_points
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from lit_eemllm.console import read_object, write_atomically
from lit_eemllm.errors import UserError
from lit_eemllm.shipped import find, nowhere

GROUP = "lit_eemllm.plugins"
"""Entry point group; an entry names a module, which registers what it has when it is imported."""
RECORD = "imports.json"
"""In a run directory: the files that were given with --import when it was last trained, and their digests."""
imported: dict[str, str] = {}
"""File, as it was named -> its SHA-256, of those that this process has run."""
_log = logging.getLogger("lit_eemllm")


def import_user_code(files: Iterable[Path]) -> None:
    """Run installed plugins, then the user's own files, which register themselves. Their errors keep the traceback."""
    for plugin in entry_points(group=GROUP):
        plugin.load()
    for file in files:
        run_file(file)
        imported[str(file)] = hashlib.sha256(find(file).read_bytes()).hexdigest()


def record(run: Path) -> None:
    """Write into a run directory what this process was given, if it was given anything."""
    if imported:
        write_atomically(run / RECORD, json.dumps(imported, indent=2))


def made_with(run: Path) -> str:
    """What follows the message that a name is unknown: with which files the run was made that it has not been given now."""
    missing = [f"--import {file} (sha256 {digest[:12]})" for file, digest in _others(run).items()]
    return f"; {run} was made with {' '.join(missing)}: give it again" if missing else ""


def warn_if_changed(run: Path) -> None:
    """Where files are given, and the run was made with others."""
    if imported and (others := _others(run)):
        was, now = (
            ", ".join(f"{file} (sha256 {digest[:12]})" for file, digest in files.items())
            for files in (others, imported)
        )
        _log.warning(f"warning: {run} was made with --import {was}; given now is {now}")


def _others(run: Path) -> dict[str, str]:
    """What the run was made with, without files that are given now, wherever they lie."""
    file = run / RECORD
    if not file.is_file():
        return {}
    found = read_object(file, mend="it only tells with which files the run was made: remove it")
    return {name: digest for name, digest in found.items() if str(digest) == digest and digest not in imported.values()}


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
