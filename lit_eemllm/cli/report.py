"""`report`: compare runs."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from lit_eemllm.cli.common import verb


def add(verbs: Any) -> None:
    examples = (
        "lit-eemllm report runs/sweeps/aligner",
        "lit-eemllm report runs/a-0 runs/a-1 runs/b-0 --baseline runs/b-0",
    )
    text = "Compare runs, or a sweep's rows, in a table, a page and a picture."
    made = verb(verbs, "report", _report, text, *examples)
    made.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories, or one sweep's directory")
    text = "a row, by its name or one of its runs, that the others are compared with; default: the sweep's"
    made.add_argument("--baseline", metavar="ROW", help=text)
    text = "default: report in the sweep's directory, else runs/report"
    made.add_argument("--out", type=Path, metavar="DIR", help=text)


def _report(args: Namespace) -> None:
    from lit_eemllm.report import report

    report(args.runs, args.out, baseline=args.baseline)
