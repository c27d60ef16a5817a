"""What the demo needs, tried in seconds before minutes of training: the machine, the libraries, and every step of the demo once.

The steps are those of the demo in the same order, a few pictures and two optimiser steps long, so that what a new version of a
library has broken shows here. Of what fails the line names the library and its version, and says what to do.

Nothing is imported above that may be broken: a library's import is a check of its own.
"""

from __future__ import annotations

import io
import math
import platform
import re
import shutil
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING

from . import __version__
from .errors import UserError, describe
from .terminal import say

if TYPE_CHECKING:
    from .config.keys import Config

PYTHON = (3, 10)
DISK, TEMPORARY, MEMORY = 1.0, 0.5, 2.0  # GiB; `demo` takes 0.14 and 0.2, its largest step 1.4
MODULES = {"megatron-energon": "megatron.energon", "pyyaml": "yaml", "pillow": "PIL"}
"""Modules that are not called as their packages."""
SETTINGS = (
    "data.shuffle_buffer=16", "data.packing_buffer=8", "optim.max_steps=2", "optim.val_every=2", "optim.val_batches=1",
    "optim.save_every=2", "optim.log_every=1", "eval.samples=4", "eval.control=1",
)  # fmt: skip


@dataclass(frozen=True)
class Check:
    """Something to try.

    Attributes:
        name: in the words of a user.
        run: returns what was found; whatever it raises, the check has failed.
        uses: packages that it stands on.
        advice: what to do if it fails.
    """

    name: str
    run: Callable[[], str]
    uses: tuple[str, ...] = ()
    advice: str = ""


def preflight(configs: Sequence[str], out: Path) -> bool:
    """Try everything and print a line for each check.

    Args:
        configs: names of the configurations that are going to be trained.
        out: folder in which the demo writes; made if it is not there.

    Returns:
        Whether all is well. The machine and the libraries are checked to the end; steps end with the first that fails.
    """
    try:
        libraries = library_checks()
    except metadata.PackageNotFoundError:  # run from its folder without being installed
        libraries = []
    if [check.name for check in (*machine_checks(out), *libraries) if not passes(check)]:
        return False
    with tempfile.TemporaryDirectory(prefix=".check-", dir=out) as folder:
        return all(passes(check) for check in step_checks(configs, Path(folder)))


def passes(check: Check) -> bool:
    """Run a check and print its line, the name first: a library that takes the process down with it has been named."""
    say(f"{check.name}: ", end="", flush=True)
    said = io.StringIO()
    try:
        with redirect_stdout(said), redirect_stderr(said), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = check.run()
    except Exception as error:  # noqa: BLE001  a library may break in any way; that is what is looked for
        say(f"FAILED: {error if isinstance(error, UserError) else describe(error)}")
        for line in (blame(error, check.uses), check.advice, *said.getvalue().splitlines()[-5:]):
            if line:
                say(f"    {line}")
        return False
    say(f"good, {found}", flush=True)
    return True


# --- the machine
def machine_checks(out: Path) -> list[Check]:
    """Python, disk and memory."""

    def python() -> str:
        if sys.version_info < PYTHON:
            raise UserError(f"found {platform.python_version()}, expected {'.'.join(map(str, PYTHON))} or newer")
        return platform.python_version()

    def disk(folder: Path, needed: float) -> str:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # it can be written
        return _enough(shutil.disk_usage(folder).free / 2**30, needed)

    def memory() -> str:
        free = free_memory()
        return "not known here, so not checked" if free is None else _enough(free / 2**30, MEMORY)

    temporary = Path(tempfile.gettempdir())
    return [
        Check("Python", python, advice="Install a newer Python and lit_eemllm in an environment of it."),
        Check(
            f"disk of {out}", partial(disk, out, DISK), (), "Free some space, or start from a folder on another disk."
        ),
        Check(
            f"disk of {temporary}",
            partial(disk, temporary, TEMPORARY),
            (),
            "Free some space, or set TMPDIR to another folder.",
        ),
        Check("memory", memory, advice="Close other programs, or give the container more."),
    ]


def _enough(free: float, needed: float) -> str:
    """The two numbers, GiB. Raises UserError if it is too little."""
    found = f"{math.floor(100 * free + 1e-6) / 100:g} GiB are free, {needed:g} GiB are needed"  # 1.99, not 2
    if free < needed:
        raise UserError(found)
    return found


def free_memory(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that a new process can have: the machine's, or what is left of the container's. None where Linux does not tell."""
    try:
        available = int(re.findall(r"MemAvailable:\s+(\d+)", (proc / "meminfo").read_text())[0]) * 1024
    except (OSError, IndexError):
        return None
    try:
        limit, used = (int((cgroup / f"memory.{name}").read_text()) for name in ("max", "current"))
        cached = int(re.findall(r"^inactive_file (\d+)", (cgroup / "memory.stat").read_text(), re.MULTILINE)[0])
    except (OSError, ValueError, IndexError):  # no container, or one without a limit: "max"
        return available
    return min(available, limit - used + cached)  # the kernel gives back what it has only cached


# --- libraries
def library_checks() -> list[Check]:
    """The packages that lit_eemllm asks for, its extras left out. Raises PackageNotFoundError if it is not installed."""
    from packaging.requirements import Requirement

    asked = [Requirement(text) for text in metadata.requires("lit_eemllm") or ()]

    def check(one: Requirement) -> Check:
        def load() -> str:
            if not _installed(one.name):
                raise UserError(f"not installed; pip install '{one}'")
            version = metadata.version(one.name)
            import_module(MODULES.get(one.name, one.name))
            tested = one.specifier.contains(version, prereleases=True)
            return version + ("" if tested else f", but {one.specifier} is what lit_eemllm was tested with")

        return Check(one.name, load, (one.name,))

    return [check(one) for one in asked if one.marker is None or one.marker.evaluate({"extra": ""})]


# --- the demo in small
def step_checks(configs: Sequence[str], folder: Path) -> Iterator[Check]:
    """Every step of the demo; a step needs what those before it have left in the folder."""
    data, run, first = folder / "data", folder / "run", configs[0]

    def config(name: str) -> Config:
        from .config import load_config

        return load_config([name], [*SETTINGS, f"data.train={data}", f"data.val={data}", f"out={run}"])

    def pictures() -> str:
        from .data.shards import make
        from .data.sources import run_recipe

        write = run_recipe("shapes.py").write
        rows = {split: write(folder / "raw", split, count) for split, count in (("train", 64), ("val", 16))}
        return f"{make(rows, folder / 'raw' / 'images', data, shard_size=32).good.total()} rows drawn and packed"

    def parts() -> str:
        from .model.build import build_processor

        processor, vision = build_processor(config(first).model)
        return f"{len(processor.tokenizer)} tokens, {sum(p.numel() for p in vision.parameters()):,} parameters"

    def decoder() -> str:
        from .model.build import build

        return f"{sum(p.numel() for p in build(config(first).model)[0].language_model.parameters()):,} parameters"

    def answers(name: str) -> str:
        from .evaluation.run import UNTRAINED, generate

        picture = next((folder / "raw" / "images").glob("val*"))
        with redirect_stdout(io.StringIO()) as said:
            generate(config(name), UNTRAINED, [picture], "What is it?", 3, 0.0)
        return repr(said.getvalue().strip())

    def train() -> str:
        from .training.fit import fit

        fit(config(first))
        return "two steps, saved"

    def score() -> str:
        from .evaluation.run import validate

        validate(config(first), None)
        return "loaded again and asked"

    def table() -> str:
        from .report import report

        report([run], folder / "report")
        return "a page and a picture"

    yield Check("pictures", pictures, ("pillow", "webdataset", "megatron-energon"))
    yield Check("tokenizer and encoder", parts, ("transformers", "tokenizers"))
    yield Check("decoder", decoder, ("transformers", "safetensors"))
    for name in configs:
        yield Check(f"answer of the untrained {Path(name).stem}", partial(answers, name), ("transformers", "torch"))
    yield Check("training", train, ("lightning", "torch", "megatron-energon"))
    yield Check("scoring", score, ("transformers", "torch", "torchmetrics"))
    yield Check("report", table, ("matplotlib",))


# --- what is said of an error
def blame(error: BaseException, uses: Sequence[str]) -> str:
    """Which library an error comes from, with its version: the one that raised it or, if our own code did, those it uses.

    Empty for a message of ours, which says itself what to do.
    """
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, UserError):
        return ""
    ours, installed = __name__.partition(".")[0], metadata.packages_distributions()
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        top = str(frame.f_globals.get("__name__")).partition(".")[0]
        if top == ours:
            break
        if top in installed:
            name, file = installed[top][0], "/".join(Path(frame.f_code.co_filename).parts[-3:])
            return f"This comes from {_versions([name])}, in {file}, line {line}. {_mend([name])}"
    names = [name for name in uses if _installed(name)]
    return f"This probably comes from {_versions(names)}. {_mend(names)}" if names else ""


def _versions(names: Sequence[str]) -> str:
    return " or ".join(f"{name} {metadata.version(name)}" for name in names)


def _mend(names: Sequence[str]) -> str:
    older = " ".join(f"'{name}<{metadata.version(name)}'" for name in names)
    again = f"if its files are damaged, install it anew: pip install --force-reinstall --no-deps {' '.join(names)}"
    return f"If it is newer than lit_eemllm {__version__}, try an older one: pip install {older}; {again}"


def _installed(name: str) -> bool:
    try:
        return bool(metadata.version(name))
    except metadata.PackageNotFoundError:
        return False
