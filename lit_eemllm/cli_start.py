"""Verbs of the command line for a start from nothing: `demo`, `configs`, and `shrink`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from textwrap import shorten
from typing import Any

from .errors import UserError
from .terminal import say


def _demo(args: Namespace) -> int:
    from .demo import check, demo

    if args.check:
        return 0 if check(args.journey) else 2
    demo(args.journey, args.force)
    return 0


def _configs_list(args: Namespace) -> None:
    from .shipped import ROOT, about, find, names

    wanted = [name for name in names() if name.startswith(args.start)]
    if not wanted:
        raise UserError(f"configs list {args.start}: no name begins so; without it all are listed")
    longest = max(map(len, wanted))
    for name in wanted:
        own = "(yours wins) " if find(name).resolve() != ROOT / name else ""
        say(f"{name:{longest}}  {shorten(own + about(name), 120 - longest, placeholder=' ...')}")


def _configs_show(args: Namespace) -> None:
    from .shipped import show

    say(show(args.name), end="")


def _configs_copy(args: Namespace) -> None:
    from .shipped import copy

    for file in copy(args.names, args.to):
        say(file)


def _shrink(args: Namespace) -> None:
    from .config import load_config
    from .console import writing
    from .shrink import shrink

    files = [text for text in args.inputs if "=" not in text]
    config = load_config(files, [text for text in args.inputs if "=" in text])
    with writing(args.out):
        made = shrink(config, args.out, args.published)
    verb = "estimate" if args.published else "fit"
    say(f"{made}: goes behind the others: lit-eemllm {verb} {' '.join(args.inputs)} {made}")


def add_verbs(to: Any, group: Callable[[str, str], Any], verb: Callable[..., ArgumentParser]) -> None:
    """Add them to the command line; `group` and `verb` are those of `cli.build_parser`."""
    example = "lit-eemllm demo\n  lit-eemllm demo compare"
    text = "Train and ask a tiny model on a CPU, from nothing; what it needs is checked first. Writes into runs/."
    made = verb(to, "demo", _demo, text, example)
    text = "compare: trains longer, with three seeds each; mechanisms: every mechanism, one seed each"
    made.add_argument("journey", choices=("demo", "compare", "mechanisms"), nargs="?", default="demo", help=text)
    made.add_argument("--check", action="store_true", help="only try what it needs")
    made.add_argument("--force", action="store_true", help="go on where a check has failed")

    configs = group("configs", "List, show or copy the configurations and recipes that come with lit_eemllm.")
    example = "lit-eemllm configs list configs/sweeps"
    made = verb(configs, "list", _configs_list, "Print their names, which work in every folder.", example)
    made.add_argument("start", nargs="?", default="", metavar="NAME", help="those that begin so; default: all")
    example = "lit-eemllm configs show configs/demo/ee_mllm.yaml"
    text = "Print a file as it is; with all that is merged into it: config show."
    verb(configs, "show", _configs_show, text, example).add_argument("name", metavar="NAME")
    example = "lit-eemllm configs copy configs/demo\n  lit-eemllm configs copy data_recipes/blends --to shards"
    text = "Copy files and folders, to change them: your own file wins over the one of the same name."
    made = verb(configs, "copy", _configs_copy, text, example)
    made.add_argument("names", nargs="+", metavar="NAME")
    text = "folder for the files and for what is in folders; default: the same names in the current folder, as files need that name others"
    made.add_argument("--to", type=Path, metavar="DIR", help=text)

    example = "lit-eemllm shrink tiny configs/presets/ee_mllm_7b_pretrain.yaml"
    text = "Make a preset small, for two steps on a CPU: tiny parts, data, and overrides to put behind it."
    made = verb(to, "shrink", _shrink, text, example)
    made.add_argument("out", type=Path, metavar="DIR", help="for the parts, the data and shrink.yaml")
    made.add_argument("inputs", nargs="+", metavar="CONFIG|key=value", help="as for fit")
    text = "config files of the parts in their published size and nothing else: for estimate, where no hub is in reach"
    made.add_argument("--published", action="store_true", help=text)
