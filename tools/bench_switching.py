"""Benchmark a schedule of mechanisms: what a switch takes, and steps of a schedule beside steps of each of its mechanisms alone.

    python tools/bench_switching.py                        # 7B shapes on the GPU if there is one, else tiny ones
    python tools/bench_switching.py --layers 32 --text 256 --reduced 'every 4'

The schedule is DualSpeed's without its teacher: nine steps of ten, drawn, see the reduced tokens, and one all. Whole rounds of the three
kinds of training alternate, so that they meet the same machine. Writes result.json and report.md.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
import time
from datetime import date
from pathlib import Path
from statistics import mean, median
from typing import Any

import bench_training
import torch
from bench_training import CASES, SHAPES, pack

from lit_eemllm.config import load_config
from lit_eemllm.console import console, write_atomically
from lit_eemllm.doctor import provenance
from lit_eemllm.mechanisms import Mechanism
from lit_eemllm.mechanisms.schedule import Schedule
from lit_eemllm.training.tuning import parameter_groups


def measure(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Medians of switches and of steps, and the schedule's steps beside what the mechanisms that it drew take alone."""
    decoder, tower = SHAPES[args.shape]
    SHAPES["asked"] = {**decoder, "num_hidden_layers": args.layers or decoder["num_hidden_layers"]}, tower
    cuda = device.type == "cuda"
    words = [
        "model.decoder=random",
        "model.vision.path=random",
        "data.train=none",
        "optim.lr=1e-4",
        "optim.max_steps=1",
    ]
    words += [f"model.dtype={'bfloat16' if cuda else 'float32'}", *CASES[args.case], "model.mechanism.preset=llava"]
    entries = [{"weight": 9, "mechanism": {"rows": [{"layers": "0-", "tokens": args.reduced}]}}, {"weight": 1}]
    config = load_config([], [*words, f"optim.mechanisms={json.dumps(entries)}"])
    model = bench_training.build("asked", "llava", config, device)
    dtype = torch.bfloat16 if cuda else torch.float32
    backend = model.set_attention(args.attention, dtype).backend.name
    schedule = Schedule.of(config, model.mechanism, model.config.text_config)
    reduced, whole = (entry.mechanism for entry in schedule.entries[:2])
    batch, optimizer = (
        pack(model, args.text, args.documents, device),
        torch.optim.AdamW(parameter_groups(model, config.optim)),
    )

    def switch(mechanism: Mechanism) -> float:
        """As `LitEEMLLM` does; its seconds."""
        start = time.perf_counter()
        if mechanism != model.mechanism:
            model.set_mechanism(mechanism)
        return time.perf_counter() - start

    def step(mechanism: Mechanism, after: Mechanism) -> tuple[float, float]:
        """Seconds of a step, and of its switches: before it, and to what is evaluated after it."""
        start = time.perf_counter()
        switching = switch(mechanism)
        with torch.autocast(device.type, dtype, enabled=cuda):
            loss = model.packed_loss(batch)
        loss.backward()
        switching += switch(after)
        optimizer.step()
        optimizer.zero_grad()
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start, switching

    for mechanism in (whole, reduced) * 2:  # to warm up
        step(mechanism, whole)
    found: dict[str, list[float]] = {name: [] for name in ("switch", "all", "reduced", "schedule", "switching")}
    found["switch"] = [switch(mechanism) for _ in range(args.steps) for mechanism in (reduced, whole)]
    drawn = []
    for turn in range(args.rounds):
        for name, alone in (("all", whole), ("reduced", reduced)):
            switch(alone)
            found[name] += [step(alone, alone)[0] for _ in range(args.steps)]
        switch(whole)
        for number in range(turn * args.steps, (turn + 1) * args.steps):
            drawn.append(schedule.at(number + 1).mechanism)
            seconds, switching = step(drawn[-1], whole)
            found["schedule"].append(seconds)
            found["switching"].append(switching)
    few = drawn.count(reduced) / len(drawn)
    alone = {reduced: median(found["reduced"]), whole: median(found["all"])}
    within = {each: median(x for x, one in zip(found["schedule"], drawn, strict=True) if one == each) for each in drawn}
    return {
        "layers": len(model.language_model.model.layers),
        "attention": backend,
        "tokens": batch.layout.num_tokens,
        "switch_ms": 1e3 * median(found["switch"]),
        "all_ms": 1e3 * median(found["all"]),
        "reduced_ms": 1e3 * median(found["reduced"]),
        "drawn_reduced": few,
        "expected_ms": 1e3 * mean(alone[each] for each in drawn),
        "schedule_ms": 1e3 * mean(within[each] for each in drawn),
        "switching_share": sum(found["switching"]) / sum(found["schedule"]),
    }


def report(result: dict[str, Any]) -> str:
    """Markdown; all is of one run."""
    row = result["row"]
    return f"""# Switching mechanisms, {result["shape"]} shapes, {row["layers"]} layers, random weights

A pack of {row["tokens"]:,} tokens, attention by {row["attention"]}, AdamW, {result["case"]}; {result["rounds"]} rounds of {result["steps"]} steps of each kind.

| | ms |
|---|---:|
| a switch | {row["switch_ms"]:.3f} |
| a step with all visual tokens | {row["all_ms"]:.2f} |
| a step with `{result["reduced"]}` | {row["reduced_ms"]:.2f} |
| a step of the schedule, {row["drawn_reduced"]:.0%} of them reduced | {row["schedule_ms"]:.2f} |
| these steps, by the two above | {row["expected_ms"]:.2f} |

Switching there and back is {row["switching_share"]:.3%} of the schedule's time.

- {result["provenance"]}
"""


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=[*SHAPES], default="7b" if device.type == "cuda" else "tiny")
    parser.add_argument("--layers", type=int, help="of the decoder, default the shape's")
    parser.add_argument("--case", choices=CASES, default="lora" if device.type == "cuda" else "full")
    parser.add_argument("--reduced", default="every 4", help="visual tokens in most steps, a selection")
    parser.add_argument("--attention", default="auto", help="backend, default auto")
    parser.add_argument(
        "--text", type=int, default=256 if device.type == "cuda" else 16, help="text tokens of a document"
    )
    parser.add_argument("--documents", type=int, default=4, help="documents in a pack")
    parser.add_argument("--steps", type=int, default=20, help="of each kind in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()) if device.type == "cuda" else "cpu"
    out = args.out or Path("benchmarks") / f"{date.today()}-switching-{name.strip('-')}"
    out.mkdir(parents=True, exist_ok=True)
    result = {key: getattr(args, key) for key in ("shape", "case", "reduced", "steps", "rounds")}
    result |= {"row": measure(args, device)}
    result["provenance"] = provenance(shlex.join(["python", "tools/bench_switching.py", *argv]))
    write_atomically(out / "result.json", json.dumps(result, indent=2))
    write_atomically(out / "report.md", report(result))
    console.print(report(result), markup=False)
    console.print(f"written: {out}")


if __name__ == "__main__":
    main(sys.argv[1:])
