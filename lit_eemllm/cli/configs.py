"""`configs list`, `show` and `copy`: what comes with the package."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from textwrap import shorten
from typing import Any

from lit_eemllm.cli.common import group, named, verb
from lit_eemllm.errors import UserError
from lit_eemllm.terminal import say


def add(verbs: Any) -> None:
    configs = group(verbs, "configs", "List, show or copy the configurations and recipes that come with lit_eemllm.")
    examples = (
        "lit-eemllm configs list configs/sweeps",
        "lit-eemllm configs list data_recipes",
    )
    made = verb(configs, "list", _list, "Print their names, which work in every folder.", *examples)
    made.add_argument("start", nargs="?", default="", metavar="NAME", help="those that begin so; default: all")
    examples = (
        "lit-eemllm configs show configs/demo/ee_mllm.yaml",
        "lit-eemllm configs show configs/sweeps/table6_7b.yaml",
    )
    text = "Print a file as it is; with all that is merged into it: config show."
    named("files", verb(configs, "show", _show, text, *examples).add_argument("name", metavar="NAME"))
    examples = "lit-eemllm configs copy configs/demo", "lit-eemllm configs copy data_recipes/blends --to shards"
    text = "Copy files and folders, to change them: your own file wins over the one of the same name."
    made = verb(configs, "copy", _copy, text, *examples)
    named("files", made.add_argument("names", nargs="+", metavar="NAME"))
    text = "folder for the files and for what is in folders; default: the same names in the current folder, as files need that name others"
    made.add_argument("--to", type=Path, metavar="DIR", help=text)


def _list(args: Namespace) -> None:
    from lit_eemllm.shipped import ROOT, about, find, names

    wanted = [name for name in names() if name.startswith(args.start)]
    if not wanted:
        raise UserError(f"configs list {args.start}: no name begins so; without it all are listed")
    longest = max(map(len, wanted))
    for name in wanted:
        own = "(yours wins) " if find(name).resolve() != ROOT / name else ""
        say(f"{name:{longest}}  {shorten(own + about(name), 120 - longest, placeholder=' ...')}")


def _show(args: Namespace) -> None:
    from lit_eemllm.shipped import show

    say(show(args.name), end="")


def _copy(args: Namespace) -> None:
    from lit_eemllm.shipped import copy

    for file in copy(args.names, args.to):
        say(file)
