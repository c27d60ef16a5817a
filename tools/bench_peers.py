"""Benchmark this project beside transformers' LLaVA, which it shares every weight with, in one run: prefill, a second question about
the same picture, tokens a second, training steps of documents of mixed lengths, peak memory; over the number of visual tokens.

    python tools/bench_peers.py                                          # 7B on a GPU if there is one, else a small decoder
    python tools/bench_peers.py --shape smollm2-135m --layers 6 --visual 64 256 1024 --threads 1

`hf eager`, `hf sdpa`, `hf flash`: `LlavaForConditionalGeneration` with its attention implementations. The others: mechanisms of this
project. Before anything is timed the logits and the training loss of `llava` are compared with those of `hf sdpa`. Systems take turns,
round by round. Running out of memory is a result. Writes result.json, report.md and plot.png, by default into
benchmarks/DATE-peers-DEVICE, after every size.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import re
import shlex
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from lit_eemllm.console import console, progress, write_atomically
from lit_eemllm.formats.llava import Llava
from lit_eemllm.inputs.images import ImageTransform
from lit_eemllm.layout import PackedBatch, Run, SequenceLayout
from lit_eemllm.mechanisms import PRESETS, build_mechanism
from lit_eemllm.model import EEMLLM, EEMLLMConfig
from lit_eemllm.model.image_cache import ImageCache
from lit_eemllm.model.vision import TransformersVision
from lit_eemllm.report import provenance

SHAPES = {
    "7b": dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000),
    "smollm2-135m": dict(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152,
    ),
    "tiny": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, vocab_size=320),
}  # fmt: skip
HF = {"hf eager": "eager", "hf sdpa": "sdpa", "hf flash": "flash_attention_2"}
BASE = "hf sdpa"
PATCH, PREFIX = 4, 35
MEASURES = {
    "prefill": "Prefill of one prompt, s",
    "second": "A second question about the same picture, s",
    "decode": "One new token, s",
    "training": "Forward and backward of four documents with texts of T/2, T, 2T and 4T tokens, s",
}
Row = dict[str, Any]


# --- both models
class Pair:
    """transformers' LLaVA and this project's models on the same weights, for pictures of so many visual tokens.

    The encoder is one narrow layer: what is compared is the decoder.
    """

    def __init__(self, args: argparse.Namespace, visual: int) -> None:
        self.args, self.visual, side = args, visual, PATCH * math.isqrt(visual)
        shape = {**SHAPES[args.shape], **({"num_hidden_layers": args.layers} if args.layers else {})}
        self.text = LlamaConfig(**shape, max_position_embeddings=16384, tie_word_embeddings=False)
        self.image = shape["vocab_size"] - 1
        tower = CLIPVisionConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, image_size=side, patch_size=PATCH
        )  # fmt: skip
        config = LlavaConfig(
            vision_config=tower, text_config=self.text, image_token_index=self.image, vision_feature_layer=-1
        )
        torch.manual_seed(0)
        with _made_in(args):
            self.hf = LlavaForConditionalGeneration(config).eval()
        self.transform = ImageTransform(side, side, PATCH, (0.5,) * 3, (0.5,) * 3)
        self.ours: dict[str, EEMLLM] = {}
        self.pixels = torch.randn(4, 3, side, side, device=args.device, dtype=args.dtype)

    def model(self, system: str) -> Any:
        """Ready to be run as a system."""
        if system in HF:
            self.hf.set_attn_implementation(HF[system])
            return self.hf
        mechanism = build_mechanism(system, self.text.num_hidden_layers)
        kind = str(mechanism.modules)
        if kind not in self.ours:
            vision = TransformersVision(self.hf.model.vision_tower, self.transform, -1)
            settings = EEMLLMConfig(
                text_config=self.text, vision={"encoder": "transformers", "config": vision.to_config()},
                mechanism=mechanism.to_dict(), image_token_id=self.image,
            )  # fmt: skip
            with _made_in(self.args):
                made = EEMLLM(settings, vision=vision).eval()
            theirs = dict(self.hf.named_parameters())
            for name, parameter in made.named_parameters():
                prefix = next((own for own in Llava.names if name.startswith(own)), None)
                if prefix and (same := theirs.get(name.replace(prefix, Llava.names[prefix], 1))) is not None:
                    parameter.data = same.data
            self.ours[kind] = made
        model = self.ours[kind]
        model.set_mechanism(mechanism)
        model.set_attention(self.args.attention, self.args.dtype)
        return model

    # --- what is measured, of a model that is ready
    def prompt(self, seed: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(1, self.image, (1, self.args.text), generator=generator)
        picture = torch.full((1, self.visual), self.image)
        ids = torch.cat([ids[:, :PREFIX], picture, ids[:, PREFIX:]], 1).to(self.args.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": self.pixels[:1]}

    @torch.no_grad()
    def logits(self, model: Any, seed: int = 0) -> Tensor:
        found: Tensor = model(**self.prompt(seed), use_cache=True, logits_to_keep=1).logits
        return found

    def prefill(self, model: Any) -> float:
        return self.timed(lambda: self.logits(model))

    def second(self, model: Any) -> float:
        """Of another prompt; this project keeps what it may of a picture."""
        if isinstance(model, EEMLLM):
            model.image_cache = ImageCache(1 << 40)
            self.logits(model, seed=1)
        seconds = self.timed(lambda: self.logits(model))
        if isinstance(model, EEMLLM):
            model.image_cache = None
        return seconds

    def decode(self, model: Any) -> float:
        """From the first new token of an answer to its last, for each."""
        clock, new = Clock(), self.args.tokens + 1
        with torch.no_grad():
            model.generate(
                **self.prompt(0),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
                streamer=clock,
            )
        _, first, *rest = clock.times
        return (rest[-1] - first) / len(rest)

    def documents(self) -> list[int]:
        """Text tokens of each."""
        text = self.args.text
        return [max(PREFIX + 2, text // 2), text, 2 * text, 4 * text]

    def loss(self, model: Any) -> Tensor:
        """Mean over the text after the pictures: of a padded batch, and of a pack without padding."""
        generator = torch.Generator().manual_seed(0)
        texts = [torch.randint(1, self.image, (length,), generator=generator) for length in self.documents()]
        if not isinstance(model, EEMLLM):
            length = self.visual + max(map(len, texts))
            ids, labels = torch.zeros(4, length, dtype=torch.long), torch.full((4, length), -100)
            mask = torch.zeros_like(ids)
            for row, text in enumerate(texts):
                whole = torch.cat([text[:PREFIX], torch.full((self.visual,), self.image), text[PREFIX:]])
                ids[row, : len(whole)], mask[row, : len(whole)] = whole, 1
                labels[row, PREFIX + self.visual + 1 : len(whole)] = text[PREFIX + 1 :]
            given = (x.to(self.args.device) for x in (ids, mask, labels))
            found: Tensor = model(
                **dict(zip(("input_ids", "attention_mask", "labels"), given, strict=True)), pixel_values=self.pixels
            ).loss
            return found
        layout = SequenceLayout.of(
            [[Run(False, PREFIX), Run(True, self.visual), Run(False, len(t) - PREFIX)] for t in texts]
        )
        ids = torch.zeros(layout.num_tokens, dtype=torch.long).index_copy(0, layout.text_index, torch.cat(texts))
        starts = torch.tensor([0, *map(len, texts)]).cumsum(0).tolist()
        rows = torch.cat([torch.arange(s + PREFIX, s + len(t) - 1) for s, t in zip(starts, texts, strict=False)])
        targets = torch.cat(texts)[rows + 1]
        batch = PackedBatch(ids, rows, targets, self.pixels, layout, ["a", "b", "c", "d"]).to(self.args.device)
        return model.packed_loss(batch) / len(rows)

    def training(self, model: Any) -> float:
        model.train().requires_grad_(True)
        try:
            return self.timed(lambda: self.loss(model).backward())
        finally:
            model.zero_grad(set_to_none=True)
            model.eval()

    def timed(self, call: Callable[[], object]) -> float:
        """Seconds until it has been done, also on the device."""
        wait = torch.cuda.synchronize if self.args.device.type == "cuda" else lambda: None
        wait()
        begin = time.perf_counter()
        call()
        wait()
        return time.perf_counter() - begin

    def compare(self) -> dict[str, float]:
        """Largest relative differences between `llava` and transformers; what is timed must be the same computation."""
        bound = 1e-3 if self.args.dtype == torch.float32 else 5e-2
        theirs, ours = (self.logits(self.model(name))[0, -1, : self.image].float() for name in (BASE, "llava"))
        with torch.no_grad():
            losses = [self.loss(self.model(name)).item() for name in (BASE, "llava")]
        found = {
            "logits": ((ours - theirs).abs().max() / theirs.abs().max()).item(),
            "loss": abs(losses[1] - losses[0]) / losses[0],
        }
        if not max(found.values()) <= bound:
            sys.exit(f"llava is not transformers' LLaVA: {found}, at most {bound} expected")
        return found


class Clock:
    """A streamer of `generate`: when the prompt and each new token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        value.tolist()  # it is there
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class _made_in:
    """Modules are made in the type and place where they stay: 7B in float32 on the host would take minutes."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device, self.dtype = args.device, args.dtype

    def __enter__(self) -> None:
        self.before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        self.place = torch.device(self.device)
        self.place.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.place.__exit__(*error)
        torch.set_default_dtype(self.before)


# --- measuring
def measure(pair: Pair, args: argparse.Namespace) -> list[Row]:
    """Every system, in turns: the first round warms up."""
    rows: dict[tuple[str, str], Row] = {}
    with progress(f"V = {pair.visual:,}", (args.rounds + 1) * len(args.measures) * len(args.systems)) as advance:
        for number in range(args.rounds + 1):
            for what in args.measures:
                for system in args.systems:
                    row = rows.setdefault(
                        (what, system), {"measure": what, "system": system, "visual": pair.visual, "seconds": []}
                    )
                    advance(1)
                    if "failed" in row:
                        continue
                    if args.device.type == "cuda":
                        torch.cuda.reset_peak_memory_stats()
                    try:
                        seconds = getattr(pair, what)(pair.model(system))
                    except (torch.OutOfMemoryError, ImportError) as error:
                        row["failed"] = (
                            str(error).splitlines()[0] if isinstance(error, ImportError) else "out of memory"
                        )
                        gc.collect()
                        continue
                    if number:
                        row["seconds"].append(seconds)
                    if args.device.type == "cuda":
                        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return list(rows.values())


def exponent(points: list[tuple[int, float]]) -> float | None:
    """Of cost over V, fitted by least squares to the logarithms; None for fewer than three sizes."""
    if len(points) < 3:
        return None
    x, y = torch.tensor(points, dtype=torch.float64).log().T
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x * x).sum())


# --- what is written
def report(result: Row) -> str:
    """A table for each measure: medians, and how many times as fast as transformers' sdpa."""
    systems = list(dict.fromkeys(row["system"] for row in result["rows"]))
    lines = [
        "# Beside transformers' LLaVA",
        "",
        f"{result['provenance']}.",
        "",
        "![cost over visual tokens](plot.png)",
        "",
    ]
    lines += [
        f"A decoder of the shape {result['shape']}, {result['layers']} layers, {result['dtype']}; prompts of {result['text']} text tokens and one "
        f"picture; random weights, the same for all; {result['rounds']} rounds in turns, medians. In brackets: how many times as fast as "
        f"{BASE} in this run. Exponent: of time over V, fitted. Largest relative difference of llava's logits and loss from {BASE}: "
        + ", ".join(f"{name} {value:.0e}" for name, value in result["differences"].items()) + ".",
        "",
    ]  # fmt: skip
    for what, title in MEASURES.items():
        rows = [row for row in result["rows"] if row["measure"] == what]
        if not rows:
            continue
        sizes = sorted({row["visual"] for row in rows})
        lines += [f"## {title}", "", f"| V | {' | '.join(systems)} |", "|---:|" + "---:|" * len(systems)]
        known = {(row["visual"], row["system"]): row for row in rows}
        for visual in sizes:
            base = known[visual, BASE]["seconds"] if (visual, BASE) in known else []
            cells = []
            for system in systems:
                row = known[visual, system]
                if not row["seconds"]:
                    cells.append(row.get("failed", ""))
                    continue
                ratio = f" ({median(base) / median(row['seconds']):.2f})" if base else ""
                memory = f" {row['peak_gib']:.1f} GiB" if "peak_gib" in row else ""
                cells.append(f"{median(row['seconds']):.4g}{ratio}{memory}")
            lines.append(f"| {visual:,} | {' | '.join(cells)} |")
        fits = [
            exponent([(v, median(known[v, s]["seconds"])) for v in sizes if known[v, s]["seconds"]]) for s in systems
        ]
        lines += ["| exponent | " + " | ".join("" if fit is None else f"{fit:.2f}" for fit in fits) + " |", ""]
    return "\n".join(lines)


def draw(result: Row) -> Figure:
    """Median time over V, a panel for each measure; bars from the fastest to the slowest round."""
    present = [what for what in MEASURES if any(row["measure"] == what and row["seconds"] for row in result["rows"])]
    figure = Figure(figsize=(1.5 + 4 * len(present), 4.2), layout="constrained")
    axes = figure.subplots(1, len(present), squeeze=False)[0]
    systems = list(dict.fromkeys(row["system"] for row in result["rows"]))
    for axis, what in zip(axes, present, strict=True):
        for number, system in enumerate(systems):
            rows = [r for r in result["rows"] if (r["measure"], r["system"]) == (what, system) and r["seconds"]]
            rows.sort(key=lambda row: row["visual"])
            times = [median(row["seconds"]) for row in rows]
            low = [t - min(row["seconds"]) for t, row in zip(times, rows, strict=True)]
            high = [max(row["seconds"]) - t for t, row in zip(times, rows, strict=True)]
            style = "--" if system in HF else "-"
            axis.errorbar(
                [r["visual"] for r in rows],
                times,
                [low, high],
                ls=style,
                marker="o",
                ms=4,
                c=f"C{number}",
                label=system,
            )
        sizes = sorted({row["visual"] for row in result["rows"]})
        axis.set(xscale="log", yscale="log", title=what, xlabel="visual tokens V")
        axis.set_xticks(sizes, [f"{v:,}" for v in sizes])
        axis.set_xticks([], minor=True)
        axis.grid(color="0.9")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("seconds, median")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    return figure


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--shape", choices=SHAPES, default="7b" if cuda else "smollm2-135m")
    parser.add_argument("--layers", type=int, help="fewer than the shape has; on a CPU 6 by default")
    parser.add_argument(
        "--visual", nargs="+", type=int, default=[64, 576, 2304, 4900] if cuda else [64, 256, 1024], metavar="V"
    )
    parser.add_argument("--text", type=int, default=256 if cuda else 64, metavar="T")
    parser.add_argument("--tokens", type=int, default=32 if cuda else 8, help="of an answer")
    parser.add_argument("--systems", nargs="+", default=None, metavar="NAME", help=f"of {', '.join([*HF, *PRESETS])}")
    parser.add_argument("--measures", nargs="+", choices=MEASURES, default=list(MEASURES))
    parser.add_argument("--attention", default="auto", help="this project's backend")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="of a CPU")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    args.device = torch.device("cuda" if cuda else "cpu")
    args.dtype = torch.bfloat16 if cuda else torch.float32
    args.layers = args.layers or (None if cuda or args.shape == "tiny" else 6)
    args.systems = args.systems or [*(name for name in HF if cuda or name != "hf flash"), *PRESETS]
    if unknown := [name for name in args.systems if name not in (*HF, *PRESETS)]:
        parser.error(f"--systems {' '.join(unknown)}: expected of {', '.join([*HF, *PRESETS])}")
    if wrong := [v for v in args.visual if v < 4 or math.isqrt(v) ** 2 != v]:
        parser.error(f"--visual {' '.join(map(str, wrong))}: expected squares, as pictures are square")
    if args.text < PREFIX + 2 or args.rounds < 1 or args.tokens < 1:
        parser.error(f"--text is {PREFIX + 2} or more, --rounds and --tokens 1 or more")
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    name = torch.cuda.get_device_name() if args.device.type == "cuda" else "cpu"
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    out = args.out or Path("benchmarks") / f"{date.today()}-peers-{slug}"
    out.mkdir(parents=True, exist_ok=True)
    result: Row = {
        "shape": args.shape, "layers": args.layers or SHAPES[args.shape]["num_hidden_layers"], "text": args.text,
        "dtype": str(args.dtype).removeprefix("torch."), "rounds": args.rounds, "threads": torch.get_num_threads(),
        "provenance": provenance(shlex.join(["python", "tools/bench_peers.py", *argv])), "differences": {}, "rows": [],
    }  # fmt: skip
    for visual in args.visual:
        pair = Pair(args, visual)
        found = pair.compare()
        result["differences"] = {key: max(value, result["differences"].get(key, 0)) for key, value in found.items()}
        result["rows"] += measure(pair, args)
        del pair
        gc.collect()
        write_atomically(out / "result.json", json.dumps(result, indent=1) + "\n")  # kept if it is interrupted
        write_atomically(out / "report.md", report(result))
        if any(row["seconds"] for row in result["rows"]):
            draw(result).savefig(out / "plot.png", dpi=110)
    console.print(report(result), markup=False)
    console.print(f"written: {out}")


if __name__ == "__main__":
    main(sys.argv[1:])
