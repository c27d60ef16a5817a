"""Benchmark the attention backends beside each other: time, memory and FLOP/s of dense and composite layers.

    python tools/bench_attention.py                       # on the GPU if there is one, else small sizes on the CPU
    python tools/bench_attention.py --visual 2880 --text 256 --documents 1 --backends sdpa flash

A pack holds documents of 35 text tokens, V visual tokens and the rest of T text tokens. In a dense layer every token
queries, in a composite one only text. Every provider of a backend is measured; one that cannot run is listed with its
reason, and running out of memory is a result. Writes result.json, report.md (which says what the numbers mean) and
plot.png, by default into benchmarks/DATE-attention-DEVICE.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler, which counts memory on the CPU, logs every start

import torch
from matplotlib.figure import Figure
from torch import Tensor

from lit_eemllm.attention import AttentionBackend, registered_backends
from lit_eemllm.attention.base import _BACKENDS, TOLERANCE, disagreement
from lit_eemllm.console import console, progress, write_atomically
from lit_eemllm.doctor import environment, machine
from lit_eemllm.layout import Run, SequenceLayout, Visibility, first_place

PREFIX = 35  # text before the image, as in LLaVA's template
LAYERS = {"dense": Visibility(True), "composite": Visibility(False)}
PASSES = ("forward", "forward+backward")
REFERENCE_LIMIT = 2**30  # bytes of one dense float32 matrix of scores, of which the reference holds several
WARM_UP = 3
DEFAULTS: dict[str, dict[str, Any]] = {
    "cuda": dict(dtype="bfloat16", visual=[576, 2880, 4900, 9800], text=[64, 256, 1024], heads=32, head_size=128),
    "cpu": dict(dtype="float32", visual=[64, 144], text=[16, 64], heads=4, head_size=64),
}
Row = dict[str, Any]

NOTES = """\
*V*, *T*: visual and text tokens of a document; *docs*: documents in a pack. Cells are **dense / composite** layer. Speed
is how many times as fast as `sdpa` in a dense layer with the same tokens in this run. FLOPs are those that the
visibility needs: 4 × pairs × heads × head size forward, where pairs counts the keys that each query sees, and 2.5 times
that backward. The ceiling is a large matrix product in the same run and type. Memory is the peak beyond the inputs and
the plan; a plan is made once a batch, outside what is timed. Errors are the largest difference relative to the largest
value, of output and gradients the worst, from `reference` where its dense matrix fits, else from `sdpa`. The forward of
a backend that trains records what a backward needs. result.json has every row, with quartiles and first calls."""
TABLES = (
    ("Speed against sdpa dense", PASSES[0], "speed", 1, ".2f"),
    ("Speed against sdpa dense", PASSES[1], "speed", 1, ".2f"),
    ("Median time, ms", PASSES[0], "seconds", 1e3, ".3g"),
    ("Median time, ms", PASSES[1], "seconds", 1e3, ".3g"),
    ("Share of the ceiling, %", PASSES[1], "of_ceiling", 100, ".1f"),
    ("Peak memory, MiB", PASSES[1], "peak_bytes", 2**-20, ".4g"),
    ("Making the plan, ms", PASSES[0], "plan_seconds", 1e3, ".2g"),
)


def layout_of(visual: int, text: int, documents: int) -> SequenceLayout:
    """Equal documents text-image-text; with little text, half of it comes first."""
    before = PREFIX if text > PREFIX else text // 2
    return SequenceLayout.of([[Run(False, before), Run(True, visual), Run(False, text - before)]] * documents)


def visible_pairs(layout: SequenceLayout, visibility: Visibility) -> int:
    """Pairs of query and key that a layer needs: row p of a document sees p + 1 keys, or as many as its window or chunk has so far."""
    keys_S = layout.positions + 1
    if visibility.window is not None:
        keys_S = keys_S - first_place(layout.positions, visibility.window).clamp(min=0)
    return int((keys_S if visibility.visual_queries else keys_S[layout.text_index]).sum())


def needed_flops(pairs: int, heads: int, head_size: int, backward: bool) -> int:
    """Two products forward, of 2 FLOPs a multiplication with addition; five backward, which recomputes the scores."""
    forward = 4 * pairs * heads * head_size
    return forward + 5 * forward // 2 if backward else forward


def clocked(call: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """What one call returns, and its seconds by the clock."""
    begin = time.perf_counter()
    found = call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return found, time.perf_counter() - begin


def durations(call: Callable[[], Any], device: torch.device, repeats: int) -> list[float]:
    """Seconds of each of some calls, warm."""
    for _ in range(WARM_UP):
        call()
    if device.type != "cuda":
        return [clocked(call, device)[1] for _ in range(repeats)]
    # Writing more than any cache holds: a layer finds its inputs in memory, and the CPU runs ahead of the GPU.
    flush = torch.empty(2**30, dtype=torch.uint8, device=device)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        flush.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]


def peak_memory(call: Callable[[], Any], device: torch.device) -> int:
    """The most bytes held at once beyond what was there before; what the call returns counts."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in events), initial=0))


def ceiling(device: torch.device, dtype: torch.dtype, repeats: int) -> float:
    """FLOP/s of a large matrix product."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    return 2 * n**3 / median(durations(partial(torch.mm, a, b), device, repeats))


def available(args: argparse.Namespace) -> tuple[dict[str, tuple[AttentionBackend, bool]], dict[str, str]]:
    """Every provider that works and whether it trains; and why others do not, or do not train."""
    working: dict[str, tuple[AttentionBackend, bool]] = {}
    unavailable: dict[str, str] = {}
    where = args.device, args.dtype
    for name in args.backends:
        if reason := _BACKENDS[name].refusal(*where, training=False):
            unavailable[name] = reason
            continue
        candidates = list(_BACKENDS[name].candidates())
        for provider, make in candidates:
            label = name if len(candidates) == 1 else f"{name} ({provider})"
            for training, what in ((False, label), (True, f"{label}, backward")):
                try:
                    backend = make()
                    reason = backend.refusal(*where, training)
                    reason = reason or disagreement(backend, *where, training, args.head_size)
                except Exception as error:  # noqa: BLE001  a kernel may fail in any way; the reason is listed
                    reason = f"{type(error).__name__}: {error}"
                if reason:
                    unavailable[what] = " ".join(reason.split())
                    break
                working[label] = backend, training
    return working, unavailable


def attempt(measure: Callable[[], Row]) -> Row:
    """What it finds, or why it fails: one failing kernel must not end the benchmark."""
    try:
        return measure()
    except torch.OutOfMemoryError:
        return {"status": "out of memory"}
    except Exception as error:  # noqa: BLE001  a kernel may fail in any way; the reason is listed
        return {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def bench_layer(args: argparse.Namespace, case: Row, working: dict, top: float) -> list[Row]:
    """A row for each backend and pass, for one layout in one kind of layer; `top` is the ceiling."""
    torch.compiler.reset()  # so many shapes would exceed the limit of recompilations, and FlexAttention turn dense
    layout, visibility = layout_of(case["visual"], case["text"], case["documents"]), LAYERS[case["layer"]]
    queries, keys = layout.num_tokens if visibility.visual_queries else layout.num_text, layout.num_tokens
    pairs, layout = visible_pairs(layout, visibility), layout.to(args.device)
    torch.manual_seed(0)
    *qkv, weights_QNH = (
        torch.randn(rows, heads, args.head_size, device=args.device, dtype=args.dtype)
        for rows, heads in ((queries, args.heads), (keys, args.kv_heads), (keys, args.kv_heads), (queries, args.heads))
    )

    def run(backend: AttentionBackend, plan: Any, trains: bool, backward: bool) -> list[Tensor]:
        """The output, and the gradients of q, k and v if `backward`."""
        q_QNH, k_SKH, v_SKH = inputs = [x.detach().requires_grad_(trains) for x in qkv]
        out = backend.attend(q_QNH, k_SKH, v_SKH, plan, args.head_size**-0.5)
        return [out.detach(), *(torch.autograd.grad(out, inputs, weights_QNH) if backward else ())]

    scores = 4 * args.heads * queries * keys  # bytes
    judge = "reference" if scores <= REFERENCE_LIMIT else "sdpa"
    law = next(_BACKENDS[judge].candidates())[1]()
    true = attempt(lambda: {"found": run(law, law.plan(layout, visibility), True, True)}).get("found")

    def measure(backend: AttentionBackend, trains: bool, backward: bool, flops: int) -> Row:
        if backend.name == "reference" != judge:
            limit = f"its dense matrix would take {scores / 2**30:.1f} GiB, the limit is {REFERENCE_LIMIT / 2**30:g}"
            return {"status": "skipped", "reason": limit}
        make_plan = partial(backend.plan, layout, visibility)
        plan_bytes = peak_memory(make_plan, args.device)
        plan, plan_seconds = clocked(make_plan, args.device)
        call = partial(run, backend, plan, trains, backward)
        found, first = clocked(call, args.device)
        error = None
        if true is not None and backend.name != judge:
            compared = zip(found, true, strict=False)  # without a backward only the output
            error = max(((x.float() - y.float()).abs().max() / y.float().abs().max()).item() for x, y in compared)
        del found
        peak = peak_memory(call, args.device)
        times = durations(call, args.device, args.repeats)
        return {
            "status": "measured",
            "seconds": median(times),
            "quartiles": quantiles(times, n=4)[::2],
            "first_call_seconds": first,
            "plan_seconds": plan_seconds,
            "plan_peak_bytes": plan_bytes,
            "peak_bytes": peak,
            "flops_per_second": flops / median(times),
            "of_ceiling": flops / median(times) / top,
            "error": error,
            "error_against": None if error is None else judge,
            "wrong": error is not None and not error <= TOLERANCE[args.dtype],
        }

    result = []
    for label, (backend, trains) in working.items():
        for name in PASSES[: 1 + trains]:
            backward = name == PASSES[1]
            flops = needed_flops(pairs, args.heads, args.head_size, backward)
            row = {**case, "backend": label, "pass": name, "pairs": pairs, "flops": flops}
            result.append(row | attempt(partial(measure, backend, trains, backward, flops)))
    return result


def setting(args: argparse.Namespace, argv: Sequence[str]) -> Row:
    """The machine, versions, commit and command that the numbers come from."""
    kernels = ("triton", "flash-attn", "flash-attn-3", "flash-attn-4", "xformers")
    about = environment("lit_eemllm", "torch", *kernels)
    about |= {
        "device": about["gpu"] if args.device.type == "cuda" else about["cpu"],
        "date": date.today().isoformat(),
        "command": shlex.join(["python", "tools/bench_attention.py", *argv]),
        "threads": torch.get_num_threads(),
        "dtype": str(args.dtype).removeprefix("torch."),
        "machine": {k: v for k, v in machine().items() if k != "system"},
    }
    return about | {name: getattr(args, name) for name in ("heads", "kv_heads", "head_size", "repeats")}


def report(result: Row) -> str:
    """A result for people, in Markdown."""
    about, rows = result["environment"], result["rows"]
    cells: dict[tuple, list[Row]] = {}  # those of the layers, in the order of LAYERS
    for row in rows:
        cells.setdefault((row["visual"], row["text"], row["documents"], row["backend"], row["pass"]), []).append(row)
    versions = ", ".join(map(" ".join, about["versions"].items())) + f", {about['machine']['pytorch_built_for']}"
    worst = {name: [r["error"] for r in rows if r["backend"] == name and r.get("error")] for name in result["backends"]}
    parts = [
        f"# Attention backends on {about['device']}",
        f"{about['date']}, {about['dtype']}, {about['heads']} heads ({about['kv_heads']} of keys and values) of "
        f"{about['head_size']}; medians of {about['repeats']} calls; {about['threads']} CPU threads; "
        f"ceiling {result['ceiling'] / 1e12:.3g} TFLOP/s. {versions}. Commit {about['commit']}: `{about['command']}`",
        "![time over V](plot.png)",
        NOTES,
        "Largest errors: " + ", ".join(f"{name} {max(found):.1e}" for name, found in worst.items() if found) + ".",
        "Cannot run here:\n\n" + "\n".join(f"- {name}: {reason}" for name, reason in result["unavailable"].items()),
    ]
    for title, name, key, unit, form in TABLES:
        lines = [["V", "T", "docs", *result["backends"]], ["---:"] * (3 + len(result["backends"]))]
        for case in dict.fromkeys(key[:3] for key in cells):
            lines.append([str(x) for x in case])
            for label in result["backends"]:
                texts = []
                for row in cells.get((*case, label, name), ()):
                    missing = row["status"].replace("measured", "–")  # no sdpa beside it
                    wrong = " wrong" if row.get("wrong") else ""
                    texts.append(missing if row.get(key) is None else f"{unit * row[key]:{form}}{wrong}")
                lines[-1].append(" / ".join(texts) or "–")
        parts += [f"## {title}, {name}", "\n".join(f"| {' | '.join(line)} |" for line in lines)]
    return "\n\n".join(parts) + "\n"


def draw(result: Row) -> Figure:
    """Time over V of the largest packs, one panel per pass and number of text tokens."""
    documents, about = max(row["documents"] for row in result["rows"]), result["environment"]
    rows = [row for row in result["rows"] if row["documents"] == documents]
    texts, visuals = (sorted({row[key] for row in rows}) for key in ("text", "visual"))
    figure = Figure(figsize=(3.5 + 3.5 * len(texts), 7), layout="constrained")
    axes = figure.subplots(2, len(texts), squeeze=False, sharex=True, sharey="row")
    for (i, name), (j, text) in itertools.product(enumerate(PASSES), enumerate(texts)):
        axis = axes[i][j]
        for (c, label), layer in itertools.product(enumerate(result["backends"]), LAYERS):
            points = [r for r in rows if (r["backend"], r["layer"], r["pass"], r["text"]) == (label, layer, name, text)]
            times = [1e3 * row.get("seconds", float("nan")) for row in points]
            style = dict(marker="o", ls="-") if layer == "dense" else dict(marker="s", ls="--", mfc="white")
            axis.plot([row["visual"] for row in points], times, c=f"C{c}", ms=5, label=f"{label}, {layer}", **style)
        scale = (
            "log" if any("seconds" in row for row in rows if row["pass"] == name) else "linear"
        )  # log needs a number
        axis.set(xscale="log", yscale=scale, title=f"{name}, T = {text}")
        axis.set_xticks(visuals, [f"{v:,}" for v in visuals])
        axis.set_xticks([], minor=True)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.grid(color="0.9")
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("visual tokens V of a document")
    figure.supylabel("median time, ms")
    figure.suptitle(f"Attention: {documents} documents a pack, {about['dtype']}, {about['device']}")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    return figure


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options, with the defaults of the device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=DEFAULTS, help="default: the GPU if there is one")
    parser.add_argument("--dtype", choices=[str(dtype).removeprefix("torch.") for dtype in TOLERANCE])
    parser.add_argument(
        "--backends", nargs="+", choices=registered_backends(), default=registered_backends(), metavar="NAME"
    )
    parser.add_argument("--visual", nargs="+", type=int, metavar="V", help="visual tokens of a document")
    parser.add_argument("--text", nargs="+", type=int, metavar="T", help="text tokens of a document, 2 or more")
    parser.add_argument("--documents", nargs="+", type=int, default=[1, 4], metavar="N", help="documents of a pack")
    parser.add_argument("--heads", type=int)
    parser.add_argument("--kv-heads", type=int, help="heads of keys and values, default: as many as --heads")
    parser.add_argument("--head-size", type=int)
    parser.add_argument("--repeats", type=int, default=20, help="timed calls of each")
    parser.add_argument("--out", type=Path, help="folder for the results")
    args = parser.parse_args(argv)
    args.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if args.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has none that PyTorch can use")
    for name, value in DEFAULTS[args.device.type].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.dtype, args.kv_heads = getattr(torch, args.dtype), args.kv_heads or args.heads
    if args.heads % args.kv_heads:
        parser.error(f"--heads {args.heads} is no multiple of --kv-heads {args.kv_heads}")
    if min(args.visual) < 1 or min(args.text) < 2 or min(args.documents) < 1 or args.repeats < 2:
        parser.error("--visual and --documents are 1 or more, --text and --repeats 2 or more")
    return args


def main(argv: Sequence[str]) -> None:
    args = parse(argv)
    about = setting(args, argv)
    slug = re.sub("[^a-z0-9]+", "-", about["device"].lower()).strip("-")
    out = args.out or Path("benchmarks") / f"{about['date']}-attention-{slug}"
    working, unavailable = available(args)
    for name, reason in unavailable.items():
        console.print(f"cannot run: {name}: {reason}")
    if not working:
        sys.exit("none of these backends can run here: nothing to measure")
    result: Row = {"environment": about, "ceiling": ceiling(args.device, args.dtype, args.repeats)}
    result |= {"backends": list(working), "unavailable": unavailable, "rows": []}
    out.mkdir(parents=True, exist_ok=True)
    sizes = list(itertools.product(args.visual, args.text, args.documents))
    with progress("layer", len(sizes) * len(LAYERS)) as advance:
        for visual, text, documents in sizes:
            rows: list[Row] = []
            for layer in LAYERS:
                case = {"visual": visual, "text": text, "documents": documents, "layer": layer}
                rows += bench_layer(args, case, working, result["ceiling"])
                advance(1)
            known = {(row["backend"], row["layer"], row["pass"]): row.get("seconds") for row in rows}
            for row in rows:
                base = known.get(("sdpa", "dense", row["pass"]))
                row["speed"] = base / row["seconds"] if base and "seconds" in row else None
            result["rows"] += rows
            write_atomically(out / "result.json", json.dumps(result, indent=1) + "\n")  # kept if it is interrupted
    write_atomically(out / "report.md", report(result))
    draw(result).savefig(out / ".plot.png.unfinished", dpi=110, format="png")
    os.replace(out / ".plot.png.unfinished", out / "plot.png")
    for row in result["rows"]:
        if row.get("wrong"):
            console.print(f"WRONG: {row['backend']}, {row['layer']}, {row['pass']}: error {row['error']:.1e} in {row}")
    console.print(f"{len(result['rows'])} rows: {out / 'report.md'}, result.json, plot.png")


if __name__ == "__main__":
    main(sys.argv[1:])
