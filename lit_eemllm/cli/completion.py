"""`completion`: what makes a shell complete verbs, options, names of files, and those that options expect."""

from __future__ import annotations

import sys
from argparse import Namespace
from typing import Any

from lit_eemllm.cli.common import NAMED, verb


def add(verbs: Any) -> None:
    examples = (
        "lit-eemllm completion bash > ~/.local/share/bash-completion/completions/lit-eemllm",
        'lit-eemllm completion zsh > "${fpath[1]}/_lit-eemllm"',
    )
    text = "Print what makes a shell complete verbs, options, names of files, mechanisms, sources and shapes; anew after an update."
    made = verb(verbs, "completion", _completion, text, *examples)
    made.add_argument("shell", choices=("bash", "zsh"))


def _completion(args: Namespace) -> None:
    import shtab

    from lit_eemllm.cli import Parser, build_parser

    parser, known = build_parser(), _known()
    for argument in Parser.files:
        argument.complete = shtab.FILE
    for kind, argument in NAMED:
        argument.choices = known[kind]  # nothing is parsed with them
    sys.stdout.write(shtab.complete(parser, shell=args.shell))


def _known() -> dict[str, list[str]]:
    """Names of each kind. Takes seconds to import."""
    from lit_eemllm import bench
    from lit_eemllm.attention import registered_backends
    from lit_eemllm.cost import shapes, weightless
    from lit_eemllm.data import sources
    from lit_eemllm.inputs.video import MARKERS
    from lit_eemllm.mechanisms import PRESETS
    from lit_eemllm.shipped import names

    return {
        "backends": ["auto", *registered_backends()],
        "files": names(),
        "markers": [*MARKERS],
        "mechanisms": [*PRESETS],
        "shapes": [*weightless.SHAPES, *shapes.PUBLISHED],
        "sizes": [*bench.SHAPES],
        "sources": sources.names(),
    }
