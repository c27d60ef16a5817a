"""The command line: one verb, one function. Nothing heavy is imported before a verb has been chosen.

Code of your own (a vision encoder, an attention backend) enters by ``--import FILE`` or by a package with an entry point
in the group ``lit_eemllm.plugins``, never by a key of a configuration, a recipe or a checkpoint.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lit_eemllm import __version__
from lit_eemllm.errors import ConfigError, UserError

_OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")


def _import_user_code(files: Sequence[Path]) -> None:
    """Run the user's own files and installed plugins, which register themselves. Their errors keep their traceback."""
    from importlib.metadata import entry_points
    from importlib.util import module_from_spec, spec_from_file_location

    for plugin in entry_points(group="lit_eemllm.plugins"):
        plugin.load()
    for file in files:
        spec = spec_from_file_location(f"lit_eemllm_user_{file.stem}", file)
        if not file.is_file() or spec is None or spec.loader is None:
            raise UserError(f"--import {file}: expected a Python file (.py)")
        module = module_from_spec(spec)
        sys.modules[spec.name] = module  # so that loader processes can find its classes
        spec.loader.exec_module(module)


def _split(inputs: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Files and overrides. A run directory stands for its config.yaml, with `out` set to where it lies now."""
    files: list[Path] = []
    overrides: list[str] = []
    moved: list[str] = []
    for text in inputs:
        if _OVERRIDE.match(text):
            overrides.append(text)
        elif Path(text).is_dir():
            if not (Path(text) / "config.yaml").is_file():
                raise ConfigError(f"{text}: not a run directory, it has no config.yaml")
            files.append(Path(text) / "config.yaml")
            moved.append(f"out={json.dumps(text)}")
        else:
            files.append(Path(text))
    if not files:
        raise ConfigError("name at least one configuration file or run directory before the key=value overrides")
    return files, moved + overrides


def _config(args: argparse.Namespace) -> Any:
    from lit_eemllm.config import check_names, load_config

    _import_user_code(args.imports)
    files, overrides = _split(args.inputs)
    return load_config(files, overrides, checks=[check_names])


def _fit(args: argparse.Namespace) -> None:
    config = _config(args)
    from lit_eemllm.training.fit import fit

    fit(config)


def _validate(args: argparse.Namespace) -> None:
    config = _config(args)
    from lit_eemllm.evaluation.run import validate

    validate(config, args.checkpoint)


def _generate(args: argparse.Namespace) -> None:
    config = _config(args)
    from lit_eemllm.evaluation.run import generate

    tokens = config.eval.max_new_tokens if args.max_new_tokens is None else args.max_new_tokens
    generate(config, args.checkpoint, args.images, args.prompt, tokens, args.temperature)


def _report(args: argparse.Namespace) -> None:
    from lit_eemllm.report import report

    report(args.runs, args.out)


def _config_show(args: argparse.Namespace) -> None:
    from lit_eemllm.config import load_config, to_yaml

    print(to_yaml(load_config(*_split(args.inputs)), comments=True), end="")


def _config_check(args: argparse.Namespace) -> None:
    """Each file on its own, with the same overrides; the mistakes of all of them."""
    from lit_eemllm.config import check_names, load_config

    _import_user_code(args.imports)
    files, overrides = _split(args.inputs)
    problems = []
    for file in files:
        try:
            load_config([file], overrides, checks=[check_names])
            print(f"{file}: good")
        except ConfigError as error:
            problems.append(f"{file}: {error}")
    if problems:
        raise ConfigError("\n".join(problems))


class _Help(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of the examples."""


def build_parser() -> argparse.ArgumentParser:
    """The whole command line. Every verb's namespace has `run`, the function to call."""
    parser = argparse.ArgumentParser(
        "lit-eemllm", description="Train multimodal LLMs whose treatment of visual tokens is an experiment variable."
    )
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    def verb(
        group: Any, name: str, run: Callable[[argparse.Namespace], None], text: str, example: str
    ) -> argparse.ArgumentParser:
        made = group.add_parser(
            name,
            help=text,
            description=text,
            epilog=f"example:\n  {example}",
            formatter_class=_Help,
            allow_abbrev=False,
        )
        made.set_defaults(run=run, parser=made)
        return made

    def takes_config(made: argparse.ArgumentParser) -> None:
        text = "YAML files, merged from left to right, or a run directory; then overrides, which win"
        made.add_argument("inputs", nargs="*", metavar="CONFIG|key=value", help=text)
        text = "a Python file of your own that registers encoders or attention backends; may be repeated"
        made.add_argument("--import", dest="imports", type=Path, action="append", default=[], metavar="FILE", help=text)

    def takes_checkpoint(made: argparse.ArgumentParser) -> None:
        made.add_argument("--checkpoint", metavar="PATH", help="default: the newest checkpoint of the run")

    fit = verb(
        verbs,
        "fit",
        _fit,
        "Train, or continue the run found in `out`.",
        "lit-eemllm fit configs/demo.yaml optim.lr=1e-3 model.mechanism.preset=llava",
    )
    takes_config(fit)

    validate = verb(
        verbs,
        "validate",
        _validate,
        "Score a checkpoint by generating answers to data.val.",
        "lit-eemllm validate runs/default eval.samples=100",
    )
    takes_config(validate)
    takes_checkpoint(validate)

    generate = verb(
        verbs,
        "generate",
        _generate,
        "Answer one prompt about images.",
        'lit-eemllm generate runs/default --image photo.jpg --prompt "What colour is the circle?"',
    )
    takes_config(generate)
    takes_checkpoint(generate)
    generate.add_argument(
        "--image",
        dest="images",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="an image; may be repeated",
    )
    generate.add_argument(
        "--prompt", required=True, help="the question; images without an <image> mark in it come first"
    )
    generate.add_argument("--max-new-tokens", type=int, metavar="N", help="default: eval.max_new_tokens of the run")
    generate.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 (default) takes the likeliest token"
    )

    report = verb(
        verbs,
        "report",
        _report,
        "Compare runs: tables, curves and what they cost.",
        "lit-eemllm report runs/a runs/b --out report",
    )
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories")
    report.add_argument("--out", type=Path, default=Path("runs/report"), metavar="DIR", help="default: runs/report")

    config = verbs.add_parser("config", help="Show or check configurations.").add_subparsers(
        metavar="VERB", required=True
    )
    show = verb(
        config,
        "show",
        _config_show,
        "Print the configuration as `fit` would use it, every key explained.",
        "lit-eemllm config show configs/demo.yaml optim.lr=1e-3",
    )
    takes_config(show)
    check = verb(
        config,
        "check",
        _config_check,
        "Check each file on its own and list all mistakes.",
        "lit-eemllm config check configs/*.yaml",
    )
    takes_config(check)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb. Returns the exit status: 0 good, 2 a mistake the user can mend, 130 interrupted."""
    # Overrides may stand before and after options, which argparse's sub-commands know only as left-over arguments.
    args, rest = build_parser().parse_known_args(arguments)
    strays = [text for text in rest if text.startswith("-")] if hasattr(args, "inputs") else rest
    if strays:
        hint = "; overrides are written without dashes: key=value" if any("=" in text for text in strays) else ""
        args.parser.error(f"unknown arguments: {' '.join(strays)}{hint}")
    if rest:
        args.inputs += rest
    level = logging.INFO if os.environ.get("LOCAL_RANK", "0") == "0" else logging.WARNING
    logging.basicConfig(format="%(message)s")
    logging.getLogger("lit_eemllm").setLevel(level)
    try:
        args.run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0
