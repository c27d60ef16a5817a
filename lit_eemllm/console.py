"""How the program speaks on the terminal, and reads and writes small files: one console, one kind of progress bar."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderableType, RenderHook, RenderResult
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.segment import Segment

from .errors import UserError, WriteError
from .terminal import visible

COMMAND = (sys.executable, str(Path(__file__).with_name("__main__.py")))
"""Starts this program as a process of its own, which takes no library from the current folder."""
WIDTH = None if sys.stdout.isatty() else 120  # columns; a file has no width of its own
console = Console(highlight=False, soft_wrap=True, markup=False, width=WIDTH)


@dataclass
class _Visible:
    """Whatever rich can draw, with texts that are `visible`; what rich itself says to the terminal stays."""

    drawn: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self.drawn, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)


class _Hook(RenderHook):
    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Visible(one) for one in renderables]


console.push_render_hook(_Hook())


def progress_bar() -> Progress:
    """Title, count, bar, time so far and time left; silent where nobody watches a terminal."""
    return Progress(
        TextColumn("{task.description}"), MofNCompleteColumn(), BarColumn(), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal or os.environ.get("LOCAL_RANK", "0") != "0",
    )  # fmt: skip


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar over `total`; yields the function that advances it."""
    with progress_bar() as bar:
        task = bar.add_task(visible(title), total=total)
        yield lambda steps: bar.advance(task, steps)


PAGE_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""Content policy of every page that is written: what strangers' texts bring along is neither fetched nor run."""
_VERSION = re.compile(r"version_(\d{1,9})")
_DISK = re.compile(r"\(os error \d|disk (is full|I/O error)")
"""What libraries say of a disk without an OSError: those in Rust, safetensors and tokenizers, and sqlite."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around all that writes a file or a folder. Raises WriteError, with the path, where the disk fails."""
    try:
        yield
    except Exception as error:
        cause = str(error)
        if isinstance(error, OSError):
            other = error.filename is not None and str(error.filename) != str(path)
            cause = f"{error.strerror or error}" + f" ({error.filename})" * other
        elif not _DISK.search(cause):
            raise
        raise WriteError(f"{path} could not be written: {cause}") from error


def unfinished(path: Path) -> Path:
    """Where a file is written until it is whole and gets its name: beside it, and no other process writes there."""
    return path.with_name(f".{path.name}.{os.uname().nodename}-{os.getpid()}.unfinished")


def write_atomically(path: Path, content: str | bytes) -> None:
    """The file holds the whole content or what it held before; a text is UTF-8 in any locale. Raises WriteError."""
    part = unfinished(path)
    with writing(path):
        try:
            part.write_bytes(content.encode() if isinstance(content, str) else content)
            os.replace(part, path)
        finally:
            with suppress(OSError):  # what is wrong with the disk is being told
                part.unlink(missing_ok=True)


def metrics_files(run: Path) -> list[Path]:
    """What a run has logged, a file for each time that it was started, the first one first."""
    starts = {
        int(found[1]): file
        for file in run.glob("logs/*/metrics.csv")
        if (found := _VERSION.fullmatch(file.parent.name))
    }
    return [starts[number] for number in sorted(starts)]


def read_object(path: Path, error: type[UserError] = UserError, mend: str = "") -> dict[str, Any]:
    """A JSON object.

    Raises:
        error: it is anything else; the message names the file and ends with how to `mend` it.
        OSError: it cannot be read.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
        problem = "" if isinstance(found, dict) else f"found a {type(found).__name__}, expected an object"
    except (ValueError, RecursionError) as wrong:
        problem = f"not valid JSON: {wrong}"
    if problem:
        raise error(f"{path}: {problem}" + (f"; {mend}" if mend else ""))
    return found


def _errors_only(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def quiet_libraries() -> None:
    """Hide the libraries' own chatter, which repeats what our summary says or concerns what we decided on purpose."""
    from lightning.pytorch.utilities.warnings import PossibleUserWarning
    from transformers.utils import logging as transformers_logging

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # a filter: where DeepSpeed is installed, transformers imports it to save a model; it sets the level itself, and tells on stdout that it finds no GPU
    logging.getLogger("DeepSpeed").addFilter(_errors_only)
    warnings.filterwarnings("ignore", category=PossibleUserWarning)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning's use of a deprecated function of torch
    warnings.filterwarnings(
        "ignore", message="Checkpoint directory .* exists and is not empty"
    )  # a run is continued there
    logging.getLogger("huggingface_hub").propagate = False  # it has a handler of its own: every line came twice
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
