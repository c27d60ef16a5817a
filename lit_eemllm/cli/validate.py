"""`validate`: score a run's model."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from lit_eemllm.cli.common import config_of, takes_config, verb


def add(verbs: Any) -> None:
    examples = (
        "lit-eemllm validate runs/demo/ee_mllm-0 eval.samples=100",
        "lit-eemllm validate runs/finetune eval.suite=benchmarks.yaml trainer.devices=8",
        "lit-eemllm validate runs/finetune eval.data=pope.json eval.images=val2014 eval.metric=pope",
    )
    text = "Score a run's model on data.val, on eval.data or on a suite of sets; goes on where it was killed."
    takes_config(verb(verbs, "validate", _validate, text, *examples), checkpoint=True)


def _validate(args: Namespace) -> None:
    config = config_of(args)
    from lit_eemllm.evaluation.run import validate

    validate(config, args.checkpoint)
