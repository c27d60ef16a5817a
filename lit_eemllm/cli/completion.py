"""`completion`: what makes a shell complete verbs, options and names of files."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace, _SubParsersAction
from pathlib import Path
from typing import Any

from lit_eemllm.cli.common import verb


def add(verbs: Any) -> None:
    examples = (
        "lit-eemllm completion bash > ~/.local/share/bash-completion/completions/lit-eemllm",
        'lit-eemllm completion zsh > "${fpath[1]}/_lit-eemllm"',
    )
    text = "Print what makes a shell complete verbs, options and names of files."
    made = verb(verbs, "completion", _completion, text, *examples)
    made.add_argument("shell", choices=("bash", "zsh"))


def _completion(args: Namespace) -> None:
    import shtab

    from lit_eemllm.cli import build_parser

    parser = build_parser()
    _complete_files(parser, shtab.FILE)
    sys.stdout.write(shtab.complete(parser, shell=args.shell))


def _complete_files(parser: ArgumentParser, files: Any) -> None:
    """Mark in all verbs what takes names of files: paths, and configurations, which may be folders too."""
    for action in parser._actions:
        if isinstance(action, _SubParsersAction):
            for made in action.choices.values():
                _complete_files(made, files)
        elif action.type is Path or action.dest == "inputs":
            action.complete = files  # type: ignore[attr-defined]
