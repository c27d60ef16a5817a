"""`completion`: what makes a shell complete verbs, options and names of files."""

from __future__ import annotations

import sys
from argparse import Namespace
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

    from lit_eemllm.cli import Parser, build_parser

    parser = build_parser()
    for argument in Parser.files:
        argument.complete = shtab.FILE
    sys.stdout.write(shtab.complete(parser, shell=args.shell))
