"""Try the package with other versions of its dependencies than the locked ones: the newest there are, or the lowest allowed.

    python tools/versions.py newest       # make newest
    python tools/versions.py lowest       # make lowest

Makes an environment `.venv-newest` or `.venv-lowest` beside this one and runs a short job there: the contracts with other libraries,
parity with transformers, shards, 20 steps in two parts, an answer, a validation. One line says what came of it. If the job fails,
packages are put back to their locked versions one by one until it passes: the last one broke it.

PyTorch stays within the bounds of pyproject.toml, since a newer one may be had as a CUDA build alone.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
CONFIG = (
    "configs/demo/ee_mllm.yaml",
    "data.workers=0",
    "optim.save_every=10",
    "optim.log_every=10",
    "optim.val_every=20",
)
STEPS = (
    ("contracts", "-m", "pytest", "-q", "-x", "tests/compat/test_compat.py"),
    ("parity", "-m", "pytest", "-q", "-x", "tests/model/test_model.py", "-k", "equals_transformers_llava"),
    ("shards", "-m", "lit_eemllm", "shards", "make", "--source", "shapes", "--train", "300", "--val", "60", "--out", "{out}/data"),
    ("fit", "-m", "lit_eemllm", "fit", *CONFIG, "data.train={out}/data", "data.val={out}/data", "out={out}/run", "optim.max_steps=10"),
    ("resume", "-m", "lit_eemllm", "fit", "{out}/run", "optim.max_steps=20"),
    ("generate", "-m", "lit_eemllm", "generate", "{out}/run", "--prompt", "What is it?"),
    ("validate", "-m", "lit_eemllm", "validate", "{out}/run", "eval.samples=40"),
)  # fmt: skip
MOST_TRIES = 6


def dependencies() -> list[Requirement]:
    """Of the package and its tests, on this machine."""
    found = [Requirement(text) for text in requires("lit_eemllm") or []]
    return [r for r in found if r.marker is None or any(r.marker.evaluate({"extra": extra}) for extra in ("", "test"))]


def wanted(which: str) -> list[str]:
    """What pip is asked for."""
    lines = []
    for requirement in dependencies():
        lower = [spec.version for spec in requirement.specifier if spec.operator == ">="]
        if which == "lowest":
            lines.append(f"{requirement.name}=={lower[0]}")
        elif requirement.name == "torch":
            lines.append(f"{requirement.name}{requirement.specifier}")
        else:
            lines.append(f"{requirement.name}>={lower[0]}")
    return lines


def installed(python: Path) -> dict[str, str]:
    """Versions in an environment, by name."""
    text = subprocess.run([python, "-m", "pip", "freeze", "--all"], capture_output=True, text=True, check=True).stdout
    return {canonicalize_name(n): v for n, _, v in (line.partition("==") for line in text.splitlines()) if v}


def run(python: Path, step: tuple[str, ...], out: str) -> str:
    """Run a step; what went wrong, in one line, or nothing."""
    words = [word.format(out=out) for word in step[1:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [python, *words], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if not done.returncode:
        return ""
    lines = [line.removeprefix("E").strip() for line in done.stdout.splitlines()]
    told = [line for line in lines if re.match(r"[\w.]*(Error|Exception|error)\b.*: ", line)]
    broken = [line for line in lines if line.startswith("Failed: ")]  # a contract, which names the library
    return broken[0] if broken else (told or lines or [""])[0 if "pytest" in words else -1]


def job(python: Path, steps: Sequence[tuple[str, ...]] = STEPS) -> tuple[tuple[str, ...], str] | None:
    """The first step that fails, and what it says. Each job has a folder of its own: a run that is there would be continued."""
    with tempfile.TemporaryDirectory() as out:
        for step in steps:
            if error := run(python, step, out):
                return step, error
            print(f"  {step[0]}: good", flush=True)
    return None


def culprit(python: Path, step: tuple[str, ...], error: str, changed: dict[str, tuple[str, str]]) -> str:
    """Which of the changed packages, (locked, here) by name, is to blame."""
    for name, (locked, here) in changed.items():
        if f"{name} {here}: " in error:  # a contract says it
            return f"{name} {here} (locked: {locked})"
    alone = step[0] in ("contracts", "parity")  # the others stand on those before them
    steps = [step] if alone else STEPS[2 : STEPS.index(step) + 1]
    for name, (locked, here) in list(changed.items())[:MOST_TRIES]:
        print(f"  once more with {name} {locked}", flush=True)
        try:
            pip(python, "--no-deps", f"{name}=={locked}")
        except subprocess.CalledProcessError as refused:
            print(refused.stdout)
        else:
            if job(python, steps) is None:
                return f"{name} {here} (locked: {locked})"
    rest = ", ".join(f"{name} {here} (locked: {locked})" for name, (locked, here) in changed.items())
    return f"one of {rest}" if rest else "no library: these are the locked versions"


def pip(python: Path, *words: str) -> None:
    """Raises CalledProcessError with what pip said."""
    command = [python, "-m", "pip", "install", "--quiet", *words]
    subprocess.run(command, check=True, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def main(which: str) -> int:
    folder = ROOT / f".venv-{which}"
    python = folder / "bin" / "python"
    print(f"{which}: installing into {folder.name}", flush=True)
    venv.create(folder, clear=True, with_pip=True)
    try:
        pip(python, "--upgrade", "pip")
        pip(python, "--upgrade", *wanted(which))
        pip(python, "--no-deps", "--editable", ".")
    except subprocess.CalledProcessError as error:
        print(error.stdout, f"{which}: BROKEN: these versions cannot be installed together, see above", sep="\n")
        return 1
    here, locked = installed(python), installed(Path(sys.executable))
    direct = [canonicalize_name(r.name) for r in dependencies()]
    order = [*direct, *sorted(here.keys() - {*direct, "pip", "setuptools", "lit-eemllm"})]
    changed = {n: (locked[n], here[n]) for n in order if n in here and n in locked and here[n] != locked[n]}
    other = ", ".join(f"{name} {new} (locked: {old})" for name, (old, new) in changed.items() if name in direct)
    failed = job(python)
    if failed is None:
        print(f"{which}: good; not as locked: {other or 'none'}")
        return 0
    step, error = failed
    print(f"{which}: BROKEN by {culprit(python, step, error, changed)} in `{step[0]}`: {error}")
    return 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=("newest", "lowest"))
    sys.exit(main(parser.parse_args().which))
