"""`lit-eemllm demo`: the whole journey on a CPU: make data, train EE-MLLM and self-attention, ask both about pictures they have
not seen, compare, and measure what more visual tokens cost.

    lit-eemllm demo               one seed each, a few minutes
    lit-eemllm demo compare       longer training, three seeds each
    lit-eemllm demo mechanisms    every mechanism, one seed each

What it needs is tried first (`preflight`, alone with `--check`). Every step is an ordinary command, printed before it runs, so that it can be
repeated by hand. Runs that are finished are not trained again; remove `runs/demo` to start over.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from .console import COMMAND
from .errors import UserError
from .preflight import preflight
from .terminal import say

DATA = Path("runs/demo/data")
TRAINED = (
    "llava", "ee_mllm", "naavit", "shortv", "saisa", "vica", "flamingo", "casa", "pyramid_drop", "hidrop", "sampled",
    "skip_vision", "bidirectional", "visual_experts", "p_mod", "deepstack",
)  # fmt: skip
FREE = ("ee_mllm_f", "fastv", "visionzip", "withdrawal", "visipruner", "operator_skipping")
"""Need no training: the trained llava with some visual tokens treated in another way."""
JOURNEYS = {"demo": (("ee_mllm", "llava"), 1), "compare": (("ee_mllm", "llava"), 3), "mechanisms": (TRAINED, 1)}
"""Mechanisms and seeds."""
Stage = tuple[str, float, Callable[[], None]]
"""Its title, how many minutes it takes on two CPU cores, and what does it."""


def run(*words: object) -> None:
    """Run one command of the program, visibly. Exits with its status if it fails."""
    say(f"\n$ lit-eemllm {' '.join(map(str, words))}", flush=True)
    result = subprocess.run([*COMMAND, *map(str, words)], check=False)
    if result.returncode:
        sys.exit(result.returncode)


def kill_and_resume(config: str, folder: Path) -> None:
    """20 steps at once, and 20 steps killed after the tenth and continued: compare the two last checkpoints bit by bit."""
    import torch

    options = [
        config,
        "resume=auto",
        "optim.max_steps=20",
        "optim.save_every=10",
        "optim.log_every=10",
        "data.val=null",
    ]
    whole, cut = folder / "whole", folder / "killed"
    run("fit", *options, f"out={whole}")
    if not (cut / "checkpoints" / "step-20.ckpt").is_file():
        words = ["fit", *options, f"out={cut}"]
        say(f"\n$ lit-eemllm {' '.join(words)}      (killed as soon as the checkpoint of step 10 is there)", flush=True)
        process = subprocess.Popen([*COMMAND, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not (cut / "checkpoints" / "step-10.ckpt").is_file():
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    run("fit", *options, f"out={cut}")
    a, b = (torch.load(out / "checkpoints" / "step-20.ckpt", weights_only=True)["state_dict"] for out in (whole, cut))
    different = [name for name in a if not a[name].equal(b[name])]
    say(f"\nkilled and continued against unbroken: {len(a) - len(different)} of {len(a)} tensors bit-equal", flush=True)
    if different:
        sys.exit("resume is not exact: " + ", ".join(different))


def check(name: str) -> bool:
    """Try what a journey needs, and say what came of it."""
    start = time.perf_counter()
    well = preflight([f"configs/demo/{mechanism}.yaml" for mechanism in JOURNEYS[name][0]], Path("runs"))
    if well:
        say(f"All is well, after {time.perf_counter() - start:.0f} s.")
    return well


def stages_of(name: str) -> tuple[list[Stage], list[Path]]:
    """The stages of a journey, and the runs that its report compares."""
    stages: list[Stage] = []
    mechanisms, seeds = JOURNEYS[name]
    if not DATA.is_dir():
        stages.append(("draw pictures", 0.4, partial(run, "shards", "make", "--source", "shapes", "--out", DATA)))
    runs = []
    for mechanism in mechanisms:
        for seed in range(seeds):
            out = Path("runs") / name / f"{mechanism}-{seed}"
            extra = ["configs/demo/long.yaml"] if name == "compare" else []
            words: tuple[object, ...] = ("fit", f"configs/demo/{mechanism}.yaml", *extra, f"seed={seed}", f"out={out}")
            stages.append((f"train {mechanism}, seed {seed}", 3.4 if extra else 2.5, partial(run, *words)))
            if seed == 0 and name != "mechanisms":
                before = ("validate", out, "--checkpoint", "none", "eval.control=0", "eval.samples=1400")
                stages.append((f"ask {mechanism} as it was before training", 0.3, partial(run, *before)))
            stages.append((f"ask {mechanism}, seed {seed}", 0.5, partial(run, "validate", out)))
            runs.append(out)
    for mechanism in FREE if name == "mechanisms" else ():
        out, trained = Path("runs") / name / f"{mechanism}-0", Path("runs") / name / "llava-0" / "checkpoints"
        words = ("validate", f"configs/demo/{mechanism}.yaml", f"out={out}", "--checkpoint", trained / "step-1500.ckpt")
        stages.append((f"ask {mechanism}, which is llava's weights", 0.5, partial(run, *words)))
        runs.append(out)
    if name == "demo":
        work = partial(kill_and_resume, "configs/demo/ee_mllm.yaml", Path("runs/demo/resume"))
        stages.append(("kill a run, continue it, compare it with one that was not killed", 0.8, work))
    report = partial(run, "report", *runs, "--out", Path("runs") / name / "report")
    stages.append(("compare all in a table", 0.2, report))
    if name == "demo":
        sizes = partial(run, "bench", "--visual", 64, 256, 1024, "--minutes", 1, "--out", Path("runs/demo/bench"))
        stages.append(("what more visual tokens cost, every mechanism beside transformers", 1.3, sizes))
    return stages, runs


def demo(name: str, force: bool = False) -> None:
    """Walk one of the journeys.

    Args:
        name: of `JOURNEYS`.
        force: go on where the preflight has failed.

    Raises:
        UserError: something that it needs is missing or broken.
    """
    start = time.perf_counter()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # matrices this small gain nothing from a second thread
    # a process of its own: it may be taken down by a library, and gives back its memory
    if subprocess.run([*COMMAND, "demo", name, "--check"], check=False).returncode and not force:
        raise UserError(
            "the demo would fail, so nothing was trained; mend what failed above, or try all the same: --force"
        )
    stages, runs = stages_of(name)
    for number, (title, _, work) in enumerate(stages, 1):
        left = sum(minutes for _, minutes, _ in stages[number - 1 :])
        say(
            f"\n=== {number} of {len(stages)}: {title}; about {max(1, round(left))} minutes left on two CPU cores",
            flush=True,
        )
        work()
    say(f"\npictures with answers: {', '.join(str(out / 'eval' / 'samples.png') for out in runs)}")
    say(f"{name} took {(time.perf_counter() - start) / 60:.1f} minutes")
