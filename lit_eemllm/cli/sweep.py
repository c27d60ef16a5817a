"""`sweep`: run what is left of a sweep."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from lit_eemllm.cli.common import separated, takes_imports, verb
from lit_eemllm.errors import ConfigError


def add(verbs: Any) -> None:
    examples = (
        "lit-eemllm sweep configs/sweeps/aligner.yaml --jobs 2",
        "lit-eemllm sweep configs/sweeps/mechanisms.yaml seeds=[0] out=runs/quick optim.max_steps=100 --dry-run",
    )
    text = "Run what is left of a sweep: all its cells and seeds, then the report."
    made = takes_imports(verb(verbs, "sweep", _sweep, text, *examples))
    text = "a sweep file; then overrides of its keys, such as seeds, or of the configurations of all its runs"
    made.add_argument("inputs", nargs="*", metavar="SWEEP|key=value", help=text)
    made.add_argument("--jobs", type=int, metavar="N", help="runs at once; default 1, with --slurm all")
    made.add_argument("--dry-run", action="store_true", help="show the runs and what would be done with them")
    made.add_argument("--slurm", action="store_true", help="on a Slurm cluster; needs the extra `slurm`")


def _sweep(args: Namespace) -> int:
    files, overrides = separated(args.inputs)
    if len(files) != 1:
        raise ConfigError(f"sweep: expected one sweep file, found {' '.join(files) or 'none'}")
    from lit_eemllm.sweep import sweep

    return sweep(Path(files[0]), overrides, args.jobs, args.dry_run, args.slurm, args.imports)
