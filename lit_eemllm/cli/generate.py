"""`generate`: answer one prompt."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from lit_eemllm.cli.common import config_of, takes_config, verb


def add(verbs: Any) -> None:
    examples = (
        'lit-eemllm generate runs/demo/ee_mllm-0 --image photo.jpg --prompt "What is this?"',
        'lit-eemllm generate runs/demo/llava-0 --image left.jpg --image right.jpg --prompt "Which has more?" --temperature 0.7',
    )
    made = takes_config(
        verb(verbs, "generate", _generate, "Answer one prompt about images and videos.", *examples), checkpoint=True
    )
    made.add_argument("--image", type=Path, action="append", default=[], metavar="FILE", help="repeatable")
    made.add_argument(
        "--video", type=Path, action="append", default=[], metavar="FILE", help="repeatable; see eval.video"
    )
    made.add_argument(
        "--prompt", required=True, help="images and videos come first, or where the prompt says <image>, <video>"
    )
    made.add_argument("--max-new-tokens", type=int, metavar="N", help="default: eval.max_new_tokens of the run")
    made.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0, the default, is greedy")


def _generate(args: Namespace) -> None:
    config = config_of(args)
    from lit_eemllm.evaluation.run import generate

    tokens = config.eval.max_new_tokens if args.max_new_tokens is None else args.max_new_tokens
    generate(config, args.checkpoint, args.image, args.prompt, tokens, args.temperature, args.video)
