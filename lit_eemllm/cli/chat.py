"""`chat`: talk with a run's model in the terminal."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from lit_eemllm.cli.common import config_of, takes_config, verb


def add(verbs: Any) -> None:
    examples = (
        "lit-eemllm chat runs/demo/llava-0",
        "lit-eemllm chat configs/demo/ee_mllm_f.yaml --checkpoint runs/demo/llava-0/checkpoints/step-1500.ckpt",
    )
    text = "Talk with a model about pictures, and switch the mechanism while you do."
    made = takes_config(verb(verbs, "chat", _chat, text, *examples), checkpoint=True)
    made.add_argument(
        "--max-new-tokens", type=int, default=256, metavar="N", help="of an answer (default: %(default)s)"
    )


def _chat(args: Namespace) -> None:
    config = config_of(args)
    from lit_eemllm.evaluation.chat import chat

    chat(config, args.checkpoint, args.max_new_tokens)
