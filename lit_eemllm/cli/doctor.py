"""`doctor`: the machine, versions and backends."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from lit_eemllm.cli.common import takes_imports, verb


def add(verbs: Any) -> None:
    examples = (
        "lit-eemllm doctor --head-size 128 --json > bug-report.json",
        "lit-eemllm doctor",
    )
    text = "Show the machine, versions, and which attention backends really run here."
    made = takes_imports(verb(verbs, "doctor", _doctor, text, *examples))
    text = "such as cpu or cuda:1; default: cuda if there is any, else cpu"
    made.add_argument("--device", metavar="DEVICE", help=text)
    made.add_argument("--head-size", type=int, default=64, metavar="H", help="of the decoder, default 64")
    made.add_argument("--json", action="store_true", help="all of it as JSON, for bug reports")


def _doctor(args: Namespace) -> None:
    from lit_eemllm.doctor import doctor

    doctor(args.device, args.head_size, args.json)
