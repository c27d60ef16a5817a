"""Kill a tiny training run at random moments, continue it every time, and compare its end with that of an unbroken run.

    make stress                              30 kills, some minutes
    python tools/stress.py --kills 100 --seed 7
    python tools/stress.py --ranks 2         processes under FSDP2, which save in shares while they train on

The run saves at every step. Kills (SIGKILL) come as soon as a checkpoint is being written, or a line of the log, or when the first
loader process has been forked, some while the program starts, the others at random moments of training; moments are drawn from
`--seed`, what the process does then is not. After each kill the newest checkpoint must be whole, and no process may be left. Beside
the unbroken run a second process begins in the same folder: it must refuse. In the end weights, optimiser, generators, losses and the
order of the samples must be those of the unbroken run, bit for bit. Exit status 1 if they are not.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import tiny
import torch

from lit_eemllm.config import to_yaml
from lit_eemllm.console import metrics_files
from lit_eemllm.training.checkpoint import newest_checkpoint, read_checkpoint

SAME = ("state_dict", "optimizer_states", "lr_schedulers", "rng", "global_step")
"""Sections of a checkpoint. (The loader's position may be written in several ways; what follows from it may not differ.)"""
COLUMNS = ("loss", "lr", "grad_norm", "keys_crc")
MOMENTS = ("saving", "training", "starting", "forking", "logging")
PATIENCE = 120
"""Seconds within which a process must show life."""


def start(config: Path, out: Path, log: Path | None = None) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "lit_eemllm", "fit", str(config), f"out={out}"]
    with (log or out.parent / f"{out.name}.log").open("ab") as said:
        return subprocess.Popen(command, stdout=said, stderr=said, start_new_session=True)


def alive(process: subprocess.Popen[bytes]) -> set[int]:
    """Processes of its session, itself too."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session, *_ = stat.read_text().rpartition(")")[2].split()
        except (OSError, ValueError):  # it has just ended
            continue
        if int(session) == process.pid and state != "Z":
            found.add(int(stat.parent.name))
    return found


def wait_until_all_have_ended(process: subprocess.Popen[bytes], out: Path) -> None:
    begin = time.monotonic()
    while left := alive(process):
        if time.monotonic() - begin > PATIENCE:
            raise SystemExit(f"{out}: {len(left)} processes outlive the one that was killed")
        time.sleep(0.05)


def refuse_a_second(process: subprocess.Popen[bytes], config: Path, out: Path) -> None:
    """Another process in the folder in which one trains, which stands still meanwhile, ends with a message that names the folder."""
    log = out.parent / f"{out.name}.second.log"
    process.send_signal(signal.SIGSTOP)
    try:
        if start(config, out, log).wait(PATIENCE) == 0 or f"{out}: another training is running" not in log.read_text():
            raise SystemExit(f"{out}: a second process was not refused, see {log}")
    finally:
        process.send_signal(signal.SIGCONT)
    print("a second process in the same folder was refused", flush=True)


def kill_somewhere(process: subprocess.Popen[bytes], out: Path, training: float, draw: random.Random) -> str | None:
    """Kill the process at a moment within so many seconds of training. Returns when that was, None if it ended before."""
    folder = out / "checkpoints"
    newest = newest_checkpoint(out)
    kind = draw.choices(MOMENTS, (3, 4, 1, 2, 2))[0]
    delay = draw.uniform(0, {"starting": 5, "forking": 0.3}.get(kind, training))
    begin = time.monotonic()
    if kind == "forking":
        while process.poll() is None and len(alive(process)) < 2:
            time.sleep(0.002)
        begin = time.monotonic()
    elif kind != "starting":
        while process.poll() is None and newest_checkpoint(out) == newest:
            if time.monotonic() - begin > PATIENCE:
                raise SystemExit(f"{out}: no new checkpoint within {PATIENCE} s, see {out}.log")
            time.sleep(0.002)
        begin = time.monotonic()
    written = log_bytes(out)
    while process.poll() is None:
        due = time.monotonic() - begin >= delay
        written = written if due else log_bytes(out)
        if due and {"saving": saves(folder), "logging": log_bytes(out) > written}.get(kind, True):
            os.killpg(process.pid, signal.SIGKILL)  # all ranks; loader processes end by themselves
            process.wait()
            wait_until_all_have_ended(process, out)
            return "saving" if saves(folder) else kind.replace("saving", "training")
        time.sleep(0.0005)
    return None


def saves(folder: Path) -> bool:
    """Whether a checkpoint is being written, or shares of one."""
    whole = {path.stem for path in folder.glob("step-*.ckpt")}
    return any(folder.glob(".*.unfinished")) or any(x.stem not in whole for x in folder.glob("step-*.shards-*"))


def log_bytes(run: Path) -> int:
    return sum(file.stat().st_size for file in metrics_files(run))


def rows(run: Path) -> dict[int, tuple[str, ...]]:
    """step -> what was logged, the last time if several times."""
    found = {}
    for file in metrics_files(run):
        with file.open() as lines:
            for row in csv.DictReader(lines):
                if row.get("loss") and row.get("keys_crc"):  # the last line may be cut
                    found[int(row["step"])] = tuple(row[name] for name in COLUMNS)
    return found


def differences(found: Any, true: Any, where: str = "") -> list[str]:
    """Places where two nested values are not the same bits."""
    if type(found) is not type(true):
        return [where]
    if isinstance(true, torch.Tensor):
        return [] if found.dtype == true.dtype and found.equal(true) else [where]
    if isinstance(true, dict | list | tuple):
        if len(found) != len(true) or (isinstance(true, dict) and found.keys() != true.keys()):
            return [where]
        keys = true if isinstance(true, dict) else range(len(true))
        return [place for key in keys for place in differences(found[key], true[key], f"{where}.{key}")]
    return [] if found == true else [where]


def compare(cut: Path, whole: Path) -> list[str]:
    """What differs at the end of two runs."""
    ends = [newest_checkpoint(run) for run in (cut, whole)]
    if None in ends:
        return ["a run without checkpoint"]
    a, b = (read_checkpoint(end) for end in ends if end is not None)
    wrong = [place for name in SAME for place in differences(a[name], b[name], name)]
    found, true = rows(cut), rows(whole)
    return wrong + [f"log of step {step}" for step in true if found.get(step) != true[step]]


def stress(folder: Path, kills: int, seed: int, steps: int, ranks: int) -> bool:
    """All kills, in as many runs as they need. Prints counts; whether all runs ended as the unbroken one."""
    draw = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    tiny.write_parts(folder / "parts")
    tiny.write_shards(folder / "data", val=4)
    options = [f"optim.max_steps={steps}", "optim.save_every=1", "optim.keep=2", "data.val=null", "data.workers=2"]
    options += [f"trainer.accumulate_grad_batches={2 // ranks}", f"trainer.devices={ranks}"]
    made = tiny.config(folder / "parts", folder / "data", folder, *options, *["trainer.strategy=fsdp2"] * (ranks > 1))
    config = folder / "config.yaml"
    config.write_text(to_yaml(made))

    whole = folder / "whole"
    process = start(config, whole)
    while process.poll() is None and newest_checkpoint(whole) is None:
        time.sleep(0.01)
    refuse_a_second(process, config, whole)
    begin = time.monotonic()
    if process.wait():
        raise SystemExit(f"the unbroken run failed, see {whole}.log")
    seconds = time.monotonic() - begin

    counts: Counter[str] = Counter()
    most_lost, good, done, number = 0, True, 0, 0
    while done < kills:
        number += 1
        cut = folder / f"cut-{number}"
        while True:
            process = start(config, cut)
            when = kill_somewhere(process, cut, 2 * seconds / (kills + 1), draw) if done < kills else None
            if when is None:
                if process.wait():
                    raise SystemExit(f"{cut}: exit status {process.returncode}, see {cut}.log")
                break
            done += 1
            counts[when] += 1
            newest, logged = newest_checkpoint(cut), max(rows(cut), default=0)
            kept = 0 if newest is None else read_checkpoint(newest)["global_step"]
            most_lost = max(most_lost, logged - kept)
            print(f"kill {done:>3} while {when:<8}  newest checkpoint: step {kept}", flush=True)
        wrong = compare(cut, whole)
        files = sorted(path.name for path in (cut / "checkpoints").iterdir())
        good = good and not wrong and len(files) == (2 if ranks == 1 else 4)
        result = "the same, bit for bit" if not wrong else f"{len(wrong)} differences, such as {wrong[0]}"
        print(f"run {number}: {steps} steps, compared with the unbroken run: {result}; left in checkpoints/: {files}")
    told = ", ".join(f"{counts[name]} while {name}" for name in MOMENTS)
    print(f"{done} kills ({told}) in {number} runs; at most {most_lost} logged steps to repeat")
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--steps", type=int, default=60, metavar="N", help="of each run")
    parser.add_argument("--ranks", type=int, default=1, choices=(1, 2))
    parser.add_argument("--out", type=Path, metavar="DIR", help="keeps the runs there; default: a temporary folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        return 0 if stress(args.out or Path(temporary), args.kills, args.seed, args.steps, args.ranks) else 1


if __name__ == "__main__":
    sys.exit(main())
