"""`config show` and `config check`: configurations, printed or checked."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from lit_eemllm.cli.common import config_of, files_and_overrides, group, takes_config, verb
from lit_eemllm.errors import ConfigError
from lit_eemllm.terminal import say


def add(verbs: Any) -> None:
    config = group(verbs, "config", "Show or check configurations.")
    examples = (
        "lit-eemllm config show configs/demo/ee_mllm.yaml optim.lr=1e-3",
        "lit-eemllm config show runs/demo/ee_mllm-0",
    )
    takes_config(verb(config, "show", _show, "Print what `fit` would use, every key explained.", *examples))
    examples = (
        "lit-eemllm config check configs/demo/ee_mllm.yaml configs/demo/llava.yaml",
        "lit-eemllm config check configs/stages/finetune.yaml optim.tuning.llm=lora",
    )
    takes_config(verb(config, "check", _check, "Check each file on its own, list all mistakes.", *examples))


def _show(args: Namespace) -> None:
    config = config_of(args)
    from lit_eemllm.config import to_yaml

    print(to_yaml(config, comments=True), end="")  # YAML escapes by itself


def _check(args: Namespace) -> None:
    problems = []
    for file in files_and_overrides(args.inputs)[0]:
        try:
            config_of(args, file)
            say(f"{file}: good")
        except ConfigError as error:
            problems.append(f"{file}: {error}")
            if ": required, but not set" in str(error):
                text = "if it is an overlay, to be merged onto another file, check them together"
                problems[-1] += f"\n  {text}: lit-eemllm config show OTHER.yaml {file}"
    if problems:
        raise ConfigError("\n".join(problems))
