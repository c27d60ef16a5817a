"""The command line: a file a verb, or a few that belong together. Nothing heavy is imported before a verb has been chosen.

A file has `add`, which adds its verbs, and their functions; what several share is in `common`.
"""

from __future__ import annotations

import io
import logging
import os
import re
import select
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from lit_eemllm import __version__
from lit_eemllm.cli import (
    bench,
    calibrate,
    chat,
    completion,
    config,
    configs,
    convert,
    demo,
    doctor,
    estimate,
    fit,
    generate,
    merge,
    report,
    serve,
    shards,
    shrink,
    sweep,
    validate,
)
from lit_eemllm.errors import UserError, did_you_mean
from lit_eemllm.terminal import VisibleFormatter, say, say_error, visible

FILES = (
    fit, validate, generate, chat, serve, calibrate, convert, estimate, bench, merge, report, sweep, doctor, shards, config, demo, configs, shrink, completion,
)  # fmt: skip
"""In the order of the help."""


class Parser(ArgumentParser):
    """Tells mistakes in what was typed, which a shell may have filled in from names of files.

    Attributes:
        files: arguments of all parsers that are names of files.
    """

    files: ClassVar[list[Any]] = []

    def add_argument(self, *args: Any, **options: Any) -> Any:
        made = super().add_argument(*args, **options)
        if made.type is Path or made.dest in ("inputs", "checkpoint"):
            self.files.append(made)
        return made

    def error(self, message: str) -> NoReturn:
        """With what was probably meant, where one of a few words was expected."""
        if wrong := re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message):
            hint = did_you_mean(wrong[1], re.findall(r"[\w-]+", wrong[2]))
            message += f"; {hint}" if hint else ""
        super().error(visible(message))


def build_parser() -> ArgumentParser:
    """The whole command line. Every verb's namespace has `run`, the function to call."""
    text = "Train multimodal LLMs in which the treatment of visual tokens is an experiment variable."
    parser = Parser("lit-eemllm", description=text)
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for file in FILES:
        file.add(verbs)
    return parser


def parse(arguments: Sequence[str] | None = None) -> Namespace:
    """Overrides may stand before and after options, which argparse's verbs only know as left-over arguments."""
    args, rest = build_parser().parse_known_args(arguments)
    strays = [text for text in rest if text.startswith("-")] if hasattr(args, "inputs") else rest
    if strays:
        hint = "; overrides are written without dashes: key=value" if any("=" in text for text in strays) else ""
        args.parser.error(f"unknown arguments: {' '.join(strays)}{hint}")
    if rest:
        args.inputs += rest
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb. Returns the exit status: 0 good, 1 bad samples found or a disk that fails, 2 a mistake you can mend, 130
    interrupted.

    `fit` that was asked to stop exits by itself with 143 (SIGTERM) or 130 (SIGINT) after saving.
    """
    args = parse(arguments)
    sys.excepthook = say_error
    log = logging.StreamHandler()
    log.setFormatter(VisibleFormatter("%(message)s"))
    logging.basicConfig(handlers=[log])
    logging.getLogger("lit_eemllm").setLevel(logging.WARNING if int(os.environ.get("LOCAL_RANK", 0)) else logging.INFO)
    try:
        if args.imports is not None:
            from lit_eemllm.plugins import import_user_code

            import_user_code(args.imports)
        status = args.run(args) or 0
        sys.stdout.flush()
        return status
    except UserError as error:
        say(f"error: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        say("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        return 141  # as of a process that SIGPIPE has ended
    except OSError as error:  # of a disk: what is not there, and what was meant, is told where it is looked for
        say(f"error: {error.filename or 'what is printed, or a file'}: {error.strerror or error}", file=sys.stderr)
        _print_nothing_more()
        return 1


def _reader_is_gone() -> bool:
    """Whether nobody reads what is printed any more, such as `head` that has seen enough; if so, it is thrown away from here on."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    gone = any(event & select.POLLERR for _, event in output.poll(0))
    if gone:
        _print_nothing_more()
    return gone


def _print_nothing_more() -> None:
    """What is left to print would fail once more, when Python ends."""
    with suppress(io.UnsupportedOperation):  # it is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
