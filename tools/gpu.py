"""Everything that needs a GPU, in 12 minutes on an H200, most valuable first.

    make gpu                                           in .venv, into benchmarks/DATE-gpu-DEVICE
    PYTHONPATH=FOLDER python3 tools/gpu.py             where packages lie in a folder (pip install --target FOLDER), without a network
    python3 tools/gpu.py --wheels FOLDER               before that, with a network: fetches what a bare machine with PyTorch lacks
    make gpu-dry                                       the same code at small sizes on the fake device of the tests

Each part is a process of its own with a time limit, and writes its results as it goes. What has been done at this commit is not done
again, so the command can be repeated after whatever ended it. summary.md says how each part ended.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from datetime import date
from linecache import getline
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "tests")]

NEEDED = {
    "torch": "", "transformers": "", "lightning": "", "torchmetrics": "", "peft": "", "omegaconf": "", "rich": "", "PIL": "",
    "safetensors": "", "webdataset": "", "megatron.energon": "the run that is resumed", "matplotlib": "pictures", "simplejpeg": "",
    "pytest": "exactness", "pytest_timeout": "exactness", "hypothesis": "exactness",
}  # fmt: skip
"""Modules, and what is left out without one; nothing can be run without the others."""
OPTIONAL = ("flash_attn", "flash_attn_interface", "xformers", "liger_kernel", "bitsandbytes", "triton")
ROOTS = ("omegaconf", "webdataset", "megatron-energon", "simplejpeg", "torchmetrics", "lightning", "transformers", "peft", "rich",
         "matplotlib", "pytest-timeout", "pytest-xdist", "hypothesis", "easy-vqa")  # fmt: skip
"""Packages that the parts import; what they need comes with them."""
PLACE = {
    "python_version": "3.12",
    "python_full_version": "3.12.3",
    "sys_platform": "linux",
    "platform_system": "Linux",
    "extra": "",
}
PLATFORMS = (
    "manylinux_2_28_x86_64",
    "manylinux_2_27_x86_64",
    "manylinux_2_17_x86_64",
    "manylinux2014_x86_64",
    "manylinux1_x86_64",
)
"""The bare machine that wheels are fetched for. It has these already, as an image made for training has:"""
THERE = {
    "torch", "numpy", "transformers", "tokenizers", "safetensors", "huggingface-hub", "hf-xet", "lightning",
    "pytorch-lightning", "lightning-utilities", "torchmetrics", "peft", "accelerate", "matplotlib", "contourpy", "cycler",
    "fonttools", "kiwisolver", "pyparsing", "python-dateutil", "pillow", "pytest", "pytest-timeout", "pytest-xdist", "execnet",
    "pluggy", "iniconfig", "hypothesis", "sortedcontainers", "rich", "markdown-it-py", "mdurl", "pygments", "regex", "pyyaml",
    "packaging", "tqdm", "psutil", "requests", "filelock", "fsspec", "jinja2", "markupsafe", "networkx", "sympy", "mpmath",
    "setuptools", "pip", "typing-extensions", "aiohttp", "aiohappyeyeballs", "aiosignal", "attrs", "frozenlist", "multidict",
    "propcache", "yarl", "idna", "click", "typer", "shellingham", "six", "urllib3", "sentencepiece", "protobuf", "tensorboard",
    "grpcio", "absl-py", "wrapt", "h11", "anyio", "cloudpickle",
}  # fmt: skip


# --- the parts
def steps(out: Path, dry: bool) -> None:
    """An optimiser step of every mechanism through every backend here: how often the host waits, loss and gradients beside those of
    the same step on the CPU."""
    import tiny
    import torch
    from lib.fake_cuda import steps as made

    from lit_eemllm.attention import probe, registered_backends
    from lit_eemllm.mechanisms import PRESETS

    backends = [name for name in registered_backends() if probe(name, "cuda", torch.bfloat16).backend]
    rows: list[dict[str, Any]] = []
    for mechanism in PRESETS if not dry else ("llava", "ee_mllm", "flamingo"):
        for tuning in ("lora", "full"):
            config = made.configuration(tuning, True, "bfloat16")
            module = made.training_module(made.model(mechanism), config, "cpu")
            true = [made.optimiser_step(module, tiny.pack(made.PACK)) for _ in range(2)][1]
            for name in backends:
                module = made.training_module(made.model(mechanism), config, "cuda")
                module.model.set_attention(name, torch.bfloat16)
                made.optimiser_step(module, tiny.pack(made.PACK))  # kernels are made
                with waiting(dry) as waits:
                    loss, norm = made.optimiser_step(module, tiny.pack(made.PACK))
                unexpected = {line: n for line, n in waits.items() if not any(known in line for known in made.ALLOWED)}
                values = {"loss": [loss.item(), true[0].item()], "grad_norm": [norm.item(), true[1].item()]}
                rows.append({"mechanism": mechanism, "tuning": tuning, "backend": name, "waits": unexpected, **values})
                write(out, {"rows": rows})
    wrong = [row for row in rows if row["waits"]]
    if wrong:
        sys.exit(f"{len(wrong)} of {len(rows)} steps made the host wait, such as {wrong[0]}")


class waiting:
    """Counts by line what makes the host wait for the device."""

    def __init__(self, dry: bool) -> None:
        self.dry, self.caught = dry, warnings.catch_warnings(record=True)

    def __enter__(self) -> Counter[str]:
        import torch

        self.found: Counter[str] = Counter()
        if self.dry:
            from lib.fake_cuda import world

            assert world.current is not None
            world.current.forget()
        else:
            self.seen = self.caught.__enter__()
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
        return self.found

    def __exit__(self, *error: Any) -> None:
        import torch

        if self.dry:
            from lib.fake_cuda import world

            assert world.current is not None
            self.found.update({note.where: n for note, n in world.current.notes.items() if note.kind == "wait"})
            world.current.forget()
            return
        torch.cuda.set_sync_debug_mode("default")
        for warning in self.seen:
            if "synchroniz" in str(warning.message):
                line = getline(warning.filename, warning.lineno).strip()
                self.found[f"{Path(warning.filename).name}:{warning.lineno} {line}"] += 1
        self.caught.__exit__(*error)


def resumed(out: Path, dry: bool) -> None:
    """A small run on the device, and the same cut and resumed: every number of the checkpoint and of the log."""
    import tempfile

    import tiny
    import torch

    from lit_eemllm.training.checkpoint import read_checkpoint
    from lit_eemllm.training.fit import fit

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny.write_parts(folder / "parts")
        tiny.write_shards(folder / "data", val=4)
        options = ["data.val=null", "optim.max_steps=8", "optim.save_every=4", "optim.keep=2", "data.workers=2"]
        options += [f"trainer.accelerator={'cpu' if dry else 'gpu'}", "trainer.precision=bf16-mixed"]
        ends = []
        for run in ("whole", "cut"):
            if run == "cut":  # after four steps
                (folder / run / "checkpoints").mkdir(parents=True)
                shutil.copy(folder / "whole" / "checkpoints" / "step-4.ckpt", folder / run / "checkpoints")
            fit(tiny.config(folder / "parts", folder / "data", folder / run, *options))
            ends.append(read_checkpoint(folder / run / "checkpoints" / "step-8.ckpt"))
        pairs = [(ends[0]["state_dict"][name], x) for name, x in ends[1]["state_dict"].items()]
        apart = max((a.float() - b.float()).abs().max().item() for a, b in pairs)
    write(out, {"equal": all(torch.equal(a, b) for a, b in pairs), "largest_difference": apart, "tensors": len(pairs)})


def exactness(out: Path, dry: bool) -> None:
    """The tests that need a GPU: backends against the float32 reference, kernels, memory."""
    words = [
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        "--no-header",
        "--continue-on-collection-errors",
        "tests",
    ]
    if dry:
        words.append("--collect-only")
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    write(out, {"said": lines[-40:], "failed": [line for line in lines if line.startswith(("FAILED", "ERROR"))]})
    if done.returncode not in (0, 5):
        sys.exit(lines[-1] if lines else done.stderr[-2000:])


def prefill(out: Path, dry: bool) -> None:
    """Prefill, a second question and decoding at 7B beside transformers' LLaVA. The fake device records no graph."""
    from lit_eemllm.bench import bench, setting

    real: dict[str, Any] = {"visual": [576, 4900], "rounds": 3, "measures": ["prefill", "second", "decode", "graph"]}
    small = {
        "shape": "small",
        "layers": 2,
        "visual": [4],
        "text": 40,
        "rounds": 1,
        "tokens": 2,
        "measures": real["measures"][:3],
    }
    systems = ["hf sdpa", "llava", "ee_mllm", "vica"] if dry else None
    bench(setting(**(small if dry else real), systems=systems), out.parent / "peers", "make gpu")


def training(out: Path, dry: bool) -> None:
    """Training steps at 7B: speed and memory."""
    import bench_training

    small = [
        "--shape",
        "tiny",
        "--cases",
        "projector",
        "--mechanisms",
        "llava",
        "ee_mllm",
        "--text",
        "16",
        "--documents",
        "1",
    ]
    words = ["--cases", "projector", "lora"]
    bench_training.main([*(small if dry else words), "--out", str(out.parent / "training")])


def attention(out: Path, dry: bool) -> None:
    """Attention alone."""
    import bench_attention

    words = ["--visual", "576", "4900", "--text", "64", "256", "--documents", "4", "--repeats", "10"]
    small = ["--visual", "16", "--text", "8", "--documents", "1", "--repeats", "2", "--heads", "2", "--head-size", "16"]
    small += ["--backends", "sdpa", "flash"]
    bench_attention.main([*(small if dry else words), "--out", str(out.parent / "attention")])


PARTS: dict[str, tuple[Callable[[Path, bool], None], int]] = {
    "steps": (steps, 90),
    "resumed": (resumed, 60),
    "exactness": (exactness, 150),
    "prefill": (prefill, 200),
    "training": (training, 120),
    "attention": (attention, 100),
}
"""By value, with seconds: 12 minutes in all."""


# --- running them
def write(out: Path, result: dict[str, Any]) -> None:
    from lit_eemllm.console import write_atomically
    from lit_eemllm.doctor import provenance

    write_atomically(out, json.dumps({"provenance": provenance("make gpu"), **result}, indent=1) + "\n")


def run_part(name: str, out: Path, dry: bool) -> None:
    context: Any = nullcontext()
    if dry and name not in ("resumed", "exactness"):  # these run on the CPU, or collect tests alone
        from lib.fake_cuda.building import library
        from lib.fake_cuda.world import World, begin

        begin(str(library()))
        from lib.fake_cuda import steps as made

        made.stand_in()
        context = World()
    with context:
        PARTS[name][0](out / f"{name}.json", dry)


def missing() -> None:
    """Names what is missing, and says what that costs. Exits if nothing can be run."""
    lacking = [name for name in NEEDED if importlib.util.find_spec(name.partition(".")[0]) is None]
    for name in lacking:
        print(f"missing: {name}" + (f", so without {NEEDED[name]}" if NEEDED[name] else ""))
    print(f"optional, not here: {', '.join(n for n in OPTIONAL if importlib.util.find_spec(n) is None) or 'nothing'}")
    if fatal := [name for name in lacking if not NEEDED[name]]:
        sys.exit(
            f"make gpu needs {', '.join(fatal)}; python3 tools/gpu.py --wheels FOLDER fetches them where there is a network"
        )


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def run_all(out: Path, dry: bool, parts: list[str]) -> int:
    missing()
    if not dry:
        import torch

        if not torch.cuda.is_available():
            sys.exit("make gpu: PyTorch finds no CUDA device; see: lit-eemllm doctor. Without one: make gpu-dry")
    out.mkdir(parents=True, exist_ok=True)
    state_file = out / "state.json"
    state = json.loads(state_file.read_text()) if state_file.exists() else {}
    state = state if state.get("commit") == commit() else {"commit": commit(), "ended": {}}
    for name in parts:
        if state["ended"].get(name, {}).get("status") == "done":
            print(f"{name}: done before")
            continue
        begin, limit = time.monotonic(), PARTS[name][1] * (3 if dry else 1)
        words = [sys.executable, __file__, "--part", name, "--out", str(out), *(["--dry"] * dry)]
        with (out / f"{name}.log").open("w") as log:
            try:
                code = subprocess.run(
                    words, cwd=ROOT, stdout=log, stderr=log, timeout=limit, env=dict(os.environ)
                ).returncode
                status = "done" if code == 0 else f"failed: {last_line(out / f'{name}.log')}"
            except subprocess.TimeoutExpired:
                status = f"not ended within {limit} s; what it had measured is kept"
        state["ended"][name] = {"status": status, "seconds": round(time.monotonic() - begin, 1)}
        state_file.write_text(json.dumps(state, indent=1) + "\n")
        summary = "\n".join(f"| {n} | {s['status']} | {s['seconds']} |" for n, s in state["ended"].items())
        kind = " (dry: a fake device, small sizes, no times)" if dry else ""
        (out / "summary.md").write_text(
            f"# make gpu{kind}, commit {state['commit']}\n\n| part | | s |\n|---|---|---:|\n{summary}\n"
        )
        print(f"{name}: {status} ({state['ended'][name]['seconds']} s)", flush=True)
    return sum(state["ended"].get(name, {}).get("status") != "done" for name in parts)


def last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "without a word"


def wanted() -> dict[str, str]:
    """Name -> version, as they are locked, of what the parts need and the bare machine lacks. Asks the packages installed here."""
    from importlib import metadata

    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    locked: dict[str, str] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and line[0] != "#":
            one = Requirement(line)
            if one.marker is None or one.marker.evaluate(PLACE):
                locked[canonicalize_name(one.name)] = str(one.specifier).removeprefix("==")
    names, found = list(ROOTS), dict[str, str]()
    while names:
        name = names.pop()
        if name in found or (name in THERE and name not in ROOTS):
            continue
        if name not in THERE:
            found[name] = locked[name]
        for text in metadata.requires(name) or ():
            one = Requirement(text)
            if one.marker is None or one.marker.evaluate(PLACE):
                names.append(canonicalize_name(one.name))
        names = [each for each in names if each not in found and each not in THERE]
    return found


def fetch_wheels(folder: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--python-version",
        PLACE["python_version"],
    ]
    command += [
        "--implementation",
        "cp",
        *(word for name in PLATFORMS for word in ("--platform", name)),
        "-d",
        str(folder),
        "-q",
    ]
    names = [f"{name}=={version}" for name, version in sorted(wanted().items())]
    lacking = [name for name in names if subprocess.run([*command, name]).returncode]
    size = sum(file.stat().st_size for file in folder.glob("*.whl"))
    print(
        f"{len(list(folder.glob('*.whl')))} wheels, {size / 2**20:.0f} MiB, in {folder}; not found: {', '.join(lacking) or 'none'}"
    )
    print(
        f"there: python3 -m pip install --no-index --no-deps --target SITE {folder}/*.whl && PYTHONPATH=SITE python3 tools/gpu.py"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="on the tests' fake device")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="fetch packages for a bare machine, and end")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.wheels:
        fetch_wheels(args.wheels)
        return 0
    if args.part:
        run_part(args.part, args.out, args.dry)
        return 0
    out = args.out
    if out is None and not args.dry:
        import torch

        name = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
        out = ROOT / "benchmarks" / f"{date.today()}-gpu-{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}"
    return run_all(out or ROOT / "runs" / "gpu-dry", args.dry, args.parts)


if __name__ == "__main__":
    sys.exit(main())
