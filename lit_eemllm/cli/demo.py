"""`demo`: from nothing to a model that answers."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from lit_eemllm.cli.common import verb


def add(verbs: Any) -> None:
    text = "Train and ask a tiny model on a CPU, from nothing; what it needs is checked first. Writes into runs/."
    made = verb(verbs, "demo", _demo, text, "lit-eemllm demo", "lit-eemllm demo compare")
    text = "compare: trains longer, with three seeds each; mechanisms: every mechanism, one seed each"
    made.add_argument("journey", choices=("demo", "compare", "mechanisms"), nargs="?", default="demo", help=text)
    made.add_argument("--check", action="store_true", help="only try what it needs")
    made.add_argument("--force", action="store_true", help="go on where a check has failed")


def _demo(args: Namespace) -> int:
    from lit_eemllm.demo import check, demo

    if args.check:
        return 0 if check(args.journey) else 2
    demo(args.journey, args.force)
    return 0
