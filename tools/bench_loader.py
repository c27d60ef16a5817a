"""Benchmark the loader against the bare cost of decoding pictures and tokenising text, measured in turns in the same run.

    python tools/bench_loader.py --data BLEND.yaml --tokenizer FOLDER [--workers 1 2]

For each number of workers as many processes do, over and over, the least of what a loader must do for samples drawn as the
recipe asks, held in memory: `decode`: open every picture as RGB with Pillow and tokenise the conversation's text once. `pixels`:
also bring every picture to the encoder's size. `own`: as `pixels`, but decode as this project does. Then the loader with as many
workers is emptied as fast as it fills, by a process that trains nothing. Writes result.json and report.md, by default into
benchmarks/DATE-loader.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from textwrap import fill
from typing import Any

import torch
from PIL import Image
from transformers import AutoTokenizer

from lit_eemllm.compat.torch import worker_processes
from lit_eemllm.config.keys import DataConfig
from lit_eemllm.console import console, progress, write_atomically
from lit_eemllm.data.module import ShardDataModule
from lit_eemllm.data.recipe import read_recipe
from lit_eemllm.data.samples import read_members, read_row
from lit_eemllm.data.shards import make, read_shard
from lit_eemllm.errors import SampleError, UserError
from lit_eemllm.inputs.chat import ChatTemplate, get_template
from lit_eemllm.inputs.images import ImageTransform, Transform, open_image, read_picture
from lit_eemllm.report import provenance

HELD = 512  # samples in memory for the bare costs
MAX_PIXELS = DataConfig.max_image_pixels
WARM_UP = 1.0  # seconds

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


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="recipe or folder of prepared shards")
    parser.add_argument("--tokenizer", required=True, help="folder or name of a tokenizer")
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
    parser.add_argument("--out", type=Path, default=Path("benchmarks") / f"{date.today()}-loader")
    args = parser.parse_args(argv)
    try:
        bench(args, shlex.join(["python", "tools/bench_loader.py", *argv]))
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
    args.out.mkdir(parents=True, exist_ok=True)
    write_atomically(args.out / "result.json", json.dumps(result, indent=2))
    write_atomically(args.out / "report.md", report(result))
    console.print(report(result))
    console.print(f"written: {args.out}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
