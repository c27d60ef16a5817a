"""`lit-eemllm doctor`: what this machine has, and which attention backends really run on it.

Nothing is taken on trust. A package counts when it imports, a backend when it has computed four tokens, and their
gradients, as the reference does.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from dataclasses import asdict, dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table

from lit_eemllm import __version__
from lit_eemllm.attention import probe, registered_backends
from lit_eemllm.attention.base import Probe
from lit_eemllm.console import console, progress
from lit_eemllm.errors import UserError, describe

PACKAGES = {
    "torch": "torch",
    "transformers": "transformers",
    "lightning": "lightning",
    "peft": "peft",
    "megatron-energon": "megatron.energon",
    "webdataset": "webdataset",
    "flash-attn": "flash_attn",
    "flash-attn-3": "flash_attn_interface",
    "flash-attn-4": "flash_attn.cute",
    "xformers": "xformers.ops",
    "bitsandbytes": "bitsandbytes",
}
"""What is installed under which name, and the module that shows whether it works."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LONGEST_REASON = 300  # characters shown of a reason; JSON has all of them


@dataclass(frozen=True)
class Trial:
    """A backend tried in one dtype.

    Attributes:
        runs: "yes" (it trains), "forward only" (it evaluates) or "no".
        provider: whose kernel ran.
        refused: why training, or anything, is not possible, or why a better provider was not taken; "" for all providers.
    """

    runs: str
    provider: str | None
    refused: dict[str, str]


def doctor(device: str | None, head_size: int, as_json: bool) -> None:
    """Print the findings for people, or as JSON.

    Args:
        device: where to try the backends; None = CUDA where there is any, else the CPU.
        head_size: the decoder's that the trials imitate.
        as_json: for bug reports and scripts.

    Raises:
        UserError: there can be no such device or head size.
    """
    if head_size < 1:
        raise UserError(f"--head-size: found {head_size}, expected 1 or more; 64 and 128 are usual")
    try:
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise UserError(f"--device: found {device!r}, expected such as cpu, cuda or cuda:1") from None
    steps = len(PACKAGES) + len(registered_backends()) * len(DTYPES)
    # Whatever libraries say, standard output is ours.
    with redirect_stdout(sys.stderr), warnings.catch_warnings(), progress("looking", steps) as advance:
        warnings.simplefilter("ignore")
        found = examine(where, head_size, advance)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        show(found)


def examine(device: torch.device, head_size: int, advance: Callable[[int], None]) -> dict[str, Any]:
    """All findings in plain types. Backends come first, so that no package imported for its version disturbs them."""
    trials: dict[str, dict[str, Trial]] = {}
    for name in registered_backends():
        trials[name] = {}
        for dtype in DTYPES:
            trials[name][_name(dtype)] = try_backend(name, device, dtype, head_size)
            advance(1)
    versions = {"lit_eemllm": __version__, "python": platform.python_version()}
    for distribution, module in PACKAGES.items():
        versions[distribution] = version_of(distribution, module)
        advance(1)
    return {
        "machine": machine(),
        "versions": versions,
        "device": str(device),
        "head_size": head_size,
        "backends": {name: {kind: asdict(trial) for kind, trial in row.items()} for name, row in trials.items()},
        "auto": {kind: auto(trials, kind) for kind in map(_name, DTYPES)},
    }


def try_backend(name: str, device: torch.device, dtype: torch.dtype, head_size: int) -> Trial:
    """Train four tokens with a backend or, where it cannot, only evaluate them."""

    def attempt(training: bool) -> Probe:
        try:
            return probe(name, device, dtype, training, head_size)
        except Exception as error:  # noqa: BLE001  a user's backend may fail in any way, also before it is tried
            return Probe(None, {"": describe(error)})

    trained = attempt(training=True)
    if trained.backend is not None:
        return Trial("yes", trained.backend.provider, trained.refused)
    evaluated = attempt(training=False)
    if evaluated.backend is not None:
        return Trial("forward only", evaluated.backend.provider, trained.refused)
    return Trial("no", None, evaluated.refused)


def auto(trials: dict[str, dict[str, Trial]], kind: str) -> dict[str, str | None]:
    """What ``model.attention=auto`` takes, by the same trials in the same order as `resolve_backend`; None = nothing."""
    runs = {name: row[kind].runs for name, row in trials.items()}
    return {
        "training": next((name for name in runs if runs[name] == "yes"), None),
        "evaluation": next((name for name in runs if runs[name] != "no"), None),
    }


def version_of(distribution: str, module: str) -> str:
    """The installed version, and if so, why the package does not work."""
    version = None
    try:
        version = metadata.version(distribution)
        import_module(module)
    except Exception as error:  # noqa: BLE001  a broken package may fail in any way; that is what we are here to say
        if version is None and isinstance(error, metadata.PackageNotFoundError):
            return "not installed"
        return f"{version or 'installed'}, but importing it fails: {describe(error)}"
    return version


def machine() -> dict[str, Any]:
    """Operating system, cores, memory, CUDA devices or why there are none, and NVIDIA's driver."""
    driver = _driver()
    devices, reason = _cuda_devices(driver)
    if hasattr(os, "sched_getaffinity"):  # Linux: what this process may use
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    try:
        memory = _gib(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, OSError, ValueError):  # not on Windows
        memory = None
    return {
        "system": platform.platform(),
        "cpu_cores": cores,
        "memory_gib": memory,
        "pytorch_built_for": _built_for(),
        "cuda_devices": devices,
        "no_cuda_because": reason,
        "nvidia_driver": driver,
    }


def environment(*packages: str, cuda: bool = True) -> dict[str, Any]:
    """Where numbers come from: processor and its cores, GPU or None, versions of those packages that are installed, commit.

    cuda: whether a GPU, if there is one, was used.
    """
    cpuinfo = Path("/proc/cpuinfo")  # Linux alone names the processor there
    names = re.findall("model name.*: (.*)", cpuinfo.read_text()) if cpuinfo.is_file() else []
    versions = {"Python": platform.python_version()}
    for name in packages:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    root, commit = Path(__file__).parents[1], "unknown (not a git checkout)"
    if (root / ".git").exists():  # else git finds the repository of others that an installation may lie in
        with suppress(OSError, subprocess.CalledProcessError):
            # not `describe --dirty`: it writes the index, and where the disk is full it leaves its lock behind
            git = ["git", "--no-optional-locks", "-C", str(root)]
            commit, changed = (
                subprocess.run([*git, *words], capture_output=True, text=True, check=True).stdout.strip()
                for words in (["describe", "--always"], ["status", "--porcelain", "--untracked-files=no"])
            )
            commit += "-dirty" * bool(changed)
    return {
        "cpu": (names or [platform.processor() or platform.machine()])[0],
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if cuda and torch.cuda.is_available() else None,
        "versions": versions,
        "commit": commit,
    }


def origin(cuda: bool = True) -> str:
    """Machine, versions and commit of this process, in a line: what its numbers come from. cuda: as in `environment`."""
    about = environment("torch", "transformers", "lightning", "megatron-energon", cuda=cuda)
    return (
        f"{about['cpu']}, {about['cores']} cores, {about['gpu'] or 'no GPU'}; "
        f"{', '.join(map(' '.join, about['versions'].items()))}; lit_eemllm {__version__}, commit {about['commit']}"
    )


def provenance(command: str | None = None) -> str:
    """`origin`, and the command, by default that of `lit-eemllm`."""
    return f"{origin()}; {command or 'lit-eemllm ' + ' '.join(sys.argv[1:])}"


def _built_for() -> str:
    if torch.version.hip is not None:
        return f"ROCm {torch.version.hip}"
    return "CPU only" if torch.version.cuda is None else f"CUDA {torch.version.cuda}"


def _cuda_devices(driver: str | None) -> tuple[list[dict[str, Any]], str | None]:
    """The devices, and why there are none."""
    if _built_for() == "CPU only":
        return [], "this PyTorch is built for the CPU" + ("; install one that is built for CUDA" if driver else "")
    try:
        torch.cuda.init()
        found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    except Exception as error:  # noqa: BLE001  no driver, an old one, no device: its own words say it best
        return [], describe(error)
    return [
        {"name": it.name, "memory_gib": _gib(it.total_memory), "capability": f"{it.major}.{it.minor}"} for it in found
    ], None


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.split()), None)


def _gib(size: int) -> float:
    return round(size / 2**30, 1)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- for people
def show(found: dict[str, Any]) -> None:
    """Tables with short cells; sentences stand below them, and the terminal breaks their lines."""
    has = found["machine"]
    table = _table("machine")
    table.add_row("system", has["system"])
    table.add_row("CPU cores", str(has["cpu_cores"]))
    table.add_row("memory", "unknown" if has["memory_gib"] is None else f"{has['memory_gib']} GiB")
    table.add_row("PyTorch for", has["pytorch_built_for"])
    for i, it in enumerate(has["cuda_devices"]):
        table.add_row(f"cuda:{i}", f"{it['name']}, {it['memory_gib']} GiB, capability {it['capability']}")
    if has["no_cuda_because"]:
        table.add_row("CUDA", f"none: {_short(has['no_cuda_because'])}")
    table.add_row("NVIDIA driver", has["nvidia_driver"] or "not found")
    console.print(table)

    table = _table("versions")
    for name, version in found["versions"].items():
        table.add_row(name, _short(version))
    console.print(table)

    kinds = list(found["auto"])
    table = _table(f"attention on {found['device']}, head size {found['head_size']}", "backend", *kinds)
    for name, row in found["backends"].items():
        table.add_row(name, *(_cell(row[kind]) for kind in kinds))
    console.print(table)
    console.print("A name of a provider: forward and backward of four tokens through it agreed with the reference.")
    for name, row in found["backends"].items():
        for reason, where in _reasons(row).items():
            console.print(f"- {name}{'' if len(where) == len(kinds) else ' in ' + ', '.join(where)}: {reason}")
    for kind, choice in found["auto"].items():
        training, evaluation = (choice[what] or "nothing" for what in ("training", "evaluation"))
        also = "" if evaluation == training else f", {evaluation} to evaluate"
        console.print(f"model.attention=auto in {kind}: {training}{also}")


def _table(title: str, *headings: str) -> Table:
    """Narrow enough for 40 columns; a first column is never broken."""
    table = Table(title=title, title_justify="left", show_header=bool(headings), box=box.SIMPLE_HEAD)
    table.pad_edge, table.collapse_padding = False, True
    for i, heading in enumerate(headings or ("", "")):
        table.add_column(heading, overflow="fold", no_wrap=i == 0)
    return table


def _cell(trial: dict[str, Any]) -> str:
    return {"yes": trial["provider"], "no": "no"}.get(trial["runs"], f"{trial['provider']}\n{trial['runs']}")


def _reasons(row: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    """Each reason once, with the dtypes that it holds for."""
    reasons: dict[str, list[str]] = {}
    for kind, trial in row.items():
        for provider, reason in trial["refused"].items():
            start = f"not {provider}: " if provider else ""
            reasons.setdefault(_short(start + reason), []).append(kind)
    return reasons


def _short(reason: str) -> str:
    return textwrap.shorten(reason, LONGEST_REASON, placeholder=" ...")
