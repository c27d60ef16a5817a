"""`merge`: write a run's trained model."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from lit_eemllm.cli.common import config_of, takes_config, verb


def add(verbs: Any) -> None:
    examples = (
        "lit-eemllm merge runs/demo/ee_mllm-0 --to merged",
        "lit-eemllm merge runs/demo/llava-0 --to merged --checkpoint runs/demo/llava-0/checkpoints/step-1000.ckpt",
    )
    text = "Write a run's trained model. One that loads without this package, of mechanism llava: convert RUN --self-contained."
    made = takes_config(verb(verbs, "merge", _merge, text, *examples), checkpoint=True)
    made.add_argument("--to", type=Path, required=True, metavar="DIR", help="a new folder")
    made.add_argument("--adapter", action="store_true", help="only the decoder's LoRA adapter, as peft loads it")


def _merge(args: Namespace) -> None:
    config = config_of(args)
    from lit_eemllm.formats.merge import merge

    merge(config, args.checkpoint, args.to, args.adapter)
