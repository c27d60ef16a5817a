"""Benchmark the loader against the bare cost of decoding pictures and tokenising text, measured in turns in the same run.

    python tools/bench_loader.py --data BLEND.yaml --tokenizer FOLDER [--workers 1 2]
    python tools/bench_loader.py --workers-for benchmarks/2026-11-21-loader-640/result.json

For each number of workers as many processes do, over and over, the least of what a loader must do for samples drawn as the
recipe asks, held in memory: `decode`: open every picture as RGB with Pillow and tokenise the conversation's text once. `pixels`:
also bring every picture to the encoder's size. `own`: as `pixels`, but decode as this project does. Then the loader with as many
workers is emptied as fast as it fills, by a process that trains nothing. Writes result.json and report.md, by default into
benchmarks/DATE-loader.

With `--workers-for` nothing is measured: from the loader's rate in a result, the workers that each preset in configs/presets needs for
data wait to stay below 1 %, written into benchmarks/DATE-workers. Packs are of the mean samples with which a preset's comment has its
memory estimated.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from itertools import cycle, islice
from math import ceil
from pathlib import Path
from statistics import median
from textwrap import fill
from typing import Any

import torch
from PIL import Image
from transformers import AutoTokenizer

from lit_eemllm.compat.torch import worker_processes
from lit_eemllm.config import load_config
from lit_eemllm.config.keys import DataConfig
from lit_eemllm.console import console, progress, write_atomically
from lit_eemllm.cost.estimate import prompt_of
from lit_eemllm.cost.trace import Document, trace
from lit_eemllm.cost.weightless import parts_of_config
from lit_eemllm.data.module import ShardDataModule
from lit_eemllm.data.recipe import read_recipe
from lit_eemllm.data.samples import read_members, read_row
from lit_eemllm.data.shards import make, read_shard
from lit_eemllm.doctor import provenance
from lit_eemllm.errors import SampleError, UserError
from lit_eemllm.inputs.chat import ChatTemplate, get_template
from lit_eemllm.inputs.images import ImageTransform, Transform, open_image, read_picture
from lit_eemllm.mechanisms import configured_mechanism
from lit_eemllm.shrink import shrink

HELD = 512  # samples in memory for the bare costs
MAX_PIXELS = DataConfig.max_image_pixels
WARM_UP = 1.0  # seconds
HEADROOM = 1.25  # packs made for each that is taken
PRESETS = Path(__file__).resolve().parents[1] / "configs" / "presets"

Held = list[tuple[str, list[bytes]]]
"""Text of a conversation as the template writes it, and its image files."""


def drawn(path: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Samples of each source, as many as its share of the recipe asks for: key and members."""
    recipe = read_recipe(path, "train")
    for source in recipe.sources:
        share = recipe.shares[recipe.names[os.path.normpath(source.folder)]]
        samples = (sample for name, _ in source.shards for sample in read_shard(source.folder / name))
        yield from islice(samples, round(HELD * share))


def enlarged(picture: Image.Image, side: int) -> bytes:
    """As JPEG, its longer side so many pixels. It is smooth: it decodes faster than a photo of that size."""
    scale, file = side / max(picture.size), io.BytesIO()
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    picture.resize(size).save(file, "JPEG", quality=90)
    return file.getvalue()


def rewritten(path: Path, folder: Path, other: Callable[[Image.Image], bytes]) -> Path:
    """A folder of shards with those samples, another JPEG file for each of their pictures."""
    rows = []
    for number, (key, members) in enumerate(drawn(path)):
        try:
            row, images = read_row(key, members)
            files = [other(open_image(data, key, MAX_PIXELS)) for data in images.values()]
        except SampleError:
            continue
        names = [f"{number}.{i}.jpg" for i in range(len(images))]
        for name, file in zip(names, files, strict=True):
            (folder / name).write_bytes(file)
        rows.append({"id": f"{number}", "image": names, "conversations": row.get("conversations")})
    (folder / "train.json").write_text(json.dumps(rows))
    make({"train": folder / "train.json"}, folder, folder / "shards")
    return folder / "shards"


def held_samples(path: Path, template: ChatTemplate) -> Held:
    """The good ones of `drawn`. Raises UserError if there are none."""
    held, why = [], "it has none"
    for key, members in drawn(path):
        try:
            conversation, images = read_members(key, members)
            text = "".join(span.text for span in template.render(conversation))
            for data in images:
                read_picture(data, key, MAX_PIXELS)
            held.append((text, images))
        except SampleError as error:
            why = f"the last one is bad: {error}"
    if not held:
        raise UserError(f"{path}: no good samples; {why}")
    return held


def by_pillow(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def by_ourselves(data: bytes) -> torch.Tensor:
    return read_picture(data, "", MAX_PIXELS)


def bare(
    tokenizer: Any, held: Held, opened: Callable[[bytes], Any], transform: Transform | None, seconds: float, rates: Any
) -> None:
    """Work for so many seconds and put the samples per second into the queue."""
    torch.set_num_threads(1)
    done, start = 0, time.perf_counter() + WARM_UP
    while (now := time.perf_counter()) < start + seconds:
        text, images = held[done % len(held)]
        tokenizer(text, add_special_tokens=False)
        for data in images:
            picture = opened(data)
            if transform is not None:
                transform(picture)
        done = 0 if now < start else done + 1
    rates.put(done / (time.perf_counter() - start))


def bare_rate(workers: int, *task: Any) -> float:
    """Samples per second of so many processes."""
    context = multiprocessing.get_context("fork")  # shares the samples in memory, as the loader's workers share theirs
    rates = context.Queue()
    processes = [context.Process(target=bare, args=(*task, rates)) for _ in range(workers)]
    for process in processes:
        process.start()
    total = sum(rates.get(timeout=600) for _ in processes)
    for process in processes:
        process.join()
    return total


def loader_rate(config: DataConfig, template: ChatTemplate, transform: Transform, seconds: float) -> dict[str, float]:
    """Samples and tokens per second, packing efficiency and memory of a worker, after its buffers have filled."""
    data = ShardDataModule(config, seed=0)
    data.connect(template, transform)
    loader: Any = data.train_dataloader()
    batches = iter(loader)
    next(batches)
    stop = time.perf_counter() + WARM_UP
    while time.perf_counter() < stop:
        next(batches)
    samples = tokens = packs = 0
    start = time.perf_counter()
    while (passed := time.perf_counter() - start) < seconds:
        batch = next(batches)
        samples, tokens, packs = samples + len(batch.keys), tokens + batch.layout.num_tokens, packs + 1
    workers = [worker.pid for worker in worker_processes(loader.loader)]
    result = {
        "samples_per_second": samples / passed,
        "tokens_per_second": tokens / passed,
        "packing": tokens / packs / config.pack_tokens,
        "mib_per_worker": max(map(own_mib, workers)),
    }
    loader.close()
    return result


def own_mib(pid: int) -> float:
    """Memory of a process, what it shares with others counted by its part."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def report(result: dict[str, Any]) -> str:
    other = f", pictures enlarged to {result['enlarge']} pixels" if result["enlarge"] else ""
    if result["pictures"]:
        other = f", in place of its pictures in turn {', '.join(result['pictures'])}"
    size = result["image_size"]
    about = (
        f"`{result['data']}`{other}, packs of {result['pack_tokens']} tokens, pictures of {size} x {size} pixels. "
        f"Medians of {result['rounds']} rounds of {result['seconds']:g} s, taken in turns, in samples a second. *decode*: "
        "open the pictures with Pillow and tokenise the text, nothing else; *pixels*: also bring the pictures to the encoder's "
        "size; *own*: as pixels, but decode as this project does."
    )
    lines = [
        "# Loader",
        "",
        fill(about, 120, break_long_words=False),
        "",
        "| workers | decode | pixels | own | loader | tokens/s | of decode | of pixels | of own | packing | MiB a worker |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['workers']} | {row['decode']:.0f} | {row['pixels']:.0f} | {row['own']:.0f} "
            f"| {row['samples_per_second']:.0f} | {row['tokens_per_second']:,.0f} | {row['of_decode']:.2f} "
            f"| {row['of_pixels']:.2f} | {row['of_own']:.2f} | {row['packing']:.3f} | {row['mib_per_worker']:.0f} |"
        )
    return "\n".join([*lines, "", f"- {result['provenance']}", ""])


# --- workers of presets
def pack_of(preset: Path, folder: Path) -> dict[str, Any]:
    """A full pack of a preset's mean samples: how many, their tokens, and its FLOPs forward and backward, without what is computed again.

    Args:
        preset: whose comment names the options of `estimate` for a mean sample.
        folder: for config files of its parts.
    """
    (options,) = re.findall(r"by estimate \((.*?)\)", preset.read_text().replace("\n# ", " "))
    asked = {name: int(number) for name, number in re.findall(r"--(text|visual) (\d+)", options)}
    config = load_config([preset, shrink(load_config([preset]), folder, published=True)])
    parts = parts_of_config(config.model)
    mechanism = configured_mechanism(config.model.mechanism, parts.decoder.num_hidden_layers)
    text, visual = asked["text"], prompt_of(parts, asked["text"], asked.get("visual"), None)
    step = trace(config, parts, mechanism, Document(text, visual, text))
    samples = config.data.pack_tokens // (text + visual)
    return {
        "text": text,
        "visual": visual,
        "samples": samples,
        "flops": samples * (step.forward_flops + step.backward_flops),
    }


def needed(pack: dict[str, Any], rate: float, speed: float) -> dict[str, Any]:
    """Seconds of a step of one pack at so many FLOP/s, those in which a worker of so many samples a second makes it, and the workers."""
    step, made = pack["flops"] / speed, pack["samples"] / rate
    return {**pack, "step_seconds": step, "worker_seconds": made, "workers": max(1, ceil(HEADROOM * made / step))}


def workers_for(measured: Path, peak: float, utilisation: float, presets: Path, out: Path, command: str) -> None:
    """Write the workers of each preset in a folder, by the rate of a result's loader: a worker's slowest, alone or beside others."""
    result = json.loads(measured.read_text())
    rate = min(row["samples_per_second"] / row["workers"] for row in result["rows"])
    paths = [path for path in sorted(presets.glob("*.yaml")) if not path.stem.startswith("base_")]
    rows = []
    with tempfile.TemporaryDirectory() as folder, progress("presets", len(paths)) as advance:
        for path in paths:
            pack = pack_of(path, Path(folder))
            rows.append({"preset": path.stem, **needed(pack, rate, 1e12 * peak * utilisation)})
            advance(1)
    found = {
        "measured": str(measured),
        "measured_on": result["provenance"].partition("; ")[0],
        "enlarge": result["enlarge"],
        "samples_per_second": rate,
        "peak_tflops": peak,
        "utilisation": utilisation,
        "headroom": HEADROOM,
        "rows": rows,
        "provenance": provenance(command),
    }
    write(found, workers_report(found), out)


def workers_report(found: dict[str, Any]) -> str:
    about = (
        f"A worker that makes a pack in t_w keeps up with steps of t_s if there are t_w / t_s of it; here {found['headroom']:g} times as many, "
        "rounded up, since a loader that just keeps up waits whenever a pack takes longer than the mean. With packs whose times deviate "
        "by 30 % and two made ahead by each worker, that headroom keeps the wait below 1 % (simulated in "
        "tests/tools/test_bench_loader.py); the slowest measured rate a worker is taken, which has what workers cost each other."
    )
    by = (
        f"t_s: FLOPs of a pack of one GPU, forward and backward by `estimate`, nothing computed again, at {found['utilisation']:.0%} of "
        f"{found['peak_tflops']:g} TFLOP/s (the data sheet of an H200 says 989 of dense bfloat16); assumed, not measured: slower steps need fewer workers. "
        f"t_w: by the {found['samples_per_second']:.0f} samples a second of a worker in `{found['measured']}` ({found['measured_on']}), each with one picture"
        f"{' of ' + str(found['enlarge']) + ' pixels' if found['enlarge'] else ''}; photos of other sizes, and several or none in a sample, take other times. "
        "Samples are the mean ones of a preset's comment. Workers are for each GPU (`data.workers`)."
    )
    lines = [
        "# Loader workers of presets",
        "",
        *(part for text in (about, by) for part in (fill(text, 120, break_long_words=False), "")),
        "| preset | visual tokens | text | samples a pack | TFLOP a pack | t_s, ms | t_w, ms | workers |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in found["rows"]:
        lines.append(
            f"| {row['preset']} | {row['visual']} | {row['text']} | {row['samples']} | {row['flops'] / 1e12:.1f} "
            f"| {1000 * row['step_seconds']:.1f} | {1000 * row['worker_seconds']:.1f} | {row['workers']} |"
        )
    return "\n".join([*lines, "", f"- {found['provenance']}", ""])


def write(result: dict[str, Any], text: str, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "result.json", json.dumps(result, indent=2))
    write_atomically(out / "report.md", text)
    console.print(text)
    console.print(f"written: {out}")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="recipe or folder of prepared shards")
    parser.add_argument("--tokenizer", help="folder or name of a tokenizer")
    parser.add_argument("--template", default="vicuna_v1")
    parser.add_argument("--image-size", type=int, default=336)
    parser.add_argument("--patch", type=int, default=14)
    parser.add_argument("--policy", default="pad")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--enlarge", type=int, metavar="SIDE", help="longer side of the pictures, in pixels")
    instead.add_argument("--pictures", type=Path, nargs="+", metavar="JPEG", help="files in place of the pictures")
    parser.add_argument("--pack-tokens", type=int, default=4096)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, len(os.sched_getaffinity(0))])
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--workers-for", type=Path, metavar="RESULT", help="a result of this tool: measure nothing, write a table"
    )
    parser.add_argument(
        "--peak", type=float, default=989.0, metavar="TFLOPS", help="with it: of a GPU; default an H200's, 989"
    )
    parser.add_argument(
        "--utilisation", type=float, default=0.4, help="with it: the share that is reached; default 0.4"
    )
    parser.add_argument("--presets", type=Path, default=PRESETS, help="with it: another folder")
    parser.add_argument("--out", type=Path, help="default benchmarks/DATE-loader or DATE-workers")
    args = parser.parse_args(argv)
    command = shlex.join(["python", "tools/bench_loader.py", *argv])
    args.out = args.out or Path("benchmarks") / f"{date.today()}-{'workers' if args.workers_for else 'loader'}"
    try:
        if args.workers_for:
            workers_for(args.workers_for, args.peak, args.utilisation, args.presets, args.out, command)
        elif args.data is None or args.tokenizer is None:
            parser.error("give --data and --tokenizer, to measure, or --workers-for RESULT")
        else:
            bench(args, command)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def bench(args: argparse.Namespace, command: str) -> None:
    """Measure and write. Raises UserError."""
    if min(args.workers) < 1:
        raise UserError(f"--workers {min(args.workers)}: expected 1 or more, which the bare costs are measured with")
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    template = get_template(args.template, tokenizer)
    size = args.image_size
    transform = ImageTransform(size, size, args.patch, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28), args.policy)
    rows: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder, progress("rounds", len(args.workers) * args.rounds) as advance:
        data = args.data
        if args.pictures:
            files = cycle([path.read_bytes() for path in args.pictures])
            data = rewritten(data, Path(folder), lambda _: next(files))
        elif args.enlarge:
            data = rewritten(data, Path(folder), lambda picture: enlarged(picture, args.enlarge))
        held = held_samples(data, template)
        for workers in args.workers:
            config = DataConfig(train=str(data), pack_tokens=args.pack_tokens, workers=workers)
            rounds = []
            for _ in range(args.rounds):
                measured = {
                    "decode": bare_rate(workers, tokenizer, held, by_pillow, None, args.seconds),
                    "pixels": bare_rate(workers, tokenizer, held, by_pillow, transform, args.seconds),
                    "own": bare_rate(workers, tokenizer, held, by_ourselves, transform, args.seconds),
                    **loader_rate(config, template, transform, args.seconds),
                }
                for name in ("decode", "pixels", "own"):
                    measured[f"of_{name}"] = measured["samples_per_second"] / measured[name]
                rounds.append(measured)
                advance(1)
            rows.append({"workers": workers} | {key: median(one[key] for one in rounds) for key in rounds[0]})
    result = {
        **{key: getattr(args, key) for key in ("pack_tokens", "image_size", "enlarge", "rounds", "seconds")},
        "data": args.data.name,
        "pictures": [path.name for path in args.pictures or ()],
        "rows": rows,
        "provenance": provenance(command),
    }
    write(result, report(result), args.out)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
