"""`shrink`: a preset, small enough for two steps on a CPU."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from lit_eemllm.cli.common import verb
from lit_eemllm.terminal import say


def add(verbs: Any) -> None:
    examples = (
        "lit-eemllm shrink tiny configs/presets/ee_mllm_7b_pretrain.yaml",
        "lit-eemllm shrink tiny configs/stages/finetune.yaml optim.tuning.llm=lora",
    )
    text = "Make a preset small, for two steps on a CPU: tiny parts, data, and overrides to put behind it."
    made = verb(verbs, "shrink", _shrink, text, *examples)
    made.add_argument("out", type=Path, metavar="DIR", help="for the parts, the data and shrink.yaml")
    made.add_argument("inputs", nargs="+", metavar="CONFIG|key=value", help="as for fit")
    text = "config files of the parts in their published size and nothing else: for estimate, where no hub is in reach"
    made.add_argument("--published", action="store_true", help=text)


def _shrink(args: Namespace) -> None:
    from lit_eemllm.config import load_config
    from lit_eemllm.console import writing
    from lit_eemllm.shrink import shrink

    files = [text for text in args.inputs if "=" not in text]
    config = load_config(files, [text for text in args.inputs if "=" in text])
    with writing(args.out):
        made = shrink(config, args.out, args.published)
    verb = "estimate" if args.published else "fit"
    say(f"{made}: goes behind the others: lit-eemllm {verb} {' '.join(args.inputs)} {made}")
