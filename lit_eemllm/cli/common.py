"""What verbs share: how one is added, the arguments that several take, and the configuration that these name."""

from __future__ import annotations

import json
import re
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_eemllm.errors import ConfigError

if TYPE_CHECKING:
    from lit_eemllm.config.keys import Config

_OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")


# --- arguments
def group(verbs: Any, name: str, text: str) -> Any:
    """Add a verb that has verbs of its own, such as `shards`; returns what those are added to."""
    return verbs.add_parser(name, help=text, description=text).add_subparsers(metavar="VERB", required=True)


def verb(verbs: Any, name: str, run: Callable[[Namespace], int | None], text: str, *examples: str) -> ArgumentParser:
    """Add a verb, of which `run` is the function; returns its parser, for its arguments."""
    looks = {"epilog": "examples:\n  " + "\n  ".join(examples), "formatter_class": RawDescriptionHelpFormatter}
    made = verbs.add_parser(name, help=text, description=text, allow_abbrev=False, **looks)
    made.set_defaults(run=run, parser=made, imports=None)
    return made


NAMED: list[tuple[str, Any]] = []
"""Arguments that are names of something that other files register, with the word for it in `completion`."""


def named(kind: str, argument: Any) -> None:
    """What a shell completes an argument by."""
    NAMED.append((kind, argument))


def takes_imports(made: ArgumentParser) -> ArgumentParser:
    """Add ``--import``."""
    text = "a Python file of your own that registers mechanisms, connectors, backends, encoders, decoders, metrics or sources; repeatable"
    made.add_argument("--import", dest="imports", type=Path, action="append", default=[], metavar="FILE", help=text)
    return made


def takes_config(made: ArgumentParser, checkpoint: bool = False) -> ArgumentParser:
    """Add what names a configuration (`config_of`), and with `checkpoint` what names the weights."""
    text = "YAML files, merged from left to right, or a run directory; then overrides, which win"
    made.add_argument("inputs", nargs="*", metavar="CONFIG|key=value", help=text)
    takes_imports(made)
    if checkpoint:
        text = "default: the run's newest; none = before any training"
        made.add_argument("--checkpoint", metavar="FILE", help=text)
    return made


# --- from arguments to a configuration
def config_of(args: Namespace, only: Path | None = None) -> Config:
    """The configuration that a verb was given. only: this file of it, with all overrides."""
    from lit_eemllm.config import load_config
    from lit_eemllm.names import check_names, check_options
    from lit_eemllm.plugins import warn_if_changed

    files, overrides = files_and_overrides(args.inputs)
    config = load_config(files if only is None else [only], overrides, checks=[check_names, check_options])
    warn_if_changed(Path(config.out))
    return config


def separated(inputs: Sequence[str]) -> tuple[list[str], list[str]]:
    """What is no override, and the overrides."""
    overrides = [text for text in inputs if _OVERRIDE.match(text)]
    return [text for text in inputs if not _OVERRIDE.match(text)], overrides


def files_and_overrides(inputs: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Those of a configuration. A run directory stands for its config.yaml, with `out` set to where it lies now."""
    names, overrides = separated(inputs)
    paths = [Path(name) for name in names]
    if not paths:
        raise ConfigError("name a configuration file or a run directory; key=value overrides follow it")
    for path in paths:
        if path.is_dir() and not (path / "config.yaml").is_file():
            raise ConfigError(_no_run(path))
    moved = [f"out={json.dumps(str(path))}" for path in paths if path.is_dir()]
    return [path / "config.yaml" if path.is_dir() else path for path in paths], moved + overrides


def _no_run(folder: Path) -> str:
    """What a folder is that stands where a run directory could."""
    if any(folder.glob("*.tar")):
        return f"{folder}: a folder of shards, expected a configuration or a run directory; data are named by a key: CONFIG data.train={folder}"
    files = sorted(str(file) for file in folder.glob("*.yaml"))
    inside = f" Configurations in it: {', '.join(files[:3])}{', ...' * (len(files) > 3)}" if files else ""
    return f"{folder}: no run directory: there is no config.yaml in it.{inside}"
