"""What comes with the package beside its code: configurations, recipes, tiny parts and tools, by their names in the repository.

In a clone they are the folders at its top; in an installed package they lie beside this file. A name relative to the current
folder means the user's own file if there is one, else the shipped one of the same name: `find`. Whoever opens a file asks
it; everywhere else, in messages, run directories and checkpoints, the name stays as it was given, and so a run opens
from any folder, with a clone or without.

Converters are an exception, since they are run: `data_recipes/NAME.py` is always the shipped one, whatever lies in the
current folder. A file of the user's own is run only if `--import` names it.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from difflib import get_close_matches
from functools import cache
from itertools import islice
from pathlib import Path

from ..errors import UserError

SHIPPED = ("configs", "data_recipes", "tools/efficientnet_lite.py", "tools/slurm.sh")
"""Files and folders; pyproject.toml puts the same into the wheel."""
_log = logging.getLogger("lit_eemllm")
_HERE = Path(__file__).resolve().parent
ROOT = _HERE if (_HERE / "configs").is_dir() else _HERE.parents[1]
"""The folder that shipped names are relative to."""


def find(path: str | Path) -> Path:
    """The file or folder that a name means: the user's own, else the shipped one; the name itself if there is neither."""
    given, name = Path(path), Path(os.path.normpath(path))
    if given.is_absolute() or os.path.exists(given):
        _tell(given, name)
        return given
    if os.path.exists(name):  # through a folder that only the shipped name has: configs/sweeps/../demo/mine.yaml
        return name
    return ROOT / name if _is_shipped(name) else given


@cache
def _tell(own: Path, name: Path) -> None:
    """Once of each: that a whole file of the user's own stands in for a shipped one, in case it was forgotten or is meant to be merged."""
    if own.is_file() and not own.is_absolute() and _is_shipped(name) and not own.samefile(ROOT / name):
        _log.info(f"uses your own {own} in place of the whole file that comes with lit_eemllm")


def nowhere(path: str | Path) -> str:
    """What follows the message that a file or folder is not there: where it was looked for, and how to find what there is."""
    if Path(path).is_absolute():
        return ""
    hint = f"Did you mean {meant}? " if (meant := _meant(os.path.normpath(path))) else ""
    return f"; looked for in {Path.cwd()} and among the files that come with lit_eemllm. {hint}See: lit-eemllm configs list"


def _meant(name: str) -> str:
    """The shipped name, or what lies beside where it was looked for, that is most like a name; empty if there is none.

    Of shipped files the last part is enough, with or without what stands behind its dot: `ee_mllm` for configs/demo/ee_mllm.yaml.
    """
    known, folder = names(), os.path.dirname(name)
    with suppress(OSError):
        beside = [one.name for one in islice(os.scandir(folder or "."), 1000) if not one.name.startswith(".")]
        known += [os.path.join(folder, other) for other in sorted(beside)]
    if alike := get_close_matches(name, known, n=1, cutoff=0.8):
        return alike[0]
    ends = {Path(other).stem: other for other in reversed(known)} if not folder else {}
    return next((ends[end] for end in get_close_matches(Path(name).stem, ends, n=1, cutoff=0.8)), "")


def names() -> list[str]:
    """All shipped names that a command or a configuration can have: files, and folders in transformers' format."""
    found = []
    for top in SHIPPED:
        for file in sorted((ROOT / top).rglob("*")) or [ROOT / top]:
            if file.name == "config.json":
                found.append(file.parent)
            elif file.suffix in (".yaml", ".py", ".sh"):
                found.append(file)
    return [file.relative_to(ROOT).as_posix() for file in found]


def about(name: str) -> str:
    """The first sentence of a shipped file's comment or docstring, as far as it stands in one line."""
    if (ROOT / name).is_dir():
        return "in transformers' format"
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    first = next(line for line in lines if not line.startswith("#!"))
    return first.strip('# "')


def show(name: str) -> str:
    """The text of the file that a name means. Raises UserError if it is not there, or not a text."""
    file = find(name)
    if file.is_dir():
        raise UserError(
            f"{name}: a folder, expected a file; to see what is in it: lit-eemllm configs copy {name} --to DIR"
        )
    if not file.is_file():
        raise UserError(f"{name}: no such file{nowhere(name)}")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{name}: not a text") from None


def copy(wanted: Sequence[str], to: Path | None = None) -> list[Path]:
    """Copy shipped files and folders.

    Args:
        wanted: their names.
        to: folder for the files, and for the contents of folders; None = the same names in the current folder, where they
            then win over the shipped ones.

    Returns:
        The files written.

    Raises:
        UserError: there is no such name, a file is there already, or two would get one name; nothing was copied.
    """
    copies: dict[Path, Path] = {}
    for name in map(Path, map(os.path.normpath, wanted)):
        if not _is_shipped(name):
            raise UserError(f"{name}: does not come with lit_eemllm{nowhere(name)}")
        start = ROOT / name
        inside = [file for file in sorted(start.rglob("*")) if file.is_file() and file.suffix != ".pyc"]
        for file in inside if start.is_dir() else [start]:
            place = file.relative_to(ROOT) if to is None else to / file.relative_to(start if inside else start.parent)
            if place in copies and copies[place] != file:
                raise UserError(
                    f"{place}: two files would get this name, nothing was copied; copy one folder at a time"
                )
            copies[place] = file
    if there := [place for place in copies if os.path.lexists(place)]:
        raise UserError(f"{there[0]}: is there already, nothing was copied; remove it, or name a folder: --to DIR")
    from ..console import writing  # not to print a name, or help

    for place, file in copies.items():
        with writing(place):
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, place)
    return list(copies)


def _is_shipped(name: Path) -> bool:
    """Whether a normalised name, which has .. at most in front, is that of a shipped file or folder."""
    return any(name.is_relative_to(top) for top in SHIPPED) and os.path.exists(ROOT / name)
